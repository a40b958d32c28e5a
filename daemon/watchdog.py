"""Whether anybody needs this machine: a pure decision over what the sensors measured.

Unknown means busy. The sensors only measure; here their values are compared, and here is
decided how long quiet must last. Nothing here reads a clock or the machine.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from daemon.clock import Moment
from state.faults import NightpressError

SENSORS = ("cpu", "load", "gpu", "presence", "battery", "memory", "temperature", "hours")
#: The machine slept when the clock that goes on meanwhile gained so much on the one that stands still.
SLEPT_S = 2.0
#: So long after a wake-up the machine counts as busy. Readings taken before the sleep look fresh, because
#: the monotonic clock stood still; within this time every sensor reads anew.
WAKING_S = 10.0


class HoursWrong(NightpressError):
    """The hours cannot be read; write them as `22:00-07:00`, several separated by commas."""

    exit_code: ClassVar[int] = 5


class State(StrEnum):
    """What the machine is, as far as Nightpress may use it."""

    BUSY = "busy"  #: somebody needs it, or nobody knows
    SETTLING = "settling"  #: quiet, but not for long enough
    IDLE = "idle"  #: quiet for long enough


@dataclass(frozen=True)
class Limits:
    """From where on the machine is in use, and how long it must be quiet.

    Attributes:
        idle_after_s: so long every sensor must be quiet before the machine counts as idle.
        hold_down_s: at least so long after the machine became busy it does not become idle.
        stale_after_s: a reading older than this is unknown, and unknown is busy.
        release_share: a sensor that was over its limit is quiet only at this share of the limit; above 0, at most 1.
        cpu_percent: processor time that others use, of the whole machine.
        load_per_cpu: load average over one minute without our own, per CPU.
        gpu_percent: what others use of a GPU.
        gpu_memory_bytes: GPU memory that others hold.
        presence_away_s: after so long without input a person counts as away.
        memory_pressure_percent: share of the last 10 s in which some process waited for memory.
        memory_free_bytes: with less available memory than this, the machine is busy.
        temperature_c: of the hottest processor, in °C.
        on_battery: work on battery too; then the battery has no vote.
        hours: when work is allowed, as `22:00-07:00,12:30-13:30` in local time; empty for always.
        sensors: the names of the sensors that have a vote.
    """

    idle_after_s: float = 120.0
    hold_down_s: float = 60.0
    stale_after_s: float = 15.0
    release_share: float = 0.8
    cpu_percent: float = 15.0
    load_per_cpu: float = 1.0
    gpu_percent: float = 10.0
    gpu_memory_bytes: int = 1_500_000_000
    presence_away_s: float = 300.0
    memory_pressure_percent: float = 10.0
    memory_free_bytes: int = 1_000_000_000
    temperature_c: float = 90.0
    on_battery: bool = False
    hours: str = ""
    sensors: tuple[str, ...] = SENSORS


@dataclass(frozen=True)
class Reading:
    """One value of one sensor, or why there is none.

    Attributes:
        sensor: one of `SENSORS`.
        at_s: when it was measured, by the monotonic clock.
        value: what was measured; None for unknown or absent.
        limit: what the value is compared with.
        unit: `%`, `bytes`, `s` since the last input, `°C`, `per CPU`; empty for yes (1) or no (0), where
            `detail` says what that means.
        above: a value above the limit is busy; otherwise one below it.
        problem: why the value is unknown. Busy.
        absent: why the sensor does not apply here. Has no vote.
        detail: more for a person to read.
        part: which of several things this sensor watches, such as `gpu0`; empty for the only one.
    """

    sensor: str
    at_s: float
    value: float | None
    limit: float | None
    unit: str
    above: bool = True
    problem: str | None = None
    absent: str | None = None
    detail: str = ""
    part: str = ""

    @property
    def name(self) -> str:
        """What a person calls the thing that was measured."""
        return self.part or self.sensor

    @property
    def key(self) -> tuple[str, str]:
        """What tells this from the other readings of one moment."""
        return self.sensor, self.part

    @property
    def votes(self) -> bool:
        """Whether this sensor applies here."""
        return self.absent is None or self.problem is not None


def unknown(sensor: str, moment: Moment, problem: str) -> Reading:
    """Return the reading of a sensor that could not measure, with the reason."""
    return Reading(sensor, moment.monotonic_s, None, None, "", problem=problem)


def absent(sensor: str, moment: Moment, reason: str, part: str = "") -> Reading:
    """Return the reading of a sensor that does not apply here, with the reason."""
    return Reading(sensor, moment.monotonic_s, None, None, "", absent=reason, part=part)


@dataclass(frozen=True)
class Verdict:
    """What the machine is, and why.

    Attributes:
        state: busy, settling or idle.
        reason: the same as a sentence for people.
        since_s: the moment by the monotonic clock from which on the state holds.
        short_memory: memory is among what makes the machine busy.
        readings: all that was judged.
        for_s: how long the state holds; never negative.
    """

    state: State
    reason: str
    since_s: float
    short_memory: bool
    readings: tuple[Reading, ...]
    for_s: float = 0.0


class Watchdog:
    """Judges readings, moment after moment. Busy at once, idle only after quiet without a gap."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._state = State.BUSY
        self._since_s = 0.0
        self._busied_s = 0.0
        self._quiet_since_s: float | None = None
        self._woke_s: float | None = None
        self._over: set[tuple[str, str]] = set()
        self._last: Moment | None = None

    def update(self, limits: Limits) -> None:
        """Judge by other limits from now on; what was seen so far stands."""
        self.limits = limits

    def judge(self, readings: Iterable[Reading], moment: Moment) -> Verdict:
        """Return what the machine is at this moment; never idle while any reading says or may mean busy."""
        seen = tuple(readings)
        now_s = self._advance(moment)
        objection, short_memory = self._objection(seen, now_s)
        if objection is not None:
            self._quiet_since_s = None
            self._enter(State.BUSY, now_s)
            reason = f"busy: {objection}"
        else:
            reason = self._settle(now_s)
        return Verdict(self._state, reason, self._since_s, short_memory, seen, now_s - self._since_s)

    def _advance(self, moment: Moment) -> float:
        """Take note of the moment and of what happened to the machine since the last; return the time."""
        last = self._last
        if last is None:
            self._last = moment
            self._since_s = self._busied_s = moment.monotonic_s
            return moment.monotonic_s
        now_s = max(moment.monotonic_s, last.monotonic_s)
        passed_s = now_s - last.monotonic_s
        if moment.boot_s - last.boot_s - passed_s > SLEPT_S:
            self._woke_s = now_s
        elif passed_s > self.limits.stale_after_s and self._state is not State.IDLE:
            self._quiet_since_s = None  # nobody looked for so long that it cannot count as quiet
        self._last = Moment(now_s, max(moment.boot_s, last.boot_s), moment.wall)
        return now_s

    def _objection(self, readings: tuple[Reading, ...], now_s: float) -> tuple[str | None, bool]:
        """Return what speaks against quiet, None for nothing; and whether memory does."""
        voting = [reading for reading in readings if reading.votes and reading.sensor in self.limits.sensors]
        over, measured, unknown, short_memory = set(), [], [], False
        for reading in voting:
            why = _why_unknown(reading, now_s, self.limits.stale_after_s)
            if why is not None:
                unknown.append(f"{reading.name} is unknown: {why}")
                if reading.key in self._over:
                    over.add(reading.key)
            elif sentence := self._exceeds(reading):
                measured.append(sentence)
                over.add(reading.key)
                short_memory = short_memory or reading.sensor == "memory"
        self._over = over
        if self._woke_s is not None and now_s - self._woke_s < WAKING_S:
            return f"the machine woke up {now_s - self._woke_s:.0f} s ago", short_memory
        if not voting:
            return "no sensor has a vote", short_memory
        return next(iter([*measured, *unknown]), None), short_memory

    def _exceeds(self, reading: Reading) -> str | None:
        """Return how a known value exceeds its limit, None when it is quiet.

        A Schmitt trigger: once over the limit, a sensor has to come back to the release
        share of it, so that noise around the limit does not toggle the state.
        """
        assert reading.value is not None and reading.limit is not None  # noqa: S101, PT018 - known
        value, limit = reading.value, reading.limit
        # the time since the last input only grows: nothing to toggle
        share = 1.0 if reading.unit == "s" else self.limits.release_share
        if value > limit if reading.above else value < limit:
            return _describe(reading, limit, returning=False)
        release = limit * share if reading.above else limit / share
        if reading.key in self._over and (value > release if reading.above else value < release):
            return _describe(reading, release, returning=True)
        return None

    def _settle(self, now_s: float) -> str:
        """Go on being quiet; return the reason."""
        if self._state is State.IDLE:
            return f"idle for {duration(now_s - self._since_s)}"
        if self._quiet_since_s is None:
            self._quiet_since_s = now_s
        quiet_s = now_s - self._quiet_since_s
        needed_s = max(self.limits.idle_after_s, self._busied_s + self.limits.hold_down_s - self._quiet_since_s)
        if quiet_s >= needed_s:
            self._enter(State.IDLE, now_s)
            return f"idle for {duration(0.0)}"
        self._enter(State.SETTLING, now_s)
        return f"settling: quiet for {quiet_s:.0f} of {needed_s:.0f} s"

    def _enter(self, state: State, now_s: float) -> None:
        if state is self._state:
            return
        self._state, self._since_s = state, now_s
        if state is State.BUSY:
            self._busied_s = now_s


def _why_unknown(reading: Reading, now_s: float, stale_after_s: float) -> str | None:
    """Return why the value cannot be trusted, None when it can."""
    age_s = now_s - reading.at_s
    if reading.problem is not None:
        return reading.problem
    if reading.value is None or reading.limit is None:
        return "it was not measured"
    if not math.isfinite(reading.value) or math.isnan(reading.limit):
        return "the value is not a number"
    if math.isnan(age_s) or age_s < 0:
        return "its reading is from the future"
    if age_s > stale_after_s:
        return f"its last reading is {age_s:.0f} s old"
    return None


def _describe(reading: Reading, limit: float, *, returning: bool) -> str:
    """Return what was measured as a clause: `gpu0 34 % > 10 %`."""
    assert reading.value is not None  # noqa: S101 - known
    if not reading.unit:
        return reading.detail or f"{reading.name} says so"
    more = f" ({reading.detail})" if reading.detail else ""
    value, bound = amount(reading.value, reading.unit), amount(limit, reading.unit)
    for digits in (1, 2, 3):  # two numbers that differ must not look the same
        if value == bound:
            value, bound = amount(reading.value, reading.unit, digits), amount(limit, reading.unit, digits)
    if reading.unit == "s":
        return f"{reading.name}: last input {value} ago, away after {bound}{more}"
    if returning:
        return f"{reading.name} {value}, not yet back {'under' if reading.above else 'over'} {bound}{more}"
    return f"{reading.name} {value} {'>' if reading.above else '<'} {bound}{more}"


def amount(value: float, unit: str, digits: int | None = None) -> str:
    """Return a value as people write it: `34 %`, `1.5 GB`; digits after the point as it seems fit."""
    if unit == "bytes":
        return f"{value / 1e9:.{1 if digits is None else digits}f} GB"
    if digits is None:
        digits = 0 if abs(value) >= 10 or value == round(value) else 2 if unit == "per CPU" else 1
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `7 min`, `3 h`."""
    if seconds < 120:
        return f"{int(seconds)} s"
    return f"{int(seconds / 60)} min" if seconds < 7200 else f"{int(seconds / 3600)} h"


_WINDOW = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])-([01]?[0-9]|2[0-3]|24(?=:00)):([0-5][0-9])")


@functools.lru_cache(maxsize=8)
def parse_hours(text: str) -> tuple[tuple[int, int], ...]:
    """Return the windows of `22:00-07:00,12:30-13:30` as minutes of the day, the end excluded; '' has none.

    Raises:
        HoursWrong: not of that form, or a window whose ends are equal.
    """
    windows = []
    for window in text.split(",") if text.strip() else ():
        found = _WINDOW.fullmatch(window.strip())
        if found is None:
            raise HoursWrong(f"The hours {window.strip()!r} cannot be read; write them as `22:00-07:00`, "
                             "several separated by commas.")
        start, end = (60 * int(found[i]) + int(found[i + 1]) for i in (1, 3))
        if start == end:
            raise HoursWrong(f"The hours {window.strip()!r} begin when they end; write `00:00-24:00` for the whole "
                             "day, or nothing for always.")
        windows.append((start, end))
    return tuple(windows)
