"""What a worker does of a conversion, one step each: stage, convert, read, agree, verify."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loops.engine.gguf_check import GgufRefused, check_model
from loops.engine.gguf_format import read_header
from loops.engine.model import check_finite, load_model
from loops.engine.options import EngineOptions
from loops.events import Event, Progress
from loops.finetune import converter, lora, merging, parity, reading, tokenizer_fit
from loops.finetune import outtype as outtypes
from loops.finetune.extra import CONVERTING, require
from loops.finetune.model_folder import (
    PickledWeights,
    is_adapter,
    read_adapter,
    read_folder,
    stage,
)
from loops.finetune.pickles import to_safetensors
from state.files import explained, rename

Emit = Callable[[Event], None]
Report = Callable[[float, float], None]


def _report(emit: Emit, what: str) -> Report:
    return lambda done, total: emit(Progress(what, "", done, total))


def stage_model(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Link the data of a model or an adapter into a folder of its own; pickled weights become safetensors there.

    Args:
        job: `source`, `folder` that takes the new one, `allow_pickle`.
        emit: is told how far it is.

    Raises:
        PickledWeights: they are pickled, and that was not allowed.
    """
    source, adapter = Path(job["source"]), is_adapter(Path(job["source"]))
    model = read_adapter(source) if adapter else read_folder(source)
    with explained(Path(job["folder"])):
        staged = stage(source, Path(job["folder"]))
    if model.pickles:
        if not job["allow_pickle"]:
            raise PickledWeights(f"The weights in {source} are pickled ({model.pickles[0].name}), and a pickle can run "
                                 "code when it is read. --allow-pickle reads the tensors alone and nothing else.")
        require("Reading pickled weights", *CONVERTING)
        to_safetensors(model.pickles, staged, _report(emit, "weights to safetensors"),
                       "adapter_model" if adapter else "model")
    return {"staged": str(staged)}


def convert(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run the converter on a staged folder, or on a legacy file; the GGUF appears whole and checked.

    Args:
        job: `staged`, `target`, `outtype`, `converter`, `version`; for an adapter `base`, the staged model it belongs
            to; for a legacy file `legacy`, the script's options.
        emit: is told how far it is.

    Raises:
        ConversionFailed: what came out is no sound GGUF; and whatever `run_script` raises.
    """
    scripts = converter.Converter(Path(job["converter"]), job["version"])
    source, target = Path(job["staged"]), Path(job["target"])
    partial = target.with_name(f"{target.name}.part")
    outtype = job["outtype"]
    notes: tuple[str, ...] = ()
    if "legacy" not in job and "base" not in job:
        outtype, notes = outtypes.choose(read_folder(source), outtype, _report(emit, "looking at the weights"))
    output = ["--outfile", str(partial), "--outtype", outtype]
    report = _report(emit, job["what"])
    if "legacy" in job:
        script, arguments = converter.LEGACY_SCRIPT, ["--input", str(source), "--output", str(partial), *job["legacy"]]
    elif "base" in job:
        script, arguments = converter.ADAPTER_SCRIPT, [str(source), "--base", job["base"], *output]
        converter.check_architecture(scripts, read_folder(Path(job["base"])).architecture, Path(job["base"]))
    else:
        script, arguments = converter.MODEL_SCRIPT, [str(source), *output]
        converter.check_architecture(scripts, read_folder(source).architecture, source)
    try:
        converter.run_script(scripts, script, arguments, target.parent / "home", report)
        if not partial.is_file():
            raise converter.ConversionFailed("The converter ended without an error and without a file.")
        if "base" in job:
            kind = read_header(partial).metadata.get("general.type")
            if kind != "adapter":
                raise converter.ConversionFailed(f"The converter wrote a file of the kind {kind}, not an adapter.")
        else:
            _check_made(partial)
        with explained(target):
            rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(target.parent / "home", ignore_errors=True)
    return {"type": read_header(target).dominant_type, "notes": list(notes)}


def _check_made(file: Path) -> None:
    """Check what the converter wrote.

    Raises:
        ConversionFailed: it is no sound GGUF.
    """
    try:
        check_model(file)
    except GgufRefused as problem:
        raise converter.ConversionFailed(f"The converter wrote a GGUF that makes no sense: {problem.reason}. Do "
                                         "config.json and the weights belong together?") from problem


def read(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Have PyTorch read the fixed text and keep the reading.

    Args:
        job: `staged`; `adapters`, staged, each with its weight; `folder` that takes the reading; `name` of the form;
            `tokenizer`, a folder whose tokenizer to use, or None for the model's.
        emit: is told how far it is.
    """
    reading.read_with_torch(
        read_folder(Path(job["staged"])), Path(job["folder"]), job["name"],
        [(Path(path), weight) for path, weight in job["adapters"]], _report(emit, f"reading {job['name']}"),
        Path(job["tokenizer"]) if job.get("tokenizer") else None)
    return {}


def agree(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Compare a reading that was kept with another, or with what the engine makes of a GGUF.

    Args:
        job: `stage`; `first`, the folder of a reading; `second` the folder of another, or `gguf`, `adapter` and
            `options` of the engine.
        emit: is told how far it is.

    Raises:
        TokenizerMismatch, ParityFailed: naming the stage.
        ConversionFailed: a reading is not there.
    """
    name, report = job["stage"], _report(emit, f"comparing: {job['stage']}")
    report(0, 1)
    first = reading.load(Path(job["first"]))
    second = reading.load(Path(job["second"])) if "second" in job else None
    if first is not None and "gguf" in job:
        second = reading.read_with_engine(Path(job["gguf"]), first[0], EngineOptions(**job["options"]), "the GGUF",
                                          Path(job["adapter"]) if job["adapter"] else None)
    if first is None or second is None:
        raise converter.ConversionFailed("A reading of the fixed text is gone; run the same command again.")
    notes = parity.check_tokens(name, first[0], second[0])
    if list(first[0].ids) != list(second[0].ids):
        raise parity.TokenizerMismatch(f"Stage {name}: the forms did not read the same tokens.")
    found = parity.compare(name, first[1], second[1], parity.bounds_of(second[0].weight_type, first[0].rounding))
    report(1, 1)
    return {**found.as_json(), "notes": list(notes)}


def merge(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Write a merged model into a folder.

    Args:
        job: `base`, staged; `adapters`, staged, each with its weight; `folder` that takes the model.
        emit: is told how far it is.

    Raises:
        AdapterMismatch, AdapterUnmergeable, BaseQuantized: see `lora`.
        TokenizerMismatch: an adapter was trained with another tokenizer.
    """
    base, folder = read_folder(Path(job["base"])), Path(job["folder"])
    lora.check_full_precision(base)
    adapters = [lora.read_lora(read_adapter(Path(path)), weight) for path, weight in job["adapters"]]
    plan = lora.plan_merge(base, adapters)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer, template, notes = tokenizer_fit.choose(base, [adapter.path for adapter in adapters], plan.rows)
    merging.write_weights(base, adapters, plan, folder, _report(emit, "merging"))
    merging.write_rest(base, plan, folder, tokenizer)
    if template:
        merging.set_template(folder, template)
    return {"tensors": len(plan.terms), "rows": plan.rows, "notes": list(notes)}


def verify(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Load a GGUF and compute a few tokens: what can be said of one that there is nothing to compare with.

    Raises:
        ModelNotLoaded, NotFinite: as they say.
    """
    report = _report(emit, "loading the GGUF")
    with load_model(Path(job["gguf"]), EngineOptions(**job["options"]), lambda share: report(share, 1.0)) as model:
        check_finite(model)
    return {}


JOBS: dict[str, Callable[[dict[str, Any], Emit], dict[str, Any]]] = {
    "merge": merge, "stage": stage_model, "convert": convert, "read": read, "agree": agree, "verify": verify}
