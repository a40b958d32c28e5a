"""What to train: every setting of a fine-tuning, with the defaults of the QLoRA recipe, and its errors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from state.faults import NightpressError

#: the projections of a Llama-like layer; QLoRA adapts all of them (Dettmers et al. 2023, section 4)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
DEVICES = ("auto", "cuda", "mps", "cpu")
#: chat templates for models without one, by name
TEMPLATES: Mapping[str, str] = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
              "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "plain": "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}{{ '### ' + "
             "message['role']|capitalize + ':\\n' + message['content'] }}{% if message['role'] == 'assistant' %}"
             "{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '### Assistant:\\n' }}{% endif %}",
}


class TrainingRefused(NightpressError):
    """This training cannot be started; the message says why."""

    exit_code = 106


class TemplateMissing(NightpressError):
    """The model has no chat template; name one with --chat-template."""

    exit_code = 107


class WontFit(NightpressError):
    """The training does not fit into the memory that is free; the message names settings that do."""

    exit_code = 108


class TrainingDiverged(NightpressError):
    """The loss is no number any more; lower the learning rate."""

    exit_code = 109


class NothingToTrain(NightpressError):
    """No row of the dataset can be trained with; the message says why."""

    exit_code = 110


class ModelNotTrainable(NightpressError):
    """This model cannot be trained here; the message says why."""

    exit_code = 111


def _means(shapes: bool = True, **more: Any) -> Any:
    """Return a field that shapes the result, or one that does not."""
    return field(metadata={"shapes": shapes}, **more)


@dataclass(frozen=True)
class TrainSpec:
    """What to train, on what, and how.

    Attributes:
        model: folder of a Hugging Face model.
        dataset: folder with train.json and, to know how well it goes, validation.json.
        output: folder for the adapter; what is needed to go on lies in it too.
        epochs: passes over the training rows; may be a fraction.
        batch: rows, or with packing windows, computed at once.
        accumulation: batches to an optimizer step.
        learning_rate: at its highest.
        schedule: by which it falls.
        warmup: share of the steps over which it rises.
        weight_decay: of AdamW.
        max_grad_norm: to which gradients are clipped.
        rank, alpha, dropout: of LoRA.
        target_modules: to adapt; none for those of the seven projections that the model has.
        four_bit: keep the base in NF4, where the device can.
        double_quant: quantize the scales of NF4 too.
        checkpointing: keep one activation per layer and compute the others again.
        max_length: of a row, or with packing of a window, in tokens.
        packing: put several rows into one window, without attention between them.
        patience: evaluations without improvement after which to stop; 0 for no end before the last step.
        save_every, eval_every, log_every: optimizer steps from one to the next.
        keep: so many checkpoints, the newest.
        seed: of the adapter's first weights, of dropout, and of the order of rows.
        template: '' for the model's own, a name of `TEMPLATES`, or a file.
        device: auto, cuda, mps or cpu.
        threads: 0 for one per processor.
        force: train although memory may not suffice, and replace another training in the folder.
    """

    model: Path
    dataset: Path
    output: Path
    epochs: float = 3.0
    batch: int = 4
    accumulation: int = 4
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.001
    max_grad_norm: float = 0.3
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ()
    four_bit: bool = True
    double_quant: bool = False
    checkpointing: bool = True
    max_length: int = 2048
    packing: bool = False
    patience: int = 0
    eval_every: int = 100
    seed: int = 0
    template: str = ""
    device: str = "auto"
    save_every: int = _means(shapes=False, default=100)
    log_every: int = _means(shapes=False, default=10)
    keep: int = _means(shapes=False, default=3)
    threads: int = _means(shapes=False, default=0)
    force: bool = _means(shapes=False, default=False)

    def check(self) -> None:
        """Make sure that every value makes sense.

        Raises:
            TrainingRefused: naming the one that does not.
        """
        least = {"batch": 1, "accumulation": 1, "rank": 1, "alpha": 1, "max_length": 8, "save_every": 1,
                 "eval_every": 1, "log_every": 1, "keep": 1, "patience": 0, "threads": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise TrainingRefused(f"{name.replace('_', ' ')} is {getattr(self, name)}; it is at least {low}.")
        ranges = {"epochs": (0.0, 1e4), "learning_rate": (0.0, 1.0), "max_grad_norm": (0.0, 1e6)}
        for name, (above, high) in ranges.items():
            if not (math.isfinite(value := getattr(self, name)) and above < value <= high):
                raise TrainingRefused(f"{name.replace('_', ' ')} is {value}; it is above {above:g} and at most "
                                      f"{high:g}.")
        for name in ("warmup", "weight_decay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingRefused(f"{name.replace('_', ' ')} is {getattr(self, name)}; it is from 0 to below 1.")
        for name, known in (("schedule", SCHEDULES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise TrainingRefused(f"{getattr(self, name)[:40]!r} is no {name}; there are {', '.join(known)}.")

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return {one.name: str(value) if isinstance(value := getattr(self, one.name), Path) else
                list(value) if isinstance(value, tuple) else value for one in fields(self)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TrainSpec:
        """Return what `as_json` wrote."""
        return cls(**{**found, **{name: Path(found[name]) for name in ("model", "dataset", "output")},
                      "target_modules": tuple(found["target_modules"])})

    def shaping(self) -> dict[str, Any]:
        """Return the settings that shape the result, without the places of files."""
        places = ("model", "dataset", "output", "template")
        return {name: value for name, value in self.as_json().items() if name not in places
                and self.__dataclass_fields__[name].metadata.get("shapes", True)}

    def fingerprint(self, model: str, files: Mapping[str, str], template: str) -> str:
        """Return what two trainings have in common exactly if one may go on with the other.

        Args:
            model: identity of the base.
            files: sha256 of the dataset's files by name.
            template: text of the chat template that was named.
        """
        facts = {**self.shaping(), "model": model, "files": dict(files), "template": template}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
