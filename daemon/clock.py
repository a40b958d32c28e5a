"""The present moment by three clocks, handed in wherever time decides, so that tests can set it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Moment:
    """One moment.

    Attributes:
        monotonic_s: for durations; never jumps, and on Linux stands still while the machine is suspended.
        boot_s: the same, but goes on while the machine is suspended.
        wall: what the clock on the wall shows, with its zone; may jump. For time windows and for people only.
    """

    monotonic_s: float
    boot_s: float
    wall: datetime


class Clock(Protocol):
    """Something that knows the time."""

    def now(self) -> Moment:
        """Return the present moment."""


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> Moment:
        """Return the present moment; where suspend is not told apart, both durations are the same."""
        monotonic = time.monotonic()
        boottime = getattr(time, "CLOCK_BOOTTIME", None)
        boot = time.clock_gettime(boottime) if boottime is not None else monotonic
        return Moment(monotonic, boot, datetime.now().astimezone())
