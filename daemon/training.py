"""`nightpress train`: what is checked before, the worker that trains, and what stands in the folder afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.download import Show
from daemon.errors import Interrupted, WorkerRefused
from daemon.grip import Grip
from daemon.pulling import HUB_ID, models_folder
from daemon.settings import Settings
from daemon.sources import place_of
from daemon.supervisor import run_job
from loops.events import Note
from loops.finetune.checkpoints import FOLDER
from loops.finetune.examples import read_rows
from loops.finetune.extra import require
from loops.finetune.faults import DatasetUnreadable
from loops.finetune.forecast import shape_of, targets
from loops.finetune.model_folder import CONFIG, ModelFolder, NoModelFolder, PickledWeights, is_adapter, read_folder
from loops.finetune.plan import TEMPLATES, TrainingRefused
from loops.finetune.plan import TrainSpec as TrainSpec
from loops.finetune.prepare import check_files, read_manifest
from loops.finetune.record import ADAPTER, RECORD
from loops.starter import STARTER
from state.files import explained, make_folder, sha256_file, write_atomic
from state.lock import Lock

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "accelerate")
PLAN = "plan.json"  #: in the folder of the checkpoints: what they belong to
POLITE_S = 15.0  #: for a checkpoint, when the work is to end
_KILLED = 71


@dataclass(frozen=True)
class Trained:
    """What came out of a training.

    Attributes:
        adapter: the folder it is in, with training.json.
        steps: of the optimizer.
        best_step: after which the adapter was taken.
        train_loss: at the end, mean over the last logged steps.
        validation_loss_before: of the base, per trained token in nats; None without validation rows.
        validation_loss: of the adapter.
        seconds: that were worked.
        device: for people.
        four_bit: whether the base was in NF4.
        was_there: it was finished before, and nothing was done.
        record: all of training.json.
    """

    adapter: Path
    steps: int
    best_step: int
    train_loss: float | None
    validation_loss_before: float | None
    validation_loss: float | None
    seconds: float
    device: str
    four_bit: bool
    was_there: bool
    record: Mapping[str, Any] = field(repr=False)

    @property
    def improved(self) -> bool | None:
        """Whether the validation loss fell; None where it is not known."""
        if self.validation_loss is None or self.validation_loss_before is None:
            return None
        return self.validation_loss < self.validation_loss_before


def find_model(name: str, settings: Settings) -> Path:
    """Return the folder that a name stands for: a folder, the id of a model that was pulled, or the word `starter`.

    Raises:
        NoModelFolder: there is none.
    """
    place = place_of(Path(name), settings)
    if name == STARTER and not place.exists():
        from loops.starter.folder import write_folder

        place = models_folder(settings.state_dir, STARTER)
        partial = place.with_name(f".{STARTER}.part")
        with explained(place):
            make_folder(place.parent, 0o700)
            shutil.rmtree(partial, ignore_errors=True)
            write_folder(partial).rename(place)
    if place.exists():
        return place
    raise NoModelFolder(f"There is no folder {name}" + (
        f", and no model of that id was pulled; `nightpress pull {name}` does it." if HUB_ID.fullmatch(name) and "/" in
        name else "; check the spelling."))


def train(spec: TrainSpec, settings: Settings, grip: Grip, show: Show) -> Trained:
    """Train an adapter; interrupted, the same call goes on from the last checkpoint.

    Args:
        spec: what.
        settings: where the state lies.
        grip: by which the work is stopped or ended; at the end it writes a checkpoint first.
        show: is told how far it is.

    Raises:
        TrainingRefused: a setting makes no sense, or the output folder holds something else.
        NoModelFolder, TokenizerMissing, WeightsDamaged, PickledWeights, ModelNotTrainable: the model cannot be used.
        DatasetUnreadable: the dataset cannot.
        TrainExtraMissing: libraries are missing.
        StateBusy: another process trains into the folder.
        WorkerRefused: with the sentence and exit code of what stopped it, see `loops.finetune.trainer.train`.
        Interrupted: the grip was asked to end it.
    """
    spec.check()
    model = _check_model(spec)
    dataset = _check_dataset(spec, show)
    template = _template(spec)
    identity = hashlib.sha256(json.dumps(model.identity()).encode()).hexdigest()
    fingerprint = spec.fingerprint(identity, {name: str(one["sha256"]) for name, one in dataset["files"].items()},
                                   template)
    there = _finished(spec, fingerprint)
    if there is not None:
        return _trained(spec.output, there, was_there=True)
    require("Training", *LIBRARIES)
    job = {"job": "train", "spec": spec.as_json(), "template": template, "identity": identity, "dataset": dataset,
           "fingerprint": fingerprint}
    work = spec.output / FOLDER
    _check_output(spec, fingerprint)
    with explained(spec.output):
        make_folder(spec.output, 0o755)
    with Lock.acquire(spec.output / ".nightpress-train.lock", "nightpress train"):
        with explained(work):
            if spec.force and not _belongs(work, fingerprint):
                for file in (RECORD, *ADAPTER):
                    (spec.output / file).unlink(missing_ok=True)
                shutil.rmtree(work, ignore_errors=True)
            make_folder(work, 0o755)
            write_atomic(work / PLAN, json.dumps({"fingerprint": fingerprint, "spec": spec.as_json()}).encode(), 0o644)
        try:
            result = run_job(job, settings.state_dir, grip, show, POLITE_S).result
        except WorkerRefused as problem:
            if problem.exit_code == _KILLED and "SIGKILL" in str(problem):
                raise WorkerRefused(f"{str(problem).rstrip('. ')}. If the system was short of memory, lower "
                                    "--batch-size and raise --gradient-accumulation-steps, or lower --max-length; "
                                    "checkpoints are kept.", _KILLED) from problem
            raise
    if result.get("stopped"):
        raise Interrupted(grip.reason or None)
    return _trained(spec.output, result, was_there=False)


def _check_model(spec: TrainSpec) -> ModelFolder:
    if is_adapter(spec.model) and not (spec.model / CONFIG).is_file():
        raise NoModelFolder(f"{spec.model} is a LoRA adapter; name the model that it belongs to, or merge it first.")
    model = read_folder(spec.model)
    if model.pickles:
        raise PickledWeights(f"The weights in {spec.model} are pickled ({model.pickles[0].name}), and a pickle can run "
                             "code when it is read; training takes safetensors only.")
    if "quantization_config" in model.config:
        raise TrainingRefused(f"The weights in {spec.model} are quantized already; train on the original.")
    targets(shape_of(model), spec.target_modules, model.path.name)
    return model


def _check_dataset(spec: TrainSpec, show: Show) -> dict[str, Any]:
    """Return what is to be known of the dataset later.

    Raises:
        DatasetUnreadable: it is no dataset to train with.
    """
    if not spec.dataset.is_dir():
        what = "is a file; name the folder it is in" if spec.dataset.exists() else "is not there; check the spelling"
        raise DatasetUnreadable(f"{spec.dataset} {what}.")
    names = [name for name in ("train.json", "validation.json") if name == "train.json"
             or (spec.dataset / name).exists()]
    for name in names:
        read_rows(spec.dataset / name)
    manifest = read_manifest(spec.dataset) or {}
    for finding in check_files(spec.dataset, manifest):
        show(Note(f"{spec.dataset.name}: {finding.message}"))
    files = {name: {"sha256": sha256_file(spec.dataset / name)} for name in names}
    file = spec.dataset / "manifest.json"
    return {"path": str(spec.dataset), "files": files, "domain": manifest.get("domain", ""),
            "licence": manifest.get("licence", ""), "manifest_sha256": sha256_file(file) if file.is_file() else ""}


def _template(spec: TrainSpec) -> str:
    """Return a name of `TEMPLATES`, or the text of the file that was named.

    Raises:
        TrainingRefused: it is neither.
    """
    if spec.template in ("", *TEMPLATES):
        return spec.template
    try:
        text = Path(spec.template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise TrainingRefused(f"{spec.template[:200]!r} is no chat template: name {', '.join(TEMPLATES)} or a file in "
                              "UTF-8 with Jinja in it.") from problem
    if "{" not in text:
        raise TrainingRefused(f"{spec.template[:200]!r} holds no Jinja, so it is no chat template.")
    return text


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _belongs(work: Path, fingerprint: str) -> bool:
    return _read(work / PLAN).get("fingerprint") == fingerprint


def _finished(spec: TrainSpec, fingerprint: str) -> dict[str, Any] | None:
    """Return the record of the very same training, if it is finished."""
    found = _read(spec.output / RECORD)
    return found if found.get("fingerprint") == fingerprint and all(
        (spec.output / name).is_file() for name in ADAPTER) else None


def _check_output(spec: TrainSpec, fingerprint: str) -> None:
    """Make sure that the folder is free, or holds this training.

    Raises:
        TrainingRefused: it holds something else.
    """
    if spec.output.exists() and not spec.output.is_dir():
        raise TrainingRefused(f"{spec.output} is a file; name a folder with --output-dir.")
    if spec.output.resolve() in (spec.model.resolve(), spec.dataset.resolve()):
        raise TrainingRefused("The adapter needs a folder of its own; name one with --output-dir.")
    if spec.force or not spec.output.exists() or _belongs(spec.output / FOLDER, fingerprint):
        return
    if (spec.output / FOLDER / PLAN).exists() or (spec.output / RECORD).exists():
        raise TrainingRefused(f"{spec.output} holds another training: {_difference(spec)}. Name another folder with "
                              "--output-dir, or replace it with --force.")
    if any(not file.name.startswith(".") for file in spec.output.iterdir()):
        raise TrainingRefused(f"{spec.output} is not empty, and holds no training; name another folder with "
                              "--output-dir.")


def _difference(spec: TrainSpec) -> str:
    """Say what of the other training is different."""
    other = _read(spec.output / FOLDER / PLAN).get("spec") or _read(spec.output / RECORD).get("spec") or {}
    ours = {**spec.shaping(), "model": str(spec.model), "dataset": str(spec.dataset), "template": spec.template}
    said = [f"{name.replace('_', ' ')} {other[name]} instead of {value}" for name, value in json.loads(
        json.dumps(ours)).items() if name in other and other[name] != value]
    return ", ".join(said[:3]) or "its model or its dataset has changed since"


def _trained(output: Path, record: Mapping[str, Any], *, was_there: bool) -> Trained:
    return Trained(output, record["steps"], record["best_step"], record["train_loss"],
                   record["validation_loss_before"], record["validation_loss"], record["seconds"], record["device"],
                   record["four_bit"], was_there, record)
