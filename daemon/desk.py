"""The desk: answers what is asked of the service.

Reading takes what lies there; changing goes through the main loop.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from daemon import answers
from daemon.engine import engine_options
from daemon.errors import OrderRefused, ServiceRefused
from daemon.foreman import utc
from daemon.intake import Order, name_of, plan_for
from daemon.promotion import check_promotable, promote
from daemon.service import Service
from daemon.settings import ModelEntry
from daemon.sources import check_folder
from daemon.summary import summarise
from daemon.watchdog import Reading, State
from state import releases
from state.backup import write_backup
from state.ledger import JobSpec
from state.manifest import NotPromotable, check_name


class Desk:
    """One method per verb. Every method may be called from any thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._version = metadata.version("nightpress")

    # reading

    def status(self) -> answers.Status:
        """Say what the service does; takes no lock and asks no disk, so it answers whatever goes on."""
        service, foreman = self._service, self._service.foreman
        verdict, now = service.verdict, service.now()
        work, waiting, paused = foreman.runner.work, foreman.waiting, foreman.paused
        upcoming = foreman.next_job(now) or (waiting[0] if waiting else None)
        job = None
        if work is not None:
            place = work.place
            job = answers.Working(
                id=work.job["id"], name=work.job["name"], source=work.job["source"], run_id=work.run_id,
                urgent=bool(work.job["urgent"]), stopped=work.grip.stopped, ending=work.grip.ended, level=place.level,
                stage=place.stage, share=place.share, levels_done=place.levels_done, levels=place.levels,
                worked_s=work.worked_s(), left_s=place.left_s)
        state, reason = self._state(job, upcoming)
        return answers.Status(
            state=state, reason=reason, verdict=verdict.state.value, verdict_for_s=max(0.0, verdict.for_s),
            paused_until=paused["until"] if paused else None, job=job,
            next=_waiting(upcoming) if upcoming else None, queued=len(waiting), release=foreman.last_release,
            sensors=[_sensor(found) for found in verdict.readings], conditions=service.conditions,
            due={name: utc(at) for name, at in service.scheduler.due().items()}, pid=os.getpid(),
            version=self._version, started_at=utc(service.started.wall),
            uptime_s=max(0.0, now.boot_s - service.started.boot_s),
            state_dir=str(service.settings.state_dir.absolute()), deploy_dir=str(service.settings.deploy),
            last_event=service.hub.last)

    def _state(self, job: answers.Working | None, upcoming: dict[str, Any] | None) -> tuple[str, str]:
        service, paused = self._service, self._service.foreman.paused
        why = service.verdict.reason
        if service.foreman.stopping:
            return "stopping", "The service is stopping."
        if paused is not None:
            return "paused", f"paused until {paused['until']}" if paused["until"] else "paused on request"
        if job is not None:
            return ("stopped", why) if job.stopped else ("working", "asked for" if job.urgent else why)
        if upcoming is None:
            return "idle", "nothing waits"
        if service.verdict.state is State.IDLE and upcoming["not_before"]:
            return "waiting", f"the next job may start at {upcoming['not_before']}"
        return "waiting", why

    def health(self) -> answers.Health:
        """Say whether all is well."""
        return answers.Health(healthy=not self._service.conditions, conditions=self._service.conditions)

    def queue(self, every: bool = False) -> list[dict[str, Any]]:
        """Return the jobs that wait and the one in work, or all there ever were; without their orders."""
        rows = self._service.ledger.jobs(waiting=not every)
        work = self._service.foreman.runner.work
        for row in rows:
            if work is not None and work.job["id"] == row["id"]:
                row["run_id"] = work.run_id
            order = row.pop("spec")
            row["model"] = (order.get("plan") or {}).get("model")
        return rows

    def runs(self, limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest runs."""
        return self._service.ledger.runs(limit)

    def run(self, run_id: answers.Number) -> dict[str, Any]:
        """Return one run as its summary file has it."""
        return summarise(self._service.ledger, run_id)

    # changing

    def _ask(self, what: Callable[[], Any]) -> Any:
        return self._service.ask(what)

    def add(self, wanted: answers.Add) -> answers.Done:
        """Queue a model."""
        settings = self._service.settings
        if wanted.finetune is not None:
            order = Order.of({"finetune": wanted.finetune}, settings)
        elif wanted.plan is not None:
            order = Order.of({"plan": wanted.plan, "promoting": wanted.promoting, "fresh": wanted.fresh}, settings)
        elif wanted.path is None:
            raise OrderRefused("Say which model: path, or a whole plan.")
        else:
            path = Path(wanted.path)
            if not path.is_absolute():
                raise OrderRefused(f"{wanted.path} is not an absolute path, and the service stands in another folder.")
            if path.is_dir():
                check_folder(path)
            elif not path.is_file():
                raise OrderRefused(f"There is no file {wanted.path}, or the service may not read it.")
            entry = ModelEntry(
                path=path, name=check_name(wanted.name) if wanted.name else name_of(path),
                target_size=wanted.target_size, max_degradation=wanted.max_degradation, levels=tuple(wanted.levels),
                gates=tuple(wanted.gates))
            order = Order(plan_for(settings, entry), wanted.promoting, wanted.fresh)
        if order.plan is None and order.finetune is None:
            raise OrderRefused("Say which model: path, or a whole plan.")
        spec = JobSpec(order.name, "command", order.as_json(), priority=wanted.priority, urgent=wanted.urgent)
        after = self._service.hub.last
        number = self._ask(lambda: self._service.foreman.add(spec))
        return answers.Done(state="queued", message=f"Queued {spec.name} as job {number}.", job=number, after=after)

    def remove(self, job_id: answers.Number) -> answers.Done:
        """Take a waiting job off the queue."""
        state = self._ask(lambda: self._service.foreman.remove(job_id))
        return _done(state, f"Job {job_id} is off the queue." if state == "removed" else f"Job {job_id} was "
                     f"{state.removeprefix('already_')} before.", job_id)

    def move(self, job_id: answers.Number, place: answers.Place) -> answers.Done:
        """Move a waiting job."""
        got = self._ask(lambda: self._service.foreman.move(job_id, place.place))
        return _done("moved", f"Job {job_id} is number {got} of the queue.", job_id, place=got)

    def run_now(self, which: answers.Which) -> answers.Done:
        """Do a job whatever the load."""
        after = self._service.hub.last
        number = self._ask(lambda: self._service.foreman.hasten(which.job))
        message = f"Job {number} is done now, whatever the load."
        return answers.Done(state="started", message=message, job=number, after=after)

    def cancel(self, which: answers.Which) -> answers.Done:
        """End the job in work for good."""
        state, number = self._ask(lambda: self._service.foreman.cancel(which.job))
        words = {"cancelling": f"Job {number} is being ended; what was measured is kept.",
                 "removed": f"Job {number} is off the queue.", "nothing_in_work": "No job is in work."}
        return _done(state, words.get(state, f"Job {number} was {state.removeprefix('already_')} before."), number)

    def pause(self, pause: answers.Pause) -> answers.Done:
        """Do no work."""
        until = None
        if pause.for_s is not None:
            until = self._service.now().wall + timedelta(seconds=pause.for_s)
        state = self._ask(lambda: self._service.foreman.pause(until))
        return _done(state, "Paused" + (f" until {utc(until)}." if until else "; `nightpress resume` goes on."))

    def resume(self) -> answers.Done:
        """Work again."""
        state = self._ask(self._service.foreman.resume)
        return _done(state, "Resumed." if state == "resumed" else "It was not paused.")

    def promote(self, wanted: answers.Promote) -> answers.Done:
        """Release a level that passed; takes as long as loading it."""
        service = self._service
        ledger, settings = service.ledger, service.settings
        number = wanted.run if wanted.run is not None else ledger.latest_run_id(include_simulated=False)
        if number is None:
            raise NotPromotable("Nothing was measured yet.")
        level = wanted.level or ledger.run(number)["chosen_level"]
        if level is None:
            raise NotPromotable(f"Run {number} chose no level. Name one that passed.")
        check_promotable(ledger, number, level)  # before the engine is asked anything
        before = max((row["id"] for row in ledger.releases()), default=0)
        made = promote(ledger, settings, number, level, engine_options(settings, gpu=False))
        fresh = [row for row in ledger.releases(made.model) if row["id"] > before]
        for row in fresh:
            self._ask(lambda row=row: service.foreman.tell_release(row, "Promoted on request."))  # type: ignore[misc]
        return _done("promoted" if fresh else "already_promoted",
                     f"Release {made.number} of {made.model} ({made.manifest.level}) is deployed.",
                     **asdict(made.manifest), path=str(made.path))

    def rollback(self, wanted: answers.Rollback) -> answers.Done:
        """Go back to the release before."""
        service = self._service
        deploy = service.settings.deploy
        models = releases.models(deploy)
        if wanted.model is None and len(models) != 1:
            raise OrderRefused(f"Say which model: {', '.join(models) or 'none is deployed'}.")
        name = wanted.model or models[0]
        before = releases.current_number(deploy, name)
        made = releases.rollback(deploy, name)
        if before is not None:
            service.ledger.mark_rolled_back(name, before)
        service.ledger.record_event("release.rolled_back", None, made.manifest.level,
                                    {"model": name, "number": made.number})
        self._ask(service.foreman.note_releases)
        return _done("rolled_back", f"Release {made.number} of {name} ({made.manifest.level}) is deployed again.",
                     **asdict(made.manifest), path=str(made.path))

    def release_quarantine(self, key: str) -> answers.Done:
        """Allow again what killed the engine."""
        ledger = self._service.ledger
        if not ledger.release_quarantine(key):
            return _done("already_released", f"{key} is not in quarantine.")
        return _done("released", f"{key} is allowed again.")

    def reevaluate(self) -> answers.Done:
        """Queue a check of every deployed model."""
        found = self._ask(self._service.errands.reevaluate)
        return _done("queued" if found else "nothing_deployed", f"Queued {found} deployed model{'s' * (found != 1)}.")

    def backup(self) -> answers.Done:
        """Write the ledger as JSON."""
        path = write_backup(self._service.ledger, self._service.settings.keep_backups)
        return _done("written", f"Backed the ledger up to {path}.", path=str(path))

    def reload(self) -> answers.Done:
        """Load the settings anew."""
        changed = self._ask(self._service.reload)
        return _done("reloaded", f"Changed: {', '.join(changed) or 'nothing'}.", changed=changed)

    def stop(self) -> answers.Done:
        """Stop the service."""
        try:
            self._ask(lambda: self._service.stop("asked for"))
        except ServiceRefused:
            return _done("already_stopping", "The service is stopping.")
        return _done("stopping", "The service is stopping; the job in work goes on when it starts again.")


def _done(state: str, message: str, job: int | None = None, **detail: Any) -> answers.Done:
    return answers.Done(state=state, message=message, job=job, detail=detail)


def _waiting(row: dict[str, Any]) -> answers.Waiting:
    return answers.Waiting(**{name: row[name] for name in answers.Waiting.model_fields})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sensor(reading: Reading) -> answers.Sensor:
    unknown = reading.problem is not None or reading.value is None
    if reading.absent is not None and reading.problem is None:
        state = "absent"
    elif unknown or reading.limit is None:
        state = "unknown"
    else:
        over = reading.value > reading.limit if reading.above else reading.value < reading.limit  # type: ignore[operator]
        state = "busy" if over else "quiet"
    return answers.Sensor(sensor=reading.name, state=state, value=_finite(reading.value), limit=_finite(reading.limit),
                          unit=reading.unit, detail=reading.problem or reading.absent or reading.detail)
