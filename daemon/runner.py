"""The runner: one job at a time, on a thread of its own, held by a grip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from daemon.course import Course, Place, StagedCourse
from daemon.engine import engine_options
from daemon.errors import Interrupted
from daemon.grip import Grip
from daemon.intake import Order
from daemon.pressing import press
from daemon.settings import Settings
from daemon.supervisor import run_job
from loops import events
from state import releases
from state.faults import NightpressError
from state.files import sha256_file
from state.ledger import JobState, Ledger


class DeployedDamaged(NightpressError):
    """The deployed file is not what was released; `nightpress rollback` goes back to the release before."""

    exit_code = 16


@dataclass(frozen=True)
class Outcome:
    """How a job came back.

    Attributes:
        job_id: which.
        run_id: of the run it led to, if it came so far.
        reason: a sentence.
        chosen: level that was chosen.
        interrupted: it was ended on request and can go on.
        exit_code: of the problem; 0 for none.
        bug: traceback of an error that nobody foresaw.
        made: what a fine-tuning came to, as `Finetuned.as_json` says it.
    """

    job_id: int
    run_id: int | None = None
    reason: str = ""
    chosen: str | None = None
    interrupted: bool = False
    exit_code: int = 0
    bug: str | None = None
    made: Mapping[str, Any] | None = None


@dataclass
class Work:
    """The job in work, until its end is recorded.

    Attributes:
        job: its row.
        order: what is to be done.
        settings: where things lie.
        grip: on its processes.
        course: how far it is.
        began_s: by the clock of the grip.
        releases: number of the last release before it began.
        run_id: of its run, once there is one.
        fate: the state and reason it gets when it was ended for good.
    """

    job: dict[str, Any]
    order: Order
    settings: Settings
    grip: Grip
    course: Course
    began_s: float
    releases: int = 0
    run_id: int | None = None
    fate: tuple[JobState, str] | None = None

    @property
    def place(self) -> Place:
        """Where it is."""
        return self.course.place

    def worked_s(self) -> float:
        """Return how long it has worked, without the time it was stopped."""
        return self.grip.worked_s() - self.began_s


class Runner:
    """Runs jobs, one at a time; `work` is the one at hand."""

    def __init__(self, ledger: Ledger, show: Callable[[int, events.Event], None],
                 done: Callable[[Outcome], None]) -> None:
        """Prepare.

        Args:
            ledger: open for writing.
            show: is given the number of the job and every event, on the runner's thread.
            done: is given the outcome, on the runner's thread, when nothing of the job runs any more; then
                `clear` is to be called, as soon as the outcome is recorded.
        """
        self._ledger, self._show, self._done = ledger, show, done
        self._thread: threading.Thread | None = None
        self.work: Work | None = None

    def start(self, job: dict[str, Any], order: Order, settings: Settings) -> Work:
        """Begin a job; the one before must have come back."""
        if self.work is not None:
            raise RuntimeError("a job is in work")
        grip = Grip()
        releases = max((row["id"] for row in self._ledger.releases()), default=0)
        self.work = work = Work(job, order, settings, grip, Course(), grip.worked_s(), releases)
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"job-{job['id']}", daemon=True)
        self._thread.start()
        return work

    def clear(self) -> None:
        """Forget the job that came back."""
        self.work = None

    def finish(self, timeout_s: float) -> bool:
        """Wait for the job to come back after its grip was ended; tell whether it did."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, work: Work) -> None:
        number = int(work.job["id"])
        progress: list[bool] = []

        def show(event: events.Event) -> None:
            work.course.take(event, work.worked_s())
            if isinstance(event, events.StepDone) and not progress and work.run_id is not None:
                progress.append(True)
                self._ledger.note_progress(number, work.run_id)
            self._show(number, event)

        try:
            outcome = self._carry_out(work, number, show)
        except Interrupted as problem:
            outcome = Outcome(number, work.run_id, work.grip.reason or str(problem), interrupted=True)
        except NightpressError as problem:
            outcome = Outcome(number, work.run_id, str(problem), exit_code=problem.exit_code)
        except Exception as problem:  # noqa: BLE001 - a bug in one job must not end the service; the log gets all of it
            import traceback

            outcome = Outcome(number, work.run_id, f"A bug: {type(problem).__name__}: {problem}.",
                              exit_code=70, bug=traceback.format_exc())
        self._done(outcome)

    def _carry_out(self, work: Work, number: int, show: Callable[[events.Event], None]) -> Outcome:
        def opened(found: int) -> None:
            work.run_id = found

        order = work.order
        if order.finetune is not None:
            return self._fine_tune(work, order.finetune, number, show)
        if order.deployed is not None:
            show(events.Progress("verifying the release", "", 0, 1))
            verify_deployed(work.settings, order.deployed, work.grip)
        if order.plan is None:
            return Outcome(number, None, f"The deployed file of {order.deployed} is whole and answers.")
        run_id = press(self._ledger, work.settings, order.plan, show, work.grip, promoting=order.promoting,
                       fresh=order.fresh, own_run=work.job["run_id"], opened=opened)
        run = self._ledger.run(run_id)
        return Outcome(number, run_id, run["reason"], run["chosen_level"])


    def _fine_tune(self, work: Work, wanted: Mapping[str, Any], number: int,
                   show: Callable[[events.Event], None]) -> Outcome:
        from daemon.finetune_config import FinetuneSpec
        from daemon.finetuning import finetune

        course = work.course = StagedCourse()
        done = finetune(FinetuneSpec.of(wanted), self._ledger, work.settings, work.grip, show, began=course.begin)
        reason = f"{done.chosen} is released." if done.release else f"{len(done.stages)} stages are done."
        return Outcome(number, done.run_id, reason, done.chosen, made=done.as_json())


def verify_deployed(settings: Settings, model: str, grip: Grip) -> None:
    """Make sure that the deployed file of a model is what was released, loads and answers.

    Raises:
        DeployedDamaged: it does not.
        Interrupted: the grip was asked to end it.
    """
    release = releases.current(settings.deploy, model)
    if release is None:
        raise DeployedDamaged(f"{model} is not deployed any more.")
    if sha256_file(release.model_path) != release.manifest.sha256:
        raise DeployedDamaged(f"{release.model_path} is not the file that was released; `nightpress rollback {model}` "
                              "goes back to the release before.")
    options = engine_options(settings, grip)
    job = {"job": "smoke", "model": str(release.model_path), "sha256": release.manifest.sha256}
    run_job({**job, "options": asdict(options)}, settings.state_dir, grip)

