"""Everything comes when it is due, and once: whatever the wall clock does."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest
from apscheduler.triggers.interval import IntervalTrigger
from gguf_files import tiny_llama
from scripted_service import QUIET, ScriptedSensors
from traces import SetClock

from daemon import scheduler as due
from daemon.desk import Desk
from daemon.logs import configure, say
from daemon.scheduler import Scheduler
from daemon.service import Service
from daemon.settings import Settings
from state.ledger import Ledger

Poll = Callable[..., Any]
REAL = datetime
NIGHTLY = (due.BACKUP, due.CHECK, due.RETENTION)


class WallClock:
    """The wall clock that the scheduler and APScheduler see; `ahead` sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()
        clock = self

        class Shifted(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Self:
                return super().now(tz) + clock.ahead

        for module in ("apscheduler.schedulers.base", "apscheduler.triggers.interval", "daemon.scheduler"):
            monkeypatch.setattr(f"{module}.datetime", Shifted)

    def now(self) -> datetime:
        return REAL.now().astimezone() + self.ahead


class Posts:
    """What a scheduler posted, and when by the monotonic clock."""

    def __init__(self) -> None:
        self.posted: list[tuple[float, str]] = []

    def __call__(self, name: str) -> None:
        self.posted.append((time.monotonic(), name))

    def count(self) -> Counter[str]:
        return Counter(name for _, name in self.posted)


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


@pytest.fixture
def posts() -> Posts:
    return Posts()


@pytest.fixture
def begin(posts: Posts, wall: WallClock) -> Iterator[Callable[..., Scheduler]]:
    begun: list[Scheduler] = []

    def start(**options: Any) -> Scheduler:
        # in twelve hours, so that no night falls into a test
        night = (wall.now() + timedelta(hours=12)).strftime("%H:%M")
        begun.append(Scheduler(posts, **{"tick_s": 3600.0, "nightly_at": night, "reevaluate_days": 0, **options}))
        begun[0].start()
        return begun[0]

    yield start
    for scheduler in begun:
        scheduler.stop()


def in_days(wall: WallClock, moment: datetime) -> float:
    return (moment - wall.now()) / timedelta(days=1)


def test_nothing_is_due_before_the_start(posts: Posts) -> None:
    scheduler = Scheduler(posts, tick_s=0.05, nightly_at="03:30", reevaluate_days=7)
    assert scheduler.due() == {}
    scheduler.stop()


def test_ticks_come_and_end_with_it(begin: Callable[..., Scheduler], posts: Posts, poll: Poll) -> None:
    scheduler = begin(tick_s=0.1)
    poll(lambda: posts.count()[due.TICK] >= 4, 20, "four ticks")
    assert posts.posted[3][0] - posts.posted[0][0] > 0.15
    assert set(posts.count()) == {due.TICK}
    scheduler.stop()
    scheduler.stop()
    ended = len(posts.posted)
    threading.Event().wait(0.4)
    assert len(posts.posted) == ended
    assert not [thread for thread in threading.enumerate() if "APScheduler" in thread.name]


def test_ticks_come_as_often_as_was_asked_last(begin: Callable[..., Scheduler], posts: Posts, poll: Poll) -> None:
    scheduler = begin()
    scheduler.tick_every(0.1)
    poll(lambda: posts.count()[due.TICK] >= 3, 20, "ticks")
    scheduler.tick_every(3600.0)
    ended = posts.count()[due.TICK]
    threading.Event().wait(0.4)
    assert posts.count()[due.TICK] <= ended + 1  # one may have been under way


def test_asking_for_the_same_again_does_not_put_the_next_tick_off(begin: Callable[..., Scheduler], posts: Posts,
                                                                 poll: Poll) -> None:
    """The main loop asks after every step, more often than it ticks."""
    scheduler = begin(tick_s=0.5)

    def asked() -> bool:
        scheduler.tick_every(0.5)
        return posts.count()[due.TICK] >= 2

    poll(asked, 20, "ticks")


def test_a_wall_clock_set_back_stops_the_ticks_until_everything_is_planned_anew(
        begin: Callable[..., Scheduler], posts: Posts, wall: WallClock, poll: Poll) -> None:
    scheduler = begin(tick_s=0.1)
    poll(lambda: posts.count()[due.TICK] >= 2, 20, "ticks")
    wall.ahead = timedelta(hours=-1)
    threading.Event().wait(0.2)
    before = posts.count()[due.TICK]
    threading.Event().wait(0.6)
    assert posts.count()[due.TICK] == before
    scheduler.resync()
    poll(lambda: posts.count()[due.TICK] >= before + 3, 20, "ticks after the resync")


def test_a_wall_clock_eight_hours_ahead_makes_everything_due_once(
        begin: Callable[..., Scheduler], posts: Posts, wall: WallClock, poll: Poll) -> None:
    begin(tick_s=1.0, nightly_at=(wall.now() + timedelta(hours=4)).strftime("%H:%M"))
    poll(lambda: posts.count()[due.TICK] >= 1, 20, "a tick")
    jumped, before = time.monotonic(), posts.count()[due.TICK]
    wall.ahead = timedelta(hours=8)
    poll(lambda: {due.SCAN, *NIGHTLY} <= set(posts.count()), 20, "what came due meanwhile")
    poll(lambda: posts.count()[due.TICK] >= before + 2, 20, "regular ticks")
    count = posts.count()
    assert {name: count[name] for name in (due.SCAN, *NIGHTLY)} == dict.fromkeys((due.SCAN, *NIGHTLY), 1)
    assert count[due.TICK] - before <= (time.monotonic() - jumped) / 1.0 + 2


def test_a_long_sleep_costs_no_more_than_a_short_one(
        begin: Callable[..., Scheduler], posts: Posts, wall: WallClock, poll: Poll,
        monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    real = IntervalTrigger.get_next_fire_time

    def counted(self: IntervalTrigger, previous: datetime | None, now: datetime) -> datetime | None:
        asked.append(None)
        return real(self, previous, now)

    monkeypatch.setattr(IntervalTrigger, "get_next_fire_time", counted)
    begin(tick_s=0.25)  # as while a job is in work
    poll(lambda: posts.count()[due.TICK] >= 1, 20, "a tick")
    before = posts.count()[due.TICK]
    wall.ahead = timedelta(hours=8)
    poll(lambda: posts.count()[due.TICK] > before, 60, "the tick after it")
    assert len(asked) < 1000


def test_the_night_begins_when_it_was_asked_for_a_minute_apart(begin: Callable[..., Scheduler]) -> None:
    found = begin(nightly_at="23:59").due()
    assert {name: at.astimezone().strftime("%H:%M") for name, at in found.items() if name in NIGHTLY} == {
        "backup": "23:59", "check": "00:00", "retention": "00:01"}
    assert due.TICK not in found
    assert due.SCAN in found


def test_new_settings_move_the_night_and_end_the_checks_of_deployed_models(begin: Callable[..., Scheduler],
                                                                          wall: WallClock) -> None:
    scheduler = begin(nightly_at="03:30", reevaluate_days=7)
    assert in_days(wall, scheduler.due()[due.REEVALUATE]) == pytest.approx(7, abs=0.01)
    scheduler.change(nightly_at="04:45", reevaluate_days=0)
    found = scheduler.due()
    assert found[due.BACKUP].astimezone().strftime("%H:%M") == "04:45"
    assert due.REEVALUATE not in found
    scheduler.change(nightly_at="04:45", reevaluate_days=0)
    scheduler.change(nightly_at="04:45", reevaluate_days=2)
    assert in_days(wall, scheduler.due()[due.REEVALUATE]) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(("days_ago", "expected_days"), [
    (None, 7), (3, 4), (7, 10 / 1440), (30, 10 / 1440), (-2, 7)])
def test_a_restart_does_not_put_the_check_of_deployed_models_off(
        begin: Callable[..., Scheduler], wall: WallClock, days_ago: float | None, expected_days: float) -> None:
    last = None if days_ago is None else wall.now() - timedelta(days=days_ago)
    found = begin(reevaluate_days=7, last_reevaluation=last).due()[due.REEVALUATE]
    assert in_days(wall, found) == pytest.approx(expected_days, abs=0.002)


def test_the_check_of_deployed_models_comes_when_it_is_due(begin: Callable[..., Scheduler], posts: Posts,
                                                          wall: WallClock, poll: Poll) -> None:
    begin(tick_s=0.5, reevaluate_days=7, last_reevaluation=wall.now() - timedelta(days=6, hours=23))
    poll(lambda: posts.count()[due.TICK] >= 1, 20, "a tick")
    wall.ahead = timedelta(hours=2)
    poll(lambda: posts.count()[due.REEVALUATE] == 1, 20, "the check")


def test_new_settings_after_a_check_of_deployed_models_do_not_bring_another(
        begin: Callable[..., Scheduler], posts: Posts, wall: WallClock, poll: Poll) -> None:
    scheduler = begin(tick_s=1.0, reevaluate_days=7, last_reevaluation=wall.now() - timedelta(days=6, hours=23))
    poll(lambda: posts.count()[due.TICK] >= 1, 20, "a tick")
    wall.ahead = timedelta(hours=2)
    poll(lambda: posts.count()[due.REEVALUATE] == 1, 20, "the check")
    assert in_days(wall, scheduler.due()[due.REEVALUATE]) > 6.9
    scheduler.change(nightly_at="03:30", reevaluate_days=7)
    assert in_days(wall, scheduler.due()[due.REEVALUATE]) > 6.9


class Counted(ScriptedSensors):
    reads = 0

    def read_all(self, moment: Any) -> tuple[Any, ...]:
        self.reads += 1
        return super().read_all(moment)


@dataclass
class Stage:
    """A service whose main loop is the test itself; `new` is what a reload changes."""

    service: Service
    sensors: Counted
    clock: SetClock
    new: dict[str, Any]

    def look(self, passed_s: float = 0.0) -> int:
        """One tick after a while; return how often the machine was looked at so far."""
        self.service._look(self.clock.pass_s(passed_s))
        return self.sensors.reads

    def handle(self) -> None:
        self.service._handle(self.service._inbox.get(timeout=60))


@pytest.fixture
def begin_service(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    with contextlib.ExitStack() as stack:
        def start(**options: Any) -> Stage:
            (tmp_path / "sensors").write_text(QUIET)
            chosen = {"state_dir": tmp_path / "state", "deploy_dir": tmp_path / "deploy", "idle_after_s": 0,
                      "hold_down_s": 0, **options}
            ledger = stack.enter_context(Ledger.open(tmp_path / "state", "test"))
            logs = stack.enter_context(contextlib.closing(configure(stream=io.StringIO())))
            sensors, clock, new = Counted(tmp_path / "sensors"), SetClock(), {}
            service = Service(ledger, Settings(**chosen), sensors, logs, clock=clock,
                              reload=lambda: Settings(**{**chosen, **new}))
            stack.callback(service.scheduler.stop)
            return Stage(service, sensors, clock, new)

        yield start


@pytest.mark.parametrize(("hours", "resyncs"), [(-1, 1), (8, 0)])
def test_a_wall_clock_that_jumps_makes_one_tick_and_no_negative_figure(
        begin_service: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, hours: int, resyncs: int) -> None:
    stage, planned = begin_service(tick_s=5), []
    service = stage.service
    real = service.scheduler.resync
    monkeypatch.setattr(service.scheduler, "resync", lambda: planned.append(real()))
    assert [stage.look(), stage.look(5)] == [1, 2]
    assert service.verdict.state == "idle"
    stage.clock.wall += timedelta(hours=hours)
    assert [stage.look(5), stage.look(0.1), stage.look(0.1)] == [3, 3, 3], "ticks in a burst count as one"
    assert [stage.look(5), stage.look(5)] == [4, 5]
    assert len(planned) == resyncs
    assert service.verdict.state == "idle", "the wall clock is no sensor"
    status = Desk(service).status()
    assert (status.state, status.uptime_s, status.verdict_for_s) == ("idle", pytest.approx(20.2), pytest.approx(20.2))


def test_a_machine_that_wakes_up_is_judged_once_and_counts_as_busy(begin_service: Callable[..., Stage]) -> None:
    stage = begin_service(tick_s=5)
    stage.look()
    stage.look(5)
    stage.clock.sleep_s(8 * 3600)
    assert [stage.look(5), stage.look(0.1)] == [3, 3]
    status = Desk(stage.service).status()
    assert (status.verdict, status.verdict_for_s) == ("busy", 0)
    assert status.uptime_s == pytest.approx(8 * 3600 + 10.1)


def test_an_errand_that_fails_is_a_condition_until_it_succeeds(begin_service: Callable[..., Stage],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin_service()
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", "backup.written:raise:ENOSPC")
    stage.service.errands.run(due.BACKUP)
    stage.handle()
    assert stage.service.conditions["backup"].startswith("The backup failed: ")
    monkeypatch.delenv("NIGHTPRESS_TESTING")
    stage.service.errands.run(due.BACKUP)
    stage.handle()
    assert stage.service.conditions == {}


def scan(stage: Stage) -> None:
    stage.service.errands.run(due.SCAN)
    stage.service.errands._running[due.SCAN].join(60)
    while not stage.service._inbox.empty():
        stage.handle()


def test_a_watched_folder_that_is_gone_is_a_condition_until_it_is_there(begin_service: Callable[..., Stage],
                                                                       tmp_path: Path) -> None:
    stage = begin_service(watch=(tmp_path / "models",))
    scan(stage)
    assert list(stage.service.conditions) == [f"watch {tmp_path / 'models'}"]
    (tmp_path / "models").mkdir()
    scan(stage)
    assert stage.service.conditions == {}


@pytest.mark.parametrize(("old", "new"), [({"watch": ("/none-of-that-name",)}, {"watch": ()}),
                                          ({"gpu_layers": -1}, {"gpu_layers": 0})])
def test_a_setting_that_is_taken_away_takes_its_condition_with_it(begin_service: Callable[..., Stage],
                                                                 old: dict[str, Any], new: dict[str, Any]) -> None:
    stage = begin_service(**old)
    stage.service.errands.run(due.SCAN)
    for thread in stage.service.errands._running.values():
        thread.join(60)
    stage.look()
    while not stage.service._inbox.empty():
        stage.handle()
    assert len(stage.service.conditions) == 1
    stage.new.update(new)
    stage.service.reload()
    stage.look(60)
    assert stage.service.conditions == {}


def test_a_new_level_of_the_log_is_taken_over(begin_service: Callable[..., Stage]) -> None:
    stage = begin_service()
    stage.new["log_level"] = "debug"
    assert stage.service.reload() == ["log_level"]
    say("test.debug", "Seen?", level="debug")
    assert stage.service.logs.tail(1)[0]["action"] == "test.debug"


def test_a_new_file_that_could_not_be_queued_is_queued_later(begin_service: Callable[..., Stage], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    tiny_llama().write(tmp_path / "models" / "mine.gguf")
    stage = begin_service(watch=(tmp_path / "models",))
    monkeypatch.setattr(stage.service, "ask", lambda what: what())
    monkeypatch.setattr("state.faults._passages", {})
    scan(stage)
    stage.clock.pass_s(60)
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", "ledger.commit@1:raise:ENOSPC")
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    scan(stage)
    assert "full" in stage.service.conditions["scan"]
    stage.clock.pass_s(60)
    scan(stage)
    assert [row["name"] for row in stage.service.ledger.jobs()] == ["mine"]


def test_a_machine_that_restarts_every_day_is_checked_too(wall: WallClock, begin_service: Callable[..., Stage]) -> None:
    moments = []
    for day in (0, 6):
        wall.ahead = timedelta(days=day)
        stage = begin_service()
        stage.service.scheduler.start()
        moments.append(stage.service.scheduler.due()[due.REEVALUATE])
        stage.service.scheduler.stop()
        stage.service.ledger.close()
    assert moments[1] - moments[0] < timedelta(hours=1)
