"""Rows to tokens: what is trained on, what is cut, what shares a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loops.finetune.examples import HIDDEN, IGNORED, REFUSED, TOO_LONG, Encoder, Example, collate, read_rows, windows
from loops.finetune.faults import DatasetUnreadable
from loops.finetune.plan import TEMPLATES, NothingToTrain

MARKED = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def make_tokenizer(words: bool) -> Any:
    """Byte-level, merges learned from a few sentences, within words or over them."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["the sum of one and two is three", "|>the answer is four", "one: four"] * 4,
                             trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>"],
                                                 initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")  # noqa: S106 - no password


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Its tokens do not cross the boundaries of words."""
    return make_tokenizer(words=True)


def conversation(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[number % 2], "content": text}
                         for number, text in enumerate(texts)]}


def encode(tokenizer: Any, row: dict[str, Any], length: int = 500, template: str = MARKED) -> Any:
    tokenizer.chat_template = template
    return Encoder(tokenizer, length).encode([row])


def answers(tokenizer: Any, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def test_only_the_answer_and_its_end_are_trained_on(tokenizer: Any) -> None:
    example, = encode(tokenizer, conversation("one and two?", "three")).examples
    assert answers(tokenizer, example) == "three</s>"
    assert tokenizer.decode(example.ids) == "<s><|user|>one and two?</s>\n<|assistant|>three</s>\n"


def test_every_answer_of_a_conversation_is_trained_on(tokenizer: Any) -> None:
    example, = encode(tokenizer, conversation("one?", "two", "and?", "three")).examples
    assert answers(tokenizer, example) == "two</s>three</s>"


def test_an_answer_that_the_question_repeats_is_found_in_its_place(tokenizer: Any) -> None:
    example, = encode(tokenizer, conversation("say three", "three")).examples
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    assert tokenizer.decode(example.ids[:first]).endswith("<|assistant|>")


def test_a_token_over_the_boundary_is_trained_on() -> None:
    tokenizer = make_tokenizer(words=False)
    template = MARKED.replace("'<|assistant|>'", "'|>'").replace("'<|' + m['role'] + '|>'", "'|>'")
    assert len(tokenizer("|>the answer is four")["input_ids"]) == 1  # the prompt's end and the answer are one token
    found = encode(tokenizer, conversation("one", "the answer is four!"), template=template)
    example, = found.examples
    assert answers(tokenizer, example) == "|>the answer is four!</s>"


def test_a_template_that_rewrites_earlier_turns_is_followed(tokenizer: Any) -> None:
    """As templates do that leave the thoughts of earlier answers out."""
    template = ("{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else m['content']|upper) + "
                "eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: think {% endif %}")
    found = encode(tokenizer, conversation("one?", "two"), template=template)
    assert answers(tokenizer, found.examples[0]) == " two</s>"  # one token with the blank before it
    hidden = encode(tokenizer, conversation("one?", "two", "and?", "three"), template=template)
    assert (hidden.examples, dict(hidden.left_out)) == ([], {HIDDEN: 1})


def test_rows_that_a_template_refuses_are_counted(tokenizer: Any) -> None:
    found = encode(tokenizer, conversation("one", "two"), template="{{ raise_exception('no system role') }}")
    assert (found.examples, dict(found.left_out)) == ([], {REFUSED: 1})


def test_a_template_runs_in_a_sandbox(tokenizer: Any) -> None:
    found = encode(tokenizer, conversation("one", "two"), template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert found.examples == []


def test_a_long_row_loses_the_oldest_of_its_prompt(tokenizer: Any) -> None:
    row = conversation("x y z " * 50, "three")
    found = encode(tokenizer, row, 40)
    example, = found.examples
    assert (len(example.ids), found.cut) == (40, 1)
    assert (example.ids[0], answers(tokenizer, example)) == (tokenizer.bos_token_id, "three</s>")
    assert tokenizer.decode(example.ids).endswith("<|assistant|>three</s>\n")


def test_a_row_whose_answer_is_too_long_is_left_out(tokenizer: Any) -> None:
    found = encode(tokenizer, conversation("one", "x y z " * 50), 40)
    assert (found.examples, dict(found.left_out), found.cut) == ([], {TOO_LONG: 1}, 0)


def test_a_text_is_trained_on_whole_and_cut_at_its_end(tokenizer: Any) -> None:
    short, = encode(tokenizer, {"text": "one and two"}).examples
    assert (tokenizer.decode(short.ids), short.labels) == ("one and two</s>", (IGNORED, *short.ids[1:]))
    long = encode(tokenizer, {"text": "x y z " * 50}, 20)
    assert (len(long.examples[0].ids), long.cut) == (20, 1)


@pytest.mark.parametrize("name", ["plain"])
def test_the_templates_that_come_along_mark_the_answer(tokenizer: Any, name: str) -> None:
    example, = encode(tokenizer, conversation("one?", "two"), template=TEMPLATES[name]).examples
    assert answers(tokenizer, example) == "two</s>"


def example(size: int) -> Example:
    return Example(tuple(range(size)), (IGNORED, *range(1, size)))


def test_windows_hold_every_example_once_and_are_not_too_long() -> None:
    examples = [example(2 + number * 7 % 19) for number in range(60)]
    packed = windows(examples, 30, packing=True)
    assert sorted(len(one.ids) for window in packed for one in window) == sorted(len(one.ids) for one in examples)
    assert max(sum(len(one.ids) for one in window) for window in packed) <= 30
    assert len(packed) <= 1.1 * sum(len(one.ids) for one in examples) / 30 + 1
    with pytest.raises(NothingToTrain):
        windows([], 30, packing=True)


def test_positions_start_again_with_each_example_and_with_the_padding() -> None:
    columns = collate([[example(3), example(2)], [example(3)]], 9, packing=True)
    assert columns == {"input_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 9, 9]],
                       "labels": [[IGNORED, 1, 2, IGNORED, 1], [IGNORED, 1, 2, IGNORED, IGNORED]],
                       "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]}


@pytest.mark.parametrize(("content", "words"), [
    (None, "has no train.json"), ("{", "no JSON"), ("{}", "no list"), ('[{"text": "a"}, {"question": 1}]', "row 2"),
    ('[{"messages": [{"role": "user"}]}]', "row 1")])
def test_what_is_no_split_is_refused_with_its_place(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "train.json").write_text(content)
    with pytest.raises(DatasetUnreadable, match=words):
        read_rows(tmp_path / "train.json")
