"""Importance matrices on disk: llama.cpp's GGUF form written and read, its older .dat form read, several merged.

Of every weight matrix an importance matrix keeps, per column, the sum of the squares of the activations that
met it, and how many activations there were. Layout and merging follow tools/imatrix/imatrix.cpp and
common/imatrix-loader.cpp of llama.cpp; a file of ours with the same values has the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from loops.engine.gguf_format import open_regular, read_header
from loops.engine.gguf_header import ArraySummary, GgufHeader, GgufRefused, TensorInfo
from state.faults import NightpressError
from state.files import explained, write_atomic

Sums = NDArray[np.float32]
Counts = NDArray[np.int64]

LEGACY_CHUNK = 512  #: tokens per chunk of a .dat file, which does not say it; llama-imatrix's default
_ALIGNMENT = 32
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_UINT32, _STRING, _ARRAY = 4, 8, 9  # numbers of GGUF's value types
_F32 = 0  # number of the tensor type
_I32 = struct.Struct("<i")
_MAX_LEGACY_ENTRIES = 65_536
_MAX_LEGACY_NAME = 255


class ImatrixRefused(NightpressError):
    """The importance matrix cannot be used; make it again with `nightpress imatrix`."""

    exit_code: ClassVar[int] = 8


@dataclass(frozen=True, eq=False)
class Entry:
    """What met one weight matrix, or each of the experts stacked in it.

    Attributes:
        sums: of squares; float32 of shape (matrices * columns,), one matrix after the other.
        counts: of rows added up; int64 of shape (experts,), or (1,) where all matrices share one.
    """

    sums: Sums
    counts: Counts

    def weights(self) -> Sums:
        """Return the mean squares as llama-quantize hands them to the engine: 1 for an expert never seen."""
        rows = self.sums.reshape(len(self.counts), -1)
        counts = self.counts.astype(np.float32)[:, None]
        means: Sums = np.ones_like(rows)
        np.divide(rows, counts, out=means, where=counts > 0)
        return means.reshape(-1)


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: by name of the weight matrix.
        datasets: names of the texts it was made from, in order.
        chunks: how many pieces of text were computed.
        chunk_size: tokens in each of them.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    @property
    def sha256(self) -> str:
        """Of all sums and counts: two matrices with the same one quantize alike."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(repr((name, entry.sums.shape, entry.counts.shape)).encode())
            digest.update(entry.sums.astype("<f4").tobytes() + entry.counts.astype("<i8").tobytes())
        return digest.hexdigest()


# --- writing


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _tensor_records(name: str, entry: Entry) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Name, shape and bytes of both tensors of an entry. ggml leaves out trailing dimensions of 1."""
    matrices = len(entry.counts)
    more = (matrices,) if matrices > 1 else ()
    return [(name + _SUMS, (len(entry.sums) // matrices, *more), entry.sums.astype("<f4").tobytes()),
            (name + _COUNTS, (1, *more), entry.counts.astype("<f4").tobytes())]


def _parts(imatrix: Imatrix) -> Iterator[bytes]:
    keys = [
        _text("general.type") + struct.pack("<I", _STRING) + _text("imatrix"),
        _text(_DATASETS) + struct.pack("<IIQ", _ARRAY, _STRING, len(imatrix.datasets))
        + b"".join(map(_text, imatrix.datasets)),
        _text(_CHUNK_COUNT) + struct.pack("<II", _UINT32, imatrix.chunks),
        _text(_CHUNK_SIZE) + struct.pack("<II", _UINT32, imatrix.chunk_size)]
    tensors = [record for name in sorted(imatrix.entries, key=str.encode)
               for record in _tensor_records(name, imatrix.entries[name])]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys]
    offset = 0
    for name, shape, data in tensors:
        head.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _F32, offset))
        offset += len(data) + -len(data) % _ALIGNMENT
    start = b"".join(head)
    yield start + bytes(-len(start) % _ALIGNMENT)
    for _name, _shape, data in tensors:
        yield data + bytes(-len(data) % _ALIGNMENT)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write imatrix to path in llama.cpp's GGUF form; the file appears complete and durable.

    The form stores counts as 32-bit floats: they are exact up to 16,777,216 tokens.

    Raises:
        DiskFull: nothing is left behind.
        StateUnwritable: the folder cannot be written.
    """
    with explained(path.parent):
        write_atomic(path, _parts(imatrix), mode=0o644)


# --- reading


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ImatrixRefused(f"{path} is no usable importance matrix: {reason}.")


def _checked(path: Path, name: str, sums: Sums, counts: NDArray[np.floating]) -> Entry:
    """Return the entry; refuse numbers that no sum of squares and no count can be."""
    for what, values in (("sums", sums), ("counts", counts)):
        if not np.isfinite(values).all():
            _refuse(path, f"the {what} of {name} are not all finite numbers")
        if (values < 0).any():
            _refuse(path, f"the {what} of {name} are not all positive")
    if len(sums) % len(counts):
        _refuse(path, f"{name} has {len(sums)} sums for {len(counts)} counts")
    return Entry(sums, np.rint(counts).astype(np.int64))


def _checked_whole(path: Path, imatrix: Imatrix) -> Imatrix:
    if not any(entry.counts.any() for entry in imatrix.entries.values()):
        _refuse(path, "it holds no data")
    return imatrix


def read_imatrix(path: Path, *, legacy_chunk: int = LEGACY_CHUNK) -> Imatrix:
    """Read an importance matrix in either of llama.cpp's forms.

    The older form keeps means times chunks; as llama-imatrix does, both are multiplied by the tokens
    of a chunk, so that it can be merged with others. It has one count for all experts.

    Args:
        path: the file.
        legacy_chunk: tokens per chunk that a file of the older form was made with.

    Raises:
        ImatrixRefused: it is something else, cut off, or holds impossible numbers.
        ModelMissing: there is no such file; NotAFile, ModelUnreadable: it cannot be read.
    """
    with open_regular(path) as descriptor:
        if os.pread(descriptor, 4, 0) != b"GGUF":
            with os.fdopen(os.dup(descriptor), "rb") as stream:
                return _checked_whole(path, _read_legacy(path, stream, legacy_chunk))
        try:
            header = read_header(path)
        except GgufRefused as problem:
            raise ImatrixRefused(f"{path} is no usable importance matrix: {problem.reason}.") from problem
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            return _checked_whole(path, _read_gguf(header, stream))


def _read_floats(path: Path, stream: BinaryIO, count: int) -> Sums:
    values: Sums = np.fromfile(stream, dtype="<f4", count=count).astype(np.float32, copy=False)
    if len(values) != count:
        _refuse(path, "it was cut off")
    return values


def _datasets(header: GgufHeader) -> tuple[str, ...]:
    found = header.metadata[_DATASETS]
    if isinstance(found, ArraySummary):  # of more than 64 names the reader keeps only how many there are
        return (f"{found.length} texts",)
    return tuple(map(str, found)) if isinstance(found, tuple) else ()


def _read_gguf(header: GgufHeader, stream: BinaryIO) -> Imatrix:
    path = header.path
    kind = header.metadata.get("general.type", "model" if header.architecture else "imatrix")
    if kind != "imatrix":
        _refuse(path, f"it is a GGUF of type {kind}, not of type imatrix")
    kinds = {_DATASETS: "ARRAY[STRING]", _CHUNK_COUNT: "UINT32", _CHUNK_SIZE: "UINT32"}
    for key, wanted in kinds.items():
        if header.value_types.get(key) != wanted:
            _refuse(path, f"{key} is {header.value_types.get(key, 'missing')}, not {wanted}")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(_SUMS).removesuffix(_COUNTS)
        pair = [tensors.get(stem + _SUMS), tensors.get(stem + _COUNTS)]
        if stem in entries or stem == name:
            continue
        arrays = []
        for part, suffix in zip(pair, (_SUMS, _COUNTS), strict=True):
            if part is None:
                _refuse(path, f"{tensor.name} is there, but not {stem}{suffix}")
            if part.ggml_type != "F32":
                _refuse(path, f"{part.name} is {part.ggml_type}, not F32")
            stream.seek(header.data_offset + part.offset)
            arrays.append(_read_floats(path, stream, part.n_elements))
        entries[stem] = _checked(path, stem, *arrays)
    chunks, size = (int(str(header.metadata[key])) for key in (_CHUNK_COUNT, _CHUNK_SIZE))
    return Imatrix(entries, _datasets(header), chunks, size)


def _read_legacy(path: Path, stream: BinaryIO, chunk_size: int) -> Imatrix:
    size = os.fstat(stream.fileno()).st_size

    def take(n_bytes: int) -> bytes:
        if n_bytes > size - stream.tell():
            _refuse(path, "it was cut off")
        return stream.read(n_bytes)

    def number() -> int:
        return int(_I32.unpack(take(4))[0])

    unknown = "it is neither a GGUF nor an older file of llama-imatrix"
    if size < _I32.size or not 1 <= (n_entries := number()) <= _MAX_LEGACY_ENTRIES:
        _refuse(path, unknown)
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        length = number()
        if not 1 <= length <= _MAX_LEGACY_NAME:
            _refuse(path, unknown)
        name = take(length).decode(errors="replace")
        if not name.isprintable() or "\N{REPLACEMENT CHARACTER}" in name:
            _refuse(path, unknown)
        chunks, n_values = number(), number()
        if chunks < 1 or n_values < 1:
            _refuse(path, f"{name} has {n_values} sums of {chunks} chunks")
        if n_values > (size - stream.tell()) // 4:
            _refuse(path, "it was cut off")
        sums = _read_floats(path, stream, n_values) * np.float32(chunk_size)
        entries[name] = _checked(path, name, sums, np.array([chunks * chunk_size], dtype=np.float64))
    chunks, datasets = max(int(entry.counts[0]) for entry in entries.values()) // chunk_size, ()
    if stream.tell() == size:  # the oldest files end here
        return Imatrix(entries, datasets, chunks, chunk_size)
    chunks, length = number(), number()
    if chunks < 0 or length < 0:
        _refuse(path, f"it claims {chunks} chunks of a text whose name has {length} bytes")
    dataset = take(length).decode(errors="replace")
    return Imatrix(entries, (dataset,) if dataset else (), chunks, chunk_size)


# --- merging and checking


def merge_imatrices(parts: Sequence[Imatrix]) -> Imatrix:
    """Add up matrices of one model made from different texts, as llama-imatrix does with `--in-file`.

    Args:
        parts: at least one; the first gives the tokens per chunk. Where one part has a count per expert
            and another a single one, the single one counts for each expert.

    Raises:
        ImatrixRefused: two of them are not of the same model.
    """
    sums: dict[str, Sums] = {}
    counts: dict[str, Counts] = {}
    for number, part in enumerate(parts, 1):
        for name, entry in part.entries.items():
            mine, own = sums.get(name), counts.get(name)
            if mine is None or own is None:
                sums[name], counts[name] = entry.sums.copy(), entry.counts.copy()
                continue
            if len(mine) != len(entry.sums) or len({len(own), len(entry.counts)} - {1}) > 1:
                raise ImatrixRefused(
                    f"Importance matrix {number} of {len(parts)} is of another model than those before: {name} has "
                    f"{len(entry.sums)} sums and {len(entry.counts)} counts, not {len(mine)} and {len(own)}.")
            mine += entry.sums
            counts[name] = own + entry.counts
    entries = {name: Entry(sums[name], counts[name]) for name in sums}
    size = parts[0].chunk_size
    most = max(int(count.max()) for count in counts.values())
    return Imatrix(entries, tuple(name for part in parts for name in part.datasets), most // max(1, size), size)


def check_fits(imatrix: Imatrix, tensors: Iterable[TensorInfo], what: str, model: str) -> None:
    """Make sure that imatrix is of the model with these tensors.

    Args:
        imatrix: to be used for the model.
        tensors: all of the model.
        what: names the matrix in the message.
        model: names the model.

    Raises:
        ImatrixRefused: it has a matrix that the model has not, or of another width or number of experts.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for name, entry in imatrix.entries.items():
        shape = shapes.get(name)
        if shape is None:
            raise ImatrixRefused(f"{what} is of another model: it has {name}, and {model} has not.")
        matrices = int(np.prod(shape[2:], dtype=np.int64))
        if len(entry.sums) != shape[0] * matrices or len(entry.counts) not in {1, matrices}:
            raise ImatrixRefused(
                f"{what} is of another model: its {name} has {len(entry.sums)} sums and {len(entry.counts)} counts, "
                f"which do not fit the {shape[0]} columns of {matrices} matrices in {model}.")
