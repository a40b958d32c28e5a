"""What a GGUF file says before its weights, and the ways in which a file is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from state.faults import NightpressError

_PLAIN_TYPES = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
_MAX_BASE_MODELS = 64


class ModelMissing(NightpressError):
    """There is no model file at this path; check the spelling."""

    exit_code: ClassVar[int] = 20


class NotAFile(NightpressError):
    """The path is not a regular file; give the path of a .gguf file."""

    exit_code: ClassVar[int] = 21


class NotGguf(NightpressError):
    """The file is not a GGUF; convert the model to GGUF first."""

    exit_code: ClassVar[int] = 22


class GgufRefused(NightpressError):
    """The GGUF is malformed and was not handed to the engine; download or convert it again.

    `reason` says what is wrong, without the path.
    """

    exit_code: ClassVar[int] = 23

    def __init__(self, message: str | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class GgufTruncated(GgufRefused):
    """The GGUF is shorter than its header says; download it again."""

    exit_code: ClassVar[int] = 24


class ShardMissing(NightpressError):
    """A shard of the model is missing; put all shards into one folder."""

    exit_code: ClassVar[int] = 25


class ModelUnreadable(NightpressError):
    """The model file cannot be read; check its permissions."""

    exit_code: ClassVar[int] = 26


def refusal(path: Path, reason: str) -> GgufRefused:
    """The error that refuses `path` for `reason`, to be raised by the caller."""
    return GgufRefused(f"{path} is not a usable GGUF: {reason}", reason)


def truncation(path: Path, reason: str) -> GgufTruncated:
    """The error that says that the end of `path` is missing, to be raised by the caller."""
    return GgufTruncated(f"{path} is not a usable GGUF: {reason}; it was cut off, download it again", reason)


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """A metadata array too long to keep, or a text too long to keep (then of UINT8).

    `offset` and `n_bytes` say where its items lie in the file.
    """

    element_type: str
    length: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file: `shape` in ggml order, `offset` relative to the start of the data."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself. Every number in it was checked against the file's size.

    `metadata` holds scalars and strings as Python values, arrays of at most 64 entries as tuples and
    longer ones as `ArraySummary`; `value_types` holds the GGUF type of each (`UINT32`, ...,
    `ARRAY[STRING]`). `metadata_n_bytes` counts the key-value section alone. `architecture` is empty
    where the file names none, as in all shards but the first.
    """

    path: Path
    version: int
    alignment: int
    architecture: str
    metadata: Mapping[str, object]
    value_types: Mapping[str, str]
    metadata_n_bytes: int
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int

    @property
    def n_parameters(self) -> int:
        """Number of weights over all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight; 0 without tensors."""
        return mean_bits_per_weight(self.tensors)

    @property
    def dominant_type(self) -> str:
        """The ggml type that holds most weights; empty without tensors."""
        return most_common_type(self.tensors)

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is stored in a block-quantized type."""
        return any_quantized(self.tensors)

    @property
    def file_type(self) -> int | None:
        """`general.file_type`, llama.cpp's number for the recipe, where the file has one."""
        return self._integer("general.file_type")

    @property
    def name(self) -> str | None:
        """`general.name`."""
        return self._text("general.name")

    @property
    def license(self) -> str | None:
        """`general.license`."""
        return self._text("general.license")

    @property
    def base_models(self) -> tuple[str, ...]:
        """The models this one was made from: of each its repository, or else its name."""
        count = min(self._integer("general.base_model.count") or 0, _MAX_BASE_MODELS)
        found = (self._text(f"general.base_model.{i}.repo_url") or self._text(f"general.base_model.{i}.name")
                 for i in range(count))
        return tuple(model for model in found if model)

    @property
    def split_no(self) -> int | None:
        """Place of this file among its shards, from 0."""
        return self._integer("split.no")

    @property
    def split_count(self) -> int | None:
        """Number of shards."""
        return self._integer("split.count")

    def _integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def mean_bits_per_weight(tensors: tuple[TensorInfo, ...]) -> float:
    """Bits of tensor data per weight; 0 without tensors."""
    n_elements = sum(tensor.n_elements for tensor in tensors)
    return 8 * sum(tensor.n_bytes for tensor in tensors) / n_elements if n_elements else 0.0


def most_common_type(tensors: tuple[TensorInfo, ...]) -> str:
    """The ggml type that holds most weights; empty without tensors."""
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.ggml_type] = weights.get(tensor.ggml_type, 0) + tensor.n_elements
    return max(weights, key=weights.__getitem__, default="")


def any_quantized(tensors: tuple[TensorInfo, ...]) -> bool:
    """Whether any matrix is stored in a block-quantized type."""
    return any(len(tensor.shape) >= 2 and tensor.ggml_type not in _PLAIN_TYPES for tensor in tensors)
