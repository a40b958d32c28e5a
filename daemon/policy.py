"""What the service does next: a decision over what it sees, without a clock or a process in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from state.states import JobState

#: exit codes of problems that may go away by themselves: no memory, no disk, not writable, a judge that does not answer
TRANSIENT = frozenset({35, 50, 51, 58, 67})
#: the engine died on the unquantized model, again and again
POISON = 71


class Action(StrEnum):
    """What to do about the work."""

    NOTHING = "nothing"
    START = "start"  # begin the next job
    STOP = "stop"  # SIGSTOP: it keeps its memory
    GO_ON = "go on"
    YIELD = "yield"  # end the worker; the job waits, and goes on at the same step


@dataclass(frozen=True)
class Situation:
    """What the service sees.

    Attributes:
        verdict: `idle`, `settling` or `busy`.
        paused: somebody asked for no work.
        working: a job is in work.
        urgent: it was asked for whatever the load.
        stopped: its worker is stopped.
        ending: it was asked to end already.
        holds_gpu: its worker holds a context on a GPU, which stays when it is stopped.
        short_memory: memory is what is short.
        busy_s: how long in all the machine was busy since the worker was stopped.
        next_job: one may start now.
        next_urgent: it is to start whatever the load.
    """

    verdict: str
    paused: bool = False
    working: bool = False
    urgent: bool = False
    stopped: bool = False
    ending: bool = False
    holds_gpu: bool = False
    short_memory: bool = False
    busy_s: float = 0.0
    next_job: bool = False
    next_urgent: bool = False


def decide(seen: Situation, yield_after_s: float) -> Action:
    """Return what to do now.

    Stopping comes first and at once; ending the worker, which frees its memory, when the machine stays
    busy, is short of memory, or the stopped worker would keep a GPU.
    """
    if seen.working:
        return _about_work(seen, yield_after_s)
    if seen.paused or not seen.next_job:
        return Action.NOTHING
    return Action.START if seen.next_urgent or seen.verdict == "idle" else Action.NOTHING


def _about_work(seen: Situation, yield_after_s: float) -> Action:
    if seen.ending:
        return Action.NOTHING
    if seen.next_urgent and not seen.urgent and not seen.paused:
        return Action.YIELD
    needed = seen.paused or (seen.verdict == "busy" and not seen.urgent)
    if not seen.stopped:
        return Action.STOP if needed else Action.NOTHING
    if needed and (seen.holds_gpu or seen.short_memory or seen.busy_s >= yield_after_s):
        return Action.YIELD
    may_go_on = not seen.paused and (seen.urgent or seen.verdict == "idle")
    return Action.GO_ON if may_go_on else Action.NOTHING


@dataclass(frozen=True)
class Next:
    """What becomes of a job that came back.

    Attributes:
        state: of the job.
        reason: a sentence.
        delay_s: before it may start again; 0 for at once.
        attempts: to be counted; None leaves what is counted.
        given_up: somebody should be told.
    """

    state: JobState
    reason: str
    delay_s: float = 0.0
    attempts: int | None = None
    given_up: bool = False


def after_problem(exit_code: int, reason: str, attempts: int, retry_after_s: float, max_attempts: int) -> Next:
    """Return what becomes of a job that failed.

    What may go away by itself is tried again, four times later each time; an engine that dies on the
    original is poison and set aside; anything else will not get better by waiting.

    Args:
        exit_code: of the problem.
        reason: its sentence.
        attempts: so far without progress, this one included.
        retry_after_s: before the second attempt.
        max_attempts: after which it is given up.
    """
    if exit_code == POISON:
        return Next(JobState.QUARANTINED, reason, given_up=True)
    if exit_code in TRANSIENT and attempts < max_attempts:
        return Next(JobState.QUEUED, reason, delay_s=retry_after_s * 4.0 ** (attempts - 1))
    return Next(JobState.FAILED, reason, given_up=True)


def after_yield(reason: str, attempts: int) -> Next:
    """Return what becomes of a job that was ended to make room: it waits, and nothing is held against it."""
    return Next(JobState.QUEUED, reason, attempts=max(0, attempts - 1))
