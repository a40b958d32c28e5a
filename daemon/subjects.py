"""Models as people name them: files, folders, the starter, releases, and levels of runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon.pulling import models_folder
from daemon.settings import Settings
from loops.engine.gguf_check import check_model
from loops.finetune.extra import require
from loops.finetune.model_folder import NoModelFolder, PickledWeights, is_adapter, read_folder
from loops.starter import STARTER, STARTER_GGUF
from state import releases
from state.faults import NightpressError

_RELEASE = re.compile(r"([A-Za-z0-9][\w.-]*)(?:@([1-9][0-9]{0,8}))?")
_LEVEL = re.compile(r"([1-9][0-9]{0,8}):(\S+)")


class ModelUnknown(NightpressError):
    """There is no such model: give a GGUF, a Hugging Face folder, starter, NAME, NAME@NUMBER or RUN:LEVEL."""

    exit_code = 120


@dataclass(frozen=True)
class Chosen:
    """A model to be asked.

    Attributes:
        name: for people, unique among those chosen together.
        kind: `gguf` or `folder`.
        path: of it, absolute.
    """

    name: str
    kind: str
    path: Path


def choose(texts: Sequence[str], settings: Settings) -> tuple[Chosen, ...]:
    """Return the models that texts name, checked as far as that goes without loading them.

    A path; `starter`; the id of a model that was pulled; the name of a deployed model, with `@NUMBER` one of its
    releases; `RUN:LEVEL`, a level in the store.

    Raises:
        ModelUnknown: a text names none, or two name the same.
        GgufRefused, NoModelFolder, TokenizerMissing, WeightsDamaged, PickledWeights, TrainExtraMissing: it cannot be
            used.
    """
    found: list[Chosen] = []
    for text in texts:
        path, name = _find(text, settings)
        if any(one.path == path for one in found):
            raise ModelUnknown(f"{text} is named twice.")
        if path.is_dir():
            _check_folder(path)
        else:
            check_model(path)
        taken = {one.name for one in found}
        number = next((n for n in range(2, len(texts) + 2) if f"{name} ({n})" not in taken), 2)
        found.append(Chosen(f"{name} ({number})" if name in taken else name,
                            "folder" if path.is_dir() else "gguf", path))
    return tuple(found)


def _find(text: str, settings: Settings) -> tuple[Path, str]:
    path = Path(text).expanduser().absolute()
    if path.exists():
        return path, path.name if path.is_dir() else path.stem
    if text == STARTER:
        return STARTER_GGUF, STARTER
    pulled = models_folder(settings.state_dir, text)
    if not Path(text).is_absolute() and ".." not in Path(text).parts and pulled.is_dir():
        return pulled, text
    if level := _LEVEL.fullmatch(text):
        return _level(settings, int(level[1]), level[2].upper()), text
    if named := _RELEASE.fullmatch(text):
        home = settings.deploy / named[1]
        if named[2] and (home / "releases" / named[2]).is_dir():
            return releases.load(home, int(named[2])).model_path, text
        release = releases.current(settings.deploy, named[1]) if not named[2] and home.is_dir() else None
        if release is not None:
            return release.model_path, f"{text}@{release.number}"
    raise ModelUnknown(f"There is no model {text}: no file or folder, no release, no level. Give a GGUF, a Hugging "
                       "Face folder, starter, NAME, NAME@NUMBER or RUN:LEVEL.")


def _level(settings: Settings, run: int, level: str) -> Path:
    from state.ledger import Ledger

    with Ledger.read(settings.state_dir) as ledger:
        ledger.run(run)
        sha256 = next((row["sha256"] for row in ledger.candidates(run) if row["level"] == level), None)
    file = settings.blobs / f"{sha256}.gguf"
    if not sha256 or not file.is_file():
        raise ModelUnknown(f"Run {run} has no file of the level {level}; `nightpress results {run}` shows its levels, "
                           "and those over the disk budget are removed.")
    return file


def _check_folder(path: Path) -> None:
    if is_adapter(path):
        raise NoModelFolder(f"{path} is a LoRA adapter; merge it into its model first, with `nightpress merge`.")
    require("Evaluating a Hugging Face folder", "torch", "transformers", "safetensors")
    folder = read_folder(path)
    if folder.pickles:
        raise PickledWeights(f"The weights in {path} are pickled ({folder.pickles[0].name}), and a pickle can run code "
                             "when it is read; `nightpress convert --allow-pickle` makes a GGUF of it.")
