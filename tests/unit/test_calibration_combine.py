"""Several texts made one, and samples as a model reads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest

from calibration_data.checks import count_words
from calibration_data.combine import Source, combine
from calibration_data.render import Message, render
from calibration_data.text import TEXT, CalibrationRefused, Header, Sample, Turn
from loops.engine.chat import ChatTemplateBroken
from loops.engine.chat import render as through_jinja

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
STRICT = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
FORGETFUL = "{% for m in messages if m.role != 'tool' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
ENCODING = "{{ messages | tojson }}"


def text(name: str, count: int, words: int) -> tuple[Sample, ...]:
    return tuple(Sample(f"{name}-{number}", "", (Turn("user", " ".join([f"{name}{number}"] * words)),), Header(name))
                 for number in range(count))


def origins(samples: Sequence[Sample]) -> str:
    return "".join(sample.header.domain for sample in samples)


def test_each_text_gives_the_same_number_of_words_whatever_the_length_of_its_samples() -> None:
    made = combine([Source("a", text("a", 100, 10)), Source("b", text("b", 20, 40))])
    assert [one.words for one in made.taken] == [810, 800]  # to within one sample
    assert [(one.samples, one.of_samples, one.of_words) for one in made.taken] == [(81, 100, 1000), (20, 20, 800)]


def test_every_beginning_is_balanced_to_within_one_sample_of_each() -> None:
    sources = [Source("a", text("a", 90, 7)), Source("b", text("b", 40, 19), 2.0), Source("c", text("c", 70, 11), 0.5)]
    made = combine(sources)
    given: Counter[str] = Counter()
    for sample in made.samples:
        given[sample.header.domain] += count_words([sample])
        shares = [given[source.name] / source.weight for source in sources]
        assert max(shares) - min(shares) <= max(7 / 1, 19 / 2, 11 / 0.5)


def test_the_order_is_fixed_and_keeps_that_of_each_text() -> None:
    sources = [Source("a", text("a", 3, 10)), Source("b", text("b", 3, 10), 2)]
    made = combine(sources)
    assert origins(made.samples) == "abbab"
    assert made == combine(sources)
    assert [sample.id for sample in made.samples if sample.header.domain == "b"] == ["b-0", "b-1", "b-2"]


def test_a_sample_in_two_texts_is_taken_once() -> None:
    shared, own = text("a", 4, 10), text("b", 2, 10)
    made = combine([Source("one", shared), Source("two", (*own, *shared))])
    assert len(made.samples) == len({sample.turns for sample in made.samples}) == 6
    assert {*own, *shared} == {*made.samples}


def test_it_ends_at_the_words_asked_for() -> None:
    made = combine([Source("a", text("a", 50, 10)), Source("b", text("b", 50, 10))], max_words=95)
    assert count_words(made.samples) == 100


def test_a_text_alone_is_taken_whole() -> None:
    alone = text("a", 5, 3)
    assert combine([Source("a", alone)]).samples == alone


def test_samples_without_words_do_not_keep_the_others_waiting() -> None:
    marks = tuple(Sample(f"m{number}", "", (Turn("user", "!" * (number + 1)),), Header("m")) for number in range(50))
    made = combine([Source("m", marks), Source("a", text("a", 5, 1))])
    assert origins(made.samples) == "ma" * 5 + "m"


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(CalibrationRefused):
        combine([Source("a", text("a", 1, 1), weight)])


def test_nothing_to_combine_is_refused() -> None:
    with pytest.raises(CalibrationRefused):
        combine([])


CONVERSATION = Sample("a", "", (
    Turn("system", "Be brief."), Turn("user", "Rain?"), Turn("assistant", "call()"), Turn("tool", '{"rain": true}'),
    Turn("tool", '{"wind": 3}'), Turn("assistant", "Yes.")), Header("test"))
PASSAGE = Sample("b", "", (Turn(TEXT, "User: of a ferry.\n\nTwo paragraphs."),), Header("test"))


class Template:
    """A chat template as the engine renders it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, messages: Sequence[Message]) -> str:
        return through_jinja(self.source, messages)


def test_without_a_template_the_roles_are_named_and_passages_stay() -> None:
    assert render([CONVERSATION, PASSAGE]) == [
        'System: Be brief.\nUser: Rain?\nAssistant: call()\nTool: {"rain": true}\nTool: {"wind": 3}\nAssistant: Yes.',
        "User: of a ferry.\n\nTwo paragraphs."]


def test_a_template_gets_every_turn_and_no_passage() -> None:
    told, passage = render([CONVERSATION, PASSAGE], Template(CHATML))
    assert told.count("<|im_start|>") == 6
    assert "<|im_start|>tool\n{\"rain\": true}<|im_end|>" in told
    assert passage == PASSAGE.text


def test_a_template_without_tools_and_system_is_told_them_as_the_user() -> None:
    assert render([CONVERSATION], Template(STRICT)) == [
        '[user] Be brief.\n\nRain?\n[assistant] call()\n[user] {"rain": true}\n\n{"wind": 3}\n[assistant] Yes.\n']


def test_no_turn_is_lost_in_a_template_that_leaves_out_roles_it_does_not_know() -> None:
    (told,) = render([CONVERSATION], Template(FORGETFUL))
    assert '[system] Be brief.\n[user] Rain?' in told
    assert '[user] {"rain": true}\n\n{"wind": 3}' in told


def test_a_template_that_encodes_what_is_said_is_believed() -> None:
    (told,) = render([CONVERSATION], Template(ENCODING))
    assert '"role": "tool"' in told


def test_a_template_that_refuses_everything_is_an_error() -> None:
    with pytest.raises(ChatTemplateBroken):
        render([CONVERSATION], Template("{{ raise_exception('no') }}"))


def test_an_error_in_a_template_that_is_none_of_ours_is_not_hidden() -> None:
    def broken(_messages: Sequence[Message]) -> str:
        raise KeyError("x")

    with pytest.raises(KeyError):
        render([CONVERSATION], broken)
