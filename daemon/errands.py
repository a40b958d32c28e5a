"""Errands: what the service does now and then beside its work, each on a thread of its own, one of a kind at a time."""

from __future__ import annotations

import threading
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from daemon import scheduler as due
from daemon.foreman import utc
from daemon.intake import Folders, declared, reevaluations
from daemon.logs import say
from state import releases
from state.backup import write_backup
from state.blobs import BlobStore
from state.check import violations
from state.faults import NightpressError
from state.ledger import JobSpec, RunState

if TYPE_CHECKING:
    from daemon.service import Service

REEVALUATED = "reevaluated"  #: name of the memo that keeps the moment of the last checks of deployed models


class Errands:
    """What is due now and then. A failure becomes a condition of the service, and the next success clears it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._folders = Folders()
        self._running: dict[str, threading.Thread] = {}

    def run(self, name: str) -> None:
        """Begin an errand, unless the last of its kind still runs; called on the main loop."""
        if name == due.REEVALUATE:
            self.reevaluate()
            return
        errand = {due.BACKUP: self.back_up, due.CHECK: self.check, due.RETENTION: self.retain,
                  due.SCAN: self.scan}[name]
        settings = self._service.settings
        running = self._running.get(name)
        if (running is not None and running.is_alive()) or (
                name == due.SCAN and not (settings.watch or settings.models)):
            return

        def run() -> None:
            try:
                errand()
            except NightpressError as problem:
                self._service.report(name, f"The {name} failed: {problem}")
            else:
                self._service.report(name, "")

        self._running[name] = threading.Thread(target=run, name=name, daemon=True)
        self._running[name].start()

    def back_up(self) -> str:
        """Write the ledger as JSON; return where it lies."""
        path = write_backup(self._service.ledger, self._service.settings.keep_backups)
        say("backup.written", f"Backed the ledger up to {path}.")
        return str(path)

    def check(self) -> None:
        """Check every invariant, as `nightpress check` does."""
        settings = self._service.settings
        found = violations(settings.state_dir, settings.deploy)
        self._service.report("integrity", f"nightpress check: {found[0]}" if found else "")
        say("check.done", found[0] if found else "All is well on disk.", level="warning" if found else "info",
            violations=len(found))

    def retain(self) -> None:
        """Remove releases, blobs and events that the settings do not keep."""
        service, settings = self._service, self._service.settings
        removed = [number for model in releases.models(settings.deploy)
                   for number in releases.retain(settings.deploy, model, settings.keep_releases)]
        if service.foreman.runner.work is None:
            BlobStore(settings.blobs, settings.disk_budget_bytes).collect(set())
        before = service.now().wall - timedelta(days=settings.keep_events_days)
        forgotten = service.ledger.forget_events(utc(before))
        say("retention.done", f"Removed {len(removed)} old releases and {forgotten} old events.")

    def scan(self) -> None:
        """Queue what is new in watched folders, and declared models whose file has changed."""
        service, settings = self._service, self._service.settings
        for folder in settings.watch:
            service.report(f"watch {folder}", "" if folder.is_dir() else f"The watched folder {folder} is not there.")
        for spec in chain(self._folders.scan(settings, service.now().monotonic_s), declared(settings)):
            service.ask(lambda spec=spec: self._add_once(spec))  # type: ignore[misc]

    def declare(self) -> None:
        """Queue the declared models that never were; called on the main loop."""
        for spec in declared(self._service.settings):
            self._add_once(spec)

    def _add_once(self, spec: JobSpec) -> None:
        if not self._service.ledger.has_job(spec.key):
            self._service.foreman.add(spec)

    def reevaluate(self) -> int:
        """Queue a check of every deployed model that does not wait for one already; return how many.

        Called on the main loop.
        """
        service, ledger = self._service, self._service.ledger
        waiting = {row["name"] for row in service.foreman.waiting if row["source"] == "reevaluation"}
        deployed: dict[str, Any] = {}
        for name in releases.models(service.settings.deploy):
            release = releases.current(service.settings.deploy, name)
            if release is None or name in waiting:
                continue
            known = [row for row in ledger.releases(name) if row["sha256"] == release.manifest.sha256]
            run = ledger.run(known[0]["run_id"]) if known else None
            deployed[name] = run["plan"] if run and run["state"] == RunState.FINISHED else None
        for spec in reevaluations(deployed):
            service.foreman.add(spec)
        now = due.present()
        ledger.keep_in_mind(REEVALUATED, utc(now))
        service.scheduler.reevaluated(now)
        return len(deployed)
