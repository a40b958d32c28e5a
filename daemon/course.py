"""The course of a run: how far it is, at what, and how long it will still take."""

from __future__ import annotations

from dataclasses import dataclass

from loops import events

#: share of the time of a level that each stage takes, measured on the starter and on a 1 B model
_SHARES = {"quantize": (0.0, 0.15), "baseline": (0.0, 0.6), "divergence": (0.15, 0.6), "forced choice": (0.6, 0.7),
           "replies": (0.7, 0.95), "fluency": (0.95, 1.0), "hash": (0.0, 0.02)}
#: below this share no estimate is given: it would be noise
_LEAST = 0.03


@dataclass(frozen=True)
class Place:
    """Where a run is.

    Attributes:
        level: in work; '' for the original.
        stage: of it.
        share: of the whole run, 0 to 1.
        levels_done: came to their end.
        levels: planned.
        left_s: seconds of work still to do; None when it is too early to tell.
    """

    level: str = ""
    stage: str = "starting"
    share: float = 0.0
    levels_done: int = 0
    levels: int = 0
    left_s: float | None = None


class Course:
    """Follows the events of one run, from one thread; the place may be read from any."""

    def __init__(self) -> None:
        self._planned: list[str] = []
        self._ended: set[str] = set()
        self.place = Place()

    def take(self, event: events.Event, worked_s: float) -> None:
        """Take in one event; `worked_s` is how long the run has worked, without the time it was stopped."""
        match event:
            case events.LevelPlanned():
                if event.level not in self._planned:
                    self._planned.append(event.level)
            case events.LevelDone():
                self._ended.add(event.level)
            case events.Progress():
                self._advance(event, worked_s)

    def _advance(self, event: events.Progress, worked_s: float) -> None:
        low, high = _SHARES.get(event.stage, (0.0, 1.0))
        within = low + (high - low) * (event.done / event.total if event.total else 0.0)
        before = len(self._ended - {event.level}) + (1 if event.level else 0)  # the original counts as one level
        share = min(1.0, max((before + within) / (max(1, len(self._planned)) + 1), self.place.share))
        self.place = Place(event.level, event.stage, share, len(self._ended), len(self._planned),
                           worked_s * (1 - share) / share if share > _LEAST else None)


class StagedCourse(Course):
    """Follows a fine-tuning: every stage counts alike, as nobody knows beforehand how long each takes."""

    def __init__(self) -> None:
        super().__init__()
        self._stage, self._number, self._stages = "", 0, 1

    def begin(self, stage: str, number: int, stages: int) -> None:
        """Take note that a stage begins: its name, its place from 0, and how many there are."""
        self._stage, self._number, self._stages = stage, number, stages
        self.place = Place("", stage, number / stages, number, stages)

    def take(self, event: events.Event, worked_s: float) -> None:  # noqa: ARG002 - stages are too unlike to tell
        """Take in one event."""
        if isinstance(event, events.Progress):
            within = min(1.0, event.done / event.total) if event.total else 0.0
            share = max(self.place.share, (self._number + within) / self._stages)
            self.place = Place(event.level, f"{self._stage}: {event.stage}", share, self._number, self._stages)
