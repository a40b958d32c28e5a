"""The machine is idle only after quiet without a gap, and busy at the first sign or doubt."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import SetClock, changes, cpu, free_memory, presence, replay

from daemon.clock import Moment
from daemon.sensors import HoursSensor
from daemon.watchdog import (
    WAKING_S,
    HoursWrong,
    Limits,
    Reading,
    State,
    Watchdog,
    absent,
    parse_hours,
    unknown,
)

LIMITS = Limits(idle_after_s=20.0, hold_down_s=10.0)


def idle_watchdog(limits: Limits = LIMITS) -> tuple[Watchdog, SetClock]:
    """A watchdog that found the machine idle."""
    watchdog, clock = Watchdog(limits), SetClock()
    assert replay(watchdog, clock, [0.0] * 200)[-1].state == "idle"
    return watchdog, clock


# --- becoming idle ---


def test_idle_comes_only_after_quiet_for_idle_after_s() -> None:
    verdicts = replay(Watchdog(Limits()), SetClock(), [0.0] * 200)
    states = [verdict.state for verdict in verdicts]
    assert states == ["settling"] * 120 + ["idle"] * 80
    assert verdicts[40].reason == "settling: quiet for 40 of 120 s"
    assert verdicts[125].reason == "idle for 5 s"
    assert verdicts[125].since_s == SetClock().monotonic_s + 121
    assert verdicts[125].for_s == 5


def test_a_long_idle_is_told_in_minutes_and_hours() -> None:
    watchdog, clock = idle_watchdog()
    assert replay(watchdog, clock, [0.0] * 240)[-1].reason == "idle for 6 min"
    assert replay(watchdog, clock, [0.0] * 800, step_s=10.0)[-1].reason == "idle for 2 h"


def test_quiet_begins_anew_with_every_busy_moment() -> None:
    verdicts = replay(Watchdog(LIMITS), SetClock(), ([0.0] * 19 + [99.0]) * 5)
    assert "idle" not in changes(verdicts)


def test_the_first_busy_sensor_ends_idle_at_once() -> None:
    watchdog, clock = idle_watchdog()
    moment = clock.pass_s(1)
    gpu = Reading("gpu", moment.monotonic_s, 34.0, 10.0, "%", part="gpu0")
    verdict = watchdog.judge([cpu(0.0, moment), gpu], moment)
    assert (verdict.state, verdict.reason, verdict.for_s) == (State.BUSY, "busy: gpu0 34 % > 10 %", 0.0)


def test_a_square_wave_makes_one_transition_per_edge() -> None:
    verdicts = replay(Watchdog(LIMITS), SetClock(), ([90.0] * 30 + [1.0] * 30) * 3)
    assert changes(verdicts) == ["busy", "settling", "idle"] * 3


def test_hold_down_holds_even_where_quiet_need_not_last() -> None:
    verdicts = replay(Watchdog(Limits(idle_after_s=0.0, hold_down_s=30.0)), SetClock(), [99.0] * 3 + [0.0] * 60)
    assert [verdict.state for verdict in verdicts] == ["busy"] * 3 + ["settling"] * 27 + ["idle"] * 33


def test_time_in_which_nobody_looked_does_not_count_as_quiet() -> None:
    watchdog, clock = Watchdog(LIMITS), SetClock()
    replay(watchdog, clock, [0.0] * 10)
    verdict, = replay(watchdog, clock, [0.0], step_s=500.0)
    assert verdict.reason == "settling: quiet for 0 of 20 s"


# --- doubt ---

DOUBTS = {
    "the file is gone": lambda moment: unknown("cpu", moment, "the file is gone"),
    "it was not measured": lambda moment: cpu(None, moment),
    "it was not measured ": lambda moment: cpu(1.0, moment, limit=None),
    "the value is not a number": lambda moment: cpu(math.nan, moment),
    "the value is not a number ": lambda moment: cpu(-math.inf, moment),
    "the value is not a number  ": lambda moment: cpu(1.0, moment, limit=math.nan),
    "its last reading is 16 s old": lambda moment: replace(cpu(1.0, moment), at_s=moment.monotonic_s - 16),
    "its reading is from the future": lambda moment: replace(cpu(1.0, moment), at_s=moment.monotonic_s + 1),
    "its reading is from the future ": lambda moment: replace(cpu(1.0, moment), at_s=math.nan),
    "cannot tell": lambda moment: Reading("cpu", moment.monotonic_s, 1.0, 15.0, "%", problem="cannot tell", absent="x"),
}


@pytest.mark.parametrize("why", DOUBTS)
def test_what_is_unknown_is_busy_and_says_why(why: str) -> None:
    watchdog, clock = idle_watchdog()
    moment = clock.pass_s(1)
    verdict = watchdog.judge([presence(900.0, moment), DOUBTS[why](moment)], moment)
    assert (verdict.state, verdict.reason) == ("busy", f"busy: cpu is unknown: {why.strip()}")


def test_what_is_known_to_be_busy_is_named_before_what_is_unknown() -> None:
    watchdog, clock = idle_watchdog()
    moment = clock.pass_s(1)
    verdict = watchdog.judge([unknown("gpu", moment, "hangs"), cpu(50.0, moment)], moment)
    assert verdict.reason == "busy: cpu 50 % > 15 %"


def test_a_reading_is_good_until_it_is_stale() -> None:
    watchdog, clock = idle_watchdog()
    old = cpu(0.0, clock.now())
    assert watchdog.judge([old], clock.pass_s(15)).state == "idle"
    assert watchdog.judge([old], clock.pass_s(0.1)).state == "busy"


def test_what_is_absent_has_no_vote() -> None:
    watchdog, clock = idle_watchdog()
    moment = clock.pass_s(1)
    assert watchdog.judge([cpu(0.0, moment), absent("gpu", moment, "none here")], moment).state == "idle"


@pytest.mark.parametrize("only", ["nothing", "absent", "not counted"])
def test_without_any_vote_the_machine_is_busy(only: str) -> None:
    watchdog, clock = idle_watchdog(replace(LIMITS, sensors=("cpu",)))
    moment = clock.pass_s(1)
    readings = {"nothing": [], "absent": [absent("cpu", moment, "why")], "not counted": [presence(900.0, moment)]}
    verdict = watchdog.judge(readings[only], moment)
    assert (verdict.state, verdict.reason) == ("busy", "busy: no sensor has a vote")


def test_a_sensor_that_does_not_count_has_no_vote() -> None:
    watchdog, clock = idle_watchdog(replace(LIMITS, sensors=("cpu",)))
    moment = clock.pass_s(1)
    assert watchdog.judge([cpu(0.0, moment), unknown("gpu", moment, "hangs")], moment).state == "idle"


# --- around the limit ---


def test_once_busy_a_sensor_must_come_back_to_the_release_share() -> None:
    watchdog, clock = idle_watchdog()
    verdicts = replay(watchdog, clock, [15.0, 15.1, 14.9, 12.1, 12.0, 14.9])
    assert [verdict.state for verdict in verdicts] == ["idle", "busy", "busy", "busy", "settling", "settling"]
    assert verdicts[3].reason == "busy: cpu 12.1 %, not yet back under 12.0 %"


def test_release_works_the_other_way_where_less_is_busier() -> None:
    watchdog, clock = idle_watchdog()
    verdicts = replay(watchdog, clock, [300.0, 299.0, 374.0, 375.0, 301.0], reading=free_memory)
    assert [verdict.state for verdict in verdicts] == ["idle", "busy", "busy", "settling", "settling"]


def test_the_time_since_the_last_input_counts_as_it_is_set() -> None:
    watchdog, clock = idle_watchdog()
    verdicts = replay(watchdog, clock, [300.0, 299.0, 300.0, 301.0], reading=presence)
    assert [verdict.state for verdict in verdicts] == ["idle", "busy", "settling", "settling"]
    assert verdicts[1].reason == "busy: presence: last input 299 s ago, away after 300 s"


def test_a_limit_of_zero_can_be_kept() -> None:
    watchdog, clock = Watchdog(replace(LIMITS, cpu_percent=0.0)), SetClock()
    verdicts = replay(watchdog, clock, [1.0] + [0.0] * 30, reading=lambda value, moment: cpu(value, moment, 0.0))
    assert changes(verdicts) == ["busy", "settling", "idle"]


def test_a_doubt_in_between_does_not_release() -> None:
    watchdog, clock = idle_watchdog()
    verdicts = replay(watchdog, clock, [20.0, None, 14.0])
    assert changes(verdicts) == ["busy"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(12.01, 18.0), min_size=1, max_size=60), st.sampled_from([0.0, 8.0]))
def test_noise_around_the_limit_interrupts_once_and_for_good(noise: list[float], idle_after_s: float) -> None:
    limits = Limits(idle_after_s=idle_after_s, hold_down_s=10.0)
    verdicts = replay(Watchdog(limits), SetClock(), [0.0] * 15 + noise * 3)
    assert changes(verdicts).count("busy") <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 11.0, 14.0, 16.0]), min_size=1, max_size=60), st.sampled_from([0.0, 2.0, 20.0]))
def test_any_noise_ends_idle_at_most_once_per_hold_down(noise: list[float], idle_after_s: float) -> None:
    limits = Limits(idle_after_s=idle_after_s, hold_down_s=10.0)
    verdicts = replay(Watchdog(limits), SetClock(), noise * 3)
    ended_s = [now.since_s for before, now in pairwise(verdicts) if (before.state, now.state) == ("idle", "busy")]
    assert all(later_s - earlier_s >= limits.hold_down_s for earlier_s, later_s in pairwise(ended_s))


VALUES = st.one_of(st.just(0.0), st.floats(0.0, 40.0), st.none(), st.just(math.nan))


STAYS = st.lists(st.tuples(VALUES, VALUES, st.integers(1, 40), st.sampled_from([0.0, 0.0, -3600.0, 28_800.0]),
                           st.sampled_from([0.0, 0.0, 0.0, 3600.0])), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(STAYS)
def test_never_idle_within_idle_after_s_of_busy_or_unknown(
        stays: list[tuple[float | None, float | None, int, float, float]]) -> None:
    watchdog, clock = Watchdog(LIMITS), SetClock()
    replay(watchdog, clock, [0.0] * 25)
    bad_s = -math.inf
    for first, second, steps, jump_s, sleep_s in stays:
        clock.wall += timedelta(seconds=jump_s)
        clock.sleep_s(sleep_s)
        slept = sleep_s > 0
        for _ in range(steps):
            moment = clock.pass_s(1)
            gpu = Reading("gpu", moment.monotonic_s, second, 10.0, "%", part="gpu0")
            verdict = watchdog.judge([cpu(first, moment), gpu], moment)
            assert verdict.for_s >= 0
            quiet = first is not None and first <= 15 and second is not None and second <= 10 and not slept
            if not quiet:
                bad_s = moment.monotonic_s
                assert verdict.state == "busy"
            if verdict.state == "idle":
                assert moment.monotonic_s - bad_s > LIMITS.idle_after_s
            slept = False


# --- sleep and clocks ---


def test_after_a_sleep_the_machine_counts_as_busy_and_settles_anew() -> None:
    watchdog, clock = idle_watchdog()
    clock.sleep_s(8 * 3600)
    verdicts = replay(watchdog, clock, [0.0] * 60)
    assert verdicts[3].reason == "busy: the machine woke up 3 s ago"
    assert [verdict.state for verdict in verdicts] == (
        ["busy"] * int(WAKING_S) + ["settling"] * 20 + ["idle"] * (40 - int(WAKING_S)))


def test_a_reading_from_before_the_sleep_does_not_count_after_it() -> None:
    watchdog, clock = idle_watchdog()
    old = presence(900.0, clock.now())
    clock.sleep_s(8 * 3600)
    assert watchdog.judge([old], clock.pass_s(0.5)).state == "busy"


@pytest.mark.parametrize("jump_h", [8, -1, -24 * 365])
@pytest.mark.parametrize("before", [5, 100])
def test_the_wall_clock_changes_nothing(jump_h: int, before: int) -> None:
    told = []
    for hours in (0, jump_h):
        watchdog, clock = Watchdog(LIMITS), SetClock()
        verdicts = replay(watchdog, clock, [0.0] * before)
        clock.wall += timedelta(hours=hours)
        told.append([verdict.reason for verdict in verdicts + replay(watchdog, clock, [0.0] * 30 + [90.0] * 2)])
    assert told[0] == told[1]


def test_durations_are_never_negative() -> None:
    watchdog, clock = idle_watchdog()
    moment = clock.pass_s(-500)
    verdict = watchdog.judge([cpu(0.0, moment)], moment)
    assert verdict.for_s >= 0
    assert "-" not in verdict.reason


# --- the rest of the verdict ---


def test_other_limits_keep_what_was_seen() -> None:
    watchdog, clock = idle_watchdog()
    watchdog.update(replace(LIMITS, idle_after_s=9999.0))
    assert replay(watchdog, clock, [0.0])[0].state == "idle"
    replay(watchdog, clock, [99.0])
    assert replay(watchdog, clock, [0.0])[0].reason == "settling: quiet for 0 of 9999 s"
    watchdog.update(replace(LIMITS, sensors=("presence",)))
    assert replay(watchdog, clock, [0.0])[0].reason == "busy: no sensor has a vote"


def test_short_memory_is_told_whatever_else_is_busy() -> None:
    watchdog, clock = Watchdog(LIMITS), SetClock()
    moment = clock.now()
    low = Reading("memory", moment.monotonic_s, 4e8, 1e9, "bytes", above=False, part="free memory")
    both = watchdog.judge([cpu(90.0, moment), low], moment)
    assert (both.reason, both.short_memory) == ("busy: cpu 90 % > 15 %", True)
    assert watchdog.judge([low], moment).reason == "busy: free memory 0.4 GB < 1.0 GB"
    assert not watchdog.judge([cpu(90.0, moment)], moment).short_memory
    assert not watchdog.judge([unknown("memory", moment, "hangs")], moment).short_memory


def test_a_yes_or_no_is_told_in_its_own_words() -> None:
    watchdog, clock = Watchdog(LIMITS), SetClock()
    moment = clock.now()
    battery = Reading("battery", moment.monotonic_s, 1.0, 0.5, "", detail="on battery (80 %)")
    assert watchdog.judge([battery], moment).reason == "busy: on battery (80 %)"


def test_two_numbers_that_differ_never_look_the_same() -> None:
    watchdog, clock = Watchdog(LIMITS), SetClock()
    assert replay(watchdog, clock, [15.2])[0].reason == "busy: cpu 15.2 % > 15.0 %"


def test_hours_are_read_as_minutes_of_the_day() -> None:
    assert parse_hours("22:00-07:00, 12:30-13:30") == ((1320, 420), (750, 810))
    assert parse_hours("0:00-24:00") == ((0, 1440),)
    assert parse_hours("") == parse_hours(" ") == ()


@pytest.mark.parametrize("text", ["22-7", "22:00", "07:00-07:00", "25:00-07:00", "22:60-07:00", "24:00-07:00",
                                  "22:00-24:30", "22:00-07:00,", "22:00 to 07:00", "٢٢:00-07:00",
                                  "22:00-07:00;1:00-2:00"])
def test_hours_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(HoursWrong, match="The hours"):
        parse_hours(text)


# --- hours ---

HOURS = "22:00-07:00,12:30-13:30"


@pytest.mark.parametrize(("time", "words"), [
    ("21:59", None), ("22:00", "until 07:00"), ("00:00", "until 07:00"), ("06:59", "until 07:00"), ("07:00", None),
    ("12:29", None), ("12:30", "until 13:30"), ("13:29", "until 13:30"), ("13:30", None)])
def test_work_is_allowed_inside_the_hours_only(time: str, words: str | None) -> None:
    wall = datetime.fromisoformat(f"2026-03-04T{time}:30+05:30")
    reading, = HoursSensor(Limits(hours=HOURS)).read(Moment(1.0, 1.0, wall))
    assert (reading.value, reading.limit, reading.unit) == (0.0 if words else 1.0, 0.5, "")
    assert reading.detail == (f"inside {HOURS}, {words}" if words else f"outside {HOURS}")


@pytest.mark.parametrize(("day", "shift_h"), [("2026-03-29", 1), ("2026-10-25", -1)])
def test_hours_hold_on_days_of_23_and_25_hours(day: str, shift_h: int) -> None:
    """At 01:00 UTC the clocks go to or from summer time; all night long the wall's time decides."""
    sensor, told = HoursSensor(Limits(hours="01:30-03:30")), []
    first = datetime.fromisoformat(f"{day}T00:00:00+00:00")
    for minute in range(0, 240, 10):
        utc = first + timedelta(minutes=minute)
        summer = (minute >= 60) is (shift_h > 0)
        wall = utc.astimezone(timezone(timedelta(hours=2 if summer else 1)))
        reading, = sensor.read(Moment(0.0, 0.0, wall))
        told.append((reading.value == 0.0) is ((1, 30) <= (wall.hour, wall.minute) < (3, 30)))
    assert all(told)
