"""A clock that tests set, and readings to judge at its moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from daemon.clock import Moment
from daemon.watchdog import Reading, Verdict, Watchdog


@dataclass
class SetClock:
    """The three clocks; each moves only as told."""

    monotonic_s: float = 1000.0
    boot_s: float = 5000.0
    wall: datetime = field(default_factory=lambda: datetime(2026, 3, 4, 12, 0, tzinfo=UTC))

    def now(self) -> Moment:
        return Moment(self.monotonic_s, self.boot_s, self.wall)

    def pass_s(self, seconds: float) -> Moment:
        """Let time pass."""
        self.monotonic_s += seconds
        self.boot_s += seconds
        self.wall += timedelta(seconds=seconds)
        return self.now()

    def sleep_s(self, seconds: float) -> None:
        """Let the machine be suspended."""
        self.boot_s += seconds
        self.wall += timedelta(seconds=seconds)


def cpu(value: float | None, moment: Moment, limit: float | None = 15.0) -> Reading:
    """A reading in which more is busier."""
    return Reading("cpu", moment.monotonic_s, value, limit, "%")


def presence(value: float, moment: Moment, limit: float = 300.0) -> Reading:
    """A reading in which less is busier."""
    return Reading("presence", moment.monotonic_s, value, limit, "s", above=False)


def free_memory(value: float, moment: Moment, limit: float = 300.0) -> Reading:
    """A reading in which less is busier, and which may go up and down."""
    return Reading("memory", moment.monotonic_s, value, limit, "bytes", above=False)


def replay(watchdog: Watchdog, clock: SetClock, values: Iterable[float | None], step_s: float = 1.0,
           reading: Callable[[float | None, Moment], Reading] = cpu) -> list[Verdict]:
    """Judge one value after the other, step_s apart."""
    return [watchdog.judge([reading(value, moment)], moment) for value in values for moment in [clock.pass_s(step_s)]]


def changes(verdicts: Iterable[Verdict]) -> list[str]:
    """The states in their order, each once per stay."""
    found: list[str] = []
    for verdict in verdicts:
        if not found or found[-1] != verdict.state:
            found.append(verdict.state)
    return found
