"""A worker process: started clean, listened to, ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from daemon.errors import Interrupted
from daemon.grip import Grip
from loops.events import Event, from_line
from state.owner import is_live, started

#: all that a worker sees of this process's environment; keys and tokens are not among it
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
               "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS",
               "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "SSL_CERT_FILE")
#: How long the engine's threads spin while they wait for each other. Alone on the machine, so short a time
#: costs nothing; beside other programs, libgomp's default is ten times slower (benchmarks/README.md).
SPIN_COUNT = "1000"

_FOR_TESTS = ("NIGHTPRESS_TESTING", "NIGHTPRESS_FAILPOINT")


def worker_environment() -> dict[str, str]:
    """Return the whitelisted environment of a worker."""
    names = [*ENVIRONMENT, *(_FOR_TESTS if os.environ.get("NIGHTPRESS_TESTING") == "1" else ())]
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {"GOMP_SPINCOUNT": SPIN_COUNT, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1", **kept}


class WorkerProcess:
    """One worker on one job. Leaving the `with` block ends it and all its children."""

    def __init__(self, job: Mapping[str, Any], log: Path, grip: Grip, *, polite: bool = False) -> None:
        """Start the worker.

        Args:
            job: what to do, see `loops.worker`.
            log: takes what it prints besides events; overwritten.
            grip: by which the worker and its children are stopped and let go on.
            polite: the end of the grip does not kill it, see `Grip.take`.
        """
        self._log, self._grip = log, grip
        with log.open("wb") as errors:
            # -P keeps a folder named `state` or `loops` where the user stands from being imported
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "loops.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=worker_environment(), start_new_session=True, text=True, encoding="utf-8",
                errors="replace")
        grip.take(self.process.pid, polite=polite)
        # where no kernel ends a stopped worker with its parent, the next start does, see `end_leftover`
        with contextlib.suppress(OSError):
            _note(log).write_text(f"{self.process.pid} {started(self.process.pid)}", encoding="ascii")
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="worker-events", daemon=True)
        self._reader.start()
        self.send(job)

    def _read(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one line of JSON; a worker that is gone is noticed by whoever reads its events."""
        assert self.process.stdin is not None  # noqa: S101 - PIPE was asked for
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def next_event(self, timeout_s: float) -> Event | None:
        """Return the next event, None when none came in time.

        Raises:
            EOFError: the worker is gone and everything it said was read.
        """
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                return None
            if line is None:
                self._lines.put(None)
                raise EOFError
            with contextlib.suppress(ValueError):  # a stray print of a library is no event
                return from_line(line)
        return None

    def end(self) -> int:
        """End the worker and everything it started; return its exit status, negative for a signal."""
        self._grip.let_go(self.process.pid)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind in its group
        self._reader.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.end()

    def last_words(self, lines: int = 3) -> str:
        """Return the end of what the worker printed besides events."""
        try:
            text = self._log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())


def _note(log: Path) -> Path:
    return log.with_suffix(".pid")


def end_leftover(log: Path) -> bool:
    """End the worker of a service that was killed, if it is still there; tell whether it was.

    Only to be called by the one process that may have workers on this log.
    """
    try:
        pid, since = _note(log).read_text(encoding="ascii").split(" ", 1)
    except (OSError, ValueError):
        return False
    if not pid.isdecimal() or not is_live(int(pid), since):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(int(pid), signal.SIGKILL)
    return True


def signal_name(status: int) -> str | None:
    """Return `SIGSEGV` for the exit status of a process that it ended, None when it exited by itself."""
    if status >= 0:
        return None
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"


@contextlib.contextmanager
def grip_of_signals() -> Iterator[Grip]:
    """Yield a grip that SIGINT and SIGTERM end; the handlers found are put back afterwards."""
    grip = Grip()
    asked = threading.Event()

    def relay() -> None:  # a handler must not take the grip's lock, which its own thread may hold
        asked.wait()
        grip.end(str(Interrupted()))

    relaying = threading.Thread(target=relay, name="signals", daemon=True)
    relaying.start()
    found = {number: signal.signal(number, lambda _number, _frame: asked.set())
             for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield grip
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
        asked.set()
        relaying.join()
