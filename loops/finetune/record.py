"""What is left of a training: the adapter, its tokenizer, a card for people, and last training.json for machines."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from loops.finetune import checkpoints
from loops.finetune.loading import Device
from loops.finetune.plan import TrainSpec
from state.files import explained, fsync_file, write_atomic

RECORD = "training.json"
VERSION = 1  #: of the record
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "nightpress")


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        step, steps: done, and those that were to do.
        before: validation loss of the base; None without validation rows.
        history: of transformers' Trainer, an entry per logged step and per evaluation.
        seconds: that were worked, over all sessions.
        peak_bytes: the most memory of any session.
        folder: of the checkpoints.
    """

    step: int
    steps: int
    before: float | None
    history: Sequence[Mapping[str, Any]]
    seconds: float
    peak_bytes: int
    folder: Path


def finish(spec: TrainSpec, job: Mapping[str, Any], outcome: Outcome, model: Any, tokenizer: Any, device: Device,
           facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the best adapter into the output folder, and last the record; return the record."""
    best = checkpoints.best_step(outcome.history)
    evaluated = dict(checkpoints.evaluations(outcome.history))
    losses = [[int(entry["step"]), float(entry["loss"]), float(entry["learning_rate"])]
              for entry in outcome.history if "loss" in entry]
    after = evaluated.get(best)
    document = {
        "version": VERSION, "fingerprint": job["fingerprint"], "spec": job["spec"],
        "base": {"path": str(spec.model), "identity": job["identity"]}, "dataset": job["dataset"],
        "steps": outcome.step, "planned_steps": outcome.steps, "best_step": best or outcome.step,
        "stopped_early": outcome.step < outcome.steps,
        "train_loss": losses[-1][1] if losses else None, "validation_loss_before": outcome.before,
        "validation_loss": after,
        "improved": after < outcome.before if after is not None and outcome.before is not None else None,
        "losses": losses, "validation_losses": [list(one) for one in evaluated.items()],
        "seconds": round(outcome.seconds, 3), "peak_bytes": outcome.peak_bytes, "device": device.label,
        "dtype": device.dtype, "four_bit": device.four_bit, "four_bit_refused": device.why_not,
        "trainable": int(sum(one.numel() for one in model.parameters() if one.requires_grad)), **facts,
        "versions": _versions(), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    output = spec.output
    with explained(output):
        source = checkpoints.best_folder(outcome.folder, best)
        if best:
            for name in ADAPTER:
                partial = output / f".{name}.part"
                shutil.copyfile(source / name, partial)
                fsync_file(partial)
                partial.replace(output / name)
        else:
            model.save_pretrained(str(output))
        tokenizer.save_pretrained(str(output))
        write_atomic(output / "README.md", card(document, spec).encode(), mode=0o644)
        for file in output.iterdir():
            if file.is_file() and not file.name.startswith("."):
                fsync_file(file)
        write_atomic(output / RECORD, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(), mode=0o644)
    return document


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def verdict(document: Mapping[str, Any]) -> str:
    """Say in a sentence or two what the training brought, also where that is nothing."""
    before, after = document["validation_loss_before"], document["validation_loss"]
    if before is None or after is None:
        return "There were no rows to validate with, so nobody knows whether it helped."
    said = f"Validation loss {before:.4f} before, {after:.4f} after step {document['best_step']:,}"
    if after < before:
        return f"{said}: {100 * (1 - after / before):.1f} % lower."
    return (f"{said}: it got no better. Do not use this adapter; lower the learning rate, train longer, or look at the "
            "data.")


def card(document: Mapping[str, Any], spec: TrainSpec) -> str:
    """Return the model card, with the header that the hub reads."""
    dataset, kind = document["dataset"], "NF4" if document["four_bit"] else document["dtype"]
    licence = dataset.get("licence") or "not said"
    return f"""---
library_name: peft
base_model: {json.dumps(str(spec.model))}
tags: [lora, nightpress]
---
# {spec.output.name}

A LoRA adapter for {spec.model.name}, trained by Nightpress on {spec.dataset.name}. {verdict(document)}

| | |
|---|---|
| rows | {document["rows"]["train"]["used"]:,}, domain {dataset.get("domain") or "not said"}, licence {licence} |
| steps | {document["steps"]:,} of {document["planned_steps"]:,}, the best after {document["best_step"]:,} |
| LoRA | rank {spec.rank}, alpha {spec.alpha}, dropout {spec.dropout:g}, on {", ".join(document["modules"])} |
| learning rate | {spec.learning_rate:g}, {spec.schedule} |
| base while training | {kind} |
| device | {document["device"]}, {document["seconds"]:,.0f} s, at most {document["peak_bytes"] / 1e9:,.2f} GB |

The loss is over the answers alone. Everything else stands in {RECORD}.
"""
