"""The ladder tries as few levels as it can and chooses what the user prefers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops.pass1.ladder import PREFERENCES, Rung, choose, next_level

STATES = ("passed", "failed", "rejected", "inconclusive", "error", "crashed", "timeout")


def climb(strategy: str, outcomes: list[str]) -> dict[str, str]:
    """Try levels until nothing is left to try; return what was tried, in order, with its outcome."""
    order = [f"L{index}" for index in range(len(outcomes))]
    ended: dict[str, str] = {}
    while (name := next_level(strategy, order, ended)) is not None:
        assert name not in ended
        ended[name] = outcomes[order.index(name)]
    return ended


def smallest(ended: dict[str, str]) -> str | None:
    return max((name for name, state in ended.items() if state == "passed"), default=None,
               key=lambda name: int(name[1:]))


monotone = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(
    lambda counts: ["passed"] * counts[0] + ["failed"] * counts[1])
anything = st.lists(st.sampled_from(STATES), max_size=20)


@given(monotone)
def test_bisecting_finds_the_smallest_that_passes_when_loss_grows_as_size_falls(outcomes: list[str]) -> None:
    passing = outcomes.count("passed")
    assert smallest(climb("bisect", outcomes)) == (f"L{passing - 1}" if passing else None)


@given(monotone)
def test_bisecting_tries_no_more_than_the_logarithm(outcomes: list[str]) -> None:
    assert len(climb("bisect", outcomes)) <= math.ceil(math.log2(len(outcomes) + 1))


@given(monotone)
def test_walking_and_bisecting_choose_the_same_when_loss_grows_as_size_falls(outcomes: list[str]) -> None:
    assert smallest(climb("bisect", outcomes)) == smallest(climb("walk", outcomes))


@given(anything)
def test_bisecting_ends_and_finds_a_pass_only_where_there_is_one(outcomes: list[str]) -> None:
    found = smallest(climb("bisect", outcomes))
    assert found is None or outcomes[int(found[1:])] == "passed"


@given(anything)
def test_walking_stops_exactly_after_the_first_clear_failure_below_a_pass(outcomes: list[str]) -> None:
    passed, expected = False, len(outcomes)
    for index, state in enumerate(outcomes):
        if passed and state in {"failed", "rejected"}:
            expected = index + 1
            break
        passed = passed or state == "passed"
    assert list(climb("walk", outcomes)) == [f"L{index}" for index in range(expected)]


@pytest.mark.parametrize("state", ["inconclusive", "error", "crashed", "timeout"])
def test_walking_goes_on_after_what_says_nothing_about_smaller_levels(state: str) -> None:
    assert smallest(climb("walk", ["passed", state, "passed", "failed"])) == "L2"


def test_walking_goes_on_as_long_as_nothing_passed() -> None:
    assert len(climb("walk", ["failed", "rejected", "failed"])) == 3


def test_walking_goes_on_after_a_failure_above_the_first_pass() -> None:
    assert smallest(climb("walk", ["failed", "passed", "passed", "failed", "passed"])) == "L2"


@pytest.mark.parametrize("strategy", ["walk", "bisect"])
def test_an_empty_ladder_has_nothing_to_try(strategy: str) -> None:
    assert next_level(strategy, [], {}) is None


RUNGS = (Rung("Q8_0", "passed", 8_000_000_000, 0.80), Rung("Q6_K", "passed", 6_000_000_000, 0.81),
         Rung("Q4_K_M", "passed", 4_000_000_000, 0.70), Rung("Q2_K", "failed", 2_000_000_000, 0.99),
         Rung("IQ1_S", "inconclusive", 1_000_000_000, 1.0))


@pytest.mark.parametrize(("prefer", "level"), [("smallest", "Q4_K_M"), ("score", "Q6_K"), ("score-per-gb", "Q4_K_M")])
def test_the_choice_follows_the_preference(prefer: str, level: str) -> None:
    chosen, reason = choose(prefer, RUNGS)
    assert chosen is not None
    assert chosen.level == level
    assert reason.startswith(level)
    assert "3 that passed" in reason


def test_score_per_gb_may_prefer_a_larger_level() -> None:
    chosen, reason = choose("score-per-gb", (Rung("A", "passed", 10**9, 0.9), Rung("B", "passed", 9 * 10**8, 0.1)))
    assert chosen is not None
    assert chosen.level == "A"
    assert "(0.9)" in reason


def test_of_equal_scores_the_smaller_level_is_chosen() -> None:
    chosen, _ = choose("score", (Rung("A", "passed", 2, 0.5), Rung("B", "passed", 1, 0.5), Rung("C", "passed", 3, 0.5)))
    assert chosen is not None
    assert chosen.level == "B"


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_nothing_is_chosen_when_nothing_passed(prefer: str) -> None:
    chosen, reason = choose(prefer, RUNGS[3:])
    assert chosen is None
    assert reason == "No level passed, so nothing is promoted."


@given(st.sampled_from(PREFERENCES), st.lists(st.builds(
    Rung, st.text(min_size=1, max_size=3), st.sampled_from(STATES), st.integers(1, 10**12), st.floats(0, 1))))
def test_only_what_passed_is_ever_chosen(prefer: str, rungs: list[Rung]) -> None:
    chosen, _ = choose(prefer, rungs)
    assert (chosen is None) == all(rung.state != "passed" for rung in rungs)
    assert chosen is None or (chosen in rungs and chosen.state == "passed")
