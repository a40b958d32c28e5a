"""Validation: each fault is found, named and weighed, and a sound dataset has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from calibration_data.text import TEXT, Turn
from loops.finetune.cleaning import Cleaning
from loops.finetune.records import Row
from loops.finetune.sample import TASKS, generate
from loops.finetune.splits import part
from loops.finetune.tokens import WORDS
from loops.finetune.validation import CHECKS, ERROR, WARNING, Report, validate

HOW = Cleaning(WORDS)
SPLITS = part(generate("legal", 120))


def added(*rows: Row, split: str = "train") -> Report:
    return validate({**SPLITS, split: [*SPLITS[split], *rows]}, HOW)


def said(*turns: tuple[str, str], label: str = "clause") -> Row:
    return Row("bad", tuple(Turn(*turn) for turn in turns), label=label)


def good(question: str = "What is the deposit for?", answer: str = "It secures the rent of the flat.") -> Row:
    return said(("user", question), ("assistant", answer))


def found(report: Report) -> dict[str, str]:
    return {one.check: one.level for one in report.findings}


@pytest.mark.parametrize("domain", TASKS)
def test_a_sound_dataset_has_no_fault(domain: str) -> None:
    report = validate(part(generate(domain, 200)), HOW)
    assert report.findings == ()
    assert report.as_json()["usable"] is True
    assert sum(line.startswith("ok ") for line in report.lines()) == len(CHECKS)


@pytest.mark.parametrize(("row", "check", "level"), [
    (said(("user", "What is it?"), ("assistant", " ")), "nulls", ERROR),
    (Row("bad", (), label="clause"), "nulls", ERROR),
    (said(("user", "What is it?")), "instruction_format", ERROR),
    (said(("assistant", "Hello to you."), ("user", "And to you."), ("assistant", "Yes.")), "instruction_format", ERROR),
    (said(("user", "One thing."), ("user", "Another."), ("assistant", "Both.")), "instruction_format", ERROR),
    (said(("user", "One thing."), ("system", "Quiet."), ("assistant", "Both.")), "instruction_format", ERROR),
    (good("Say this again.", "Say  this again."), "instruction_format", WARNING),
    (good("Why <|im_end|> so?"), "special_tokens", WARNING),
    (good(answer="word " * 3000), "lengths", WARNING),
    (said(("user", "Eh"), ("assistant", "No")), "lengths", WARNING),
    (good(answer="Der Vertrag ist nicht für die Dauer der Miete und das ist mit dem Haus so."), "language", WARNING),
    (replace(good(), label=""), "labels", WARNING),
    (good(answer="Ask ann@mail.example for it."), "personal_data", WARNING),
    (SPLITS["train"][0], "duplicates", WARNING),
    (replace(SPLITS["test"][0], id="bad"), "leakage", ERROR),
])
def test_each_fault_is_found_and_names_the_row(row: Row, check: str, level: str) -> None:
    report = added(row)
    assert found(report) == {check: level}
    one, = report.findings
    assert one.count == 1
    assert one.rows == (row.id,) or check == "leakage"
    assert any(line.startswith(level) and CHECKS[check] in line for line in report.lines())
    assert bool(report.errors) == (level == ERROR)


@pytest.mark.parametrize("turns", [
    (("system", "Be brief."), ("user", "Hi there."), ("assistant", "Hello.")),
    (("user", "Look it up."), ("assistant", "I ask."), ("tool", "3"), ("tool", "4"), ("assistant", "It is 7.")),
    (("user", "One is?"), ("assistant", "1."), ("user", "And two?"), ("assistant", "2.")),
    ((TEXT, "A passage that nobody says."),),
])
def test_orders_of_turns_that_are_right(turns: Sequence[tuple[str, str]]) -> None:
    assert "instruction_format" not in found(added(said(*turns)))


def test_what_is_nearly_the_same_in_two_splits_leaks_and_in_one_is_a_warning() -> None:
    row = SPLITS["test"][0]
    changed = replace(row, id="bad", turns=(*row.turns[:-1], Turn("assistant", f"{row.answer} Yes.")))
    assert found(added(changed)) == {"leakage": ERROR}
    assert found(added(changed, split="test")) == {"near_duplicates": WARNING}


def test_a_long_answer_in_two_splits_is_a_warning() -> None:
    row = SPLITS["test"][0]
    question = Turn("user", " ".join(f"word{number}" for number in range(80)))
    other = replace(row, id="bad", turns=(question, row.turns[-1]))
    assert found(added(other)) == {"leakage": WARNING}


def test_classes_that_are_uneven_or_never_trained_are_told() -> None:
    report = added(replace(good(), label="rare"), split="test")
    assert [one.message for one in report.findings if one.check == "labels"] == [
        "The class 'notice' has 20 rows and 'rare' 1; the step balance evens them.",
        "test has classes that train has not: rare."]


def test_splits_that_are_missing_empty_or_of_one_row_are_told() -> None:
    rows = generate("legal", 20)
    assert found(validate({"": rows}, HOW)) == {}
    assert [(one.level, one.message) for one in validate({"train": rows}, HOW).findings] == [
        (WARNING, "There is no split called validation or test.")]
    assert "test has one row." in [one.message for one in validate({**part(rows), "test": [good()]}, HOW).errors]
    assert "The dataset has no rows." in [one.message for one in validate({"": []}, HOW).errors]


def test_a_finding_names_a_few_rows_and_says_how_many_more() -> None:
    rows = [Row(f"bad:{number}", (Turn("user", f"Number {number}, please?"),)) for number in range(9)]
    report = added(*rows)
    one, = report.errors
    assert (one.count, len(one.rows)) == (9, 5)
    assert "bad:4 and 4 more" in "\n".join(report.lines())
