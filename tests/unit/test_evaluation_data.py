"""The shipped evaluation data keeps the promises that the measurements build on."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "loops" / "evaluation" / "data"
KEYS = ["id", "emotion", "valence", "intensity", "topic", "register", "prompt", "empathic", "dismissive"]
TEXTS = ("prompt", "empathic", "dismissive")
VALENCES = {"positive", "neutral", "negative"}


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold())


def shingles(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start:start + length]) for start in range(len(found) - length + 1)}


def similarity(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return (DATA / "scenarios.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def scenarios(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def held_out() -> str:
    return (DATA / "held_out.txt").read_text(encoding="utf-8")  # strict: raises on invalid UTF-8


@pytest.fixture(scope="module")
def paragraphs(held_out: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", held_out) if part.strip()]


def test_there_are_forty_scenarios(lines: list[str]) -> None:
    assert len(lines) == 40


def test_every_scenario_has_the_keys_in_their_order(scenarios: list[dict[str, Any]]) -> None:
    assert all(list(scenario) == KEYS for scenario in scenarios)


def test_every_text_of_a_scenario_is_filled_and_trimmed(scenarios: list[dict[str, Any]]) -> None:
    fields = [key for key in KEYS if key != "intensity"]
    for scenario in scenarios:
        for field in fields:
            value = scenario[field]
            assert isinstance(value, str)
            assert value, (scenario["id"], field)
            assert value == value.strip(), (scenario["id"], field)


def test_intensity_is_a_number_between_zero_and_one(scenarios: list[dict[str, Any]]) -> None:
    for scenario in scenarios:
        assert isinstance(scenario["intensity"], float)
        assert 0.0 <= scenario["intensity"] <= 1.0


def test_valence_is_one_of_three_and_the_same_for_an_emotion(scenarios: list[dict[str, Any]]) -> None:
    assert {scenario["valence"] for scenario in scenarios} == VALENCES
    pairs = {(scenario["emotion"], scenario["valence"]) for scenario in scenarios}
    assert len(pairs) == len({emotion for emotion, _ in pairs})


def test_ids_are_unique_slugs_of_their_emotion(scenarios: list[dict[str, Any]]) -> None:
    ids = [scenario["id"] for scenario in scenarios]
    assert len(set(ids)) == len(ids)
    for scenario in scenarios:
        assert re.fullmatch(rf"{scenario['emotion']}-\d\d", scenario["id"])


def test_there_are_twenty_emotions_with_two_scenarios_each(scenarios: list[dict[str, Any]]) -> None:
    told = [scenario["emotion"] for scenario in scenarios]
    assert len(set(told)) == 20
    assert all(told.count(emotion) == 2 for emotion in set(told))


def test_the_first_twenty_five_span_all_emotions(scenarios: list[dict[str, Any]]) -> None:
    every = {scenario["emotion"] for scenario in scenarios}
    assert {scenario["emotion"] for scenario in scenarios[:25]} == every


def test_every_prefix_of_ten_or_more_is_balanced(scenarios: list[dict[str, Any]]) -> None:
    valences = [scenario["valence"] for scenario in scenarios]
    for length in range(10, len(valences) + 1):
        prefix = valences[:length]
        assert prefix.count("positive") >= length / 4, length
        assert prefix.count("negative") >= length / 4, length


def test_the_two_replies_are_of_similar_length(scenarios: list[dict[str, Any]]) -> None:
    for scenario in scenarios:
        ratio = len(scenario["empathic"].split()) / len(scenario["dismissive"].split())
        assert 0.75 <= ratio <= 1.33, (scenario["id"], ratio)


def test_neither_kind_of_reply_is_longer_on_the_whole(scenarios: list[dict[str, Any]]) -> None:
    empathic = sum(len(scenario["empathic"].split()) for scenario in scenarios)
    dismissive = sum(len(scenario["dismissive"].split()) for scenario in scenarios)
    assert empathic / dismissive == pytest.approx(1.0, abs=0.05)


def test_no_text_of_a_scenario_stands_twice(scenarios: list[dict[str, Any]]) -> None:
    texts = [" ".join(words(scenario[field])) for scenario in scenarios for field in TEXTS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("field", TEXTS)
def test_no_two_scenarios_are_near_duplicates(scenarios: list[dict[str, Any]], field: str) -> None:
    seen = {scenario["id"]: shingles(scenario[field], 5) for scenario in scenarios}
    for one, other in combinations(seen, 2):
        assert similarity(seen[one], seen[other]) < 0.5, (one, other)


def test_the_held_out_text_has_at_least_twelve_thousand_words(held_out: str) -> None:
    assert len(held_out.split()) >= 12_000


def test_the_held_out_text_has_no_control_or_replacement_characters(held_out: str) -> None:
    assert "\ufffd" not in held_out
    assert all(character == "\n" or character.isprintable() for character in held_out)


def test_the_held_out_text_is_mostly_ascii(held_out: str) -> None:
    foreign = sum(not character.isascii() for character in held_out)
    assert 0 < foreign < len(held_out) / 100


def test_no_paragraph_of_the_held_out_text_stands_twice(paragraphs: list[str]) -> None:
    normal = [" ".join(words(paragraph)) for paragraph in paragraphs]
    assert len(set(normal)) == len(normal)


def test_one_blank_line_separates_the_paragraphs_of_the_held_out_text(held_out: str) -> None:
    rows = held_out.split("\n")
    assert held_out.endswith("\n")
    assert all(first or second for first, second in pairwise(rows))


def test_the_held_out_text_shares_no_eight_words_with_the_scenarios(
    held_out: str, scenarios: list[dict[str, Any]]
) -> None:
    shown = shingles(held_out, 8)
    for scenario in scenarios:
        for field in TEXTS:
            assert not shown & shingles(scenario[field], 8), (scenario["id"], field)
