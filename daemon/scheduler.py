"""When things are due: APScheduler over the wall clock, each job of which only posts its name.

A wall clock that jumps ahead makes every job due once; one that is set back would keep them from
coming for as long: `resync` plans them anew, and the main loop, which goes by the monotonic clock,
calls it when a tick stays away.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

TICK, BACKUP, CHECK, RETENTION, REEVALUATE, SCAN = "tick", "backup", "check", "retention", "reevaluate", "scan"
_NIGHTLY = (BACKUP, CHECK, RETENTION)
SCAN_S = 30.0


class Scheduler:
    """Posts names when they are due, from a thread of its own."""

    def __init__(self, post: Callable[[str], None], *, tick_s: float, nightly_at: str, reevaluate_days: int,
                 last_reevaluation: datetime | None = None) -> None:
        """Plan everything; nothing is posted before `start`.

        Args:
            post: is given `tick`, `backup`, `check`, `retention`, `reevaluate` or `scan`; must return at once.
            tick_s: seconds between ticks.
            nightly_at: local time `HH:MM` of backup, check and retention, a minute apart.
            reevaluate_days: between checks of deployed models; 0 for never.
            last_reevaluation: so that a restart does not put the next one off.
        """
        from apscheduler.executors.debug import DebugExecutor
        from apscheduler.schedulers.background import BackgroundScheduler

        self._post, self._tick_s = post, tick_s
        self._nightly_at, self._reevaluate_days = nightly_at, reevaluate_days
        self._last_reevaluation = last_reevaluation
        # Posting a name takes microseconds, so it is done on the scheduler's own thread.
        self._scheduler: BackgroundScheduler = BackgroundScheduler(
            executors={"default": DebugExecutor()},
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1})
        self._plan()

    def start(self) -> None:
        """Begin to post."""
        self._scheduler.start()

    def stop(self) -> None:
        """Post nothing more; a second call does nothing."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)

    def tick_every(self, seconds: float) -> None:
        """Change how often to tick; the same as now changes nothing."""
        if seconds != self._tick_s:
            self._tick_s = seconds
            self._interval(TICK, seconds=seconds)

    def change(self, *, nightly_at: str, reevaluate_days: int) -> None:
        """Take over new settings."""
        self._nightly_at, self._reevaluate_days = nightly_at, reevaluate_days
        self._plan()

    def resync(self) -> None:
        """Plan everything anew from the present wall clock; to be called after it was set back."""
        self._plan()

    def due(self) -> dict[str, datetime]:
        """Return when each job but the tick comes next."""
        return {job.id: job.next_run_time for job in self._scheduler.get_jobs()
                if job.id != TICK and getattr(job, "next_run_time", None) is not None}

    def _plan(self) -> None:
        self._interval(TICK, seconds=self._tick_s)
        self._interval(SCAN, seconds=SCAN_S)
        hour, minute = map(int, self._nightly_at.split(":"))
        for later, name in enumerate(_NIGHTLY):
            at = (hour * 60 + minute + later) % 1440
            self._add(name, "cron", hour=at // 60, minute=at % 60)
        if self._reevaluate_days:
            every = timedelta(days=self._reevaluate_days)
            now = datetime.now().astimezone()
            last = self._last_reevaluation
            first = now + every if last is None or last > now else max(last + every, now + timedelta(minutes=10))
            self._add(REEVALUATE, "interval", days=self._reevaluate_days, start_date=first)
        elif self._scheduler.get_job(REEVALUATE) is not None:
            self._scheduler.remove_job(REEVALUATE)

    def _interval(self, name: str, *, seconds: float) -> None:
        self._add(name, "interval", seconds=seconds)

    def _add(self, name: str, trigger: str, **options: Any) -> None:
        self._scheduler.add_job(self._post, trigger, args=(name,), id=name, replace_existing=True, **options)
