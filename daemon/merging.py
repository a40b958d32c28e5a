"""From a base and its adapters to one model that says the same: stage, merge, parity, each in a worker of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from daemon.converting import Steps, read_form, refused
from daemon.download import Show
from daemon.errors import Interrupted, WorkerRefused
from daemon.grip import Grip
from daemon.settings import Settings
from loops.events import Progress
from loops.finetune.extra import CONVERTING, require
from loops.finetune.lora import (
    AdapterMismatch,
    check_full_precision,
    check_named_base,
    plan_merge,
    read_lora,
)
from loops.finetune.model_folder import ModelFolder, NoModelFolder, PickledWeights, read_adapter, read_folder
from loops.pass1.single import OutputThere
from state.files import DiskFull, explained, fsync_folder, rename, sha256_file, temporary_beside, write_atomic
from state.lock import Lock

RECORD = "merge.json"  #: written into what was merged


@dataclass(frozen=True)
class MergeSpec:
    """What to merge.

    Attributes:
        base: the full-precision model.
        adapters: folders of LoRA adapters, each with its weight in the sum.
        output: the folder to write.
        allow_pickle: read weights that are pickled.
        any_base: accept adapters that say they belong to a model of another name.
        parity: compare afterwards.
        replace: what was merged there before.
    """

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    output: Path
    allow_pickle: bool = False
    any_base: bool = False
    parity: bool = True
    replace: bool = False


@dataclass(frozen=True)
class Merged:
    """The model that came out: its files by sha256, how it agreed, and whether it was there already."""

    folder: Path
    tensors: int
    n_bytes: int
    files: Mapping[str, str]
    stages: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    again: bool = False


def shares(weights: Sequence[float] | None, n_adapters: int) -> tuple[float, ...]:
    """Return the weight of each adapter: 1 for a single one, equal shares for several, unless they are given.

    Raises:
        AdapterMismatch: there are more or fewer weights than adapters, or one is zero or no number.
    """
    if weights is None:
        return (1.0 / n_adapters,) * n_adapters
    if len(weights) != n_adapters:
        raise AdapterMismatch(f"{n_adapters} adapter{'s' * (n_adapters != 1)} need as many weights, and {len(weights)} "
                              f"{'is' if len(weights) == 1 else 'are'} given.")
    if not all(math.isfinite(weight) and weight for weight in weights):
        raise AdapterMismatch("A weight is a number other than 0; leave an adapter out that is not to count.")
    return tuple(map(float, weights))


def merge(spec: MergeSpec, settings: Settings, grip: Grip, show: Show) -> Merged:
    """Merge adapters into a base; the folder appears whole, and only if it says what base and adapters say.

    Interrupted, the same call goes on after the last finished step. What was merged before of the very same files is
    returned as it is.

    Args:
        spec: what.
        settings: where the state lies.
        grip: by which the work is stopped or ended.
        show: is told how far it is.

    Raises:
        NoModelFolder, TokenizerMissing, WeightsDamaged, PickledWeights: a folder cannot be used.
        BaseQuantized, AdapterMismatch, AdapterUnmergeable: these do not go together.
        TrainExtraMissing: libraries are missing.
        OutputThere: there is something of that name.
        DiskFull: before anything is written.
        WorkerRefused: a step failed, with its sentence and exit code: TokenizerMismatch, ParityFailed, OutOfMemory.
        Interrupted: the grip was asked to end it.
    """
    base, adapters = _read(spec)
    require("Merging", *CONVERTING, "peft")
    output = spec.output.absolute()
    key = _fingerprint(spec, base, adapters)
    there = _there(spec, output, key)
    if there is not None:
        return there
    work = output.parent / f".nightpress-merge-{key[:16]}"
    with explained(output.parent):
        work.mkdir(parents=True, exist_ok=True)
    with Lock.acquire(work / "lock", "nightpress merge"):
        _check_room(base, adapters, work)
        steps = Steps(work, settings, grip, show)
        try:
            done = _merge(spec, base, adapters, steps, output, key)
        except WorkerRefused as problem:
            if refused(problem) or not any((work / "made").rglob("*.safetensors")):
                shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work, ignore_errors=True)
    return done


def _read(spec: MergeSpec) -> tuple[ModelFolder, list[ModelFolder]]:
    """Check what can be told of the folders without reading a weight."""
    if not spec.adapters:
        raise NoModelFolder("Name at least one adapter.")
    if (spec.base / "adapter_config.json").is_file() and not (spec.base / "config.json").is_file():
        raise NoModelFolder(f"{spec.base} is a LoRA adapter itself; --base is the model that it was trained on.")
    base = read_folder(spec.base)
    check_full_precision(base)
    adapters = [read_adapter(path) for path, _weight in spec.adapters]
    for model in (base, *adapters):
        if model.pickles and not spec.allow_pickle:
            raise PickledWeights(f"The weights in {model.path} are pickled ({model.pickles[0].name}), and a pickle can "
                                 "run code when it is read. --allow-pickle reads the tensors alone and nothing else.")
    if not spec.any_base:
        for adapter in adapters:
            check_named_base(adapter, base)
    if not any(model.pickles for model in (base, *adapters)):
        plan_merge(base, [read_lora(adapter, weight) for adapter, (_path, weight) in zip(
            adapters, spec.adapters, strict=True)])
    return base, adapters


def _fingerprint(spec: MergeSpec, base: ModelFolder, adapters: Sequence[ModelFolder]) -> str:
    facts = {"base": [str(base.path), base.identity()], "parity": spec.parity, "adapters": [
        [str(path), weight, adapter.identity()]
        for adapter, (path, weight) in zip(adapters, spec.adapters, strict=True)]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _there(spec: MergeSpec, output: Path, key: str) -> Merged | None:
    """Return what was merged before of the same files.

    Raises:
        OutputThere: there is something else.
    """
    if not output.exists() and not output.is_symlink():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        if record["key"] == key and all((output / name).is_file() for name in record["files"]):
            return Merged(output, record["tensors"], _size(output), record["files"], tuple(record["stages"]),
                          tuple(record["notes"]), again=True)
        if spec.replace:
            return None
    if spec.replace and not (output / RECORD).is_file():
        raise OutputThere(f"{output} is there already, and was not made by `nightpress merge`; it is not replaced. "
                          "Name another folder with -o.")
    raise OutputThere(f"{output} is there already; --force replaces what was merged there before.")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _check_room(base: ModelFolder, adapters: Sequence[ModelFolder], work: Path) -> None:
    """Refuse what the disk has no room for.

    Raises:
        DiskFull: with what is needed and what is free.
    """
    needed = base.n_bytes + (16 << 20) + sum(model.n_bytes for model in (base, *adapters) if model.pickles)
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(work).free
    if needed > free + there:
        raise DiskFull(f"Merging needs about {needed / 1e6:,.0f} MB in {work.parent}, and only {free / 1e6:,.0f} MB "
                       "are free.")


def _merge(spec: MergeSpec, base: ModelFolder, adapters: Sequence[ModelFolder], steps: Steps, output: Path,
           key: str) -> Merged:
    """Stage, merge and compare; then give the folder its name."""
    work, staged = steps.work, []
    for number, model in enumerate((base, *adapters)):
        place = work / "staged" / str(number)
        staged.append(steps.run(f"stage-{number}", {
            "job": "stage", "source": str(model.path), "folder": str(place), "allow_pickle": spec.allow_pickle},
            (place / model.path.name).is_dir)["staged"])
    weighed = [(path, weight) for path, (_path, weight) in zip(staged[1:], spec.adapters, strict=True)]
    made = work / "made" / output.name
    result = steps.run("merged", {"job": "merge", "base": staged[0], "adapters": weighed, "folder": str(made)},
                       made.is_dir)
    stages, notes = [], list(result["notes"])
    if spec.parity:
        first = read_form(steps, "base and adapter", staged[0], weighed, str(made))
        second = read_form(steps, "the merged model", str(made))
        stages.append(steps.run_always({"job": "agree", "stage": "merging", "first": str(first),
                                        "second": str(second)}))
        notes += stages[0]["notes"]
    else:
        notes.append("Not compared with base and adapter, as asked.")
    counted = [{**_hashes(adapter, steps), "weight": weight}
               for adapter, (_path, weight) in zip(adapters, spec.adapters, strict=True)]
    files = _hashes(read_folder(made), steps)["files"]
    notes = list(dict.fromkeys(notes))
    record = {
        "nightpress": metadata.version("nightpress"), "key": key, "base": _hashes(base, steps),
        "adapters": counted,
        "tensors": result["tensors"], "files": files, "stages": stages, "notes": notes}
    with explained(output.parent):
        write_atomic(made / RECORD, json.dumps(record, indent=2, ensure_ascii=False).encode(), mode=0o644)
        for file in made.iterdir():
            file.chmod(0o644)
        fsync_folder(made)
        if output.exists():
            old = temporary_beside(output)
            rename(output, old)
            rename(made, output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            rename(made, output)
    return Merged(output, result["tensors"], _size(output), files, tuple(stages), tuple(notes))


def _hashes(model: ModelFolder, steps: Steps) -> dict[str, Any]:
    """Return a folder with the sha256 of its weights, tokenizer and configuration.

    Raises:
        Interrupted: the grip was asked to end it.
    """
    wanted = [file for file in sorted(model.path.iterdir()) if file.is_file() and not file.name.startswith(".")
              and (file in model.safetensors or file in model.pickles or file.suffix in {".json", ".model", ".jinja"})
              and file.name != RECORD]
    total, done, found = sum(file.stat().st_size for file in wanted), 0, {}
    for file in wanted:
        if steps.grip.ended:
            raise Interrupted(steps.grip.reason)
        steps.show(Progress("hashing", model.path.name, done, total))
        found[file.name] = sha256_file(file)
        done += file.stat().st_size
    return {"folder": str(model.path), "files": found}


def as_json(done: Merged) -> dict[str, Any]:
    """Return a merge as JSON can hold it."""
    return {**asdict(done), "folder": str(done.folder)}
