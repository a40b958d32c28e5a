"""The rig: the original and what is made of it on the engine, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loops.engine.gguf_check import CheckedModel
from loops.engine.model import Model, load_model
from loops.engine.options import EngineOptions
from loops.events import Progress
from loops.pass1.steps import Emit, Steps


@dataclass(frozen=True)
class Subject:
    """What is measured: the original or something made of it.

    Attributes:
        level: '' for the original.
        path: its GGUF.
        sha256: of its content.
    """

    level: str
    path: Path
    sha256: str


class Rig:
    """Loads models for whoever measures; finished work is remembered in steps.

    Attributes:
        model: the checked original.
        original: the same, to be measured.
        options: of the engine.
        scratch: folder for checkpoints.
        matrices: folder for importance matrices.
        steps: finished work.
        emit: told progress.
    """

    def __init__(self, model: CheckedModel, original: Subject, options: EngineOptions, scratch: Path, matrices: Path,
                 steps: Steps, emit: Emit) -> None:
        self.model, self.original, self.options = model, original, options
        self.scratch, self.matrices, self.steps, self.emit = scratch, matrices, steps, emit
        self._held = ExitStack()
        self._held_path: Path | None = None
        self._held_model: Model | None = None

    def report(self, stage: str, level: str) -> Callable[[float, float], None]:
        """Return what tells how far a stage is."""
        return lambda done, total: self.emit(Progress(stage, level, done, total))

    def release(self) -> None:
        """Free the model that is loaded, if any."""
        self._held.close()
        self._held_path = self._held_model = None

    def loaded(self, subject: Subject) -> Model:
        """Return the subject's model; it stays in memory until another is asked for."""
        if self._held_model is None or self._held_path != subject.path:
            self.release()
            self._held_model = self._held.enter_context(load_model(
                subject.path, self.options, lambda share: self.report("load", subject.level)(share, 1.0)))
            self._held_path = subject.path
        return self._held_model
