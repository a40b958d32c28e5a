"""Data as strangers bring them: other separators, columns, roles and writings, and much of the same."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from calibration_data.checks import guess_language
from calibration_data.text import Turn
from loops.finetune import near, personal
from loops.finetune.cleaning import Cleaning, clean
from loops.finetune.faults import ColumnsWrong, DatasetUnreadable, EncodingWrong, ParquetBroken
from loops.finetune.records import Row, convert, recognise
from loops.finetune.sources import read_path
from loops.finetune.splits import part
from loops.finetune.tokens import WORDS
from loops.finetune.validation import UNKNOWN, validate

PAIR = {"question": "Who, and why?", "answer": "Ann; she may"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def spoken(path: Path) -> list[tuple[tuple[str, str], ...]]:
    source, = read_path(path)
    return [tuple((turn.role, turn.text) for turn in row.turns) for row in convert(source, recognise(source))]


def chat(*messages: dict[str, Any], **columns: Any) -> str:
    return json.dumps([{"messages": list(messages), **columns}])


def row(number: int, question: str, answer: str) -> Row:
    return Row(f"r:{number}", (Turn("user", question), Turn("assistant", answer)))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_says_itself_what_parts_its_columns(tmp_path: Path, separator: str) -> None:
    table = f'question{separator}answer\n"{PAIR["question"]}"{separator}"{PAIR["answer"]}"\n'
    source, = read_path(write(tmp_path, "a.csv", table))
    assert source.rows == (PAIR,)


def test_a_row_with_a_field_too_many_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnreadable, match="line 2 has 3 fields, and the header 2"):
        read_path(write(tmp_path, "a.csv", "question,answer\na,b,c\n"))


def test_a_document_of_columns_is_its_rows_and_one_conversation_is_one(tmp_path: Path) -> None:
    columns = {"question": ["One?", "Two?"], "answer": ["1", "2"]}
    assert spoken(write(tmp_path, "a.json", json.dumps(columns))) == [
        (("user", "One?"), ("assistant", "1")), (("user", "Two?"), ("assistant", "2"))]
    one = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    assert len(spoken(write(tmp_path, "b.json", json.dumps(one)))) == 1


def test_numbers_stay_as_they_are_written_and_alone_are_no_rows(tmp_path: Path) -> None:
    huge = "9" * 5000
    for number in ("1.10", huge, "1e999"):
        file = write(tmp_path, "a.json", f'[{{"question": "How much?", "answer": {number}}}]')
        assert spoken(file) == [(("user", "How much?"), ("assistant", number))]
    with pytest.raises(DatasetUnreadable, match="row 1 is not an object"):
        read_path(write(tmp_path, "a.json", "[1, 2.5]"))


def test_old_line_ends_part_paragraphs_and_other_widths_of_unicode_are_named(tmp_path: Path) -> None:
    source, = read_path(write(tmp_path, "a.txt", "One.\r\rTwo."))
    assert [found["text"] for found in source.rows] == ["One.", "Two."]
    with pytest.raises(EncodingWrong, match="UTF-32"):
        read_path(write(tmp_path, "b.txt", "One.".encode("utf-32")))


def test_parquet_with_bytes_for_text_is_read_and_with_broken_text_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"question": [b"Why?", b"\xff\xfe"], "answer": [b"So.", b"Oh."]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert spoken(tmp_path / "a.parquet") == [
        (("user", "Why?"), ("assistant", "So.")), (("user", ""), ("assistant", "Oh."))]
    broken = arrow.Array.from_buffers(arrow.string(), 1, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0"),
                                                          arrow.py_buffer(b"\xff\xfe")])
    parquet.write_table(arrow.table({"question": broken, "answer": broken}), tmp_path / "b.parquet")
    with pytest.raises(ParquetBroken, match=r"b\.parquet is no whole Parquet file"):
        read_path(tmp_path / "b.parquet")


def test_chats_of_other_tools_keep_their_system_prompt(tmp_path: Path) -> None:
    said = ({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"})
    expected = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes"))
    assert spoken(write(tmp_path, "a.json", chat(*said, system="Be kind."))) == [expected]
    developer = {"role": "developer", "content": "Be kind."}
    assert spoken(write(tmp_path, "b.json", chat(developer, *said, system="Not this."))) == [expected]
    empty = {"role": "system", "content": ""}
    assert spoken(write(tmp_path, "c.json", chat(empty, *said))) == [expected[1:]]
    table = json.dumps([{"messages": json.dumps(said)}])
    assert spoken(write(tmp_path, "d.json", table)) == [expected[1:]]


def test_calls_of_tools_are_kept_and_pictures_refused(tmp_path: Path) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "Find 3."}]}
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"x": 3}'}}]}
    rest = ({"role": "tool", "content": "three"}, {"role": "assistant", "content": "Found."})
    assert spoken(write(tmp_path, "a.json", chat(asked, call, *rest))) == [
        (("user", "Find 3."), ("assistant", '{"name": "find", "arguments": {"x": 3}}'), ("tool", "three"),
         ("assistant", "Found."))]
    asked["content"] = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(ColumnsWrong, match="row 1 holds 'image_url' besides text"):
        spoken(write(tmp_path, "b.json", chat(asked, *rest)))
    with pytest.raises(ColumnsWrong, match="calls a tool without a name"):
        spoken(write(tmp_path, "c.json", chat({**call, "tool_calls": [{"function": {}}]})))


def test_the_same_letters_put_together_otherwise_are_the_same() -> None:
    said = "Où est le café à côté de l'école que tu connais"
    wide = "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in said)
    rows = [row(1, said, "Là-bas."), row(2, unicodedata.normalize("NFD", said), "Là-bas."), row(3, wide, "Là-bas.")]
    assert near.exact_duplicates(rows) == [(1, 0), (2, 0)]
    assert [(pair.first, pair.second) for pair in near.near_duplicates(rows)] == [(0, 1), (0, 2), (1, 2)]


def test_thousands_of_equal_rows_are_one_group_in_a_moment() -> None:
    rows = [row(number, "the same long question stands in all of these rows", "yes") for number in range(1900)]
    others = [row(5000 + number, f"another question {number} about {number + 7} birds", "no") for number in range(9)]
    before = time.process_time()
    assert len(part([*rows, *others])["train"]) >= 1900
    kept, _ = clean([*rows, *others], Cleaning(WORDS, ("near_duplicates",)))
    assert len(kept) == 10
    report = validate({"train": rows, "test": [*others, rows[0]]}, Cleaning(WORDS))
    assert [one.count for one in report.findings if one.check == "leakage"] == [1]
    assert time.process_time() - before < 20


def test_equal_rows_of_two_splits_are_each_compared_with_what_follows() -> None:
    said, alike = "one two three four five six seven eight nine ten", "one two three four five six seven eight nine"
    report = validate({"test": [row(1, said, "a")], "train": [row(2, said, "a"), row(3, alike, "a")]}, Cleaning(WORDS))
    assert {name for one in report.findings if one.check == "leakage" for name in one.rows} == {"r:2", "r:3"}
    homes = ["train", "test", "train"]
    found = near.pairs([said, said, alike], home=homes)
    assert [(pair.first, pair.second) for pair in found] == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("threshold", [0.25, 1 / 3, 0.5, 0.75, 1.0])
def test_pairs_just_at_the_threshold_are_found(threshold: float) -> None:
    chance = random.Random(3)
    said = [" ".join(chance.choices("abc", k=chance.randint(3, 8))) for _ in range(120)]
    sets = [near.shingles(text) for text in said]
    assert [(pair.first, pair.second) for pair in near.near_pairs(said, threshold)] == [
        (first, second) for second in range(120) for first in range(second)
        if near.similarity(sets[first], sets[second]) >= threshold]


@pytest.mark.parametrize("text", [
    "Give me no more of it as I do say", "Los Angeles is a no go for him today",
    "Die hard in El Paso, said Mr De Niro"])
def test_a_short_row_with_words_of_several_languages_is_left_open(text: str) -> None:
    assert guess_language(text) in ("", "en")


def test_a_row_too_short_to_tell_its_language_is_told_as_such() -> None:
    rows = [row(1, "Why?", "So."), row(2, "Where is the key of the house that I gave to you?", "It is in the bag.")]
    assert validate({"": rows}, Cleaning(WORDS)).languages == {UNKNOWN: 1, "en": 1}


@pytest.mark.parametrize(("text", "masked"), [
    ("Call 1-800-555-1234 now", "Call [phone] now"), ("au 06 12 34 56 78.", "au [phone]."),
    ("card 4111-1111-1111-1111, old 4111-1111-1111-1112", "card [card], old 4111-1111-1111-1112"),
    ("American 3782 822463 10005", "American [card]"), ("on 01.02.2003 at 12.30", "on 01.02.2003 at 12.30"),
    ("write to a.b+c@mail.example.org!", "write to [email]!")])
def test_personal_data_are_masked_and_what_only_looks_like_it_stays(text: str, masked: str) -> None:
    assert personal.mask(text, ("email", "phone", "card")) == masked
