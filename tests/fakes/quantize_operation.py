"""Quantize in a process of its own, which may be killed: `quantize_operation.py MODEL LEVEL FOLDER [how]`.

How: `limit=BYTES` no file may grow larger; `small=MB` the folder becomes a file system of that size, in a
mount namespace of this process; `blind` the forecast is forgotten, so that only the disk itself refuses.
Prints one line of JSON: the result, or the error with its kind, exit code and message.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_small(folder: Path, megabytes: int) -> None:
    """Put a small file system over folder, seen by this process alone; exit 77 where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
        sys.exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=False)
    if done.returncode != 0:
        sys.exit(77)


def main() -> None:
    model, level, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    how = dict(part.partition("=")[::2] for part in sys.argv[4:])
    folder.mkdir(parents=True, exist_ok=True)
    if "small" in how:
        mount_small(folder, int(how["small"]))
    # after the mount: a process with threads may not enter a new user namespace
    from loops.engine.gguf_check import check_model
    from loops.engine.levels import level_named
    from loops.engine.options import EngineOptions
    from loops.engine.quantize import QuantizeSpec, forecast, quantize
    from state.faults import NightpressError

    spec = QuantizeSpec(check_model(model), level_named(level), EngineOptions(threads=1, extra_buffers=False))
    expected = forecast(spec)
    if "blind" in how:
        expected = replace(expected, n_bytes=0)
    if "limit" in how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how["limit"]), int(how["limit"])))
    try:
        made = quantize(spec, expected, folder)
        told: dict[str, object] = {"sha256": made.sha256}
    except NightpressError as problem:
        told = {"kind": type(problem).__name__, "exit_code": problem.exit_code, "message": str(problem)}
    left = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    print(json.dumps({**told, "left": left}), flush=True)


if __name__ == "__main__":
    main()
