"""One session of a training: where it begins, what it has done, what it is validated with."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from loops.events import Event, Note, Progress
from loops.finetune import checkpoints
from loops.finetune.checkpoints import FOLDER, Checkpoint
from loops.finetune.examples import IGNORED, Example, collate
from loops.finetune.loading import Device
from loops.finetune.plan import TrainingDiverged, TrainSpec
from loops.finetune.record import Outcome
from state.files import explained, write_atomic

Emit = Callable[[Event], None]
BEFORE = "before.json"  #: the validation loss of the base, once it is known


class Stopped(Exception):
    """The training was asked to end while nothing was to be saved; for the caller alone."""


@dataclass
class Course:
    """What is known while a training runs.

    Attributes:
        stop: set when it is to write a checkpoint and end.
        began: by the monotonic clock.
        earlier: seconds that were worked before the checkpoint it went on from.
        earlier_peak: the most memory until then.
        tokens: computed since the last line.
        spoke: when that was.
        stopped: it ended on request.
    """

    stop: threading.Event
    began: float = field(default_factory=time.monotonic)
    earlier: float = 0.0
    earlier_peak: int = 0
    tokens: int = 0
    spoke: float = field(default_factory=time.monotonic)
    start: int = 0
    stopped: bool = False

    @property
    def seconds(self) -> float:
        """Seconds that were worked, of earlier sessions too."""
        return self.earlier + time.monotonic() - self.began


def peak_bytes(device: Device) -> int:
    """Return the most memory this process has held: on a GPU there, else resident."""
    if device.name == "cuda":
        return int(import_module("torch").cuda.max_memory_reserved())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes but on macOS


def diverged(what: str, step: int, spec: TrainSpec, device: Device) -> TrainingDiverged:
    """Return the error for a loss that is no number after a step."""
    if not step:
        return TrainingDiverged(f"The {what} is no number before anything was learned: {spec.model.name} has weights "
                                f"that are no numbers, or overflows in {device.dtype}"
                                f"{' and 4 bits; try --no-4bit' if device.four_bit else ''}.")
    return TrainingDiverged(f"The {what} is no number any more after step {step:,}; lower --learning-rate (now "
                            f"{spec.learning_rate:g}) or --max-grad-norm (now {spec.max_grad_norm:g}).")


class Run:
    """One session of a training, from its newest checkpoint to the end or to the next one."""

    def __init__(self, spec: TrainSpec, device: Device, course: Course, emit: Emit,
                 trained: Sequence[tuple[Example, ...]], checked: Sequence[tuple[Example, ...]], pad: int) -> None:
        self.spec, self.device, self.course, self.emit = spec, device, course, emit
        self.trained, self.checked, self.pad = trained, checked, pad
        self.folder = spec.output / FOLDER
        self.step = 0
        per_epoch = math.ceil(math.ceil(len(trained) / spec.batch) / spec.accumulation)
        self.steps = max(1, math.ceil(per_epoch * spec.epochs))

    def go(self, model: Any) -> Outcome | None:
        """Train to the end; return what came out, None where it was stopped."""
        from loops.finetune.hooks import make_trainer

        self.folder.mkdir(parents=True, exist_ok=True)
        start = checkpoints.newest(self.folder)
        trainer = make_trainer(self, model)
        before = self._before(trainer, start)
        if self.course.stopped:
            return None
        history: list[dict[str, Any]] = []
        if start is not None:
            history = json.loads((start.path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            self.course.earlier, self.course.earlier_peak = start.seconds, start.peak_bytes
            self.course.start = self.step = start.step
            self.emit(Note(f"Going on after step {start.step:,} of {self.steps:,}."))
        checkpoints.tidy(self.folder, start.step if start else 0, checkpoints.best_step(history))
        if not self._is_over(start, history):
            self.emit(Progress("training", "", self.step, self.steps))
            with contextlib.suppress(Stopped):
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
            self.step, history = int(trainer.state.global_step), list(trainer.state.log_history)
        if self.course.stopped:
            return None
        return Outcome(self.step, self.steps, before, history, self.course.seconds,
                       max(self.course.earlier_peak, peak_bytes(self.device)), self.folder)

    def _is_over(self, start: Checkpoint | None, history: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether nothing is left to train: the last step is done, or it stopped early, and is evaluated."""
        late = checkpoints.evaluations_since_best(history)
        return start is not None and (start.step in dict(checkpoints.evaluations(history)) or not self.checked) and (
            start.step >= self.steps or 0 < self.spec.patience <= late)

    def _before(self, trainer: Any, start: Checkpoint | None) -> float | None:
        """Return the validation loss of the base, which is computed once."""
        file = self.folder / BEFORE
        if not self.checked:
            return None
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))["loss"])
        except (OSError, ValueError, KeyError, TypeError):
            if start is not None:  # the weights are not the base's any more once the checkpoint is loaded
                self.emit(Note("The validation loss of the base is computed again."))
        found = self.validate(trainer.model, "the base on the validation rows")
        if found is None:
            return None
        self.emit(Note(f"Before training: validation loss {found:.4f}."))
        with explained(file):
            write_atomic(file, json.dumps({"loss": found}).encode(), mode=0o644)
        return found

    def batch(self, chosen: Sequence[Sequence[Example]], packing: bool) -> dict[str, Any]:
        """Return a batch as tensors."""
        torch = import_module("torch")
        return {column: torch.tensor(rows) for column, rows in collate(chosen, self.pad, packing).items()}

    def validate(self, model: Any, what: str) -> float | None:
        """Return the loss per trained token over the validation rows, in nats; None where it was stopped.

        Draws no random numbers: a training with evaluations and one without see the same dropout.

        Raises:
            TrainingDiverged: it is no number.
        """
        torch = import_module("torch")
        was_training = model.training
        model.eval()
        total, tokens, size = 0.0, 0, self.spec.batch
        order = sorted(self.checked, key=lambda window: len(window[0].ids))
        kind = self.device.name
        mixed = torch.autocast(kind, dtype=getattr(torch, self.device.dtype), enabled=self.device.width == 2)
        with torch.no_grad(), mixed:
            for place in range(0, len(order), size):
                if self.course.stop.is_set():
                    self.course.stopped = True
                    break
                batch = {column: rows.to(kind) for column, rows in self.batch(
                    order[place:place + size], packing=False).items()}
                labels = batch.pop("labels")
                logits = model(**batch).logits[:, :-1]
                total += float(torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), ignore_index=IGNORED,
                    reduction="sum"))
                tokens += int((labels[:, 1:] != IGNORED).sum())
                self.emit(Progress(what, "", min(place + size, len(order)), len(order)))
        model.train(was_training)
        if self.course.stopped:
            return None
        if not math.isfinite(total):
            raise diverged("validation loss", self.step, self.spec, self.device)
        return total / max(1, tokens)
