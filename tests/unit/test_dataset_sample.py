"""Synthetic rows: different, the same each time, right, and no answer in two splits. And what is recommended."""

from __future__ import annotations

import re

import pytest

from loops.finetune import recommended
from loops.finetune.faults import DatasetRefused
from loops.finetune.records import Row
from loops.finetune.sample import GENERAL, MAX_ROWS, TASKS, generate
from loops.finetune.splits import part


@pytest.mark.parametrize("domain", [*TASKS, "poetry"])
def test_rows_vary_and_no_answer_is_in_two_splits(domain: str) -> None:
    rows = generate(domain, 600, seed=2)
    assert len({row.text for row in rows}) == 600
    assert {row.label for row in rows} == set(TASKS.get(domain, GENERAL))
    answers = {name: {row.answer for row in found} for name, found in part(rows).items()}
    assert sum(map(len, answers.values())) == 600
    assert len(set().union(*answers.values())) == 600


@pytest.mark.parametrize("domain", [*TASKS, "poetry"])
def test_as_many_as_can_be_asked_for_have_answers_of_their_own(domain: str) -> None:
    assert len({row.answer for row in generate(domain, MAX_ROWS)}) == MAX_ROWS


def test_the_seed_decides() -> None:
    assert generate("finance", 50, seed=1) == generate("finance", 50, seed=1)
    assert generate("finance", 50, seed=1) != generate("finance", 50, seed=2)
    assert generate("finance", 50, seed=1) == generate("finance", 80, seed=1)[:50]


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def of_task(domain: str, task: str) -> list[Row]:
    return [row for row in generate(domain, 300) if row.label == task]


def test_answers_follow_from_the_questions() -> None:
    for row in of_task("finance", "margin"):
        revenue, cost = numbers(row.turns[0].text)
        made, margin = numbers(row.answer)
        assert (made, margin) == (abs(revenue - cost), round(abs(revenue - cost) / revenue * 100, 1))
    for row in of_task("legal", "inheritance"):
        estate, children = numbers(row.turns[0].text)[:2]
        assert numbers(row.answer) == [estate / 2, children, round(estate / 2 / children, 2)]
    for row in of_task("healthcare", "body mass index"):
        height, weight = sorted(numbers(row.turns[0].text), reverse=True)
        assert numbers(row.answer)[0] == pytest.approx(weight / (height / 100) ** 2, abs=0.051)
    for row in of_task("finance", "break-even"):
        price, unit, fixed = numbers(row.turns[0].text)
        _, units, revenue = numbers(row.answer)
        assert (units - 1) * (price - unit) < fixed <= units * (price - unit)
        assert revenue == units * price


def test_more_than_can_be_different_is_refused() -> None:
    with pytest.raises(DatasetRefused, match="--sample"):
        generate("legal", MAX_ROWS + 1)


@pytest.mark.parametrize("domain", [*TASKS, "poetry"])
def test_what_is_reckoned_with_in_one_split_is_not_in_another_whoever_it_is_about(domain: str) -> None:
    splits = part(generate(domain, 1800, seed=5))
    figures = {name: {(row.label, *sorted(numbers(row.turns[0].text)), *re.findall(r"\d ([A-Z]\w+) 2", row.text))
                      for row in found if not row.context} for name, found in splits.items()}
    asked = sum(not row.context for found in splits.values() for row in found)
    assert sum(map(len, figures.values())) > 0.9 * asked
    assert not figures["train"] & figures["test"]
    assert not figures["train"] & figures["validation"]


def test_every_domain_has_recommended_datasets_with_licence_and_size() -> None:
    for domain in TASKS:
        found = recommended.recommend(domain)
        assert len(found) >= 2
        assert all(one.licence and one.rows > 0 and one.name.count("/") == 1 for one in found)
    assert recommended.recommend("poetry") == ()
    assert recommended.licence_of("qiaojin/PubMedQA") == "MIT"
    assert recommended.licence_of("nobody/none") == ""
