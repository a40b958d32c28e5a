"""The foreman: sees to it that the right job is in work, stopped, ended or begun. Lives on the main loop's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from daemon.answers import Release
from daemon.clock import Moment
from daemon.errors import OrderRefused
from daemon.hooks import Hooks, Kind, run_hooks
from daemon.hub import Hub
from daemon.intake import Order
from daemon.logs import Level, say
from daemon.policy import Action, Next, Situation, after_problem, after_yield, decide
from daemon.runner import Outcome, Runner
from daemon.settings import Settings
from daemon.watchdog import State, Verdict
from loops import events
from state import releases
from state.faults import NightpressError
from state.ledger import JobSpec, JobState, Ledger, UnknownJob

PAUSED = "paused"  #: name of the memo that keeps a pause over restarts


def utc(moment: datetime) -> str:
    """Return a moment as the ledger stores it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Foreman:
    """Decides with `policy`, acts through the runner's grip, and keeps the queue's rows true.

    Attributes:
        waiting: rows of the queued jobs in order; a copy, so that any thread may look.
        paused: somebody asked for no work; kept over restarts.
        gpu_layers: those that may be used now, None for as many as the settings say.
        stopping: the service ends; no job is begun any more.
        last_release: the newest promotion that was not rolled back.
    """

    def __init__(self, ledger: Ledger, settings: Settings, hub: Hub, done: Callable[[Outcome], None]) -> None:
        self.ledger, self.settings, self._hub = ledger, settings, hub
        self.runner = Runner(ledger, self._shown, done)
        self.paused: dict[str, Any] | None = ledger.in_mind(PAUSED)
        self.waiting: tuple[dict[str, Any], ...] = ()
        self.gpu_layers: int | None = None
        self.stopping = False
        self._verdict: Verdict | None = None
        self._stopped_busy_s = 0.0
        self._acted_s: float | None = None
        self.last_release: Release | None = None
        self._halt = threading.Event()
        self._telling: list[threading.Thread] = []
        self.refresh()
        self.note_releases()

    def note_releases(self) -> None:
        """Look up the newest release that stands."""
        row = next((found for found in self.ledger.releases() if found["rolled_back_at"] is None), None)
        self.last_release = Release(**{name: row[name] for name in Release.model_fields}) if row else None

    def refresh(self) -> None:
        """Read the queue again."""
        self.waiting = tuple(row for row in self.ledger.jobs(waiting=True) if row["state"] == JobState.QUEUED)

    def next_job(self, moment: Moment) -> dict[str, Any] | None:
        """Return the first waiting job that may start by now, None when there is none."""
        now = utc(moment.wall)
        return next((row for row in self.waiting if row["urgent"] or (row["not_before"] or "") <= now), None)

    def act(self, verdict: Verdict, moment: Moment) -> Action:
        """Do what the situation asks for; return what was done."""
        self._verdict = verdict
        work, passed = self.runner.work, 0.0
        if self._acted_s is not None:
            passed = max(0.0, moment.monotonic_s - self._acted_s)
        self._acted_s = moment.monotonic_s
        stopped = work is not None and work.grip.stopped
        busy = verdict.state is State.BUSY or self.paused is not None
        self._stopped_busy_s = self._stopped_busy_s + passed * busy if stopped else 0.0
        upcoming = self.next_job(moment)
        action = decide(Situation(
            verdict=verdict.state.value, paused=self._is_paused(moment), working=work is not None,
            urgent=work is not None and bool(work.job["urgent"]), stopped=stopped,
            ending=work is not None and work.grip.ended,
            holds_gpu=work is not None and work.settings.gpu_layers != 0, short_memory=verdict.short_memory,
            busy_s=self._stopped_busy_s, next_job=upcoming is not None and not self.stopping,
            next_urgent=upcoming is not None and bool(upcoming["urgent"])), self.settings.yield_after_s)
        match action:
            case Action.START if upcoming is not None:
                self._begin(upcoming)
            case Action.STOP if work is not None:
                work.grip.stop()
                self._tell_job("job.stopped", f"Stopped {work.job['name']}: {self._why()}.", work.job["id"])
            case Action.GO_ON if work is not None:
                work.grip.go_on()
                self._tell_job("job.continued", f"{work.job['name']} goes on: {self._why()}.", work.job["id"])
            case Action.YIELD if work is not None:
                self._yield(work.job)
        return action

    def _why(self) -> str:
        if self.paused is not None:
            return "paused on request"
        return self._verdict.reason if self._verdict else "no verdict"

    def _is_paused(self, moment: Moment) -> bool:
        """Tell whether there is to be no work, and forget a pause that is over."""
        if self.paused is not None and (self.paused["until"] or "9") <= utc(moment.wall):
            self.resume("The pause is over.")
        return self.paused is not None

    def _begin(self, row: Mapping[str, Any]) -> None:
        number = int(row["id"])
        if row["attempts"] >= self.settings.max_attempts:
            reason = f"Begun {row['attempts']} times and never got on; `nightpress run-now {number}` tries again."
            self.ledger.end_job(number, JobState.QUARANTINED, reason)
            self._tell_job("job.quarantined", f"{row['name']} is set aside. {reason}", number, level="error")
            self.refresh()
            return
        settings = self.settings
        if self.gpu_layers is not None:
            settings = settings.model_copy(update={"gpu_layers": self.gpu_layers})
        try:
            order = Order.of(row["spec"], settings)
        except NightpressError as problem:
            self.ledger.begin_job(number)
            self.ledger.end_job(number, JobState.FAILED, str(problem))
            self._tell_job("job.failed", f"{row['name']} failed: {problem}", number, level="error",
                           exit_code=problem.exit_code)
            self.refresh()
            return
        self.ledger.begin_job(number)
        self._stopped_busy_s = 0.0
        self.refresh()
        self._tell_job("job.started", f"Began {row['name']} (job {number}).", number)
        self.runner.start(self.ledger.job(number), order, settings)

    def _yield(self, job: Mapping[str, Any]) -> None:
        work = self.runner.work
        if work is not None:
            work.grip.end(f"Made room: {self._why()}.")
            self._tell_job("job.yielded", f"{job['name']} makes room: {self._why()}.", int(job["id"]))

    # what comes back from the runner

    def _shown(self, number: int, event: events.Event) -> None:
        """Publish an event of the job in work; called on the runner's thread."""
        # steps and measurements carry whole replies: whoever wants them asks the ledger
        if not isinstance(event, events.StepDone | events.LevelMeasured):
            self._hub.publish("press", {"job": number, "line": events.to_line(event)})
        if isinstance(event, events.LevelDone):
            work = self.runner.work
            rows = self.ledger.candidates(work.run_id) if work is not None and work.run_id is not None else []
            row: Mapping[str, Any] = next((found for found in rows if found["level"] == event.level), {})
            facts: dict[str, Any] = {key: row.get(key) for key in (
                "bytes", "bits_per_weight", "degradation", "degradation_low", "degradation_high", "tokens_per_s",
                "built_s", "measured_s")}
            say("level.done", f"{event.level} {event.state}. {event.reason}".strip(), job=number,
                run=row.get("run_id"), model=work.job["name"] if work else None, level_name=event.level,
                state=event.state, **facts)
        elif isinstance(event, events.Note):
            say("job.note", event.message.strip() or "(nothing)", job=number)

    def came_back(self, outcome: Outcome, moment: Moment) -> None:
        """Record how a job came back, and tell whom it concerns; failed by a full disk, it can be called again."""
        work = self.runner.work
        row = self.ledger.job(outcome.job_id)
        after = self._next(outcome, row, work.fate if work is not None else None)
        self.note_releases()  # before the job is over: who sees its end sees its release
        not_before = utc(moment.wall + timedelta(seconds=after.delay_s)) if after.delay_s else None
        self.ledger.end_job(outcome.job_id, after.state, after.reason, run_id=outcome.run_id, not_before=not_before,
                            attempts=after.attempts)
        level: Level = "error" if after.given_up else "info"
        facts: dict[str, Any] = {"state": after.state.value, "run": outcome.run_id, "chosen": outcome.chosen,
                 "exit_code": outcome.exit_code, "attempts": row["attempts"], "not_before": not_before,
                 "model": row["name"], "source": row["source"], "worked_s": round(work.worked_s(), 1) if work else None,
                 **({"traceback": outcome.bug} if outcome.bug else {})}
        words = {JobState.DONE: "is done", JobState.QUEUED: "waits again", JobState.CANCELLED: "was cancelled",
                 JobState.FAILED: "failed", JobState.QUARANTINED: "is set aside"}[after.state]
        if outcome.made is not None:
            self._hub.publish("finetuned", {"job": outcome.job_id, "made": outcome.made})
        self._tell_job(f"job.{after.state.value}", f"{row['name']} {words}. {after.reason}".strip(), outcome.job_id,
                       level=level, **facts)
        self.runner.clear()
        self.refresh()
        if after.given_up:
            self._run_hooks("failure", {"model": row["name"], "job": outcome.job_id, "run": outcome.run_id,
                                        "reason": after.reason, "exit_code": outcome.exit_code})
        if after.state is JobState.DONE and work is not None:
            for found in self.ledger.releases():
                if found["id"] > work.releases and found["run_id"] == outcome.run_id:
                    self.tell_release(found, outcome.reason)

    def _next(self, outcome: Outcome, row: Mapping[str, Any], fate: tuple[JobState, str] | None) -> Next:
        if outcome.interrupted:
            if fate is not None:
                return Next(*fate)
            return after_yield(outcome.reason, row["attempts"])
        if outcome.exit_code:
            return after_problem(outcome.exit_code, outcome.reason, row["attempts"], self.settings.retry_after_s,
                                 self.settings.max_attempts)
        return Next(JobState.DONE, outcome.reason)

    def tell_release(self, found: Mapping[str, Any], reason: str) -> None:
        """Tell hooks, log and listeners of a release that was recorded."""
        deployed = releases.current(self.settings.deploy, str(found["model"]))
        path = str(deployed.model_path) if deployed else str(found["path"])
        facts = {"model": found["model"], "level": found["level"], "release": found["number"], "path": path,
                 "bytes": found["bytes"], "sha256": found["sha256"], "run": found["run_id"], "reason": reason}
        told: dict[str, Any] = {"level_name" if name == "level" else name: value for name, value in facts.items()}
        self.note_releases()
        self._hub.publish("release", facts)
        say("release.promoted", f"Release {found['number']} of {found['model']} is deployed: {found['level']}.",
            **told)
        self._run_hooks("promote", facts)

    def _run_hooks(self, kind: Kind, facts: Mapping[str, Any]) -> None:
        hooks = hooks_of(self.settings)

        def run() -> None:
            for outcome in run_hooks(hooks, kind, facts, stop=self._halt):
                say("hook.done" if outcome.worked else "hook.failed", outcome.detail, hook=outcome.hook,
                    level="info" if outcome.worked else "warning", target=outcome.target, status=outcome.status,
                    tries=outcome.tries, took_s=round(outcome.took_s, 3), output=outcome.output)

        if hooks.webhook or (hooks.on_promote if kind == "promote" else hooks.on_failure):
            self._telling = [thread for thread in self._telling if thread.is_alive()]
            self._telling.append(threading.Thread(target=run, name=f"hook-{kind}", daemon=True))
            self._telling[-1].start()

    def _tell_job(self, action: str, message: str, number: int, *, level: Level = "info", **facts: Any) -> None:
        self.ledger.record_event(action, facts.get("run"), None, {"job": number, "message": message})
        self._hub.publish("job", {"job": number, "action": action, "message": message, **facts})
        say(action, message, level=level, job=number, **facts)

    # what is asked for

    def add(self, spec: JobSpec) -> int:
        """Queue a job and return its number.

        Raises:
            OrderRefused, NightpressError: the order is none.
        """
        order = Order.of(spec.spec, self.settings)
        if order.plan is None and order.deployed is None and order.finetune is None:
            raise OrderRefused("An order needs a model to press.")
        number = self.ledger.add_job(replace(spec, spec=order.as_json()))
        self.refresh()
        self._tell_job("job.queued", f"Queued {spec.name} (job {number}).", number)
        return number

    def remove(self, number: int) -> str:
        """Take a waiting job off the queue; one in work is for `cancel`."""
        row = self.ledger.job(number)
        if row["state"] == JobState.WORKING:
            raise OrderRefused(f"Job {number} is in work; `nightpress cancel` ends it.")
        if row["state"] != JobState.QUEUED:
            return f"already_{row['state']}"
        self.ledger.end_job(number, JobState.CANCELLED, "Removed on request.")
        self.refresh()
        self._tell_job("job.cancelled", f"Removed {row['name']} (job {number}) from the queue.", number)
        return "removed"

    def cancel(self, number: int | None) -> tuple[str, int | None]:
        """End the job in work for good; return the state reached and its number.

        Raises:
            UnknownJob: that job is not in work.
        """
        work = self.runner.work
        if work is None or (number is not None and work.job["id"] != number):
            if number is None:
                return "nothing_in_work", None
            row = self.ledger.job(number)
            if row["state"] == JobState.QUEUED:
                return self.remove(number), number
            return f"already_{row['state']}", number
        work.fate = JobState.CANCELLED, "Cancelled on request."
        work.grip.end("Cancelled on request.")
        return "cancelling", int(work.job["id"])

    def hasten(self, number: int | None) -> int:
        """Let a job run next whatever the load; without a number the next in the queue.

        Raises:
            UnknownJob: there is none, or it is done.
            OrderRefused: the service is paused.
        """
        if self.paused is not None:
            raise OrderRefused("The service is paused; `nightpress resume` first.")
        work = self.runner.work
        if number is None:
            if work is not None:
                number = int(work.job["id"])
            elif self.waiting:
                number = int(self.waiting[0]["id"])
            else:
                raise UnknownJob("Nothing waits; `nightpress add MODEL` queues a model.")
        if self.ledger.job(number)["state"] == JobState.DONE:
            raise UnknownJob(f"Job {number} is done; `nightpress add` queues its model again.")
        self.ledger.hasten_job(number)
        if work is not None and work.job["id"] == number:
            work.job["urgent"] = True
        self.refresh()
        self._tell_job("job.hastened", f"Job {number} is to be done now, whatever the load.", number)
        return number

    def move(self, number: int, place: int) -> int:
        """Move a waiting job; return the place it got."""
        got = self.ledger.move_job(number, place)
        self.refresh()
        return got

    def pause(self, until: datetime | None = None) -> str:
        """Do no work until `resume`, or until a moment; return the state reached."""
        wanted = {"until": utc(until) if until else None}
        state = "already_paused" if self.paused == wanted else "paused"
        if state == "paused":
            self.paused = wanted
            self.ledger.keep_in_mind(PAUSED, wanted)
            say("service.paused", f"Paused{' until ' + wanted['until'] if wanted['until'] else ''} on request.")
        return state

    def resume(self, why: str = "Resumed on request.") -> str:
        """Work again; return the state reached."""
        if self.paused is None:
            return "already_resumed"
        self.paused = None
        self.ledger.keep_in_mind(PAUSED, None)
        say("service.resumed", why)
        return "resumed"

    def close(self, timeout_s: float) -> bool:
        """End the job in work, which waits again; tell whether it came back in time."""
        self.stopping = True
        self._halt.set()
        work = self.runner.work
        if work is not None:
            work.grip.end("The service stops.")
        return self.runner.finish(timeout_s)


def hooks_of(settings: Settings) -> Hooks:
    """Return the hooks that the settings ask for."""
    return Hooks(settings.on_promote, settings.on_failure, settings.webhook, settings.hook_timeout_s)
