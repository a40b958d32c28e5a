"""From a Hugging Face folder to a GGUF that says the same: stage, convert, parity, each in a worker of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daemon.converter_source import find_converter
from daemon.download import Show
from daemon.engine import engine_options
from daemon.errors import WorkerRefused
from daemon.grip import Grip
from daemon.settings import Settings
from daemon.supervisor import run_job
from loops.engine.gguf_format import read_header
from loops.events import Note
from loops.finetune.converter import Converter, check_architecture
from loops.finetune.extra import CONVERTING, require
from loops.finetune.model_folder import (
    ModelFolder,
    NoModelFolder,
    PickledWeights,
    is_adapter,
    is_legacy,
    read_adapter,
    read_folder,
    weight_types,
)
from loops.finetune.parity import ParityFailed, TokenizerMismatch
from loops.pass1.single import OutputThere
from state.files import DiskFull, explained, fsync_file, rename, sha256_file, write_atomic
from state.lock import Lock

#: a failed comparison is no finished work: what was converted is removed
_REFUSED = (ParityFailed.exit_code, TokenizerMismatch.exit_code)


@dataclass(frozen=True)
class ConvertSpec:
    """What to convert.

    Attributes:
        source: a model folder, a folder with a LoRA adapter, or a file of llama.cpp's formats before GGUF.
        output: the file to write; None for a name of its own in the current folder.
        outtype: f16, bf16, f32 or auto.
        base: for an adapter, the model that it belongs to; for a merged model, the one it was merged into.
        adapter: for a merged model, what was merged into it: then base and adapter are compared with it.
        llama_cpp: a folder of llama.cpp to use instead of the engine's own.
        allow_pickle: read weights that are pickled.
        parity: compare afterwards.
        replace: a file that is there.
        legacy: options of the converter of files before GGUF, by name.
    """

    source: Path
    output: Path | None = None
    outtype: str = "auto"
    base: Path | None = None
    adapter: Path | None = None
    llama_cpp: Path | None = None
    allow_pickle: bool = False
    parity: bool = True
    replace: bool = False
    legacy: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """The GGUF that came out, and how each stage agreed with the one before."""

    path: Path
    weight_type: str
    n_bytes: int
    sha256: str
    kind: str
    converter: str
    stages: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


@dataclass
class Steps:
    """Runs jobs whose results are remembered in the work folder: what is finished is not done again."""

    work: Path
    settings: Settings
    grip: Grip
    show: Show

    def run(self, key: str, job: Mapping[str, Any], stands: Callable[[], bool]) -> dict[str, Any]:
        """Return the result of a job, remembered if what it made still stands."""
        file = self.work / f"{key}.json"
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(found, dict) and stands():
                return found
        result = self.run_always(job)
        with explained(self.work):
            write_atomic(file, json.dumps(result).encode())
        return result

    def run_always(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a job."""
        return dict(run_job(job, self.settings.state_dir, self.grip, self.show).result)


def convert(spec: ConvertSpec, settings: Settings, grip: Grip, show: Show,
            converter: Converter | None = None) -> Converted:
    """Convert a model, an adapter or a legacy file; the GGUF appears whole, and only if every stage agreed.

    Interrupted, the same call goes on after the last finished step.

    Args:
        spec: what.
        settings: where the state lies.
        grip: by which the work is stopped or ended.
        show: is told how far it is.
        converter: to use; found by `find_converter` unless given.

    Raises:
        NoModelFolder, TokenizerMissing, WeightsDamaged, PickledWeights: the source cannot be used.
        TrainExtraMissing: libraries are missing.
        ConverterMissing, DownloadDamaged: see `find_converter`.
        OutputThere: there is a file of that name.
        DiskFull: before anything is written.
        WorkerRefused: a step failed, with its sentence and exit code: UnknownArchitecture, ConversionFailed,
            TokenizerMismatch, ParityFailed, OutOfMemory.
        Interrupted: the grip was asked to end it.
    """
    legacy = is_legacy(spec.source)
    models = {} if legacy else _models(spec)
    require("Converting", *CONVERTING)
    if spec.parity and "adapter" in models:
        require("The parity check of an adapter", "peft")
    if spec.output is not None and spec.output.exists() and not spec.replace:
        raise OutputThere(f"{spec.output} is there already; --force replaces it.")
    scripts = converter or find_converter(spec.llama_cpp, settings.state_dir, show)
    for role in ("model", "base"):
        if role in models:
            check_architecture(scripts, models[role].architecture, models[role].path)
    if legacy:
        show(Note("Files before GGUF know little of themselves: tell the converter with --gqa, --eps and --context. "
                  "There is nothing to compare the result with."))
    folder = (spec.output.parent if spec.output else Path.cwd()).absolute()
    work = folder / f".nightpress-convert-{_fingerprint(spec, models, scripts)[:16]}"
    with explained(folder):
        work.mkdir(parents=True, exist_ok=True)
    with Lock.acquire(work / "lock", "nightpress convert"):
        _check_room(spec, models, work)
        steps = Steps(work, settings, grip, show)
        try:
            made, stages, notes = (_convert_legacy(spec, scripts, steps) if legacy
                                   else _convert_folder(spec, models, scripts, steps))
        except WorkerRefused as problem:
            if refused(problem) or not _is_worth_keeping(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        done = _deliver(spec, made, "adapter" if is_adapter(spec.source) else "legacy" if legacy else "model",
                        scripts, stages, notes)
    shutil.rmtree(work, ignore_errors=True)
    return done


def refused(problem: WorkerRefused) -> bool:
    """Tell whether a comparison failed: what was made is wrong, and not to be gone on with."""
    return problem.exit_code in _REFUSED


def _is_worth_keeping(work: Path) -> bool:
    """Tell whether a work folder holds weights that some step made."""
    return any(file.suffix in {".gguf", ".safetensors"} and not file.is_symlink() for file in work.rglob("*"))


def _models(spec: ConvertSpec) -> dict[str, ModelFolder]:
    """Check the folders that take part; return them by their role: model, base, adapter."""
    found: dict[str, ModelFolder] = {}
    if is_adapter(spec.source):
        found["adapter"] = read_adapter(spec.source)
        named = Path(str(found["adapter"].config.get("base_model_name_or_path") or ""))
        base = spec.base or (named if named.is_absolute() and named.is_dir() else None)
        if base is None:
            known = f", which is {named}" if str(named) != "." else ""
            raise NoModelFolder(f"{spec.source} is a LoRA adapter, and the model that it belongs to{known}, is needed "
                                "too: name its folder with --base.")
        found["base"] = read_folder(base.absolute())
    else:
        found["model"] = read_folder(spec.source)
        if (spec.base is None) != (spec.adapter is None):
            raise NoModelFolder("To compare a merged model with what it was merged from, both --base and --adapter are "
                                "needed.")
        if spec.base is not None and spec.adapter is not None:
            found["base"], found["adapter"] = read_folder(spec.base), read_adapter(spec.adapter)
    for model in found.values():
        if model.pickles and not spec.allow_pickle:
            raise PickledWeights(f"The weights in {model.path} are pickled ({model.pickles[0].name}), and a pickle can "
                                 "run code when it is read. --allow-pickle reads the tensors alone and nothing else.")
    return found


def _fingerprint(spec: ConvertSpec, models: Mapping[str, ModelFolder], scripts: Converter) -> str:
    facts: dict[str, Any] = {"source": str(spec.source), "outtype": spec.outtype, "legacy": dict(spec.legacy),
             "converter": [str(scripts.folder), scripts.version],
             "models": {role: [str(model.path), model.identity()] for role, model in models.items()}}
    if not models:
        facts["file"] = [spec.source.stat().st_size, spec.source.stat().st_mtime_ns]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_room(spec: ConvertSpec, models: Mapping[str, ModelFolder], work: Path) -> None:
    """Refuse what the disk has no room for.

    Raises:
        DiskFull: with what is needed and what is free.
    """
    wide = spec.outtype == "auto" and any("F32" in weight_types(model) for model in models.values())
    width = 4 if spec.outtype == "f32" or wide else 2
    needed = sum(model.forecast_bytes(width) for role, model in models.items()
                 if role == "model" or is_adapter(spec.source))
    needed += sum(model.n_bytes for model in models.values() if model.pickles)
    if not models:
        needed = 2 * spec.source.stat().st_size
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(work).free
    if needed > free + there:
        raise DiskFull(f"Converting needs about {needed / 1e6:,.0f} MB in {work.parent}, and only {free / 1e6:,.0f} MB "
                       "are free.")


def _convert_folder(spec: ConvertSpec, models: Mapping[str, ModelFolder], scripts: Converter,
                    steps: Steps) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """Stage and convert what is needed, then compare; return the GGUF, the stages and the notes."""
    work, staged = steps.work, {}
    for role, model in models.items():
        place = work / "staged" / role
        staged[role] = steps.run(f"stage-{role}", {
            "job": "stage", "source": str(model.path), "folder": str(place), "allow_pickle": spec.allow_pickle},
            (place / model.path.name).is_dir)["staged"]
    main = "adapter" if is_adapter(spec.source) else "model"
    common = {"job": "convert", "converter": str(scripts.folder), "version": scripts.version}
    made = work / f"{main}.gguf"
    outtype, base = spec.outtype, {}
    if main == "adapter":  # the script fails on `auto`; an adapter is small, and F32 loses nothing
        outtype, base = "f32" if outtype == "auto" else outtype, {"base": staged["base"]}
    notes = steps.run("converted", {**common, "staged": staged[main], "target": str(made), "outtype": outtype,
                                    "what": "converting", **base}, made.is_file).get("notes", [])
    if not spec.parity:
        return made, [], [*notes, "Not compared with the original, as asked."]
    engine = asdict(engine_options(steps.settings, steps.grip, gpu=False))  # as the form it is compared with
    stages: list[dict[str, Any]] = []
    if "base" in models:
        together = read_form(steps, "base and adapter", staged["base"], [(staged["adapter"], 1.0)])
    if main == "model":
        original = read_form(steps, "the model", staged["model"])
        if "base" in models:
            stages.append(steps.run_always({"job": "agree", "stage": "merging", "first": str(together),
                                            "second": str(original)}))
        stages.append(steps.run_always({"job": "agree", "stage": "conversion", "first": str(original),
                                        "gguf": str(made), "adapter": None, "options": engine}))
    else:
        under = work / "base.gguf"
        steps.run("converted-base", {**common, "staged": staged["base"], "target": str(under), "outtype": "auto",
                                     "what": "converting the base, to compare"}, under.is_file)
        stages.append(steps.run_always({"job": "agree", "stage": "conversion of the adapter", "first": str(together),
                                        "gguf": str(under), "adapter": str(made), "options": engine}))
    return made, stages, list(dict.fromkeys([*notes, *(note for stage in stages for note in stage["notes"])]))


def read_form(steps: Steps, name: str, staged: str, adapters: Sequence[tuple[str, float]] = (),
              tokenizer: str | None = None) -> Path:
    """Have PyTorch read the fixed text; return the folder of the reading."""
    place = steps.work / "readings" / name.replace(" ", "-")
    steps.run(f"read-{place.name}", {"job": "read", "staged": staged, "adapters": list(adapters), "folder": str(place),
                                     "name": name, "tokenizer": tokenizer}, (place / "reading.json").is_file)
    return place


def _convert_legacy(spec: ConvertSpec, scripts: Converter, steps: Steps) -> tuple[
        Path, list[dict[str, Any]], list[str]]:
    made = steps.work / "model.gguf"
    options = [part for name, value in spec.legacy.items() for part in (f"--{name}", value)]
    steps.run("converted", {"job": "convert", "converter": str(scripts.folder), "version": scripts.version,
                            "staged": str(spec.source), "target": str(made), "outtype": "", "what": "converting",
                            "legacy": ["--name", spec.source.stem, *options]}, made.is_file)
    engine = asdict(engine_options(steps.settings, steps.grip, gpu=False))  # as the form it is compared with
    steps.run_always({"job": "verify", "gguf": str(made), "options": engine})
    return made, [], ["A file before GGUF has nothing to compare with; it loads and computes finite numbers."]


def _deliver(spec: ConvertSpec, made: Path, kind: str, scripts: Converter, stages: list[dict[str, Any]],
             notes: list[str]) -> Converted:
    """Give the finished file its name."""
    weight_type = read_header(made).dominant_type
    stem = spec.source.stem if kind == "legacy" else spec.source.name
    target = spec.output or Path.cwd() / f"{stem}{'-adapter' if kind == 'adapter' else ''}-{weight_type}.gguf"
    target = target.absolute()
    if target.exists() and not spec.replace:
        raise OutputThere(f"{target} is there already; --force replaces it. What was converted is kept in "
                          f"{made.parent}.")
    with explained(target.parent):
        fsync_file(made)
        sha256 = sha256_file(made)
        rename(made, target)
    return Converted(target, weight_type, target.stat().st_size, sha256, kind,
                     f"llama-cpp-python {scripts.version}" if scripts.version else str(scripts.folder), tuple(stages),
                     tuple(notes))
