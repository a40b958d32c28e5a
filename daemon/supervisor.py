"""The supervisor: runs a plan in workers, outlives their deaths, and alone writes the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.errors import Interrupted, WorkerCrashed, WorkerRefused
from daemon.grip import Grip
from daemon.settings import Settings
from daemon.workers import WorkerProcess, signal_name
from loops.events import (
    Calibrated,
    Event,
    Failed,
    Finished,
    LevelDone,
    LevelMeasured,
    LevelPlanned,
    LevelStarted,
    Note,
    Opened,
    StepDone,
)
from loops.fingerprint import fingerprint
from loops.pass1.plan import PressPlan
from state.backup import write_backup
from state.blobs import BlobStore
from state.faults import failpoint
from state.files import explained, make_folder
from state.ledger import Ledger, LevelState, MeasurementRow, ResponseRow, RunSpec, RunState

DISK_FULL = 50
TICK_S = 0.1
#: A level over which the worker dies is tried again, so often without a finished step in between, then quarantined.
#: SIGKILL comes from outside, from a person or a kernel short of memory, so it says less about the level.
RETRIES, RETRIES_KILLED = 1, 3

Show = Callable[[Event], None]


def worker_log(state_dir: Path) -> Path:
    """Return the file that takes what workers print, its folder made."""
    with explained(state_dir):
        make_folder(state_dir, 0o700)
        make_folder(state_dir / "logs", 0o700)
    return state_dir / "logs" / "worker.log"


def run_job(job: Mapping[str, Any], state_dir: Path, grip: Grip | None = None, show: Show | None = None,
            polite_s: float = 0.0) -> Finished:
    """Run a job that needs no ledger, to its end; a worker that is killed from outside is started again.

    Args:
        job: what to do, see `loops.worker`.
        state_dir: for the worker's log.
        grip: by which it is stopped or ended; with one it has the lowest priority.
        show: is shown what the worker tells on the way.
        polite_s: where this is more than 0, the end of the grip asks the worker to end, and gives it so many seconds.

    Raises:
        WorkerRefused: with the worker's sentence and exit code; 71 when it died.
        Interrupted: the grip was asked to end it.
    """
    held = grip or Grip()
    killed = 0
    while True:
        with WorkerProcess({**job, "demote": grip is not None}, worker_log(state_dir), held,
                           polite=polite_s > 0) as worker:
            try:
                return _finish(worker, held, show, polite_s)
            except EOFError:
                if held.ended:
                    raise Interrupted(held.reason) from None
                died = signal_name(worker.end()) or "without a word"
                killed += died == "SIGKILL"
                if died != "SIGKILL" or killed > RETRIES_KILLED:
                    raise WorkerRefused(f"the worker died ({died}). {worker.last_words()}", 71) from None


def _finish(worker: WorkerProcess, grip: Grip, show: Show | None, polite_s: float) -> Finished:
    deadline = None
    while True:
        if grip.ended:
            if deadline is None:
                deadline = time.monotonic() + polite_s
                worker.send({"stop": True})
            if time.monotonic() >= deadline:
                raise Interrupted(grip.reason)
        event = worker.next_event(TICK_S)
        if isinstance(event, Failed):
            raise WorkerRefused(event.message, event.exit_code)
        if isinstance(event, Finished):
            return event
        if event is not None and show is not None:
            show(event)


def _hopeless(deaths: int, killed: int) -> bool:
    """Tell whether so many deaths without progress, so many of them by SIGKILL, are enough."""
    return deaths - killed > RETRIES or killed > RETRIES_KILLED


@dataclass
class Attempt:
    """What is known while a worker is at a run.

    Attributes:
        level: being worked on; '' for the original.
        deadline: of that level by the clock of the grip; None for none.
        finished: the end, once it came.
    """

    level: str = ""
    deadline: float | None = None
    finished: Finished | None = None


@dataclass
class Pressing:
    """One run of a plan, over as many workers as it takes.

    Attributes:
        run_id: in the ledger; 0 until the model was opened.
        opened: what was found out about the model.
        settled: levels that are not to be tried, with state and reason.
        resumed: an interrupted run goes on.
        fresh: results of earlier runs are not used; those of this run are.
        own_run: that the same job began before it was interrupted; a fresh one goes on with it.
        opened_run: is given the number of the run as soon as there is one.
        died_early: signals of workers that died before they had opened the model.
    """

    ledger: Ledger
    settings: Settings
    plan: PressPlan
    show: Show
    grip: Grip
    run_id: int = 0
    opened: Opened | None = None
    settled: dict[str, dict[str, str]] = field(default_factory=dict)
    resumed: bool = False
    fresh: bool = False
    own_run: int | None = None
    opened_run: Callable[[int], None] | None = None
    died_early: list[str] = field(default_factory=list)

    def run(self) -> Finished:
        """Carry the plan out, worker after worker; the run stays open, `end_run` is the caller's.

        Raises:
            WorkerRefused: the plan cannot be carried out; the run is recorded as failed, or as
                interrupted where freeing disk lets it go on.
            WorkerCrashed: the worker dies on the original itself.
            Interrupted: the grip was asked to end it; the run can be resumed.
        """
        BlobStore(self.settings.blobs, self.settings.disk_budget_bytes).prepare()
        with explained(self.settings.scratch):
            make_folder(self.settings.scratch, 0o700)
        while True:
            attempt = Attempt()
            status, words = self._attempt(attempt)
            if attempt.finished is not None:
                return attempt.finished
            self._take_note_of_death(attempt, status, words)

    def _attempt(self, attempt: Attempt) -> tuple[int, str]:
        """Run one worker until it finishes, dies or is stopped; return its exit status and last words."""
        job = {"job": "press", "plan": self.plan.as_json(), "known_sha256": self._known_sha256()}
        with WorkerProcess(job, worker_log(self.settings.state_dir), self.grip) as worker:
            while attempt.finished is None:
                if self.grip.ended:
                    worker.end()
                    self._close(RunState.INTERRUPTED, self.grip.reason)
                    raise Interrupted(self.grip.reason)
                if attempt.deadline is not None and self.grip.worked_s() > attempt.deadline:
                    worker.end()
                    self._time_out(attempt)
                    return 0, ""
                try:
                    event = worker.next_event(TICK_S)
                except EOFError:
                    if self.grip.ended:
                        continue  # it was killed on request
                    return worker.end(), worker.last_words()
                if event is not None:
                    self._take(event, attempt, worker)
            return 0, ""

    def _known_sha256(self) -> str | None:
        path = self.plan.model_path.absolute()
        single = "-of-" not in path.name  # the hash of a sharded model is over all its files
        return self.ledger.cached_hash(path) if single and path.is_file() else None

    def _take(self, event: Event, attempt: Attempt, worker: WorkerProcess) -> None:
        """Write down what a worker tells, then show it."""
        ledger, run = self.ledger, self.run_id
        match event:
            case Opened():
                self._open(event)
                worker.send({"steps": self._steps(event.model_sha256), "settled": self.settled})
            case StepDone():
                ledger.record_step(event.fingerprint, run, event.level, event.kind, event.result)
                failpoint("supervisor.step")
            case LevelPlanned():
                ledger.plan_level(run, event.level, event.ordinal, event.forecast_bytes or None)
                ledger.update_level(run, event.level, bits_per_weight=event.bits_per_weight,
                                    fallbacks=event.fallbacks, tensor_types=event.tensor_types)
            case LevelStarted():
                attempt.level = event.level
                attempt.deadline = self.grip.worked_s() + self.plan.timeout_s if self.plan.timeout_s else None
                ledger.update_level(run, event.level, LevelState.WORKING, reason="", signal=None)
                ledger.record_event("level.started", run, event.level)
            case LevelMeasured():
                self._measure(event)
            case Calibrated():
                self._compare(event)
            case LevelDone():
                attempt.level, attempt.deadline = "", None
                self._finish_level(event)
            case Failed():
                # out of disk is no verdict on the run: it goes on when there is space again
                self._close(RunState.INTERRUPTED if event.exit_code == DISK_FULL else RunState.FAILED, event.message)
                raise WorkerRefused(event.message, event.exit_code)
            case Finished():
                attempt.finished = event
            case Note():
                ledger.record_event("note", run or None, None, {"message": event.message})
        self.show(event)

    def _steps(self, model_sha256: str) -> dict[str, Any]:
        if self.plan.simulate:
            return {}
        return self.ledger.steps_of_run(self.run_id) if self.fresh else self.ledger.steps_of_model(model_sha256)

    def _open(self, event: Opened) -> None:
        """Find the interrupted run of this plan, or start one; remember the model's hash."""
        self.opened = event
        if not self.run_id:
            found = self._resumable(event.plan_fingerprint)
            if found is not None:
                self.ledger.resume_run(found)
                self.run_id, self.resumed = found, True
            else:
                self.run_id = self.ledger.start_run(RunSpec(
                    name=event.name, model_path=str(self.plan.model_path.absolute()), model_sha256=event.model_sha256,
                    model_bytes=event.model_bytes, plan={**self.plan.as_json(), "facts": dict(event.facts)},
                    plan_fingerprint=event.plan_fingerprint, engine=str(event.engine["id"]),
                    simulated=self.plan.simulate))
            self.ledger.record_event("run.resumed" if self.resumed else "run.started", self.run_id, None,
                                     {"engine": dict(event.engine)})
            if self.opened_run is not None:
                self.opened_run(self.run_id)
            if "-of-" not in self.plan.model_path.name:
                self.ledger.remember_hash(self.plan.model_path.absolute(), event.model_sha256)
        for key, reason in self.ledger.quarantined().items():
            for level in self._levels():
                if key == self._crash_key(level):
                    self.settled[level] = {"state": "quarantined", "reason": reason}

    def _resumable(self, plan_fingerprint: str) -> int | None:
        """Return the interrupted run to go on with: a fresh one only with the run it began itself."""
        if not self.fresh:
            return self.ledger.find_resumable(plan_fingerprint)
        if self.own_run is None:
            return None
        run = self.ledger.run(self.own_run)
        goes_on = run["state"] == RunState.INTERRUPTED and run["plan_fingerprint"] == plan_fingerprint
        return self.own_run if goes_on else None

    def _levels(self) -> tuple[str, ...]:
        from loops.engine.ladders import ORIGINAL_LADDER, expand

        return expand(self.plan.levels or ORIGINAL_LADDER)

    def _crash_key(self, level: str) -> str:
        """Name what killed the worker: this level of this model with this engine."""
        assert self.opened is not None  # noqa: S101 - only asked for after the model was opened
        return fingerprint("crash", model=self.opened.model_sha256, level=level.upper(),
                           engine=self.opened.engine["id"])

    def _measure(self, event: LevelMeasured) -> None:
        known = MeasurementRow.__dataclass_fields__
        self.ledger.record_measurements(self.run_id, event.level, [
            MeasurementRow(**{name: value for name, value in row.items() if name in known})
            for row in event.measurements])
        if event.responses:
            self.ledger.record_responses(self.run_id, event.level, [ResponseRow(**row) for row in event.responses])
        if event.columns:
            self.ledger.update_level(self.run_id, event.level, **event.columns)

    def _compare(self, event: Calibrated) -> None:
        """Write down what a comparison of importance matrices came to."""
        self.ledger.record_measurements(self.run_id, event.level, [
            MeasurementRow(f"kl_divergence, imatrix {row['matrix']}, held-out {row['text']}", row["kld"],
                           error=row["error"], n=row["n"], unit="nats/token") for row in event.rows])
        self.ledger.record_event("calibration.compared", self.run_id, event.level, {
            "used": event.used, "reason": event.reason, "rows": [dict(row) for row in event.rows]})

    def _finish_level(self, event: LevelDone) -> None:
        self.ledger.update_level(self.run_id, event.level, LevelState(event.state), reason=event.reason,
                                 **event.columns)
        self.ledger.record_event("level.done", self.run_id, event.level,
                                 {"state": event.state, "reason": event.reason})
        write_backup(self.ledger, self.settings.keep_backups)
        self._keep_to_budget()

    def _keep_to_budget(self) -> None:
        """Remove the least recently used blobs over the disk budget; what this run may promote stays."""
        passed = {row["sha256"] for row in self.ledger.candidates(self.run_id)
                  if row["state"] == LevelState.PASSED and row["sha256"]}
        BlobStore(self.settings.blobs, self.settings.disk_budget_bytes).collect(passed)

    def _time_out(self, attempt: Attempt) -> None:
        reason = f"It took longer than the {self.plan.timeout_s:g} s a level may take."
        self.settled[attempt.level] = {"state": "timed_out", "reason": reason}
        self.ledger.update_level(self.run_id, attempt.level, LevelState.TIMED_OUT, reason=reason)
        self.ledger.record_event("level.timed_out", self.run_id, attempt.level)

    def _take_note_of_death(self, attempt: Attempt, status: int, words: str) -> None:
        """Record a dead worker; the second death over the same level without progress quarantines it."""
        if attempt.level in self.settled:
            return  # it was ended for its deadline
        died = signal_name(status) or f"exit status {status}"
        if self.opened is None:
            self.died_early.append(died)
            if _hopeless(len(self.died_early), self.died_early.count("SIGKILL")):
                raise WorkerRefused(f"The worker died before it could open the model ({died}). {words}", 71)
            return
        level, key = attempt.level, self._crash_key(attempt.level)
        self.ledger.record_crash(key, self.run_id, level, died, words)
        self.ledger.record_event("worker.died", self.run_id, level or None, {"signal": died, "words": words})
        count = self.ledger.crashes_without_progress(key, self.run_id, level)
        killed = self.ledger.crashes_without_progress(key, self.run_id, level, "SIGKILL")
        hopeless = _hopeless(count, killed)
        self.show(Note(f"The worker died ({died}) {'on ' + level if level else 'on the original'}; "
                       + ("not tried again." if hopeless else "trying once more.")))
        if not level:
            if hopeless:
                self._close(RunState.FAILED, f"The worker died {count} times on the original ({died}).")
                raise WorkerCrashed(f"The engine dies on the unquantized model ({died}), tried {count} times. {words}")
            return
        self.ledger.update_level(self.run_id, level, LevelState.CRASHED, signal=died,
                                 reason=f"The engine died: {died}.")
        if hopeless:
            reason = (f"The engine died {count} times on it ({died}). `nightpress quarantine --release {key}` "
                      "allows it again.")
            self.ledger.quarantine(key, reason)
            self.settled[level] = {"state": "quarantined", "reason": reason}

    def _close(self, state: RunState, reason: str) -> None:
        if self.run_id:
            self.ledger.end_run(self.run_id, state, reason=reason)
            self.ledger.record_event(f"run.{state}", self.run_id, None, {"reason": reason})
            write_backup(self.ledger, self.settings.keep_backups)
