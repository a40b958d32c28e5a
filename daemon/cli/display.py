"""Progress on a terminal: what is being done, how far, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from daemon.course import Course
from loops import events


class _Shown:
    """What is shown while it is entered: bars, on a terminal only, and lines."""

    def __init__(self, out: Console) -> None:
        self._out, self._live = out, out.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>4.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out, transient=True)

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._live:
            self._bars.stop()

    def _say(self, line: str) -> None:
        self._out.print(line, markup=False)

    def _note(self, note: events.Note) -> None:
        """Show the last line of a note, which of a traceback is the one that says what."""
        self._say((note.message.strip().splitlines() or [""])[-1])


class Stages(_Shown):
    """Shows work that is no run: a bar per stage on a terminal, and notes."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self._tasks: dict[str, TaskID] = {}

    def show(self, event: events.Event) -> None:
        """Show one event."""
        if isinstance(event, events.Progress):
            name = f"{event.level} {event.stage}".strip()
            if name not in self._tasks:
                for task in self._tasks.values():
                    self._bars.update(task, visible=False)
                self._tasks[name] = self._bars.add_task(name, total=event.total)
            self._bars.update(self._tasks[name], completed=event.done, total=event.total, visible=True)
        elif isinstance(event, events.Note):
            self._note(event)


class Display(_Shown):
    """Shows events: bars on a terminal, a line per level elsewhere."""

    def __init__(self, out: Console) -> None:
        super().__init__(out)
        self._overall = self._bars.add_task("opening the model", total=1.0)
        self._course = Course()
        self._began = time.monotonic()

    def show(self, event: events.Event) -> None:
        """Show one event."""
        self._course.take(event, time.monotonic() - self._began)
        match event:
            case events.Opened():
                self._say(f"{event.name}: {event.facts['parameters']:,} parameters, {event.facts['architecture']}, "
                          f"{event.bits_per_weight:.1f} bits per weight")
            case events.Progress():
                place = self._course.place
                self._bars.update(self._overall, completed=place.share,
                                  description=f"{place.level or 'original':8} {place.stage}")
            case events.LevelDone():
                self._say(f"  {event.level:8} {event.state}" + (f": {event.reason}" if event.reason else ""))
            case events.Note():
                self._note(event)
            case _:
                pass
