"""One enum of states, one table: what is not in the table raises."""

from __future__ import annotations

import itertools

import pytest

from state.states import LEVEL_TRANSITIONS, RUN_TRANSITIONS, IllegalTransition, LevelState, RunState, advance


def test_every_state_has_a_row() -> None:
    assert set(LEVEL_TRANSITIONS) == set(LevelState)
    assert set(RUN_TRANSITIONS) == set(RunState)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(LevelState, LevelState)))
def test_a_level_takes_only_steps_of_the_table(old: LevelState, new: LevelState) -> None:
    if old is new or new in LEVEL_TRANSITIONS[old]:
        assert advance(old, new) is new
    else:
        with pytest.raises(IllegalTransition, match=f"from {old} to {new}"):
            advance(old, new)


def test_a_result_is_never_turned_into_another_without_work() -> None:
    results = set(LevelState) - {LevelState.PLANNED, LevelState.WORKING, LevelState.CRASHED}
    for old, new in itertools.permutations(results, 2):
        assert new not in LEVEL_TRANSITIONS[old]


def test_a_finished_run_stays_finished() -> None:
    assert advance(RunState.FINISHED, RunState.FINISHED) is RunState.FINISHED
    for state in set(RunState) - {RunState.FINISHED}:
        with pytest.raises(IllegalTransition):
            advance(RunState.FINISHED, state)
