"""Dying with the parent: what the kernel is asked for, so that even a stopped process leaves nothing behind."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """Return what a process calls to be killed when its parent ends; None where no kernel does that.

    The library is loaded here, so that between fork and exec only a system call is left.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask
