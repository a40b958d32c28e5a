"""The foreman: the right job is in work, stopped, ended or begun, and the queue's rows say so."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from traces import SetClock

from daemon.errors import Interrupted, OrderRefused, WorkerCrashed
from daemon.foreman import Foreman
from daemon.grip import Grip
from daemon.hub import Hub
from daemon.intake import Order
from daemon.policy import Action
from daemon.runner import Outcome
from daemon.settings import Settings
from daemon.watchdog import State, Verdict
from loops import events
from loops.engine.gguf_header import NotGguf
from loops.pass1.plan import PressPlan
from state.files import DiskFull
from state.ledger import JobSpec, JobState, Ledger, ReleaseRow, RunSpec, RunState, UnknownJob

IDLE, SETTLING, BUSY = State.IDLE, State.SETTLING, State.BUSY
REASONS = {IDLE: "idle for 3 min", SETTLING: "settling: quiet for 5 of 120 s", BUSY: "busy: cpu 80 % > 15 %"}


@dataclass
class Press:
    """In place of `press`: holds each model until it may `go` or is ended, or ends it by its name in `ends`."""

    ends: dict[str, str | Exception] = field(default_factory=dict)
    tells: tuple[events.Event, ...] = ()
    releases: bool = False
    begun: list[tuple[str, Settings]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    lingers: bool = False  # what was ended is not yet gone

    def __call__(self, ledger: Ledger, settings: Settings, plan: PressPlan, show: Callable[[events.Event], None],
                 grip: Grip, *, opened: Callable[[int], None], **_facts: bool) -> int:
        self.begun.append((plan.name, settings))
        if (run := ledger.find_resumable(plan.name)) is not None:
            ledger.resume_run(run)
        else:
            run = ledger.start_run(RunSpec(plan.name, plan.model, "0" * 64, 9, plan.as_json(), plan.name, "b1"))
        opened(run)
        for event in self.tells:
            show(event)
        end = self.ends.get(plan.name)
        while end is None and not self.go.is_set() and not grip.ended:
            grip.ending.wait(0.01)
        if grip.ended:
            while self.lingers:
                self.go.wait(0.01)
            ledger.end_run(run, RunState.INTERRUPTED, reason=grip.reason)
            raise Interrupted(grip.reason)
        if isinstance(end, Exception):
            ledger.end_run(run, RunState.INTERRUPTED, reason=str(end))
            raise end
        if self.releases:
            ledger.record_release(ReleaseRow(plan.name, 1, run, "Q4_K_M", "a" * 64, 9, "/deploy/1"))
        ledger.end_run(run, RunState.FINISHED, chosen_level=end or "Q4_K_M", reason="The smallest that passed.")
        return run


class Stage:
    """A foreman over a real ledger, its clock in the test's hand."""

    def __init__(self, ledger: Ledger, settings: Settings, press: Press) -> None:
        self.ledger, self.settings, self.press, self.clock, self.hub = ledger, settings, press, SetClock(), Hub()
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.foreman = Foreman(ledger, settings, self.hub, self.outcomes.put)

    def add(self, name: str, **facts: Any) -> int:
        plan = PressPlan(model=f"/{name}.gguf", name=name, blobs="", scratch="")
        return self.foreman.add(JobSpec(name, "command", Order(plan).as_json(), **facts))

    def act(self, state: State, passed_s: float = 0.25, **facts: Any) -> Action:
        verdict = replace(Verdict(state, REASONS[state], 0.0, False, ()), **facts)
        return self.foreman.act(verdict, self.clock.pass_s(passed_s))

    def back(self) -> Outcome:
        outcome = self.outcomes.get(timeout=60)
        self.foreman.came_back(outcome, self.clock.now())
        return outcome

    def row(self, number: int) -> dict[str, Any]:
        return self.ledger.job(number)

    def told(self) -> list[str]:
        return [message.data["action"] for message in self.hub.since(0) if message.kind == "job"]


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Press:
    scripted = Press()
    monkeypatch.setattr("daemon.runner.press", scripted)
    return scripted


@pytest.fixture
def begin(tmp_path: Path, press: Press) -> Iterator[Callable[..., Stage]]:
    with Ledger.open(tmp_path / "state", "test") as ledger:
        stages: list[Stage] = []

        def start(**settings: Any) -> Stage:
            chosen = Settings(state_dir=tmp_path / "state", deploy_dir=tmp_path / "deploy",
                              **{"yield_after_s": 15, "retry_after_s": 60, "max_attempts": 3, **settings})
            stages.append(Stage(ledger, chosen, press))
            return stages[-1]

        yield start
        assert all(stage.foreman.close(60) for stage in stages)
        for thread in (thread for stage in stages for thread in stage.foreman._telling):
            thread.join(60)


@pytest.fixture
def stage(begin: Callable[..., Stage]) -> Stage:
    return begin()


def test_an_idle_machine_does_one_job_after_the_other_in_order(stage: Stage, press: Press) -> None:
    press.go.set()
    numbers = [stage.add("one"), stage.add("two"), stage.add("first", priority=5)]
    assert [row["name"] for row in stage.foreman.waiting] == ["first", "one", "two"]
    for state in (BUSY, SETTLING):
        assert stage.act(state) is Action.NOTHING
    for name in ("first", "one", "two"):
        assert stage.act(IDLE) is Action.START
        outcome = stage.back()
        assert (outcome.chosen, outcome.exit_code, press.begun[-1][0]) == ("Q4_K_M", 0, name)
    assert stage.act(IDLE) is Action.NOTHING
    assert [(row["state"], row["reason"], row["run_id"]) for row in map(stage.row, numbers)] == [
        ("done", "The smallest that passed.", run) for run in (2, 3, 1)]
    assert stage.told()[-6:] == ["job.started", "job.done"] * 3
    assert [row["action"] for row in stage.ledger.events() if row["action"].startswith("job.")] == stage.told()


def test_work_is_stopped_at_once_ended_when_the_machine_stays_busy_and_goes_on_in_the_same_run(stage: Stage,
                                                                                              press: Press) -> None:
    number = stage.add("one")
    stage.add("two")
    stage.act(IDLE)
    work = stage.foreman.runner.work
    assert work is not None
    assert stage.act(BUSY) is Action.STOP
    assert work.grip.stopped
    assert [stage.act(SETTLING, 100), stage.act(IDLE), stage.act(BUSY)] == [
        Action.NOTHING, Action.GO_ON, Action.STOP]
    assert [stage.act(BUSY, 7), stage.act(SETTLING, 100), stage.act(BUSY, 7)] == [Action.NOTHING] * 3
    assert stage.act(BUSY, 1) is Action.YIELD
    assert stage.act(BUSY, 60) is Action.NOTHING, "it ends already"
    assert stage.back().interrupted
    row = stage.row(number)
    assert (row["state"], row["attempts"], row["reason"]) == ("queued", 0, "Made room: busy: cpu 80 % > 15 %.")
    assert stage.act(BUSY) is Action.NOTHING
    press.go.set()
    assert stage.act(IDLE) is Action.START
    stage.back()
    assert stage.row(number)["run_id"] == 1
    assert [name for name, _ in press.begun] == ["one", "one"]


@pytest.mark.parametrize(("short", "gpu_layers", "usable", "then"), [
    (False, 0, True, Action.NOTHING), (True, 0, True, Action.YIELD), (False, -1, True, Action.YIELD),
    (False, -1, False, Action.NOTHING)])
def test_a_worker_that_keeps_scarce_memory_or_a_gpu_is_ended_soon_after_its_stop(
        begin: Callable[..., Stage], press: Press, short: bool, gpu_layers: int, usable: bool, then: Action) -> None:
    stage = begin(gpu_layers=gpu_layers)
    stage.foreman.gpu_layers = None if usable else 0
    stage.add("one")
    stage.act(IDLE)
    assert [stage.act(BUSY, short_memory=short) for _ in range(2)] == [Action.STOP, then]
    stage.foreman.cancel(None)
    stage.back()
    assert press.begun[0][1].gpu_layers == (gpu_layers if usable else 0)


def test_one_that_is_asked_for_displaces_another_and_no_load_stops_it(stage: Stage, press: Press) -> None:
    one, two = stage.add("one"), stage.add("two")
    stage.act(IDLE)
    assert stage.foreman.hasten(two) == two
    assert stage.act(IDLE) is Action.YIELD
    stage.back()
    assert [stage.row(number)["state"] for number in (one, two)] == ["queued", "queued"]
    assert stage.act(BUSY) is Action.START
    assert [stage.act(BUSY, 60) for _ in range(3)] == [Action.NOTHING] * 3
    press.go.set()
    stage.back()
    assert (stage.row(two)["state"], stage.row(one)["state"]) == ("done", "queued")
    assert stage.act(BUSY) is Action.NOTHING


def test_without_a_number_what_is_in_work_is_hastened_or_else_the_next(stage: Stage) -> None:
    with pytest.raises(UnknownJob):
        stage.foreman.hasten(None)
    one = stage.add("one")
    stage.act(IDLE)
    assert (stage.add("two", priority=9), stage.act(BUSY)) == (2, Action.STOP)
    assert stage.foreman.hasten(None) == one
    assert stage.act(BUSY) is Action.GO_ON
    with pytest.raises(UnknownJob):
        stage.foreman.hasten(99)


def test_a_cancelled_job_is_ended_for_good_also_when_it_already_makes_room(stage: Stage, press: Press) -> None:
    for name, yielding in (("one", False), ("two", True)):
        press.lingers = True
        number = stage.add(name)
        stage.act(IDLE)
        if yielding:
            assert [stage.act(BUSY), stage.act(BUSY, 60)] == [Action.STOP, Action.YIELD]
        assert stage.foreman.cancel(number if yielding else None) == ("cancelling", number)
        press.lingers = False
        stage.back()
        assert (stage.row(number)["state"], stage.row(number)["reason"]) == ("cancelled", "Cancelled on request.")
        assert stage.foreman.cancel(number) == ("already_cancelled", number)
        assert stage.act(IDLE) is Action.NOTHING


def test_what_waits_is_removed_and_what_is_in_work_is_not(stage: Stage) -> None:
    assert stage.foreman.cancel(None) == ("nothing_in_work", None)
    one, two, three = map(stage.add, ("one", "two", "three"))
    stage.act(IDLE)
    assert [stage.foreman.remove(two), stage.foreman.remove(two)] == ["removed", "already_cancelled"]
    assert stage.foreman.cancel(three) == ("removed", three)
    with pytest.raises(OrderRefused, match="nightpress cancel"):
        stage.foreman.remove(one)
    for what in (stage.foreman.remove, stage.foreman.cancel):
        with pytest.raises(UnknownJob):
            what(99)
    assert stage.foreman.waiting == ()


def test_a_pause_stops_work_outlives_a_restart_and_ends_when_it_is_over(begin: Callable[..., Stage]) -> None:
    stage = begin()
    number = stage.add("one")
    stage.act(IDLE)
    assert [stage.foreman.pause(), stage.foreman.pause()] == ["paused", "already_paused"]
    assert [stage.act(IDLE), stage.act(IDLE, 14), stage.act(IDLE, 1)] == [Action.STOP, Action.NOTHING, Action.YIELD]
    stage.back()
    with pytest.raises(OrderRefused, match="resume"):
        stage.foreman.hasten(number)
    after = begin()
    assert after.act(IDLE) is Action.NOTHING
    assert [after.foreman.resume(), after.foreman.resume()] == ["resumed", "already_resumed"]
    until = after.clock.now().wall + timedelta(hours=1)
    assert [after.foreman.pause(until), after.foreman.pause(until)] == ["paused", "already_paused"]
    last = begin()
    assert [last.act(IDLE), last.act(IDLE, 3590), last.act(IDLE, 10)] == [Action.NOTHING, Action.NOTHING, Action.START]
    assert last.ledger.in_mind("paused") is None


def test_what_may_go_away_is_tried_later_and_later_and_then_given_up(begin: Callable[..., Stage], press: Press,
                                                                    tmp_path: Path) -> None:
    told = tmp_path / "told"
    stage = begin(on_failure=("/bin/sh", "-c", f"cat > {told}.new && mv {told}.new {told}"))
    press.ends.update(one=DiskFull("The disk is full."), other="Q8_0")
    number, other = stage.add("one"), stage.add("other")
    stage.act(IDLE)
    stage.back()
    assert (stage.row(number)["state"], stage.row(number)["not_before"]) == ("queued", "2026-03-04T12:01:00.250Z")
    assert stage.act(IDLE) is Action.START, "the next one meanwhile"
    stage.back()
    assert stage.row(other)["state"] == "done"
    assert [stage.act(IDLE, 59), stage.act(IDLE, 1)] == [Action.NOTHING, Action.START]
    stage.back()
    assert [stage.act(IDLE, 239), stage.act(IDLE, 1)] == [Action.NOTHING, Action.START]
    stage.back()
    assert (stage.row(number)["state"], stage.row(number)["attempts"]) == ("failed", 3)
    for thread in stage.foreman._telling:
        thread.join(60)
    assert {name: json.loads(told.read_text())[name] for name in ("model", "job", "exit_code", "reason")} == {
        "model": "one", "job": number, "exit_code": 50, "reason": "The disk is full."}


@pytest.mark.parametrize(("problem", "state", "code"), [
    (NotGguf("No GGUF."), "failed", NotGguf.exit_code), (WorkerCrashed("It dies."), "quarantined", 71),
    (ValueError("oh"), "failed", 70)])
def test_what_waiting_does_not_mend_is_given_up_at_once_and_the_next_is_done(
        stage: Stage, press: Press, problem: Exception, state: str, code: int) -> None:
    press.ends["one"], number, other = problem, stage.add("one"), stage.add("other")
    stage.act(IDLE)
    outcome = stage.back()
    assert (outcome.exit_code, stage.row(number)["state"]) == (code, state)
    assert (outcome.bug is not None) is isinstance(problem, ValueError)
    press.go.set()
    stage.act(IDLE)
    stage.back()
    assert stage.row(other)["state"] == "done"
    assert stage.foreman.hasten(number) == number
    assert stage.row(number)["state"] == "queued"


def test_a_job_that_was_begun_too_often_without_progress_is_set_aside(stage: Stage) -> None:
    number = stage.add("one")
    for _ in range(3):  # services that were killed amid it
        stage.ledger.begin_job(number)
        stage.ledger.end_job(number, JobState.QUEUED)
    stage.foreman.refresh()
    assert stage.act(IDLE) is Action.START
    assert stage.foreman.runner.work is None
    assert stage.row(number)["state"] == "quarantined"
    assert stage.told()[-1] == "job.quarantined"


def test_a_row_that_holds_no_order_fails_and_a_deployed_model_that_is_gone_too(stage: Stage) -> None:
    torn = stage.ledger.add_job(JobSpec("torn", "command", {"plan": {"model": "/m"}}))
    gone = stage.foreman.add(JobSpec("gone", "reevaluation", Order(None, deployed="gone").as_json()))
    stage.act(IDLE)
    assert stage.row(torn)["state"] == "failed"
    stage.act(IDLE)
    assert stage.back().exit_code == 16
    assert stage.row(gone)["state"] == "failed"
    with pytest.raises(OrderRefused):
        stage.foreman.add(JobSpec("empty", "command", {}))


def test_progress_makes_the_attempts_count_anew(stage: Stage, press: Press) -> None:
    press.tells = (events.StepDone("f", "score", "", {}), events.StepDone("g", "score", "", {}))
    press.ends["one"] = DiskFull("Full.")
    number = stage.add("one")
    for _ in range(5):
        assert stage.act(IDLE, 1000) is Action.START
        stage.back()
    assert (stage.row(number)["state"], stage.row(number)["attempts"]) == ("queued", 1)


@pytest.mark.parametrize("next_begins_first", [False, True])
def test_a_release_is_told_to_hooks_and_listeners(begin: Callable[..., Stage], press: Press, tmp_path: Path,
                                                  poll: Any, next_begins_first: bool) -> None:
    told = tmp_path / "told"
    stage = begin(on_promote=("/bin/sh", "-c", f"cat > {told}.new && mv {told}.new {told}"))
    press.releases, press.ends["one"] = True, "Q4_K_M"
    stage.add("one")
    stage.add("two")
    stage.act(IDLE)
    poll(stage.outcomes.qsize, 60, "the job's coming back")
    if next_begins_first:
        stage.act(IDLE)
    stage.back()
    assert [message.data["model"] for message in stage.hub.since(0) if message.kind == "release"] == ["one"]
    assert getattr(stage.foreman.last_release, "model", None) == "one"
    for thread in stage.foreman._telling:
        thread.join(60)
    facts = json.loads(told.read_text())
    assert (facts["model"], facts["level"], facts["run"]) == ("one", "Q4_K_M", 1)


def test_who_sees_the_end_of_a_job_sees_its_release(stage: Stage, press: Press, poll: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    press.releases, press.ends["one"] = True, "Q4_K_M"
    stage.add("one")
    stage.act(IDLE)
    poll(stage.outcomes.qsize, 60, "the job's coming back")
    seen, end = [], stage.ledger.end_job
    monkeypatch.setattr(stage.ledger, "end_job", lambda *given, **more: (
        seen.append(stage.foreman.last_release), end(*given, **more)))
    stage.back()
    assert [getattr(release, "model", None) for release in seen] == ["one"]


def test_the_end_of_the_service_ends_the_work_and_begins_no_other(stage: Stage) -> None:
    number = stage.add("one")
    stage.add("two")
    stage.act(IDLE)
    stage.act(BUSY)
    assert stage.foreman.close(60)
    assert stage.act(IDLE) is Action.NOTHING
    stage.back()
    assert (stage.row(number)["state"], stage.row(number)["attempts"]) == ("queued", 0)


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_cancelled_job_stays_cancelled_in_the_moment_it_comes_back(stage: Stage, poll: Any,
                                                                    cancelled_first: bool) -> None:
    one, _ = stage.add("one"), stage.add("two")
    stage.act(IDLE)
    _ = [stage.foreman.cancel(one)] if cancelled_first else [stage.act(BUSY), stage.act(BUSY, 60)]
    poll(stage.outcomes.qsize, 60, "the job's coming back")
    _ = [stage.act(IDLE)] if cancelled_first else [stage.foreman.cancel(one)]
    stage.back()
    assert stage.row(one)["state"] == "cancelled"


def test_a_disk_that_fills_up_while_an_end_is_recorded_changes_no_end(stage: Stage,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    number = stage.add("one")
    stage.act(IDLE)
    stage.foreman.cancel(number)
    outcome = stage.outcomes.get(timeout=60)
    monkeypatch.setattr("state.faults._passages", {})
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", "ledger.commit@2:raise:ENOSPC")  # the job's row, then the event
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    with pytest.raises(DiskFull):
        stage.foreman.came_back(outcome, stage.clock.now())
    assert stage.row(number)["state"] == "cancelled"
    stage.foreman.came_back(outcome, stage.clock.now())
    assert stage.row(number)["state"] == "cancelled"
