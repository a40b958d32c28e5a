"""Sizes mean what people mean by them, and a plan is the same plan wherever its files lie."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops.engine.options import EngineOptions
from loops.evaluation.names import METRICS
from loops.pass1.plan import BadSize, BadWeight, PressPlan, parse_size, parse_weights

PLAN = PressPlan(model="m.gguf", name="m", blobs="blobs", scratch="scratch")
PLACES = {"model": "elsewhere.gguf", "blobs": "b", "scratch": "s", "scenarios": "mine.jsonl", "text": "mine.txt",
          "tool": "llama-quantize", "eq_bench": "questions.json", "multiple_choice": "choices.jsonl", "dataset": "mine",
          "domains": ("medical",), "calibration": ("notes.txt",), "user_domains": "calibration", "imatrix": "m.gguf",
          "source": {"folder": "Model", "stages": []}}
WHEN = {"timeout_s": 5.0, "ignore_forecast": True}
DECIDING = {
    "name": "other", "levels": ("Q2_K",), "target_bytes": 1, "max_degradation": 0.5, "max_kld": 0.1,
    "max_iterations": 1, "strategy": "bisect", "prefer": "score", "first_scenarios": 5, "max_scenarios": 6,
    "text_windows": 4, "accept_inconclusive": True, "allow_requantize": True, "simulate": True,
    "max_tokens": 7, "seed": 1, "store_bytes": 5, "gates": ("empathy:0.05", "worst-slice"), "weights": {"empathy": 2.0},
    "seeds": 5, "judge": "anthropic:judge", "options": EngineOptions(threads=3)}


@pytest.mark.parametrize(("text", "size"), [
    ("20", 20 * 10**9), ("20GB", 20 * 10**9), ("20gb", 20 * 10**9), (" 20 GB ", 20 * 10**9), ("20G", 20 * 10**9),
    ("800MB", 8 * 10**8), ("800m", 8 * 10**8), ("4.5", 45 * 10**8), ("1.5GiB", 3 * 2**29), ("1GiB", 2**30),
    ("1Gi", 2**30), ("512MiB", 2**29), ("3kB", 3000), ("3KiB", 3072), ("2TB", 2 * 10**12), ("1TiB", 2**40),
    ("17B", 17), ("17b", 17), ("0.000000001", 1), ("9007199254740993B", 9007199254740993)])
def test_a_size_means_what_people_mean(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [
    "", " ", "GB", "-1GB", "+1GB", "1,5GB", "1e9", "0x10", "ten", "1 000 MB", "5PB", "1GBB", "1GB\0", "nan", "inf", "0",
    "0GB", "0.0", "0.0000000001", "0.4B", ".5GB", "5.GB", "9" * 400, "9" * 5000 + "GB", "1.5GiB;rm", "20GB\n20GB",
    "٢٠GB"])
def test_what_is_no_size_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(BadSize, match="no size"):
        parse_size(text)


@given(st.integers(1, 10**18 - 1))
def test_a_size_in_bytes_comes_back_exactly(size: int) -> None:
    assert parse_size(f"{size}B") == size


@given(st.integers(1, 10**6), st.sampled_from([("k", 1), ("m", 2), ("g", 3), ("t", 4)]), st.booleans())
def test_units_are_powers_in_any_case(number: int, unit: tuple[str, int], binary: bool) -> None:
    letter, power = unit
    expected = number * (1024 if binary else 1000) ** power
    for written in (f"{number}{letter}{'i' if binary else ''}b", f"{number} {letter.upper()}{'i' if binary else ''}B"):
        assert parse_size(written) == expected


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_refused(text: str) -> None:
    with suppress(BadSize):
        assert parse_size(text) > 0


def test_a_plan_survives_json() -> None:
    plan = replace(PLAN, **{**DECIDING, **PLACES, **WHEN})  # type: ignore[arg-type]
    assert PressPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    assert PressPlan.from_json(json.loads(json.dumps(PLAN.as_json()))) == PLAN


@pytest.mark.parametrize("name", ["gates", "weights", "seeds", "eq_bench"])
def test_what_a_plan_asks_of_the_gate_survives_json(name: str) -> None:
    value = {**DECIDING, **PLACES}[name]
    plan = replace(PLAN, **{name: value})  # type: ignore[arg-type]
    assert getattr(PressPlan.from_json(json.loads(json.dumps(plan.as_json()))), name) == value


def test_a_plan_from_before_the_gates_is_read() -> None:
    old = {name: value for name, value in PLAN.as_json().items()
           if name not in {"gates", "weights", "seeds", "eq_bench", "multiple_choice", "judge"}}
    assert PressPlan.from_json(old) == PLAN


def test_a_plan_of_unknown_fields_is_refused() -> None:
    with pytest.raises(TypeError):
        PressPlan.from_json({**PLAN.as_json(), "levels_": []})


@pytest.mark.parametrize("name", [*PLACES, *WHEN])
def test_places_and_patience_do_not_change_the_identity(name: str) -> None:
    moved = replace(PLAN, **{name: {**PLACES, **WHEN}[name]})  # type: ignore[arg-type]
    assert moved != PLAN
    assert moved.identity() == PLAN.identity()


@pytest.mark.parametrize("name", DECIDING)
def test_whatever_decides_the_outcome_changes_the_identity(name: str) -> None:
    assert replace(PLAN, **{name: DECIDING[name]}).identity() != PLAN.identity()  # type: ignore[arg-type]


def test_every_field_is_either_a_place_or_decides() -> None:
    assert {field.name for field in fields(PressPlan)} == {*PLACES, *WHEN, *DECIDING}


def test_the_identity_is_what_json_can_hold() -> None:
    assert json.loads(json.dumps(PLAN.identity()))["options"]["ubatch"] == 512


def test_weights_are_read_by_metric() -> None:
    assert parse_weights(["empathy=2", "metaphor_usage=0", " response_fluency = 0.5"]) == {
        "empathy": 2.0, "metaphor_usage": 0.0, "response_fluency": 0.5}


def test_no_weights_are_none() -> None:
    assert parse_weights([]) == {}


def test_the_last_of_two_weights_counts() -> None:
    assert parse_weights(["empathy=2", "empathy=3"]) == {"empathy": 3.0}


@pytest.mark.parametrize("text", ["empaty=2", "overall=1", "=2", "", "forced_choice=1"])
def test_a_weight_of_no_emotional_metric_is_refused_with_their_names(text: str) -> None:
    with pytest.raises(BadWeight, match="no emotional metric") as refused:
        parse_weights([text])
    assert all(name in str(refused.value) for name in METRICS)


@pytest.mark.parametrize("text", ["empathy", "empathy=", "empathy=much", "empathy=1,5", "empathy:2", "empathy=2=3"])
def test_what_gives_no_number_is_no_weight(text: str) -> None:
    with pytest.raises(BadWeight):
        parse_weights([text])


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "1e999"])
def test_a_weight_must_be_a_number_of_at_least_zero(value: str) -> None:
    with pytest.raises(BadWeight, match="at least 0"):
        parse_weights([f"empathy={value}"])


def test_something_must_be_weighed() -> None:
    with pytest.raises(BadWeight, match="nothing would be scored"):
        parse_weights([f"{name}=0" for name in METRICS])


def test_one_metric_alone_may_be_weighed() -> None:
    assert any(parse_weights([f"{name}={int(name == 'empathy')}" for name in METRICS]).values())


@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_texts_are_weights_or_refused(texts: list[str]) -> None:
    with suppress(BadWeight):
        assert all(weight >= 0 for weight in parse_weights(texts).values())
