"""Cleaning: what each step changes, leaves alone and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from calibration_data.text import TEXT, Turn
from loops.finetune import personal
from loops.finetune.cleaning import DEFAULT_STEPS, STEPS, Change, Cleaning, clean, describe
from loops.finetune.faults import DatasetRefused
from loops.finetune.records import Row
from loops.finetune.tokens import WORDS


def ask(question: str, answer: str = "Because it is so.", number: int = 1, **more: str) -> Row:
    return Row(f"r:{number}", (Turn("user", question), Turn("assistant", answer)), **more)


def after(*rows: Row, step: str, **how: object) -> tuple[list[Row], Change]:
    cleaning = replace(Cleaning(WORDS, (step,)), **how)  # type: ignore[arg-type]
    kept, (change,) = clean(rows, cleaning)
    return kept, change


def text_after(step: str, text: str) -> str:
    kept, change = after(ask(text), step=step)
    assert change.changed == (kept[0].turns[0].text != text)
    return kept[0].turns[0].text


@pytest.mark.parametrize(("step", "text", "expected"), [
    ("html_entities", "a &lt; b &amp; c&nbsp;d &#39;e&#39; &#x41;", "a < b & c\u00a0d 'e' A"),
    ("html_entities", "?a=1&copy=2&nosuch; AT&T", "?a=1&copy=2&nosuch; AT&T"),
    ("special_tokens", "x<|im_start|>user</s>[INST]y<<SYS>>", "xusery"),
    ("special_tokens", "<|im<|im_end|>_start|>", ""),
    ("special_tokens", "if a < s > b: <p> [x]", "if a < s > b: <p> [x]"),
    ("control_characters", "a\x00b\x1b[0m\u200bc\u202ed\ufeff\te\nf", "ab[0mcd\te\nf"),
    ("control_characters", "क्\u200dष 👩\u200d🔬", "क्\u200dष 👩\u200d🔬"),
    ("urls", "See https://a.example/b?c=(d), or www.x.example/y. Now", "See [url](d), or [url]. Now"),
    ("urls", "The ratio is 3:1, e.g. http is a word.", "The ratio is 3:1, e.g. http is a word."),
    ("emails", "Write to ann.b+c@mail.example.org, or @ann.", "Write to [email], or @ann."),
    ("whitespace", "a  b\u00a0\u00a0c \r\n\r\n\r\n\r\n    def f():\n", "a b c\n\n    def f():"),
    ("personal_data", "Call +49 30 1234567, pay 4111 1111 1111 1111, mail a@b.example.",
     "Call [phone], pay [card], mail [email]."),
])
def test_a_step_changes_what_it_is_for_and_nothing_else(step: str, text: str, expected: str) -> None:
    assert text_after(step, text) == expected


@pytest.mark.parametrize(("given", "left"), [
    ("s u1 a1 u2 a2", "s u1 a1 u2 a2"),
    ("a1 u1 a2", "u1 a2"),
    ("s a1 a2 u1 a3 u2", "s u1 a3"),
    ("u1 u2 a1 a2", "u1+u2 a1+a2"),
    ("u1 a1 t1 t2 a2", "u1 a1 t1 t2 a2"),
    ("t1 u1 a1 t2", "u1 a1"),
    ("p1", "p1"),
    ("u1", ""), ("a1 u1", ""), ("s", ""), ("", ""), ("u1 s a1", ""), ("u1 t1 a1", "u1 t1 a1"),
])
def test_conversations_begin_with_a_question_and_end_with_an_answer(given: str, left: str) -> None:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "p": TEXT}
    row = Row("r:1", tuple(Turn(roles[word[0]], word) for word in given.split()))
    kept, change = after(row, step="turn_order")
    assert [" ".join(turn.text.replace("\n\n", "+") for turn in one.turns) for one in kept] == ([left] if left else [])
    assert (change.changed, change.after) == (int(bool(left) and left != given), int(bool(left)))
    assert all(one.in_order for one in kept)


def test_contexts_are_cleaned_as_well() -> None:
    kept, change = after(ask("x", context="&amp;"), ask("y", number=2), step="html_entities")
    assert (kept[0].context, change.changed) == ("&", 1)


def test_special_tokens_of_the_tokenizer_are_removed_too() -> None:
    kept, _ = after(ask("a ⟨turn⟩ b"), step="special_tokens", tokenizer=replace(WORDS, special=("⟨turn⟩", "")))
    assert kept[0].turns[0].text == "a  b"


@pytest.mark.parametrize("row", [
    ask(" "), ask("x", "\n"), Row("r:1", ()), Row("r:1", (Turn("user", "x"),)), Row("r:1", (Turn(TEXT, " "),))])
def test_rows_without_anything_to_learn_go(row: Row) -> None:
    kept, change = after(row, ask("x", number=2), Row("r:3", (Turn(TEXT, "y"),)), step="empty_rows")
    assert [one.id for one in kept] == ["r:2", "r:3"]
    assert str(change) == "removed 1"


def test_lengths_are_bounded_on_both_sides_and_counted() -> None:
    rows = [ask("w " * count, "a", number=count) for count in (1, 2, 5, 8, 9)]
    kept, change = after(*rows, step="length", min_tokens=3, max_tokens=9)
    assert [row.id for row in kept] == ["r:2", "r:5", "r:8"]
    assert "1 under 3 and 1 over 9 words" in change.note


def test_duplicates_go_but_for_the_first_whatever_their_case_and_spaces() -> None:
    kept, _ = after(ask("Why  so?"), ask("why so?\n", number=2), ask("Why so?", "No.", number=3), step="duplicates")
    assert [row.id for row in kept] == ["r:1", "r:3"]


def test_near_duplicates_go_but_not_several_questions_about_one_context() -> None:
    long = "the river runs past the old mill and the boats lie still under the grey evening sky of autumn"
    rows = [ask("Tell it.", long), ask("Tell it.", long.replace("autumn", "spring"), number=2),
            ask("Who owns the mill?", "The miller does.", number=3, context=long * 3),
            ask("What colour is the sky?", "The miller does.", number=4, context=long * 3)]
    kept, change = after(*rows, step="near_duplicates")
    assert [row.id for row in kept] == ["r:1", "r:3", "r:4"]
    assert "0.7" in change.note


def test_what_is_near_only_a_row_that_goes_stays() -> None:
    words = [f"w{number}" for number in range(60)]
    rows = [ask("Tell it.", " ".join(words[start:start + 40]), number=start) for start in (0, 5, 10)]
    kept, _ = after(*rows, step="near_duplicates")
    assert [row.id for row in kept] == ["r:0", "r:10"]


def test_classes_are_balanced_to_the_one_in_the_middle_the_same_each_time() -> None:
    rows = [ask("x", number=number, label="abc"[min(number // 4, 2)]) for number in range(30)]
    rows += [ask("x", number=30 + number, label="d") for number in range(2)]
    kept, _ = after(*rows, step="balance", seed=1)
    assert {label: sum(row.label == label for row in kept) for label in "abcd"} == {"a": 4, "b": 4, "c": 4, "d": 2}
    assert kept == after(*rows, step="balance", seed=1)[0]
    assert kept != after(*rows, step="balance", seed=2)[0]
    assert kept == sorted(kept, key=rows.index)


def test_statistics_change_nothing_and_say_how_long_rows_are() -> None:
    rows = [ask("w " * count, "a", number=count, label="x") for count in (1, 3, 5)]
    kept, change = after(*rows, step="statistics")
    assert kept == rows
    assert change.note == "3 rows, 12 words; of a row 2 to 6, median 4, 95 % at most 6; 1 class"
    assert describe([], WORDS).rows == 0


def test_steps_run_in_their_order_so_that_each_sees_what_the_one_before_uncovered() -> None:
    hidden = ask("&lt;s&gt;\u200b", "Yes.")
    usual, changes = clean([hidden, ask("Is this a whole row?", "Yes, it is one.", number=2)], Cleaning(WORDS))
    assert [row.id for row in usual] == ["r:2"]
    assert [change.step for change in changes] == list(DEFAULT_STEPS)
    assert [change.before for change in changes[1:]] == [change.after for change in changes[:-1]]
    other, _ = clean([hidden], Cleaning(WORDS, ("special_tokens", "html_entities", "empty_rows")))
    assert other


@pytest.mark.parametrize(("steps", "told"), [
    (("whitespaces",), "did you mean whitespace"), (("urls", "urls"), "is there twice"),
    (("???",), "there are turn_order, html_entities")])
def test_unknown_steps_are_refused(steps: Sequence[str], told: str) -> None:
    with pytest.raises(DatasetRefused, match=told):
        clean([], Cleaning(WORDS, tuple(steps)))
    assert set(DEFAULT_STEPS) <= set(STEPS)


@pytest.mark.parametrize(("text", "kinds"), [
    ("ann@mail.example", ["email"]), ("tel +1 (555) 123-4567.", ["phone"]), ("(030) 1234567", ["phone"]),
    ("555-123-4567", ["phone"]), ("0171 1234567", ["phone"]), ("+4915112345678", ["phone"]),
    ("4111-1111-1111-1111", ["card"]), ("378282246310005", ["card"]), ("5555 5555 5555 4444", ["card"]),
    ("4111 1111 1111 1112", []), ("2024-01-15 10:30", []), ("1,234,567.89", []), ("12345678901", []),
    ("3.14159265358979", []), ("from 1990 to 2015", []), ("user@localhost", []), ("10.0.0.1:8080", []),
    ("order 4111111111111111x", []), ("PMID 21645374", []),
    ("33 33 33 33 33 33 33", []), ("3782 822463 10005", ["card"]),
])
def test_personal_data_are_found_by_their_form(text: str, kinds: list[str]) -> None:
    assert [one.kind for one in personal.find(f"Well, {text} it is.")] == kinds
