"""One process at a time: an advisory lock on a file that names its holder.

The kernel frees the lock when the holder dies, however it dies; the file itself stays.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from state.faults import NightpressError


class StateBusy(NightpressError):
    """Another Nightpress process works on this state; wait for it, or stop it first."""

    exit_code: ClassVar[int] = 75


class Lock:
    """An exclusive lock held from `acquire` until `release` or the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, owner: str, *, wait_s: float = 0.0, mode: int = 0o600) -> Self:
        """Take the lock and write `<pid> <owner>` into the file.

        Raises:
            StateBusy: another process still holds it after `wait_s`; the message names it.
            OSError: the file cannot be created.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        deadline = time.monotonic() + wait_s
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StateBusy(_busy(path, descriptor)) from None
                    time.sleep(0.02)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {owner}\n".encode("utf-8", "replace"), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _busy(path: Path, descriptor: int) -> str:
    holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
    pid, _, command = holder.partition(" ")
    who = f"process {pid} ({command})" if pid.isdigit() else "another process"
    return f"{path.parent} is in use by {who}; wait for it, or stop it first."
