"""The format of calibration text: what is written is read again, files concatenate, errors name their line."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration_data.text import (
    MAX_BYTES,
    ROLES,
    TEXT,
    CalibrationRefused,
    Header,
    Sample,
    Turn,
    parse,
    read,
    write,
)

A = """%% domain cooking
%% language en
%% licence CC0-1.0
%% source written by hand

%% sample cooking-001 how long an egg takes
%% system
You cook.
%% user
How long does an egg take?

Soft, please.
%% assistant
Four minutes,
  no more.

%% sample cooking-002
%% user
And hard?
%% tool
{"minutes": 9}
%% assistant
Nine.
"""
B = """%% domain law
%% licence CC-BY-4.0
%% sample law-001 a fence
%% user
Whose fence is it?
%% assistant
Look into the deed.
"""
COOKING = Header("cooking", "en", "CC0-1.0", "written by hand")
PLAIN = "One paragraph\nof two lines.\n\n\n%  Another one.\n\\%% and a third line?\n"


def test_a_sample_has_its_id_topic_turns_and_header() -> None:
    first, second = parse(A)
    assert first == Sample("cooking-001", "how long an egg takes", (
        Turn("system", "You cook."), Turn("user", "How long does an egg take?\n\nSoft, please."),
        Turn("assistant", "Four minutes,\n  no more.")), COOKING)
    assert (second.id, second.topic, [turn.role for turn in second.turns]) == (
        "cooking-002", "", ["user", "tool", "assistant"])


def test_concatenated_files_are_the_samples_of_both_each_with_its_own_header() -> None:
    assert parse(A + B) == parse(A) + parse(B)
    assert parse(B + A) == parse(B) + parse(A)
    assert parse(A + B)[-1].header == Header("law", "", "CC-BY-4.0", "")


def test_plain_text_before_a_marked_file_stays_plain_text() -> None:
    assert parse(PLAIN + "\n" + A)[2:] == parse(A)


def test_a_header_without_a_domain_changes_only_what_it_says() -> None:
    found = parse(A + "%% licence MIT\n%% sample three\n%% user\nNo?\n%% assistant\nNo.\n")
    assert found[-1].header == Header("cooking", "en", "MIT", "written by hand")


def test_a_file_without_markup_is_one_sample_per_paragraph() -> None:
    found = parse(PLAIN, domain="notes")
    assert [sample.turns for sample in found] == [
        (Turn(TEXT, "One paragraph\nof two lines."),), (Turn(TEXT, "%  Another one.\n\\%% and a third line?"),)]
    assert {sample.header for sample in found} == {Header("notes")}
    assert len({sample.id for sample in found}) == 2


def test_a_program_with_comments_like_markup_is_plain_text() -> None:
    code = "%% Section one\nx = 1;\n%%%% and\n%%two"
    assert [sample.text for sample in parse(code)] == [code]


def test_plain_text_below_a_header_has_that_header() -> None:
    first, second = parse("%% domain law\n%% licence MIT\n\nOne.\n\nTwo.\n")
    assert (first.text, second.text) == ("One.", "Two.")
    assert first.header == second.header == Header("law", "", "MIT", "")
    assert [sample.text for sample in parse(A + "%% domain law\n\nOne.\n\nTwo.\n")[2:]] == ["One.", "Two."]


def test_a_sample_may_be_plain_text_with_blank_lines() -> None:
    (sample,) = parse("%% sample poem a short one\n\nRoses\n\nare red.\n")
    assert sample.turns == (Turn(TEXT, "Roses\n\nare red."),)


def test_a_line_of_text_that_looks_like_markup_is_escaped() -> None:
    (sample,) = parse("%% sample a\n%% user\n\\%% user\n\\\\%% x\n% y\n%% assistant\nYes.")
    assert sample.turns[0].text == "%% user\n\\%% x\n% y"
    assert parse(write([sample])) == (sample,)


def test_line_ends_and_byte_order_marks_of_other_systems_are_understood() -> None:
    assert parse("\ufeff" + A.replace("\n", "\r\n") + "\ufeff" + B.replace("\n", "\r")) == parse(A + B)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
lines = st.lists(st.one_of(
    st.sampled_from(["%% user", "%% sample x", "\\%% user", "%%", "\\\\%%", "x%% domain y", "", "%% domain z", " "]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12)), max_size=5)
texts = lines.map("\n".join).filter(str.strip)
one_line = st.text(st.characters(categories=["L", "N", "P"]), max_size=12)
turns = st.one_of(texts.map(lambda text: (Turn(TEXT, text),)),
                  st.lists(st.builds(Turn, st.sampled_from(ROLES), texts), min_size=1, max_size=4).map(tuple))
samples = st.builds(Sample, names, one_line, turns, st.builds(Header, names, one_line, one_line, one_line))


def trimmed(text: str) -> str:
    """Text with the line ends of this system, without blank lines at both ends."""
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while not rows[0].strip():
        del rows[0]
    while not rows[-1].strip():
        del rows[-1]
    return "\n".join(rows)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(samples, max_size=4))
def test_what_is_written_is_read_again(given_samples: list[Sample]) -> None:
    assert parse(write(given_samples)) == tuple(
        replace(sample, turns=tuple(Turn(turn.role, trimmed(turn.text)) for turn in sample.turns))
        for sample in given_samples)


@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(st.sampled_from(
    ["%% ", "%%", "user", "sample ", "domain ", "x", "\n", "\n\n", " ", "\\"]), max_size=40).map("".join))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    told = "line "
    try:
        found = parse(text)
    except CalibrationRefused as refusal:
        told, found = str(refusal), ()
    assert "line " in told
    assert "\n" not in told
    assert all(turn.text.strip() for sample in found for turn in sample.turns)


@pytest.mark.parametrize(("text", "number", "what"), [
    ("%% sample a\n%% user\nHi\n%% asistant\nHo", 4, "Did you mean '%% assistant'"),
    ("%% license MIT\n%% domain x\n\nText", 1, "Did you mean '%% licence'"),
    ("%% sample a\n%% user\nHi\n%%user\nHo", 4, r"\%%"),
    ("%% domain x\n\n%% user\nHi", 3, "before any '%% sample ID'"),
    ("%% sample a\n%% user Hello there\nHi", 2, "on the next line"),
    ("%% domain x\n%% sample\n%% user\nHi", 2, "without an id"),
    ("%% sample a\nLost words\n%% user\nHi", 1, "text before its first turn"),
    ("%% sample a\n%% user\nHi\n%% assistant\n\n%% sample b\n%% user\nHo", 1, "a turn of the assistant is empty"),
    ("%% sample a\n\n%% sample b\n%% user\nHo", 1, "there is nothing"),
    ("%% domain ../etc\n%% sample b\n%% user\nHo", 1, "name of a domain"),
    ("%% domain x\n%% licence A\n%% licence B\n\nHo", 3, "says the licence twice"),
    ("%% domain x\n%% licence\n\nHo", 2, "says nothing"),
    (A.rstrip("\n") + B, 23, "joined without a line break"),
])
def test_wrong_markup_is_refused_with_its_line(text: str, number: int, what: str) -> None:
    with pytest.raises(CalibrationRefused) as refused:
        parse(text, "my.txt")
    assert str(refused.value).startswith(f"my.txt, line {number}, ")
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sample", [
    Sample("a", "", (), COOKING),
    Sample("", "", (Turn("user", "Hi"),), COOKING),
    Sample("a", "", (Turn("user", " \n "),), COOKING),
    Sample("a", "", (Turn("user", "a\0b"),), COOKING),
    Sample("a", "", (Turn("narrator", "Hi"),), COOKING),
    Sample("a", "", (Turn(TEXT, "Hi"), Turn("user", "Ho")), COOKING),
    Sample("a", "", (Turn("user", "Hi"),), Header("a b")),
], ids=["no turn", "no id", "empty", "NUL", "role", "text and turn", "domain"])
def test_what_could_not_be_read_again_is_not_written(sample: Sample) -> None:
    with pytest.raises(CalibrationRefused):
        write([sample])


def test_line_breaks_in_a_topic_or_header_cannot_forge_markup() -> None:
    forged = Sample("a b", "one\n%% user\ntwo", (Turn("user", "Hi"),), Header("x", "", "MIT\n%% sample y", ""))
    (found,) = parse(write([forged]))
    assert (found.id, found.topic, found.header.licence) == ("a-b", "one %% user two", "MIT %% sample y")


@pytest.mark.parametrize(("content", "what"), [
    (b"", "holds no calibration text"), (b" \n\n", "holds no calibration text"),
    (b"%% domain x\n", "holds no calibration text"),
    (b"GGUF\0\0text", "not plain text"), ("Grüße".encode("latin-1"), "not UTF-8 text (byte 2)"),
    ("Hello".encode("utf-16"), "UTF-16"),
])
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationRefused) as refused:
        read(path)
    assert what in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    for path, what in ((pipe, "not a file"), (tmp_path, "not a file"), (large, "larger than 16 MB"),
                       (tmp_path / "none", "No such file"), (tmp_path / ("x" * 300), "File name too long"),
                       (Path("a\0b"), "null")):
        with pytest.raises(CalibrationRefused) as refused:
            read(path)
        assert what in str(refused.value)


def test_a_file_names_the_domain_of_its_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "My notes (2).txt"
    path.write_text("Some words.", encoding="utf-8")
    assert read(path)[0].header == Header("My-notes-2")
