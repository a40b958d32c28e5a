"""Check a model's files before native code sees them: one GGUF, or all the shards of one model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loops.engine.gguf_format import read_header
from loops.engine.gguf_header import (
    ArraySummary,
    GgufHeader,
    GgufRefused,
    GgufTruncated,
    ModelMissing,
    ModelUnreadable,
    NotAFile,
    NotGguf,
    ShardMissing,
    TensorInfo,
    any_quantized,
    mean_bits_per_weight,
    most_common_type,
    refusal,
)
from loops.engine.gguf_rules import check_rules

__all__ = [
    "ArraySummary", "CheckedModel", "GgufHeader", "GgufRefused", "GgufTruncated", "ModelMissing",
    "ModelUnreadable", "NotAFile", "NotGguf", "ShardMissing", "TensorInfo", "check_gguf", "check_model",
    "find_shards", "read_header",
]

_SHARD_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class CheckedModel:
    """A model whose every file passed: `path` is the one to give to the engine, the first shard."""

    path: Path
    shards: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def header(self) -> GgufHeader:
        """The header of the first shard, which holds all metadata."""
        return self.headers[0]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.header.architecture

    @property
    def metadata(self) -> dict[str, object]:
        """The metadata of the first shard."""
        return dict(self.header.metadata)

    @property
    def file_bytes(self) -> int:
        """Bytes on disk of all shards."""
        return sum(header.file_size for header in self.headers)

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight."""
        return mean_bits_per_weight(self.tensors)

    @property
    def dominant_type(self) -> str:
        """The ggml type that holds most weights."""
        return most_common_type(self.tensors)

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is stored in a block-quantized type."""
        return any_quantized(self.tensors)


def check_gguf(path: Path) -> GgufHeader:
    """Check one file by every rule; of a shard only what can be said of it alone.

    Raises:
        GgufRefused: with the reason; and whatever `read_header` raises.
    """
    header = read_header(path)
    if (header.split_count or 0) <= 1:
        check_rules(header, header.tensors)
    return header


def find_shards(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order; just `path` unless it is named as a shard.

    Raises:
        ShardMissing: naming the first that is missing.
        GgufRefused: the numbers in the name contradict each other.
    """
    match = _SHARD_NAME.fullmatch(path.name)
    if not match:
        return (path,)
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise refusal(path, f"its name says shard {number} of {count}")
    shards = []
    for place in range(1, count + 1):
        shard = path.with_name(f"{match[1]}-{place:05d}-of-{count:05d}.gguf")
        if place != number and not shard.exists():
            raise ShardMissing(f"Shard {place} of {count} is missing: {shard}; put all into one folder")
        shards.append(shard)
    return tuple(shards)


def _check_shard(header: GgufHeader, place: int, headers: list[GgufHeader]) -> None:
    """One shard must be what its name says and agree with the first."""
    for key, kind, value in (("split.no", "UINT16", place), ("split.count", "UINT16", None)):
        if header.value_types.get(key) != kind:
            raise refusal(header.path, f"it is named as a shard, but {key} is "
                                       f"{header.value_types.get(key, 'missing')}, not {kind}")
        if value is not None and header.metadata[key] != value:
            raise refusal(header.path, f"{key} is {header.metadata[key]}, but its name says {value}")
    first = headers[0]
    if header.architecture not in {"", first.architecture}:
        raise refusal(header.path, f"its architecture is {header.architecture}, "
                                   f"but that of the first shard {first.architecture}")


def check_model(path: Path) -> CheckedModel:
    """Check all files of a model, each and together. Any shard of it may be given.

    Raises:
        ShardMissing: a file of it is missing.
        GgufRefused: with the reason; and whatever `read_header` raises.
    """
    shards = find_shards(path)
    if len(shards) == 1:
        header = check_gguf(path)
        if (header.split_count or 0) > 1:
            raise refusal(path, f"it is shard {(header.split_no or 0) + 1} of {header.split_count}, "
                                "but not named NAME-00001-of-00003.gguf")
        return CheckedModel(path, shards, (header,), header.tensors)

    headers: list[GgufHeader] = []
    tensors: dict[str, TensorInfo] = {}
    for place, shard in enumerate(shards):
        header = read_header(shard)
        headers.append(header)
        _check_shard(header, place, headers)
        if header.split_count != len(shards):
            raise refusal(shard, f"split.count is {header.split_count}, but its name says {len(shards)}")
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise refusal(shard, f"the tensor {tensor.name} is also in another shard")
            tensors[tensor.name] = tensor
    total = headers[0].metadata.get("split.tensors.count")
    if headers[0].value_types.get("split.tensors.count") != "INT32" or total != len(tensors):
        raise refusal(shards[0], f"split.tensors.count is {total}, but the shards hold {len(tensors)}")
    merged = tuple(tensors.values())
    check_rules(headers[0], merged)
    return CheckedModel(shards[0], shards, tuple(headers), merged)
