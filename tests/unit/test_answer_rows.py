"""Rows to evaluate with are read as `dataset prepare` writes them, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loops.answers.rows import Example, RowsRefused, parts, read_rows

ASKED = {"role": "user", "content": "Why?"}
ROW = {"id": "a:1", "domain": "legal", "label": "why", "messages": [ASKED, {"role": "assistant", "content": "So."}]}


def written(folder: Path, rows: Any, name: str = "test.json") -> Path:
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return folder


def test_a_row_is_its_question_and_the_answer_that_is_wanted(tmp_path: Path) -> None:
    row, text = read_rows(written(tmp_path, [ROW, {"text": "All quiet.", "domain": "news"}]))
    assert row == Example("a:1", "legal", "why", (ASKED,), "So.")
    assert (text.id, text.domain, text.prompt, text.reference) == ("2", "news", (), "All quiet.")
    assert row.answers
    assert not text.answers
    assert Example.from_json(json.loads(json.dumps(row.as_json()))) == row


def test_a_file_will_do_and_so_will_another_split_and_fewer_rows(tmp_path: Path) -> None:
    many = [{**ROW, "id": str(number)} for number in range(5)]
    written(tmp_path, many, "validation.json")
    assert len(read_rows(tmp_path / "validation.json")) == 5
    assert [row.id for row in read_rows(tmp_path, "validation", 2)] == ["0", "1"]
    assert [len(part) for part in parts(read_rows(tmp_path, "validation"), 2)] == [2, 2, 1]


def test_an_empty_answer_may_be_wanted(tmp_path: Path) -> None:
    row, = read_rows(written(tmp_path, [{**ROW, "messages": [ASKED, {"role": "assistant", "content": ""}]}]))
    assert row.reference == ""


@pytest.mark.parametrize(("rows", "told"), [
    ([], "no rows"), ({}, "no rows"), ({"a": 1}, "no list"), ("{", "not JSON"), ([1], "row 1 is not a JSON object"),
    ([ROW, ROW], "repeats the id 'a:1'"), ([{"id": "x"}], "'text'"), ([{"text": " "}], "'text'"),
    ([{"messages": "hello"}], "no list of messages"), ([{"messages": [ASKED]}], "no answer"),
    ([{"messages": [{"role": "assistant", "content": "Hi"}]}], "no answer"),
    ([{"messages": [ASKED, {"role": "robot", "content": "x"}]}], "the role 'robot'"),
    ([{"messages": [ASKED, {"role": "assistant", "content": None}]}], "'content'"),
    ([{"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]}], "half a character")])
def test_what_is_no_row_is_refused_with_its_place(tmp_path: Path, rows: Any, told: str) -> None:
    with pytest.raises(RowsRefused, match=told) as refused:
        read_rows(written(tmp_path, rows))
    assert "test.json" in str(refused.value)


def test_a_missing_split_names_those_there_are(tmp_path: Path) -> None:
    written(tmp_path, [ROW], "train.json")
    with pytest.raises(RowsRefused, match="splits train: name one with --split"):
        read_rows(tmp_path)
    with pytest.raises(RowsRefused, match="no dataset that"):
        read_rows(tmp_path.parent)
    with pytest.raises(RowsRefused, match="check the spelling"):
        read_rows(tmp_path / "nowhere")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_bytes(b"GGUF\xff\xfe\x00")
    with pytest.raises(RowsRefused, match="not UTF-8"):
        read_rows(tmp_path)
