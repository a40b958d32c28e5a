"""Progress on a terminal: what is being done, how far, and how long it will take."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loops import events

#: share of the time of a level that each stage takes, measured on the starter and on a 1 B model
_SHARES = {"quantize": (0.0, 0.15), "baseline": (0.0, 0.6), "divergence": (0.15, 0.6), "forced choice": (0.6, 0.7),
           "replies": (0.7, 0.95), "fluency": (0.95, 1.0), "hash": (0.0, 0.02)}


class Display:
    """Shows events: bars on a terminal, a line per level elsewhere."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._live = out.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>4.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out, transient=True)
        self._overall = self._bars.add_task("opening the model", total=1.0)
        self._planned: list[str] = []
        self._ended = 0
        self._level = ""

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

    def show(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.Opened():
                self._say(f"{event.name}: {event.facts['parameters']:,} parameters, {event.facts['architecture']}, "
                          f"{event.bits_per_weight:.1f} bits per weight")
            case events.LevelPlanned():
                if event.level not in self._planned:
                    self._planned.append(event.level)
            case events.Progress():
                self._advance(event)
            case events.LevelDone():
                self._ended += 1
                self._say(f"  {event.level:8} {event.state}" + (f": {event.reason}" if event.reason else ""))
            case events.Note():
                self._say(event.message.strip().splitlines()[-1])
            case _:
                pass

    def _advance(self, event: events.Progress) -> None:
        low, high = _SHARES.get(event.stage, (0.0, 1.0))
        within = low + (high - low) * (event.done / event.total if event.total else 0.0)
        before = self._ended + (1 if event.level else 0)  # the original counts as one level
        total = max(1, len(self._planned)) + 1
        self._bars.update(self._overall, completed=min(1.0, (before + within) / total),
                          description=f"{event.level or 'original':8} {event.stage}")


