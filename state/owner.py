"""Which process something belongs to, proof against reused process ids.

A process is named by its id and the moment it started. On Linux that moment is counted in
clock ticks since boot, so a jump of the wall clock does not make a live process look dead.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from functools import cache
from pathlib import Path

_TAG = re.compile(r"([0-9]{1,10})-([0-9a-f]{8})")


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """Return an identifier of the moment process `pid` started; None when it is gone or a zombie."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # the command in brackets may hold blanks itself
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    import psutil  # only where there is no /proc: a rollback must not wait for imports

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None


def is_live(pid: int | None, since: str | None) -> bool:
    """Tell whether the very process that had this id and start still runs."""
    return pid is not None and since is not None and started(pid) == since


def _tag(pid: int, since: str) -> str:
    return f"{pid}-{hashlib.sha256(since.encode()).hexdigest()[:8]}"


def tag() -> str:
    """Return a mark of this process for the names of temporary files: `<pid>-<8 hex digits>`."""
    return _tag(os.getpid(), started(os.getpid()) or "")


def has_live_tag(name: str) -> bool:
    """Tell whether a file name carries the mark of a process that still runs."""
    for pid, _ in _TAG.findall(name):
        since = started(int(pid))
        if since is not None and _tag(int(pid), since) in name:
            return True
    return False
