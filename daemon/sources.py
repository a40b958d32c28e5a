"""Where a model comes from: a GGUF, a Hugging Face folder, or the id of one that was pulled or is to be.

A folder is converted into the state folder, once: what was made is used again as long as the folder stays as it is, and
removed by age when finished levels and these files together are more than the disk budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daemon.download import Show
from daemon.grip import Grip
from daemon.pulling import HUB_ID, PullSpec, models_folder, pull
from daemon.settings import Settings
from loops.finetune.extra import CONVERTING, require
from loops.finetune.lora import check_full_precision
from loops.finetune.model_folder import CONFIG, NoModelFolder, PickledWeights, is_adapter, read_folder
from loops.starter import STARTER, STARTER_GGUF
from state.faults import NightpressError
from state.files import explained, make_folder, write_atomic

FORGOTTEN_S = 7 * 86_400
HUB = "hf:"  #: before an id of a hub: pull it first if it is not here


class NoSuchModel(NightpressError):
    """There is no such model; name a GGUF, a model folder, the id of a pulled model, or hf:OWNER/NAME to pull one."""

    exit_code = 116


def place_of(path: Path, settings: Settings) -> Path:
    """Return an absolute path: the file or folder of that name, else the folder of a pulled model of that id."""
    there, hub_id = path.expanduser().absolute(), str(path).removeprefix(HUB)
    pulled = models_folder(settings.state_dir, hub_id)
    return pulled if not there.exists() and HUB_ID.fullmatch(hub_id) and pulled.is_dir() else there


def locate(model: Path, settings: Settings, show: Show | None = None) -> Path:
    """Return where a model lies, pulled first if it is named `hf:OWNER/NAME` and not here; a folder is checked.

    The word `starter` is the GGUF that ships, unless a file or folder of that name lies here.

    Raises:
        NoSuchModel: it looks like an id, and was not pulled.
        ServerRefused, DownloadInterrupted, DownloadDamaged, DiskFull: it cannot be pulled.
        NoModelFolder, PickledWeights, BaseQuantized, TrainExtraMissing: the folder cannot be converted.
    """
    text = str(model)
    if text == STARTER and not model.exists():
        return STARTER_GGUF.absolute()
    place = place_of(model, settings)
    hub_id = text.removeprefix(HUB)
    if text.startswith(HUB):
        place = models_folder(settings.state_dir, hub_id)
        if not (place / CONFIG).is_file():
            require("Converting", *CONVERTING)
            place = pull(PullSpec(hub_id, place), show).folder
    elif not place.exists() and HUB_ID.fullmatch(text) and "/" in text and not text.lower().endswith(".gguf"):
        raise NoSuchModel(f"There is no folder {text}, and no model of that id was pulled; {HUB}{text} pulls it first.")
    if place.is_dir():
        check_folder(place)
    return place


def check_folder(folder: Path) -> None:
    """Make sure that a folder is a model that can be converted, without reading its weights.

    Raises:
        NoModelFolder, TokenizerMissing, WeightsDamaged, PickledWeights, BaseQuantized: it is not.
        TrainExtraMissing: libraries are missing.
    """
    if is_adapter(folder) and not (folder / CONFIG).is_file():
        raise NoModelFolder(f"{folder} is a LoRA adapter; `nightpress merge {folder.name} --base DIR -o DIR` makes a "
                            "model of it first.")
    model = read_folder(folder)
    if model.pickles:
        raise PickledWeights(f"The weights in {folder} are pickled; `nightpress convert {folder.name} --allow-pickle` "
                             "makes a GGUF of them first.")
    if model.config.get("quantization_config"):
        check_full_precision(model)
    require("Converting", *CONVERTING)


def converted(folder: Path, settings: Settings, grip: Grip, show: Show) -> tuple[Path, Mapping[str, Any]]:
    """Return the GGUF of a model folder and where it came from; made now, or before of the very same files.

    Raises:
        What `check_folder` and `convert` raise.
    """
    from daemon.converting import ConvertSpec, convert  # numpy with it, which the service does without

    check_folder(folder)
    place = converted_folder(settings) / _key(folder) / f"{folder.name}.gguf"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        if found["bytes"] == place.stat().st_size:
            os.utime(place)
            return place, found["source"]
    with explained(place.parent):
        make_folder(converted_folder(settings), 0o700)
        make_folder(place.parent, 0o700)
    clean(settings, place)
    done = convert(ConvertSpec(folder, place, replace=True), settings, grip, show)
    model = read_folder(folder)
    source = {"folder": str(folder), "files": model.identity(), "converter": done.converter, "type": done.weight_type,
              "sha256": done.sha256, "stages": list(done.stages), "notes": list(done.notes)}
    with explained(place.parent):
        write_atomic(place.with_suffix(".json"), json.dumps({"bytes": done.n_bytes, "source": source}).encode())
    return place, source


def converted_folder(settings: Settings) -> Path:
    """Return the folder of converted models; not in the scratch, whose folders are removed by age alone."""
    return settings.state_dir.absolute() / "converted"


def _key(folder: Path) -> str:
    facts = json.dumps([str(folder), read_folder(folder).identity()])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def clean(settings: Settings, keep: Path | None = None) -> int:
    """Remove converted models, the least recently used first, until they and the finished levels keep to the budget.

    Args:
        settings: have the budget.
        keep: a GGUF of an unfinished run.

    Returns:
        How many were removed.
    """
    levels = sum(file.stat().st_size for file in settings.blobs.glob("*.gguf"))
    files = sorted(converted_folder(settings).glob("*/*.gguf"), key=lambda file: file.stat().st_mtime)
    total, removed = levels + sum(file.stat().st_size for file in files), 0
    for file in files:
        if total <= settings.disk_budget_bytes:
            break
        if file == keep:
            continue
        total -= file.stat().st_size
        file.unlink()
        file.with_suffix(".json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()
        removed += 1
    for folder in converted_folder(settings).glob("*/"):  # conversions that nobody went on with
        if not any(folder.glob("*.gguf")) and time.time() - folder.stat().st_mtime > FORGOTTEN_S and (
                keep is None or folder != keep.parent):
            shutil.rmtree(folder, ignore_errors=True)
    return removed
