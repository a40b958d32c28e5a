"""The real service over scripted sensors and, on request, a fast clock: `python scripted_service.py FILE SPEED`.

FILE holds one line per sensor, `NAME VALUE LIMIT UNIT`, and is read at every tick; a test writes it.
An empty file is a machine that cannot be read, which is busy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

QUIET, BUSY = "cpu 3 15 %\n", "cpu 80 15 %\n"


class FastClock:
    """The machine's clock, so many times faster."""

    def __init__(self, speed: float) -> None:
        from daemon.clock import SystemClock

        self._real, self._speed = SystemClock(), speed
        self._start = self._real.now()

    def now(self) -> Any:
        from daemon.clock import Moment

        real = self._real.now()
        more = (real.monotonic_s - self._start.monotonic_s) * (self._speed - 1)
        return Moment(real.monotonic_s + more, real.boot_s + more, real.wall + timedelta(seconds=more))


class ScriptedSensors:
    """Reads what a test wrote."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def usable(self) -> tuple[bool, str]:
        return False, "CPU only: scripted."

    def update(self, limits: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def read_all(self, moment: Any) -> tuple[Any, ...]:
        from daemon.watchdog import Reading

        return tuple(Reading(name, moment.monotonic_s, float(value), float(limit), unit)
                     for name, value, limit, unit in map(str.split, self._file.read_text().splitlines()))


@dataclass
class Running:
    """A service that a test started; `sensors` decides whether the machine is idle."""

    base: Path
    environment: dict[str, str]
    speed: float = 1.0
    process: subprocess.Popen[str] | None = None
    outputs: list[Path] = field(default_factory=list)

    @property
    def sensors(self) -> Path:
        return self.base / "sensors"

    def feel(self, text: str) -> None:
        """Set what the sensors read from the next tick on, whole at once."""
        beside = self.base / "sensors.new"
        beside.write_text(text)
        beside.replace(self.sensors)

    def start(self, **environment: str) -> None:
        output = self.base / f"service-{len(self.outputs)}.log"
        self.outputs.append(output)
        if not self.sensors.exists():
            self.feel(QUIET)
        with output.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(self.sensors), str(self.speed)], stdin=subprocess.DEVNULL,
                stdout=errors, stderr=errors, text=True, cwd=self.base,
                env={**os.environ, **self.environment, **environment})

    def log(self) -> str:
        return "".join(output.read_text(errors="replace") for output in self.outputs)

    def client(self) -> Any:
        from daemon.client import Client
        from daemon.settings import Settings

        return Client.of(Settings.load())

    def status(self) -> dict[str, Any] | None:
        """The status, None while nobody answers."""
        from state.faults import NightpressError

        with contextlib.suppress(NightpressError), self.client() as client:
            return dict(client.status())
        return None

    def jobs(self) -> dict[int, str]:
        """The state of every job there ever was, from the ledger itself."""
        database = Path(os.environ["NIGHTPRESS_STATE_DIR"]) / "ledger.db"
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return dict(connection.execute("SELECT id, state FROM job").fetchall())

    def workers(self) -> list[Any]:
        """The worker processes of the service that live."""
        import psutil

        with contextlib.suppress(psutil.Error):
            assert self.process is not None
            return [child for child in psutil.Process(self.process.pid).children()
                    if child.status() != psutil.STATUS_ZOMBIE and "loops.worker" in child.cmdline()]
        return []

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self, deadline_s: float = 60.0) -> int:
        """SIGTERM, then wait; return the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(deadline_s)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def running(base: Path, speed: float = 1.0, **environment: str) -> Iterator[Running]:
    """A service that is not started yet, killed at the end."""
    service = Running(base, {"NIGHTPRESS_IDLE_AFTER_S": "1", "NIGHTPRESS_HOLD_DOWN_S": "0", "NIGHTPRESS_TICK_S": "0.5",
                             "NIGHTPRESS_SENSORS": "cpu,memory", "NIGHTPRESS_YIELD_AFTER_S": "2", **environment}, speed)
    try:
        yield service
    finally:
        service.close()


def main() -> None:
    from daemon import scheduler
    from daemon.boot import serve
    from daemon.settings import Settings
    from state.faults import NightpressError

    scheduler.SCAN_S = float(os.environ.get("SCRIPTED_SCAN_S", scheduler.SCAN_S))
    try:
        serve(Settings.load, clock=FastClock(float(sys.argv[2])),
              sensors=lambda _settings: ScriptedSensors(Path(sys.argv[1])))
    except NightpressError as problem:
        sys.stderr.write(f"nightpress: {problem}\n")
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
