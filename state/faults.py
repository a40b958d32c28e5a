"""What every package shares: the base of all errors, and the failpoints that the crash tests pull.

This module imports nothing of the project, so `loops` and `daemon` may use it without
knowing the ledger.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import ClassVar


class NightpressError(Exception):
    """Something went wrong that has no better name; the message says what.

    The message is one sentence a person can act on. Without one, the first line of the
    class docstring is the message. `exit_code` is what the command line exits with, one
    number per class.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])


def failpoint(name: str) -> None:
    """Do nothing, unless a test asked for a fault at this very point.

    `NIGHTPRESS_FAILPOINT=NAME:ACTION` together with `NIGHTPRESS_TESTING=1` arms the point.
    ACTION is `kill` (SIGKILL), `stop` (SIGSTOP), `abort`, `segv`, or `raise:ERRNO`, for
    instance `raise:ENOSPC`. A point armed as `NAME@3:ACTION` fires at its third passage.

    Raises:
        OSError: for `raise:ERRNO`.
    """
    if os.environ.get("NIGHTPRESS_TESTING") != "1":
        return
    armed, _, action = os.environ.get("NIGHTPRESS_FAILPOINT", "").partition(":")
    armed, _, passage = armed.partition("@")
    if armed != name:
        return
    _passages[name] = _passages.get(name, 0) + 1
    if passage and _passages[name] != int(passage):
        return
    kind, _, detail = action.partition(":")
    if kind == "raise":
        number = getattr(errno, detail)
        raise OSError(number, f"{os.strerror(number)} (failpoint {name})")
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "abort": signal.SIGABRT,
               "segv": signal.SIGSEGV}
    os.kill(os.getpid(), signals[kind])


_passages: dict[str, int] = {}
