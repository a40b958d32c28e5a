"""When things are due: APScheduler over the wall clock, each job of which only posts its name.

A wall clock that jumps ahead makes every job due once; one that is set back would keep them from
coming for as long: `resync` plans them anew, and the main loop, which goes by the monotonic clock,
calls it when a tick stays away.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

TICK, BACKUP, CHECK, RETENTION, REEVALUATE, SCAN = "tick", "backup", "check", "retention", "reevaluate", "scan"
_NIGHTLY = (BACKUP, CHECK, RETENTION)
SCAN_S = 30.0


def present() -> datetime:
    """Return the moment by the wall clock, as APScheduler takes it, whatever clock the service was given."""
    return datetime.now().astimezone()


class Every(BaseTrigger):  # type: ignore[misc]  # APScheduler ships no types
    """Fires at an interval; however many moments were missed, it fires once and counts on from there.

    APScheduler's own interval trigger lists every missed moment: a million after a night's suspend.
    """

    def __init__(self, interval: timedelta, first: datetime | None = None) -> None:
        self._interval, self._first = interval, first

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        """Return when to fire next, after `now` unless it never fired."""
        if previous is None:
            return self._first or now + self._interval
        upcoming = previous + self._interval
        return upcoming if upcoming > now else now + self._interval


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

    def reevaluated(self, moment: datetime) -> None:
        """Take note of a check of deployed models: the next is a whole interval later."""
        self._last_reevaluation = moment
        self._plan()

    def due(self) -> dict[str, datetime]:
        """Return when each job but the tick comes next."""
        return {job.id: job.next_run_time for job in self._scheduler.get_jobs()
                if job.id != TICK and getattr(job, "next_run_time", None) is not None}

    def _post_reevaluation(self) -> None:
        self._last_reevaluation = present()
        self._post(REEVALUATE)

    def _plan(self) -> None:
        self._interval(TICK, seconds=self._tick_s)
        self._interval(SCAN, seconds=SCAN_S)
        hour, minute = map(int, self._nightly_at.split(":"))
        for later, name in enumerate(_NIGHTLY):
            at = (hour * 60 + minute + later) % 1440
            self._scheduler.add_job(self._post, "cron", hour=at // 60, minute=at % 60, args=(name,), id=name,
                                    replace_existing=True)
        if self._reevaluate_days:
            every = timedelta(days=self._reevaluate_days)
            now = present()
            last = self._last_reevaluation
            first = now + every if last is None or last > now else max(last + every, now + timedelta(minutes=10))
            self._scheduler.add_job(self._post_reevaluation, Every(every, first), id=REEVALUATE, replace_existing=True)
        elif self._scheduler.get_job(REEVALUATE) is not None:
            self._scheduler.remove_job(REEVALUATE)

    def _interval(self, name: str, *, seconds: float) -> None:
        self._scheduler.add_job(self._post, Every(timedelta(seconds=seconds)), args=(name,), id=name,
                                replace_existing=True)
