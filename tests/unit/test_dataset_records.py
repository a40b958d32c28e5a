"""Rows as conversations: formats recognised, named and mapped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calibration_data.text import Turn
from loops.finetune.faults import ColumnsWrong, DatasetRefused, TooFewRows
from loops.finetune.records import Row, convert, flatten, parse_map, recognise
from loops.finetune.sources import Source

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}]


def source(*rows: dict[str, Any], kind: str = "jsonl") -> Source:
    return Source("a.jsonl", kind, rows)


def read(*rows: dict[str, Any], form: str | None = None, **mapped: str) -> list[Row]:
    made = source(*rows)
    return convert(made, recognise(made, form, mapped))


@pytest.mark.parametrize(("row", "form", "turns", "context"), [
    ({"messages": CHAT}, "chat", (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")), ""),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "chat",
     (("user", "Hi"), ("assistant", "Hello")), ""),
    ({"instruction": "Sum up.", "input": "Long.", "output": "Short."}, "alpaca",
     (("user", "Sum up."), ("assistant", "Short.")), "Long."),
    ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "alpaca",
     (("user", "Say hi."), ("assistant", "Hi.")), ""),
    ({"question": "Where?", "context": "Map.", "answer": "There."}, "qa",
     (("user", "Where?"), ("assistant", "There.")), "Map."),
    ({"QUESTION": "Where?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "There.", "final_decision": "yes"}, "qa",
     (("user", "Where?"), ("assistant", "There.")), "One.\nTwo."),
    ({"question": "Q", "context": {"contexts": ["C"], "labels": ["X"]},
      "answers": {"text": ["A", "B"], "answer_start": [1]}}, "qa", (("user", "Q"), ("assistant", "A")), "C"),
    ({"system": "Be brief.", "prompt": "Q", "completion": "A"}, "qa",
     (("system", "Be brief."), ("user", "Q"), ("assistant", "A")), ""),
    ({"text": "Once upon a time."}, "text", (("text", "Once upon a time."),), ""),
])
def test_formats_are_recognised_by_their_columns(
        row: dict[str, Any], form: str, turns: tuple[tuple[str, str], ...], context: str) -> None:
    made = source(row)
    assert recognise(made).format == form
    assert convert(made, recognise(made)) == [
        Row("a.jsonl:1", tuple(Turn(*turn) for turn in turns), context, row.get("final_decision", ""))]


def test_columns_can_be_mapped_and_a_format_named() -> None:
    row = {"asked": "Q", "said": "A", "text": "T", "kind": "k"}
    found, = read(row, question="asked", answer="said", label="kind")
    assert (found.turns, found.label) == ((Turn("user", "Q"), Turn("assistant", "A")), "k")
    sorted_out, = read({"text": "Q", "label": "A"}, question="text", answer="label")
    assert (sorted_out.answer, sorted_out.label) == ("A", "")
    assert read({"question": "Q", "answer": "A", "text": "T"}, form="text")[0].said == "T"
    assert parse_map(["question=a=b"]) == {"question": "a=b"}


def test_the_context_follows_the_first_question_when_a_row_is_written() -> None:
    row, = read({"question": "Where?", "context": "A map.", "answer": "There.", "label": "geo"})
    assert row.as_json("travel") == {
        "id": "a.jsonl:1", "domain": "travel", "label": "geo",
        "messages": [{"role": "user", "content": "Where?\n\nA map."}, {"role": "assistant", "content": "There."}]}
    assert read({"text": "T"})[0].as_json("d") == {"id": "a.jsonl:1", "domain": "d", "text": "T"}


def test_what_was_written_is_read_again() -> None:
    rows = read({"messages": CHAT, "label": "x"}, {"messages": CHAT[1:]})
    written = Source("train.json", "json", tuple(row.as_json("d") for row in rows))
    assert convert(written, recognise(written)) == rows


@pytest.mark.parametrize(("rows", "options", "kind", "told"), [
    ([{"a": 1, "b": 2}], {}, ColumnsWrong, "a.jsonl has the columns 'a', 'b'"),
    ([{"question": "x"}], {"form": "qa"}, ColumnsWrong, "question and answer is needed"),
    ([{"question": "x"}], {"answer": "reply"}, ColumnsWrong, "has no column 'reply' for the answer"),
    ([{"text": "x"}], {"form": "poem"}, DatasetRefused, "'poem' is no format"),
    ([], {}, TooFewRows, "a.jsonl has no rows"),
    ([{"messages": CHAT}, {"messages": [{"role": "boss", "content": "x"}]}], {}, ColumnsWrong,
     "row 2 has the role 'boss'"),
    ([{"messages": ["x"]}], {}, ColumnsWrong, "row 1: a conversation is a list of messages"),
])
def test_wrong_columns_are_one_sentence(rows: list[dict[str, Any]], options: dict[str, str], kind: type[Exception],
                                        told: str) -> None:
    with pytest.raises(kind, match=told):
        read(*rows, **options)


@pytest.mark.parametrize("given", ["question", "=x", "sauce=x", "answer="])
def test_a_wrong_mapping_is_refused(given: str) -> None:
    with pytest.raises(DatasetRefused, match="PART=COLUMN"):
        parse_map([given])


def test_values_of_any_kind_become_text_that_can_be_written() -> None:
    values = (None, float("nan"), 3, 2.5, True, ["a", "", "b"], {"text": "x"}, {"other": "x"}, b"x")
    assert list(map(flatten, values)) == ["", "", "3", "2.5", "yes", "a\nb", "x", "", "x"]
    assert json.dumps(flatten("a\ud800b"), ensure_ascii=False).encode()
