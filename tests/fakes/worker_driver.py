"""Drive the real worker as the supervisor does: a job in, events out, a leash to let go of."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loops.engine.options import EngineOptions
from loops.events import Event, LevelDone, LevelMeasured, Opened, StepDone, from_line
from loops.pass1.plan import PressPlan

DEADLINE_S = 60.0
#: measured by the clock, so never twice the same
TIMED = {"tokens_per_s", "measured_s", "built_s"}


class Worker:
    """A worker process; `lines` is all that it printed on its standard output."""

    def __init__(self, job: Mapping[str, Any], fail_at: str = "") -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        fault = {"NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": fail_at} if fail_at else {}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "loops.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, text=True, encoding="utf-8",
            env={**kept, **fault, "OMP_WAIT_POLICY": "passive"})
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send_line(json.dumps(job))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._queue.put(line)
        self._queue.put(None)

    def send_line(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def events(self) -> Iterator[Event]:
        """Yield events until the worker is gone; a line that is none raises ValueError."""
        while (line := self._queue.get(timeout=DEADLINE_S)) is not None:
            yield from_line(line)

    def wait_for(self, kind: type[Any]) -> Any:
        return next(event for event in self.events() if isinstance(event, kind))

    def let_go(self) -> None:
        """Close the leash."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def worker(job: Mapping[str, Any], fail_at: str = "") -> Iterator[Worker]:
    started = Worker(job, fail_at)
    try:
        yield started
    finally:
        started.close()


@dataclass(frozen=True)
class Ended:
    """A worker that came to its end: its events, and its exit status, negative for a signal."""

    status: int
    events: tuple[Event, ...]
    lines: tuple[str, ...] = field(repr=False)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def steps(self) -> dict[str, Mapping[str, Any]]:
        return {event.fingerprint: event.result for event in self.of(StepDone)}

    def ends(self) -> dict[str, str]:
        return {event.level: event.state for event in self.of(LevelDone)}

    def numbers(self) -> dict[str, Any]:
        """The last report of each level, without what depends on the clock."""
        return {event.level: ([row for row in event.measurements if row["metric"] not in TIMED], event.responses,
                              {name: value for name, value in event.columns.items() if name not in TIMED})
                for event in self.of(LevelMeasured)}


def run_job(job: Mapping[str, Any], fail_at: str = "") -> Ended:
    """Run a job that needs no second line to its end."""
    with worker({"demote": False, **job}, fail_at) as started:
        events = tuple(started.events())
        return Ended(started.process.wait(DEADLINE_S), events, tuple(started.lines))


def press(plan: PressPlan, steps: Mapping[str, Any] | None = None, settled: Mapping[str, Any] | None = None,
          fail_at: str = "") -> Ended:
    """Press as the supervisor does: answer `Opened` with what is done already."""
    events = []
    with worker({"job": "press", "demote": False, "plan": plan.as_json()}, fail_at) as started:
        for event in started.events():
            events.append(event)
            if isinstance(event, Opened):
                started.send_line(json.dumps({"steps": steps or {}, "settled": settled or {}}))
        return Ended(started.process.wait(DEADLINE_S), tuple(events), tuple(started.lines))


def small_plan(model: Path, base: Path, **changes: Any) -> PressPlan:
    """Two levels, two groups of windows, two looks at six scenarios: about two seconds."""
    plan = PressPlan(
        model=str(model), name="small", blobs=str(base / "blobs"), scratch=str(base / "scratch"),
        levels=("Q8_0", "Q4_K_M"), text_windows=9, first_scenarios=4, max_scenarios=6, max_tokens=12,
        store_bytes=1 << 27, options=EngineOptions(threads=1, extra_buffers=False))
    return replace(plan, **changes)
