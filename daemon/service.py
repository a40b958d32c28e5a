"""The service: composes the parts and runs the main loop.

One thread, the main loop, decides everything: others only post to its inbox. It alone pings the
service manager's watchdog, so a loop that hangs is seen. Times are handed in by a clock.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from daemon import scheduler as due
from daemon.clock import Clock, Moment, SystemClock
from daemon.errands import REEVALUATED, Errands
from daemon.errors import ServiceRefused
from daemon.foreman import Foreman, utc
from daemon.hub import Hub
from daemon.intake import declared
from daemon.logs import Logs, say
from daemon.notify import Notifier
from daemon.runner import Outcome
from daemon.scheduler import Scheduler
from daemon.settings import Settings
from daemon.watchdog import Limits, Reading, State, Verdict, Watchdog
from state.backup import write_backup
from state.check import tidy
from state.faults import NightpressError, failpoint
from state.ledger import JobState, Ledger, RunState

T = TypeVar("T")

WORKING_TICK_S = 0.25  #: between looks while a job is in work: somebody who is back waits no longer
JUMPED_S = 5.0  #: the wall clock was set, when it moved so much against the monotonic one
END_S = 6.0  #: for the job in work to come back when the service stops


class Sensors(Protocol):
    """What measures the machine."""

    def usable(self) -> tuple[bool, str]:
        """Whether a GPU may be used now, and why not."""

    def read_all(self, moment: Moment) -> tuple[Reading, ...]:
        """Return the latest reading of every sensor."""

    def update(self, limits: Limits) -> None:
        """Measure against other limits from now on."""

    def close(self) -> None:
        """End the threads that measure."""


@dataclass(frozen=True)
class Due:
    """Something of the scheduler's is due."""

    name: str


@dataclass(frozen=True)
class Signalled:
    """A signal arrived."""

    number: int


@dataclass(frozen=True)
class Asked:
    """Somebody wants something done on the main loop."""

    what: Callable[[], Any]
    answer: Future[Any]


@dataclass(frozen=True)
class Reported:
    """An errand found out whether a condition holds; an empty sentence means it does not."""

    condition: str
    sentence: str


Post = Due | Signalled | Asked | Reported | Outcome


class Service:
    """The composed service; `run` is its life.

    Attributes:
        conditions: what is not as it should be, a sentence by name; replaced, never changed.
        verdict: the last one.
    """

    def __init__(self, ledger: Ledger, settings: Settings, sensors: Sensors, logs: Logs, *,
                 reload: Callable[[], Settings], clock: Clock | None = None,
                 notifier: Notifier | None = None) -> None:
        """Compose.

        Args:
            ledger: open for writing; closed by `run`.
            settings: to begin with.
            sensors: to read at every tick.
            logs: shown by the control socket.
            reload: returns the settings anew.
            clock: the machine's unless given.
            notifier: of the service manager.
        """
        self.ledger, self.settings, self.logs = ledger, settings, logs
        self._reload, self._clock = reload, clock or SystemClock()
        self._notifier = notifier or Notifier()
        self.sensors = sensors
        self.hub = Hub()
        if ledger.in_mind(REEVALUATED) is None:  # the first check of deployed models is a whole interval away
            ledger.keep_in_mind(REEVALUATED, utc(due.present()))
        self._inbox: queue.SimpleQueue[Post] = queue.SimpleQueue()
        self.watchdog = Watchdog(settings.limits)
        self.foreman = Foreman(ledger, settings, self.hub, self._inbox.put)
        self.scheduler = Scheduler(lambda name: self._inbox.put(Due(name)), tick_s=settings.tick_s,
                                   nightly_at=settings.nightly_at, reevaluate_days=settings.reevaluate_days,
                                   last_reevaluation=_moment_of(ledger.in_mind(REEVALUATED)))
        self.conditions: dict[str, str] = {}
        self.verdict = Verdict(State.BUSY, "busy: nothing was measured yet", 0.0, False, ())
        self.started = self._clock.now()
        self._last: Moment | None = None
        self._ended = False
        self._unrecorded: Outcome | None = None
        self.errands = Errands(self)

    # asked from other threads

    def ask(self, what: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Have something done on the main loop's thread and return its answer.

        Raises:
            ServiceRefused: the main loop does not answer in time, or the service ends.
            Exception: whatever `what` raises.
        """
        if self._ended:
            raise ServiceRefused("The service is stopping.")
        answer: Future[T] = Future()
        self._inbox.put(Asked(what, answer))
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            raise ServiceRefused(f"The service did not answer within {timeout_s:g} s.") from None

    def now(self) -> Moment:
        """Return the present moment by the service's clock."""
        return self._clock.now()

    def post_signal(self, number: int) -> None:
        """Take note of a signal; may be called from its handler."""
        self._inbox.put(Signalled(number))

    def report(self, condition: str, sentence: str) -> None:
        """Set or clear a condition, from any thread."""
        self._inbox.put(Reported(condition, sentence))

    # life

    def run(self, serve: Callable[[], None], unserve: Callable[[], None]) -> None:
        """Work until told to stop; then nothing of the service is left.

        Args:
            serve: begins to answer on the control socket.
            unserve: ends that.
        """
        try:
            for sentence in tidy(self.ledger, self.settings.deploy):
                say("service.recovered", sentence)
            self.foreman.refresh()
            self.errands.declare()
            serve()
            self.scheduler.start()
            self._look(self._clock.now())
            self._notifier.ready(self._words())
            say("service.ready", f"Ready: {self.verdict.reason}.", pid=os.getpid(),
                state_dir=str(self.settings.state_dir))
            while not self._ended:
                self._step()
        finally:
            self._close(unserve)

    def _step(self) -> None:
        """Handle one post, or look around when none comes in time."""
        failpoint("service.step")
        patience = 1.5 * self._tick_s() + 0.5
        if self._notifier.interval_s is not None:
            patience = min(patience, self._notifier.interval_s / 4)
        try:
            post: Post = self._inbox.get(timeout=patience)
        except queue.Empty:
            post = Due(due.TICK)
        self._notifier.ping(time.monotonic())
        try:
            self._handle(post)
        except NightpressError as problem:  # a full disk, for instance: told, and tried again at the next occasion
            say("service.trouble", str(problem), level="error", exit_code=problem.exit_code)
            self.conditions = {**self.conditions, "trouble": str(problem)}

    def _handle(self, post: Post) -> None:
        match post:
            case Due(name=due.TICK):
                self._look(self._clock.now())
            case Due(name=name):
                self.errands.run(name)
            case Outcome():
                self._unrecorded = post
                self._act(self._clock.now())
            case Reported():
                self._set_condition(post.condition, post.sentence)
            case Asked():
                _answer(post)
                self._act(self._clock.now())
            case Signalled(number=signal.SIGHUP):
                self._notifier.reloading()
                try:
                    self.reload()
                except NightpressError as problem:
                    say("settings.refused", f"The old settings stay: {problem}", level="error")
                self._notifier.ready(self._words())
            case Signalled():
                self.stop(signal.Signals(post.number).name)

    def _tick_s(self) -> float:
        return WORKING_TICK_S if self.foreman.runner.work is not None else self.settings.tick_s

    def _look(self, moment: Moment) -> None:
        """One tick: judge the machine and act; a second tick right after the first does nothing."""
        last = self._last
        if last is not None:
            passed = moment.monotonic_s - last.monotonic_s
            if (moment.wall - last.wall).total_seconds() < passed - JUMPED_S:
                say("clock.set_back", "The wall clock was set back; everything is planned anew.")
                self.scheduler.resync()
            if passed < 0.5 * self._tick_s() and self.foreman.runner.work is None:
                return
        self._last = moment
        before = self.verdict
        self.verdict = self.watchdog.judge(self.sensors.read_all(moment), moment)
        if self.verdict.state is not before.state:
            self.hub.publish("verdict", {"state": self.verdict.state.value, "reason": self.verdict.reason})
            say(f"watchdog.{self.verdict.state.value}", self.verdict.reason)
        usable, why = self.sensors.usable() if self.settings.gpu_layers else (True, "")
        self.foreman.gpu_layers = None if usable else 0
        self._set_condition("gpu", "" if usable else why)
        self._set_condition("ledger", self.ledger.degraded or "")
        self._set_condition("logs", self.logs.problem or "")
        self._act(moment)
        if "trouble" in self.conditions:
            self._set_condition("trouble", "")

    def _act(self, moment: Moment) -> None:
        if self._unrecorded is not None:  # a full disk must not lose it: tried again at every tick
            self.foreman.came_back(self._unrecorded, moment)
            self._unrecorded = None
        self.foreman.act(self.verdict, moment)
        self.scheduler.tick_every(self._tick_s())
        self._notifier.status(self._words())

    def _words(self) -> str:
        work = self.foreman.runner.work
        if work is None:
            waiting = len(self.foreman.waiting)
            what = f"{waiting} job{'s' * (waiting != 1)} waiting" if waiting else "nothing to do"
        else:
            place = work.place
            what = (f"{'stopped at' if work.grip.stopped else 'pressing'} {work.job['name']}: "
                    f"{place.level or 'original'} {place.stage}")
        return f"{what}; {'paused' if self.foreman.paused is not None else self.verdict.state.value}"

    def _set_condition(self, name: str, sentence: str) -> None:
        if sentence == self.conditions.get(name, ""):
            return
        rest = {key: value for key, value in self.conditions.items() if key != name}
        self.conditions = {**rest, name: sentence} if sentence else rest
        say("condition.raised" if sentence else "condition.cleared", sentence or f"{name} is well again.",
            level="warning" if sentence else "info", condition=name)

    # settings and end

    def reload(self) -> list[str]:
        """Load the settings anew; return the names of those that changed.

        Raises:
            NightpressError: they are wrong, or change what only a restart can; the old ones stay.
        """
        new = self._reload()
        fixed = [name for name in ("state_dir", "socket") if getattr(new, name) != getattr(self.settings, name)]
        if fixed:
            raise ServiceRefused(f"{fixed[0]} cannot change while the service runs; restart it. The old settings stay.")
        list(declared(new))  # wrong entries are refused before anything is taken over
        changed = [name for name in Settings.model_fields if getattr(new, name) != getattr(self.settings, name)]
        gone = self.settings.watch
        self.settings = self.foreman.settings = new
        for folder in set(gone) - set(new.watch):
            self._set_condition(f"watch {folder}", "")
        self.logs.set_level(new.log_level)
        self.watchdog.update(new.limits)
        self.sensors.update(new.limits)
        self.scheduler.change(nightly_at=new.nightly_at, reevaluate_days=new.reevaluate_days)
        self.errands.declare()
        say("settings.reloaded", f"Loaded the settings anew; changed: {', '.join(changed) or 'nothing'}.")
        return changed

    def stop(self, why: str) -> None:
        """End the main loop after this step."""
        if not self._ended:
            self._ended = True
            say("service.stopping", f"Stopping ({why}).")
            self._notifier.stopping()

    def _close(self, unserve: Callable[[], None]) -> None:
        self._ended = True
        self.scheduler.stop()
        back = self.foreman.close(END_S)
        try:
            self._drain(back)
        except NightpressError as problem:  # the next start finds the job without its service, and queues it again
            say("service.trouble", str(problem), level="error")
        unserve()
        self.hub.close()
        self.sensors.close()
        try:
            write_backup(self.ledger, self.settings.keep_backups)
        except NightpressError as problem:
            say("service.trouble", str(problem), level="error")
        self.ledger.close()
        say("service.stopped", "Stopped.")

    def _drain(self, back: bool) -> None:
        """Handle what came in last; what could not be waited for is recorded as interrupted."""
        while True:
            try:
                post = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(post, Outcome):
                self._unrecorded = post
            elif isinstance(post, Asked):
                post.answer.set_exception(ServiceRefused("The service is stopping."))
        if self._unrecorded is not None:
            self.foreman.came_back(self._unrecorded, self._clock.now())
        work = self.foreman.runner.work
        if not back and work is not None:
            row = self.ledger.job(int(work.job["id"]))
            if row["run_id"] and self.ledger.run(row["run_id"])["state"] == RunState.RUNNING:
                self.ledger.end_run(row["run_id"], RunState.INTERRUPTED, reason="The service stopped.")
            if row["state"] == JobState.WORKING:
                self.ledger.end_job(row["id"], JobState.QUEUED, "The service stopped.")


def _answer(asked: Asked) -> None:
    try:
        answer = asked.what()
    except Exception as problem:  # noqa: BLE001 - whoever asked gets it
        asked.answer.set_exception(problem)
    else:
        asked.answer.set_result(answer)


def _moment_of(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
