"""A Hugging Face model folder, read in pure Python before any other library sees it."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from state.faults import NightpressError
from state.files import explained

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
SAFETENSORS_INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
#: any of these is a tokenizer
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
              "tokenizer.tiktoken", "qwen.tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: pickles that a training leaves beside the weights
_NO_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state.*)\.(?:bin|pt|pth)")
#: code and pickles: nothing that may run goes to the converter
_LEFT_OUT = (".py", ".so", ".pkl", ".pickle", *PICKLES)
MAX_HEADER_BYTES = 100 << 20  #: of a safetensors file, the format's own limit
MAX_JSON_BYTES = 512 << 20
#: the first four bytes of llama.cpp's formats before GGUF, as they lie in the file
GGML_MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}


class NoModelFolder(NightpressError):
    """This is no model folder; give one with a config.json and weights, as Hugging Face models have."""

    exit_code = 94


class TokenizerMissing(NightpressError):
    """The model folder has no tokenizer; copy tokenizer.json or tokenizer.model of the model into it."""

    exit_code = 96


class PickledWeights(NightpressError):
    """The weights are a pickle, which can run code when it is read; --allow-pickle reads the tensors alone."""

    exit_code = 98


class WeightsDamaged(NightpressError):
    """The weights are incomplete or damaged; download them again."""

    exit_code = 105


@dataclass(frozen=True)
class ModelFolder:
    """What a model or an adapter says of itself.

    Attributes:
        path: the folder, absolute.
        config: of config.json, or of adapter_config.json.
        safetensors: files with weights.
        pickles: files with weights, where there are no others.
        parameters: in all safetensors; 0 where the weights are pickled.
    """

    path: Path
    config: Mapping[str, Any]
    safetensors: tuple[Path, ...]
    pickles: tuple[Path, ...]
    parameters: int

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`; '' where it has none."""
        listed = self.config.get("architectures")
        return str(listed[0]) if isinstance(listed, list) and listed else ""

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(file.stat().st_size for file in (*self.safetensors, *self.pickles))

    def forecast_bytes(self, bytes_per_weight: int) -> int:
        """Return about how many bytes a GGUF of it takes; a pickled weight counts as one of two bytes."""
        weights = self.parameters or self.n_bytes // 2
        return weights * bytes_per_weight + (16 << 20)

    def identity(self) -> list[list[Any]]:
        """Return name, size and time of change of every file: the same answer, the same content."""
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns]
                for file in sorted(self.path.iterdir()) if file.is_file() and not file.name.startswith(".")]


def is_adapter(path: Path) -> bool:
    """Tell whether a folder holds a LoRA adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def is_legacy(path: Path) -> str:
    """Return which of llama.cpp's formats before GGUF a file has; '' for none."""
    if not path.is_file():
        return ""
    with explained(path), path.open("rb") as stream:
        return GGML_MAGICS.get(stream.read(4), "")


def read_folder(path: Path) -> ModelFolder:
    """Check a folder with a model.

    Raises:
        NoModelFolder: saying what is missing.
        TokenizerMissing: there is no tokenizer in it.
        WeightsDamaged: weights are missing or cut off.
    """
    _expect_folder(path)
    if not (path / CONFIG).is_file():
        raise NoModelFolder(f"{path} has no {CONFIG}, so it is no model as Hugging Face has them.")
    config = _read_json(path / CONFIG, NoModelFolder)
    safetensors, pickles = _weights(path)
    parameters = sum(check_safetensors(file) for file in safetensors)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise TokenizerMissing(f"{path} has no tokenizer; copy tokenizer.json or tokenizer.model of the model into it.")
    return ModelFolder(path, config, safetensors, pickles, parameters)


def read_adapter(path: Path) -> ModelFolder:
    """Check a folder with a LoRA adapter, as peft writes it.

    Raises:
        NoModelFolder: saying what is missing.
        WeightsDamaged: its weights are cut off.
    """
    _expect_folder(path)
    if not is_adapter(path):
        raise NoModelFolder(f"{path} has no {ADAPTER_CONFIG}, so it is no LoRA adapter.")
    config = _read_json(path / ADAPTER_CONFIG, NoModelFolder)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise NoModelFolder(f"{path} is an adapter of the kind {config['peft_type']}; only LoRA adapters are read.")
    file, pickle = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if file.is_file():
        return ModelFolder(path, config, (file,), (), check_safetensors(file))
    if pickle.is_file():
        return ModelFolder(path, config, (), (pickle,), 0)
    raise NoModelFolder(f"{path} has no adapter_model.safetensors.")


def _expect_folder(path: Path) -> None:
    if path.is_file():
        with explained(path), path.open("rb") as stream:
            magic = stream.read(4)
        if magic == b"algg":
            raise NoModelFolder(f"{path} is a LoRA adapter in llama.cpp's old format, which llama.cpp itself does not "
                                "convert any more; convert the adapter that it was made from.")
        raise NoModelFolder(f"{path} is a GGUF already; `nightpress run` takes it as it is." if magic == b"GGUF" else
                            f"{path} is a file; give the folder of a model, with a {CONFIG} and weights in it.")
    if not path.is_dir():
        raise NoModelFolder(f"There is no folder {path}; check the spelling.")


def _weights(path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the safetensors of a model, else its pickles.

    Raises:
        NoModelFolder: it has neither.
        WeightsDamaged: an index names a file that is not there.
    """
    for index, plain in ((SAFETENSORS_INDEX, "model.safetensors"), (PICKLE_INDEX, "pytorch_model.bin")):
        found: tuple[Path, ...] = ()
        if (path / index).is_file():
            found = _indexed(path / index)
        elif (path / plain).is_file():
            found = (path / plain,)
        if found:
            return (found, ()) if plain.endswith(".safetensors") else ((), found)
    safetensors = tuple(sorted(path.glob("model*.safetensors")))
    if safetensors:
        return safetensors, ()
    pickles = tuple(sorted(file for file in path.iterdir() if file.suffix in PICKLES and file.is_file()
                           and not _NO_WEIGHTS.fullmatch(file.name)))
    if not pickles:
        raise NoModelFolder(f"{path} has no weights: no model*.safetensors, and no pytorch_model*.bin either.")
    return (), pickles


def _indexed(index: Path) -> tuple[Path, ...]:
    weights = _read_json(index, WeightsDamaged).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise WeightsDamaged(f"{index} lists no weights; download it again.")
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        if name != Path(name).name:
            raise WeightsDamaged(f"{index} names {name[:80]!r}, which is not in the folder itself.")
        if not (index.parent / name).is_file():
            raise WeightsDamaged(f"{index.parent} lacks {name}, which {index.name} names; download it again.")
    return tuple(index.parent / name for name in names)


def _read_json(path: Path, error: type[NightpressError]) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path} is far too large for what it is.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is no JSON in UTF-8: {problem}.") from problem
    if not isinstance(found, dict):
        raise error(f"{path} is JSON, but not an object with names and values.")
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: type by the format's name, shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file that is as long as its header says, in the order of their bytes.

    The layout is that of the safetensors README: eight bytes of length, a JSON header, the data.

    Raises:
        WeightsDamaged: with what is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise WeightsDamaged(f"{path} is no safetensors file, or it is cut off; download it again.")
            header = json.loads(stream.read(length))
        first = 8 + length
        tensors = {name: Stored(str(facts["dtype"]), tuple(map(int, facts["shape"])),
                                *(first + int(place) for place in facts["data_offsets"]))
                   for name, facts in header.items() if name != "__metadata__"}
    except OSError as problem:
        raise WeightsDamaged(f"{path} cannot be read: {problem.strerror}.") from problem
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as problem:
        raise WeightsDamaged(f"{path} is no safetensors file: its header makes no sense.") from problem
    if not tensors:
        raise WeightsDamaged(f"{path} holds no weights; download it again.")
    end = max(tensor.end for tensor in tensors.values())
    if size != end:
        raise WeightsDamaged(f"{path} has {size:,} bytes instead of {end:,}: it was cut off or damaged; "
                             "download it again.")
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))


def check_safetensors(path: Path) -> int:
    """Check that a safetensors file is as long as its header says; return how many weights it has.

    Raises:
        WeightsDamaged: with what is wrong.
    """
    return sum(math.prod(tensor.shape) for tensor in read_safetensors(path).values())


def weight_types(model: ModelFolder) -> dict[str, int]:
    """Return how many weights of the matrices are stored in each type, by the format's names: such as BF16."""
    counted: dict[str, int] = {}
    for file in model.safetensors:
        for tensor in read_safetensors(file).values():
            if len(tensor.shape) > 1:
                counted[tensor.dtype] = counted.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return counted


def stage(source: Path, folder: Path) -> Path:
    """Make a folder of links to the files of source that are data; return it.

    Code and pickles are left out, so that no library can be talked into running them. The folder has the name of
    the source, from which the converter takes the name of the model.

    Args:
        source: the model.
        folder: takes the new folder, which is made anew.
    """
    target = folder / source.name
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix not in _LEFT_OUT:
            (target / file.name).symlink_to(file.resolve())
    return target
