"""The states of a run, a level, a job and a stage, and the only steps allowed between them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, TypeVar

from state.faults import NightpressError


class IllegalTransition(NightpressError):
    """A run, level, job or stage cannot take this step from its present state; this is a bug, please report it."""

    exit_code: ClassVar[int] = 48


class RunState(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


class LevelState(StrEnum):
    """Where a level of a run stands; everything but planned, working and crashed is a result."""

    PLANNED = "planned"
    WORKING = "working"
    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    REJECTED = "rejected"
    OVERSIZE = "oversize"
    SKIPPED = "skipped"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    ERROR = "error"
    QUARANTINED = "quarantined"


class JobState(StrEnum):
    """Where a job of the service's queue stands."""

    QUEUED = "queued"
    WORKING = "working"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"


class StageState(StrEnum):
    """Where a stage of a fine-tuning stands."""

    WORKING = "working"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


RUN_TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    RunState.RUNNING: frozenset({RunState.INTERRUPTED, RunState.FINISHED, RunState.FAILED}),
    RunState.INTERRUPTED: frozenset({RunState.RUNNING}),
    RunState.FAILED: frozenset({RunState.RUNNING}),
    RunState.FINISHED: frozenset(),
}

# A result is decided anew only by planning or working on the level again, when its run is resumed.
_AGAIN = frozenset({LevelState.PLANNED, LevelState.WORKING})

LEVEL_TRANSITIONS: dict[LevelState, frozenset[LevelState]] = {
    LevelState.PLANNED: frozenset({
        LevelState.WORKING, LevelState.OVERSIZE, LevelState.SKIPPED, LevelState.QUARANTINED,
        LevelState.CRASHED, LevelState.TIMED_OUT, LevelState.ERROR,
    }),
    LevelState.WORKING: frozenset(LevelState) - {LevelState.WORKING},
    LevelState.CRASHED: _AGAIN | {LevelState.QUARANTINED},
    LevelState.PASSED: _AGAIN,
    LevelState.FAILED: _AGAIN,
    LevelState.INCONCLUSIVE: _AGAIN,
    LevelState.REJECTED: _AGAIN,
    LevelState.OVERSIZE: _AGAIN,
    LevelState.SKIPPED: _AGAIN,
    LevelState.TIMED_OUT: _AGAIN,
    LevelState.ERROR: _AGAIN,
    LevelState.QUARANTINED: _AGAIN,
}

JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.WORKING, JobState.CANCELLED, JobState.QUARANTINED}),
    JobState.WORKING: frozenset(JobState) - {JobState.WORKING},
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
    JobState.QUARANTINED: frozenset({JobState.QUEUED}),
}

# What is finished stays so: a stage that is done again, as its files are gone, is another row.
STAGE_TRANSITIONS: dict[StageState, frozenset[StageState]] = {
    StageState.WORKING: frozenset(StageState) - {StageState.WORKING},
    StageState.INTERRUPTED: frozenset({StageState.WORKING}),
    StageState.FAILED: frozenset({StageState.WORKING}),
    StageState.FINISHED: frozenset(),
}

_State = TypeVar("_State", RunState, LevelState, JobState, StageState)
_NAMES = {RunState: "A run", LevelState: "A level", JobState: "A job", StageState: "A stage"}


def advance(old: _State, new: _State) -> _State:
    """Return `new` when the table allows it from `old`; the same state again is always allowed.

    Raises:
        IllegalTransition: when the table has no such step.
    """
    if old is new:
        return new
    table: Mapping[_State, frozenset[_State]]
    table = {RunState: RUN_TRANSITIONS, LevelState: LEVEL_TRANSITIONS, JobState: JOB_TRANSITIONS,
             StageState: STAGE_TRANSITIONS}[type(old)]  # type: ignore[assignment]
    if new not in table[old]:
        raise IllegalTransition(
            f"{_NAMES[type(old)]} cannot go from {old} to {new}; this is a bug, please report it.")
    return new
