"""Checkpoints of a training: whole or not there, the newest to go on from, the best kept apart.

transformers' Trainer writes a checkpoint in several files, so one that a kill interrupted looks like one. Here a
checkpoint counts only with its mark, which is written when every file is on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.files import explained, fsync_file, write_atomic

FOLDER, MARK = "checkpoints", "complete.json"
_NAME, _BEST = re.compile(r"checkpoint-(\d+)"), re.compile(r"best-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Attributes:
        path: its folder.
        step: after which it was written.
        seconds: that were worked until then.
        peak_bytes: the most memory until then.
    """

    path: Path
    step: int
    seconds: float
    peak_bytes: int


def _numbered(folder: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(found[1]), path) for path in folder.iterdir() if (found := name.fullmatch(path.name)))


def mark(path: Path, seconds: float, peak_bytes: int) -> None:
    """Declare a checkpoint whole: its files go to the disk, then the mark."""
    with explained(path):
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name != MARK)
        for file in files:
            fsync_file(file)
        document = {"files": {file.name: file.stat().st_size for file in files}, "seconds": seconds,
                    "peak_bytes": peak_bytes}
        write_atomic(path / MARK, json.dumps(document).encode(), mode=0o644)


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole."""
    for step, path in reversed(_numbered(folder, _NAME)):
        try:
            said = json.loads((path / MARK).read_text(encoding="utf-8"))
            if said["files"] and all((path / name).stat().st_size == size for name, size in said["files"].items()):
                return Checkpoint(path, step, float(said["seconds"]), int(said["peak_bytes"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def tidy(folder: Path, start: int, best: int) -> None:
    """Remove what a training that goes on after step start did not come to: checkpoints and bests after it."""
    for name, kept in ((_NAME, start), (_BEST, best)):
        for step, path in _numbered(folder, name):
            if step > start or (name is _BEST and step != kept):
                shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep: int, best: int) -> None:
    """Leave the newest checkpoints, so many of them, and of the bests only that of a step."""
    for _, path in _numbered(folder, _NAME)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for step, path in _numbered(folder, _BEST):
        if step != best:
            shutil.rmtree(path, ignore_errors=True)


def best_folder(folder: Path, step: int) -> Path:
    """Return where the adapter of the best step lies."""
    return folder / f"best-{step}"


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return step and validation loss of every evaluation in a Trainer's history."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def best_step(history: Sequence[Mapping[str, Any]]) -> int:
    """Return the step with the lowest validation loss, the first of several; 0 where there is none."""
    return min(evaluations(history), key=lambda one: one[1], default=(0, 0.0))[0]


def evaluations_since_best(history: Sequence[Mapping[str, Any]]) -> int:
    """Return how many evaluations came after the best."""
    best = best_step(history)
    return sum(step > best for step, _ in evaluations(history))
