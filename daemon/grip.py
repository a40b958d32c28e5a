"""The grip on work under way: stop it for a while, let it go on, end it; safe from any thread."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time


class Grip:
    """Holds the process groups of one piece of work.

    Stopping is SIGSTOP to the whole group, because native code takes no request to pause: it works
    within milliseconds, whatever the worker does. A group that is taken while the work is stopped is
    stopped at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: set[int] = set()
        self._polite: set[int] = set()
        self._stopped_at: float | None = None
        self._stopped_s = 0.0
        self._end = threading.Event()
        #: why it was ended, a sentence
        self.reason = ""

    def take(self, group: int, *, polite: bool = False) -> None:
        """Take hold of a process group, until `let_go`; a polite one is not killed at the end, but woken.

        Whoever runs a polite group asks it to end when it sees `ended`, and ends it for certain.
        """
        with self._lock:
            self._groups.add(group)
            if polite:
                self._polite.add(group)
            if self._end.is_set():
                _signal(group, signal.SIGKILL)
            elif self._stopped_at is not None:
                _signal(group, signal.SIGSTOP)

    def let_go(self, group: int) -> None:
        """Forget a group; to be called before its leader is waited for, so that its number is still its own."""
        with self._lock:
            self._groups.discard(group)
            self._polite.discard(group)

    def stop(self) -> None:
        """Stop all work until `go_on`; stopped already, it does nothing."""
        with self._lock:
            if self._stopped_at is None:
                self._stopped_at = time.monotonic()
            for group in self._groups:
                _signal(group, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let stopped work go on."""
        with self._lock:
            if self._stopped_at is not None:
                self._stopped_s += time.monotonic() - self._stopped_at
                self._stopped_at = None
            for group in self._groups:
                _signal(group, signal.SIGCONT)

    def end(self, reason: str) -> None:
        """End the work: its processes are killed, stopped or not, and whoever runs it sees `ended`.

        The first reason stays. A group that is taken afterwards is killed too.
        """
        with self._lock:
            if not self._end.is_set():
                self.reason = reason
                self._end.set()
            for group in self._groups:
                _signal(group, signal.SIGCONT if group in self._polite else signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether the end was asked for."""
        return self._end.is_set()

    @property
    def stopped(self) -> bool:
        """Whether the work is stopped now."""
        return self._stopped_at is not None

    @property
    def ending(self) -> threading.Event:
        """Set once the end was asked for: to wait on; `end` sets it."""
        return self._end

    def worked_s(self) -> float:
        """Return a clock in seconds that stands still while the work is stopped; for deadlines."""
        with self._lock:
            now = time.monotonic() if self._stopped_at is None else self._stopped_at
            return now - self._stopped_s


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
