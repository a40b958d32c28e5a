"""What the service does next, decided over what it sees: stop at once, begin only when nobody is in the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.policy import POISON, TRANSIENT, Action, Next, Situation, after_problem, after_yield, decide
from state.states import JobState

YIELD_AFTER_S = 15.0
IDLE, SETTLING, BUSY = (Situation(verdict) for verdict in ("idle", "settling", "busy"))
SITUATIONS = st.builds(
    Situation, verdict=st.sampled_from(("idle", "settling", "busy")), paused=st.booleans(), working=st.booleans(),
    urgent=st.booleans(), stopped=st.booleans(), ending=st.booleans(), holds_gpu=st.booleans(),
    short_memory=st.booleans(), busy_s=st.floats(0, 1000), next_job=st.booleans(), next_urgent=st.booleans())


def at_work(seen: Situation, **facts: Any) -> Situation:
    return replace(seen, working=True, **facts)


def stopped(seen: Situation, **facts: Any) -> Situation:
    return at_work(seen, stopped=True, **facts)


@pytest.mark.parametrize(("seen", "action"), [
    # nothing in work
    (IDLE, Action.NOTHING),
    (replace(IDLE, next_job=True), Action.START),
    (replace(SETTLING, next_job=True), Action.NOTHING),
    (replace(BUSY, next_job=True), Action.NOTHING),
    (replace(BUSY, next_job=True, next_urgent=True), Action.START),
    (replace(SETTLING, next_job=True, next_urgent=True), Action.START),
    (replace(IDLE, next_job=True, paused=True), Action.NOTHING),
    (replace(IDLE, next_job=True, next_urgent=True, paused=True), Action.NOTHING),
    (replace(IDLE, next_urgent=True), Action.NOTHING),
    # at work
    (at_work(IDLE), Action.NOTHING),
    (at_work(SETTLING), Action.NOTHING),
    (at_work(BUSY), Action.STOP),
    (at_work(BUSY, urgent=True), Action.NOTHING),
    (at_work(IDLE, paused=True), Action.STOP),
    (at_work(IDLE, paused=True, urgent=True), Action.STOP),
    (at_work(IDLE, next_job=True), Action.NOTHING),
    # stopped
    (stopped(IDLE), Action.GO_ON),
    (stopped(SETTLING), Action.NOTHING),
    (stopped(SETTLING, busy_s=1000), Action.NOTHING),
    (stopped(BUSY), Action.NOTHING),
    (stopped(BUSY, busy_s=YIELD_AFTER_S - 0.01), Action.NOTHING),
    (stopped(BUSY, busy_s=YIELD_AFTER_S), Action.YIELD),
    (stopped(BUSY, short_memory=True), Action.YIELD),
    (stopped(BUSY, holds_gpu=True), Action.YIELD),
    (stopped(IDLE, holds_gpu=True, short_memory=True, busy_s=1000), Action.GO_ON),
    (stopped(BUSY, urgent=True), Action.GO_ON),
    (stopped(IDLE, paused=True), Action.NOTHING),
    (stopped(IDLE, paused=True, urgent=True), Action.NOTHING),
    (stopped(IDLE, paused=True, busy_s=YIELD_AFTER_S), Action.YIELD),
    (stopped(IDLE, paused=True, urgent=True, busy_s=YIELD_AFTER_S), Action.YIELD),
    # one that was asked for displaces one that was not
    (at_work(IDLE, next_job=True, next_urgent=True), Action.YIELD),
    (stopped(BUSY, next_job=True, next_urgent=True), Action.YIELD),
    (at_work(IDLE, urgent=True, next_job=True, next_urgent=True), Action.NOTHING),
    (at_work(IDLE, paused=True, next_job=True, next_urgent=True), Action.STOP),
    # it ends already
    (at_work(BUSY, ending=True), Action.NOTHING),
    (at_work(BUSY, ending=True, paused=True, next_job=True, next_urgent=True), Action.NOTHING),
    (stopped(BUSY, ending=True, short_memory=True, holds_gpu=True, busy_s=1000), Action.NOTHING),
    (stopped(IDLE, ending=True), Action.NOTHING),
])
def test_every_situation_has_its_action(seen: Situation, action: Action) -> None:
    assert decide(seen, YIELD_AFTER_S) is action


@given(SITUATIONS, st.floats(0, 600))
def test_work_begins_or_goes_on_only_when_idle_or_asked_for(seen: Situation, yield_after_s: float) -> None:
    action = decide(seen, yield_after_s)
    if action is Action.START:
        assert seen.verdict == "idle" or seen.next_urgent
    if action is Action.GO_ON:
        assert seen.verdict == "idle" or seen.urgent


@given(SITUATIONS, st.floats(0, 600))
def test_there_is_no_work_while_paused(seen: Situation, yield_after_s: float) -> None:
    paused = replace(seen, paused=True)
    action = decide(paused, yield_after_s)
    assert action not in (Action.START, Action.GO_ON)
    if paused.working and not paused.stopped and not paused.ending:
        assert action is Action.STOP


@given(SITUATIONS, st.floats(0, 600))
def test_work_beside_a_busy_machine_is_always_stopped_or_ended(seen: Situation, yield_after_s: float) -> None:
    busy = replace(seen, verdict="busy", working=True, urgent=False, stopped=False, ending=False)
    assert decide(busy, yield_after_s) in (Action.STOP, Action.YIELD)


@given(SITUATIONS, st.floats(0, 600), st.floats(0, 600))
def test_a_stopped_worker_of_a_machine_that_stays_busy_is_always_ended(
        seen: Situation, yield_after_s: float, more_s: float) -> None:
    busy = replace(seen, verdict="busy", working=True, urgent=False, stopped=True, ending=False,
                   busy_s=yield_after_s + more_s)
    assert decide(busy, yield_after_s) is Action.YIELD


@given(SITUATIONS, st.floats(0, 600))
def test_what_was_asked_for_is_never_stopped_by_load(seen: Situation, yield_after_s: float) -> None:
    urgent = replace(seen, working=True, urgent=True, paused=False)
    assert decide(urgent, yield_after_s) not in (Action.STOP, Action.YIELD)


@given(SITUATIONS, st.floats(0, 600))
def test_an_action_always_fits_what_is_there(seen: Situation, yield_after_s: float) -> None:
    action = decide(seen, yield_after_s)
    if action is Action.START:
        assert not seen.working
        assert seen.next_job
    elif action is not Action.NOTHING:
        assert seen.working
        assert not seen.ending
    if action is Action.STOP:
        assert not seen.stopped
    if action is Action.GO_ON:
        assert seen.stopped


# --- what becomes of a job that came back ---


def test_poison_is_set_aside_at_once() -> None:
    assert after_problem(POISON, "It dies.", 1, 60, 5) == Next(JobState.QUARANTINED, "It dies.", given_up=True)


@pytest.mark.parametrize("code", sorted(TRANSIENT))
def test_what_may_go_away_is_tried_again_four_times_later_each_time_and_then_given_up(code: int) -> None:
    tried = [after_problem(code, "No.", attempts, 60, 4) for attempts in range(1, 5)]
    assert [found.delay_s for found in tried] == [60, 240, 960, 0]
    assert [found.state for found in tried] == [JobState.QUEUED] * 3 + [JobState.FAILED]
    assert [found.given_up for found in tried] == [False] * 3 + [True]
    assert all(found.attempts is None and found.reason == "No." for found in tried)


@pytest.mark.parametrize("code", [1, 3, 16, 20, 45, 70, 72, 78, 130])
def test_what_waiting_does_not_mend_is_not_tried_again(code: int) -> None:
    assert after_problem(code, "Bad file.", 1, 60, 5) == Next(JobState.FAILED, "Bad file.", given_up=True)


def test_one_attempt_at_most_means_no_second() -> None:
    assert after_problem(min(TRANSIENT), "No.", 1, 60, 1).state is JobState.FAILED


def test_the_problems_that_may_go_away_are_those_of_memory_disk_and_judge() -> None:
    from daemon.errors import WorkerCrashed
    from daemon.providers import JudgeFailed
    from loops.engine.model import OutOfMemory
    from loops.pass1.plan import CannotFinish
    from state.files import DiskFull, StateUnwritable

    found = {error.exit_code for error in (CannotFinish, DiskFull, JudgeFailed, OutOfMemory, StateUnwritable)}
    assert found == set(TRANSIENT)
    assert WorkerCrashed.exit_code == POISON


def test_nothing_is_held_against_a_job_that_made_room() -> None:
    assert after_yield("Made room.", 3) == Next(JobState.QUEUED, "Made room.", attempts=2)
    assert after_yield("Made room.", 0).attempts == 0
