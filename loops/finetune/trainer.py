"""The training itself, in a worker: forecast, adapters on a frozen base, checkpoints, the best adapter at the end.

transformers' Trainer does it. TRL's SFTTrainer builds on that one and adds the preparation of rows; but it knows which
tokens are the answer's only for templates that mark them (`{% generation %}`) or for single answers, and leaves rows
whose boundary moves as they are, so rows are prepared in `loops.finetune.examples`. A loop of our own would have to
repeat what the Trainer does about mixed precision, accumulation and the state of a checkpoint.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from loops.engine.model import OutOfMemory
from loops.events import Event, Note, Progress
from loops.finetune import loading
from loops.finetune.examples import Encoded, Encoder, Example, read_rows, windows
from loops.finetune.faults import TooFewRows
from loops.finetune.forecast import Forecast, Shape, checkpoint_bytes, fitting, forecast, shape_of, targets
from loops.finetune.loading import Device
from loops.finetune.model_folder import ModelFolder, read_folder
from loops.finetune.parity import TokenizerMismatch
from loops.finetune.plan import TEMPLATES, NothingToTrain, TrainSpec, WontFit
from loops.finetune.record import finish
from loops.finetune.session import Course, Run
from state.files import DiskFull

Emit = Callable[[Event], None]


def train(job: dict[str, Any], emit: Emit, receive: Callable[[], Any]) -> dict[str, Any]:
    """Train; the adapter is in the output folder when this returns, or a checkpoint where it was asked to stop.

    Args:
        job: `spec`, `template` (its text), `identity` of the model, `dataset`, facts of its files.
        emit: is told how far it is.
        receive: blocks until the one message comes that asks for a checkpoint and the end.

    Returns:
        `stopped` with the step, or what training.json says.

    Raises:
        WontFit, OutOfMemory, DiskFull: with settings to change.
        TrainingDiverged, NothingToTrain, TokenizerMismatch, TemplateMissing, ModelNotTrainable: as they say.
    """
    spec = TrainSpec.from_json(job["spec"])
    course = Course(threading.Event())

    def listen() -> None:
        receive()
        course.stop.set()

    threading.Thread(target=listen, name="stop", daemon=True).start()
    loading.prepare_environment()
    torch, transformers = import_module("torch"), import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    emit(Progress("reading the rows", "", 0, 1))
    model = read_folder(spec.model)
    shape = shape_of(model)
    modules = targets(shape, spec.target_modules, model.path.name)
    rows = {name: read_rows(spec.dataset / f"{name}.json") for name in ("train", "validation")
            if name == "train" or (spec.dataset / "validation.json").exists()}
    tokenizer, notes = loading.load_tokenizer(model, job["template"], shape.vocabulary, any(
        "messages" in row for row in rows["train"]))
    encoded, length = _encode(spec, model, tokenizer, rows, emit)
    spec = replace(spec, max_length=length)
    _check_ids(encoded, shape, model)
    for note in notes:
        emit(Note(note))
    device = loading.choose_device(spec, {size for found in shape.modules.values() for size, _ in found})
    if spec.four_bit and not device.four_bit:
        emit(Note(f"No 4 bits on this device, so the base is in {device.dtype}: {device.why_not}."))
    trained = windows(encoded["train"].examples, length, spec.packing)
    checked = windows(encoded["validation"].examples, length, packing=False) if "validation" in encoded and \
        encoded["validation"].examples else []
    if not checked:
        emit(Note("There are no rows to validate with, so the last adapter is taken, and how good it is stays open."))
    expected = _check_room(spec, shape, modules, [*trained, *checked], device, emit)
    loaded: list[Any] = []
    try:
        transformers.set_seed(spec.seed)
        emit(Progress("loading the model", "", 0, 1))
        base = loading.load_base(model, spec, device)
        adapted = loading.add_adapters(base, spec, modules, spec.model)
        loaded.append(adapted)
        if spec.packing:
            loading.check_packing(adapted, shape.vocabulary, device, model.path.name)
        emit(Progress("loading the model", "", 1, 1))
        pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
        run = Run(spec, device, course, emit, trained, checked, pad)
        outcome = run.go(adapted)
    except (MemoryError, RuntimeError, OutOfMemory) as problem:
        if not loading.is_memory(problem) and not isinstance(problem, OutOfMemory):
            raise
        raise OutOfMemory(f"The training ran out of memory on {device.label}. Lower --batch-size (now {spec.batch}) "
                          f"and raise --gradient-accumulation-steps (now {spec.accumulation}) alike, or lower "
                          f"--max-length (now {spec.max_length}) or --lora-r (now {spec.rank})"
                          f"{'' if spec.checkpointing else ', or leave --no-gradient-checkpointing out'}. What was "
                          "saved is kept.") from problem
    if outcome is None:
        return {"stopped": True, "step": run.step}
    return finish(spec, job, outcome, adapted, tokenizer, device, {
        "modules": list(modules), "forecast": expected.as_json(), "max_length": length,
        "rows": {name: found.as_json() for name, found in encoded.items()}, "torch": str(torch.__version__)})


def _encode(spec: TrainSpec, model: ModelFolder, tokenizer: Any, rows: dict[str, list[dict[str, Any]]], emit: Emit
            ) -> tuple[dict[str, Encoded], int]:
    """Return the examples of the splits and the length they were cut to.

    Raises:
        TooFewRows: there is at most one row to train with.
        NothingToTrain: none can be used, with the reason of most.
    """
    if len(rows["train"]) < 2:
        raise TooFewRows(f"{spec.dataset / 'train.json'} has {len(rows['train']) or 'no'} "
                         f"row{'' if len(rows['train']) == 1 else 's'}; there is nothing to learn from fewer than two.")
    limit = model.config.get("max_position_embeddings")
    length = min(spec.max_length, limit) if isinstance(limit, int) and limit > 0 else spec.max_length
    if length < spec.max_length:
        emit(Note(f"{model.path.name} reads at most {length:,} tokens, so rows are no longer than that."))
    encoder = Encoder(tokenizer, length)
    encoded = {name: encoder.encode(found, lambda done, total: emit(Progress("reading the rows", "", done, total)))
               for name, found in rows.items()}
    for name, found in encoded.items():
        said = [f"{found.cut:,} cut to {length:,} tokens"] if found.cut else []
        said += [f"{count:,} left out: {reason}" for reason, count in found.left_out.most_common()]
        if said:
            emit(Note(f"Of {len(rows[name]):,} rows in {name}.json, {'; '.join(said)}."))
    if len(encoded["train"].examples) < 2 or not encoded["train"].trained:
        reason = next(iter(encoded["train"].left_out.most_common(1)), ("they have no answer", 0))[0]
        raise NothingToTrain(f"Of {len(rows['train']):,} rows in {spec.dataset / 'train.json'} fewer than two can be "
                             f"used: {reason}.")
    return encoded, length


def _check_ids(encoded: dict[str, Encoded], shape: Shape, model: ModelFolder) -> None:
    most = max(max(example.ids) for found in encoded.values() for example in found.examples)
    if most >= shape.vocabulary:
        raise TokenizerMismatch(f"The tokenizer of {model.path.name} gives the token {most:,}, and the model has only "
                                f"{shape.vocabulary:,}: it is that of another model.")


def _check_room(spec: TrainSpec, shape: Shape, modules: tuple[str, ...], found: Sequence[Sequence[Example]],
                device: Device, emit: Emit) -> Forecast:
    """Compare what the training will take with what is there; return the forecast.

    Raises:
        WontFit: the memory does not suffice, and that was not overridden.
        DiskFull: the disk does not.
    """
    longest = max(sum(len(example.ids) for example in window) for window in found)

    def needs(one: TrainSpec) -> Forecast:
        return forecast(shape, one, modules, longest, device.name, device.width)

    as_done = replace(spec, four_bit=device.four_bit)
    expected = needs(as_done)
    emit(Note(f"{device.label}: about {expected.total / 1e9:,.2f} GB of {device.free_bytes / 1e9:,.2f} GB that are "
              f"free (weights {expected.weights / 1e6:,.0f} MB{' in NF4' if device.four_bit else f', {device.dtype}'}, "
              f"adapters with gradients and moments {16 * expected.adapters / 4e6:,.0f} MB, activations "
              f"{expected.activations / 1e6:,.0f} MB)."))
    if expected.total > device.free_bytes and not spec.force:
        changed = fitting(as_done, lambda one: needs(one).total <= device.free_bytes, longest, not device.why_not)
        would = " ".join(f"{option} {value}".strip() for option, value in changed.items())
        would = f"These settings would fit: {would}." if changed else "No settings of a training make it fit."
        raise WontFit(f"Training {spec.model.name} so takes about {expected.total / 1e9:,.2f} GB, and "
                      f"{device.free_bytes / 1e9:,.2f} GB are free on {device.label}. {would} --force tries it all "
                      "the same.")
    disk, free = checkpoint_bytes(shape, spec, modules), shutil.disk_usage(spec.output).free
    if disk > free:
        raise DiskFull(f"{spec.keep} checkpoints and the adapter take about {disk / 1e6:,.0f} MB in {spec.output}, and "
                       f"{free / 1e6:,.0f} MB are free; free some, or lower --save-total-limit or --lora-r.")
    return expected


def template_text(spec: TrainSpec) -> str:
    """Return what `template` stands for: a name of `TEMPLATES`, or the content of a file; '' for the model's own."""
    return spec.template if spec.template in ("", *TEMPLATES) else Path(spec.template).read_text(encoding="utf-8")
