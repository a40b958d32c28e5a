"""Which level is recommended for a task and a memory, and that the reason says where it comes from."""

from __future__ import annotations

from typing import Any

import pytest

from loops.engine.inspection import TASKS, Measured, Survey, expected_shares, recommend
from loops.engine.ladders import EXPECTED
from loops.engine.memory import ContextMemory, Room, room_of

BITS = {"Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q5_K_S": 5.6, "Q4_K_M": 4.9, "IQ4_XS": 4.4, "Q3_K_L": 4.3,
        "IQ2_M": 2.9, "Q2_K": 3.2}
Row = dict[str, Any]


def rows(yes: float = 99.0, tight: float = 99.0) -> list[Row]:
    """Levels of a model of 8 G weights, in a memory with so many bits per weight free and in all."""
    found = [{"level": name, "bytes": int(bits * 1e9), "memory": int(bits * 1e9), "quantized": True,
              "needs_imatrix": name.startswith("IQ2"),
              "fits": "yes" if bits <= yes else "tight" if bits <= tight else "no"} for name, bits in BITS.items()]
    return [*found, {**found[0], "level": "F16", "bytes": int(16e9), "quantized": False}]


def measured(kld_share: float, state: str = "failed", run: int = 7) -> Measured:
    return Measured(run, kld_share, kld_share, 10, state)


def test_the_smallest_level_that_keeps_enough_is_recommended() -> None:
    assert {task: recommend(rows(), task, {})["level"] for task in TASKS} == {
        "chat": "Q4_K_M", "commands": "Q5_K_S", "code": "Q5_K_M"}


def test_code_and_commands_are_given_more_than_chat() -> None:
    limits = {task: EXPECTED[level] for task, level in TASKS.items()}
    assert limits["code"] < limits["commands"] < limits["chat"]


def test_an_expectation_says_that_it_is_none_of_this_model() -> None:
    found = recommend(rows(), "code", {})
    assert not found["measured"]
    assert "Llama-3-8B" in found["reason"]
    assert "`nightpress run` measures" in found["reason"]


def test_what_is_free_is_preferred_to_what_the_machine_has() -> None:
    assert recommend(rows(yes=5.0), "chat", {})["level"] == "Q4_K_M"
    tight = recommend(rows(yes=4.0, tight=6.0), "code", {})
    assert tight["level"] == "Q5_K_M"
    assert "only when other programs give way" in tight["reason"]


def test_where_nothing_is_good_enough_the_nearest_comes_with_a_warning() -> None:
    found = recommend(rows(yes=3.0, tight=3.0), "code", {})
    assert found["level"] == "IQ2_M"
    assert "Expect mistakes" in found["reason"]
    assert "needs an importance matrix" in found["reason"]


def test_where_nothing_fits_nothing_is_recommended() -> None:
    found = recommend(rows(yes=1.0, tight=1.0), "chat", {})
    assert found["level"] is None
    assert "--context" in found["reason"]


def test_what_passed_on_this_machine_goes_before_every_table() -> None:
    found = recommend(rows(), "chat", {"Q2_K": measured(0.3, "passed"), "Q6_K": measured(0.1, "passed")})
    assert (found["level"], found["measured"]) == ("Q2_K", True)
    assert "run 7" in found["reason"]
    assert "Llama" not in found["reason"]


def test_passing_a_chat_says_nothing_of_code() -> None:
    assert recommend(rows(), "code", {"Q2_K": measured(0.3, "passed")})["level"] != "Q2_K"


@pytest.mark.parametrize("state", ["failed", "rejected"])
def test_what_failed_on_this_machine_is_not_recommended(state: str) -> None:
    assert recommend(rows(), "chat", {"Q4_K_M": measured(EXPECTED["Q4_K_M"], state)})["level"] == "Q5_K_S"


def test_measurements_scale_what_is_expected_of_the_other_levels() -> None:
    worse = {"Q6_K": measured(3 * EXPECTED["Q6_K"], "skipped"), "Q8_0": measured(3 * EXPECTED["Q8_0"], "skipped")}
    shares = expected_shares(worse)
    assert shares["Q4_K_M"] == pytest.approx(3 * EXPECTED["Q4_K_M"])
    assert shares["Q6_K"] == worse["Q6_K"].share
    found = recommend(rows(), "chat", worse)
    assert found["level"] == "Q6_K"
    assert "measured in run 7" in found["reason"]
    assert "scaled by what runs" in recommend(rows(yes=5.0, tight=5.0), "chat", worse)["reason"]


def test_a_level_that_no_table_knows_is_not_recommended_unmeasured() -> None:
    strange = {**rows()[0], "level": "MXFP4_MOE", "bytes": 1, "memory": 1}
    assert recommend([strange, *rows()], "code", {})["level"] == "Q5_K_M"


def test_the_original_is_no_recommendation() -> None:
    only = [row for row in rows() if not row["quantized"]]
    assert recommend(only, "chat", {})["level"] is None


def test_memory_fits_where_it_is_free_and_is_tight_where_others_hold_it() -> None:
    room = Room(total=10, free=6)
    assert [room.fits(needed) for needed in (6, 7, 10, 11)] == ["yes", "tight", "tight", "no"]
    assert room_of(100) == Room(100, 75)
    assert ContextMemory(1, cache=1, window_cache=0, compute=20, process=300).total == 321


def test_a_survey_comes_from_json_and_another_machine_is_not_empty() -> None:
    found = Survey.from_json({"room": {"total": 100}, "cells": 5, "measured": {
        "Q8_0": {"run": 1, "kld": 0.1, "share": 0.2, "n_bytes": 3, "state": "passed"}}})
    assert found == Survey(Room(100, 75), 5, measured={"Q8_0": Measured(1, 0.1, 0.2, 3, "passed")})
    assert Survey.from_json({"room": {"total": 100, "free": 0}}).room == Room(100, 0)
