"""Promise 28: a chat template is a stranger's code; it formats a conversation and can do nothing else."""

from __future__ import annotations

import random
import resource
import signal
from pathlib import Path

import pytest

from loops.engine import chat
from loops.engine.chat import PINNED_DATE, ChatTemplateBroken, render
from loops.engine.gguf_check import read_header
from loops.starter import corpus

#: the alarm may go off in what Hypothesis does at each garbage collection, where the interpreter reports it and goes
#: on; it goes off again a second later, which is what the tests see
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. .function gc_cumulative_time")

USER = [{"role": "user", "content": "I feel sad."}]
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
          " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
#: the parts of Llama 3's template that have broken renderers: loop variables, filters, dates, white space control
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception("Unknown role: " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def starter_template(starter: Path) -> str:
    return str(read_header(starter).metadata["tokenizer.chat_template"])


@pytest.mark.parametrize("seed", range(5))
def test_the_starter_is_asked_in_the_format_it_was_trained_on(starter: Path, seed: int) -> None:
    turns = corpus.dialogue(random.Random(seed)).turns
    asked = turns[:-1] if len(turns) % 2 == 0 else turns
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(asked)]
    text = render(starter_template(starter), messages, bos="<s>", eos="</s>")
    assert text == "<s>" + corpus.render(asked) + "<|assistant|>\n"


def test_a_chatml_template_renders() -> None:
    assert render(CHATML, USER) == "<|im_start|>user\nI feel sad.<|im_end|>\n<|im_start|>assistant\n"


def test_a_llama_3_template_renders() -> None:
    assert render(LLAMA3, USER, bos="<|begin_of_text|>") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nI feel sad.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_the_date_in_a_prompt_is_the_same_every_day() -> None:
    assert render("{{ strftime_now('%Y') }} {{ date_string }}", USER) == f"{PINNED_DATE} {PINNED_DATE}"


def test_text_is_not_escaped_as_if_it_were_html() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "<b> & 'x'"}]) == "<b> & 'x'"


def test_json_keeps_what_is_not_ascii() -> None:
    messages = [{"role": "user", "content": "ä<"}]
    assert render("{{ messages | tojson }}", messages) == '[{"role": "user", "content": "ä<"}]'


def test_loop_controls_work() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", USER) == "01"


def test_what_a_message_says_is_never_run() -> None:
    text = "{{ 7 * 7 }}{% raw %}{{ cycler }}"
    assert render("{{ messages[0]['content'] }}", [{"role": "user", "content": text}]) == text


HOSTILE = {
    "every class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.popen('touch PLACE').read() }}",
    "globals of our function": "{{ raise_exception.__globals__['__builtins__']['open']('PLACE', 'w') }}",
    "builtins by import": "{{ joiner.__init__.__globals__['__builtins__'].__import__('os').mkdir('PLACE') }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': cycler}) }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "long range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "changed messages": "{{ messages.append(1) }}",
    "changed role": "{{ messages[0].update({'role': 'x'}) }}",
    "unknown filter": "{{ messages | launch }}",
    "unknown test": "{{ messages is launched }}",
    "unknown function": "{{ open('/etc/passwd') }}",
    "refused by the author": "{{ raise_exception('only with tools') }}",
    "not closed": "{% for message in messages %}",
    "no such tag": "{% python %}import os{% endpython %}",
    "no such message": "{{ messages[7].content }}",
    "text and number": "{{ 'a' + 1 }}",
    "by zero": "{{ 1 // 0 }}",
    "no such codec": "{{ 'x'.encode('nope') }}",
    "nested too deep to compile": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "brackets without end": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_refused_and_runs_nothing(template: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(ChatTemplateBroken, match=r"chat template does not work: ."):
        render(template.replace("PLACE", str(place)), USER, bos="<s>")
    assert not place.exists()


@pytest.mark.parametrize("template", [
    "{{ ''|attr('__class__')|attr('__mro__') }}", "{{ strftime_now.__code__ }}", "{{ ''['__class__'] }}",
    "{{ [messages]|map(attribute='__class__')|list|first }}"])
def test_what_the_sandbox_hides_reads_as_nothing(template: str) -> None:
    assert render(template, USER) == ""


def test_the_authors_reason_is_told() -> None:
    with pytest.raises(ChatTemplateBroken, match="only with tools"):
        render(HOSTILE["refused by the author"], USER)


def test_one_template_leaves_nothing_to_the_next() -> None:
    render("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{% set kept = 3 %}", USER)
    assert render("{{ kept is defined }} {{ ns is defined }}", USER) == "False False"


@pytest.mark.parametrize("template", [
    "{{ 'a' * 10000000000 }}", "{{ '%09999999999d' % 1 }}", "{{ 'a'.ljust(9999999999) }}", "{{ 10 ** 99999999 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"])
def test_a_template_that_asks_for_too_much_is_stopped_in_time(template: str) -> None:
    with pytest.raises(ChatTemplateBroken):
        render(template, [{"role": "user", "content": "hi"}])
    assert render("{{ messages[0]['content'] }}", [{"role": "user", "content": "still here"}]) == "still here"


@pytest.mark.parametrize("after_s", [2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1e-3, 1e-2])
def test_wherever_the_time_runs_out_the_template_is_stopped_and_the_bounds_are_lifted(
        after_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "{% for i in range(99999) %}{% for j in range(3000) %}{% endfor %}{% endfor %}"
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(chat, "TIME_S", after_s)
    for _ in range(10):
        with pytest.raises(ChatTemplateBroken) as told:
            render(long, USER)
        assert isinstance(told.value.__cause__, TimeoutError)
        assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
