"""Read the header of a GGUF file in pure Python: bounded in time, in memory and in bytes.

Everything in the file is taken for a lie until it is checked against the bytes that are left. Nothing
is allocated by a count or a length that the file claims, large arrays are stepped over and only
summarised, and the file is read through a small window instead of a map, because a file that is
truncated while it is mapped kills its reader with SIGBUS.

What a sound file looks like follows `ggml/src/gguf.cpp` of llama.cpp. Whether the metadata makes sense
is not judged here but in `loops.engine.gguf_rules`.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from loops.engine.gguf_header import (
    ArraySummary,
    GgufHeader,
    ModelMissing,
    ModelUnreadable,
    NotAFile,
    NotGguf,
    TensorInfo,
    refusal,
    truncation,
)

MAX_HEADER_BYTES = 128 << 20  # the largest known vocabulary with its merges takes about 20 MiB
MAX_ENTRIES = 65_536  # metadata keys, and tensors; the largest known models have a few thousand
MAX_STRINGS = 1 << 21  # over all string arrays of a file; walking them is what takes time
MAX_KEPT_TEXT = 1 << 20  # bytes of one text kept as a Python string; a longer one is only summarised
MAX_KEPT_TEXT_IN_ALL = 4 << 20
MAX_KEPT_ITEMS = 64  # arrays up to this length are kept as tuples
MAX_KEY_BYTES = 65_535  # GGUF specification
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_DIMS = 4  # GGML_MAX_DIMS
_INT64_MAX = 2**63 - 1
_WINDOW_BYTES = 256 << 10
_MIN_KEY_RECORD = 13  # key length, one character, value type; the value adds at least one byte
_MIN_TENSOR_RECORD = 33  # name length, one character, number of dimensions, one dimension, type, offset

#: the value types in the order of their numbers, and how the scalars among them are packed
_CODES = {"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f",
          "BOOL": "?", "STRING": "", "ARRAY": "", "UINT64": "Q", "INT64": "q", "FLOAT64": "d"}
_VALUE_TYPES = tuple(_CODES)
_SCALARS = {name: struct.Struct("<" + code) for name, code in _CODES.items() if code}
_U32, _U64 = _SCALARS["UINT32"], _SCALARS["UINT64"]

#: types that the pinned engine writes and the newest `gguf` package does not know yet; a test
#: compares the whole table with the engine's own
_NEWER_THAN_GGUF = {42: ("Q2_0", 64, 18)}


@lru_cache(maxsize=1)
def tensor_types() -> Mapping[int, tuple[str, int, int]]:
    """By number in the file: name, weights per block and bytes per block of each tensor type.

    The table is that of the `gguf` package, so a newer package knows newer types. Its import is
    put off to the first use because it pulls in numpy. Q8_1 and Q8_K are left out: they only exist
    in memory, for activations.
    """
    from gguf.constants import GGML_QUANT_SIZES

    return MappingProxyType(_NEWER_THAN_GGUF | {int(kind): (str(kind.name), int(block), int(size))
                             for kind, (block, size) in GGML_QUANT_SIZES.items()
                             if kind.name not in {"Q8_1", "Q8_K"}})


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield a descriptor of the regular file at `path`; never blocks on a FIFO or a device.

    Raises:
        ModelMissing: there is nothing.
        NotAFile: it is something else.
        ModelUnreadable: the system refuses to read it.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            what = next((word for test, word in _KINDS if test(kind)), "something else")
            raise NotAFile(f"{path} is {what}, not a file; give the path of a .gguf file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the path
        raise ModelMissing(f"There is no file {str(path)!r}; check the spelling") from None
    except PermissionError:
        raise ModelUnreadable(f"{path} cannot be read: permission denied; "
                              "make it readable for the user who runs Nightpress") from None
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror}") from None
    try:
        yield descriptor
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


class Window:
    """Forward reading through a file, a quarter of a MiB at a time, never past its end or the limit."""

    def __init__(self, descriptor: int, path: Path, position: int = 0) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self.seek(position)

    @property
    def position(self) -> int:
        """Where the next byte comes from."""
        return self._start + self._offset

    @property
    def left(self) -> int:
        """Bytes between here and the end of the file."""
        return self.size - self.position

    def _fill(self, n_bytes: int, what: str) -> None:
        """Make the next `n_bytes` available in the window."""
        self._start, self._offset = self.position, 0
        if self._start > MAX_HEADER_BYTES:
            raise refusal(self.path, f"its metadata is longer than {MAX_HEADER_BYTES >> 20} MiB")
        self._bytes = os.pread(self._descriptor, max(_WINDOW_BYTES, n_bytes), self._start)
        if len(self._bytes) < n_bytes:
            raise truncation(self.path, f"it ends inside {what}, at byte {self.size}")

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next `n_bytes`, which the caller has bounded; `what` names them in the refusal."""
        if self._offset + n_bytes > len(self._bytes):
            self._fill(n_bytes, what)
        self._offset += n_bytes
        return self._bytes[self._offset - n_bytes:self._offset]

    def number(self, kind: struct.Struct, what: str) -> int:
        """The next integer."""
        return int(kind.unpack(self.take(kind.size, what))[0])

    def skip(self, n_bytes: int, what: str) -> None:
        """Step over `n_bytes`."""
        if n_bytes > self.left:
            raise refusal(self.path, f"{what} claims {n_bytes} bytes, but only {self.left} are left")
        self._offset += n_bytes

    def seek(self, position: int) -> None:
        """Go to `position`, where reading starts or has been before."""
        self._start, self._offset, self._bytes = position, 0, b""

    def text_length(self, limit: int, what: str) -> int:
        """The length before a string, checked against `limit` and the bytes left."""
        length = self.number(_U64, what)
        if length > self.left:
            raise refusal(self.path, f"{what} claims {length} bytes, but only {self.left} are left")
        if length > limit:
            raise refusal(self.path, f"{what} is {length} bytes long; {limit} are allowed")
        return length

    def identifier(self, limit: int, what: str) -> str:
        """A key or a tensor name: not empty, UTF-8, no control characters (C would stop at a NUL)."""
        raw = self.take(self.text_length(limit, what), what)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise refusal(self.path, f"{what} is not UTF-8: {raw[:64]!r}") from None
        if not text:
            raise refusal(self.path, f"{what} is empty")
        if not text.isprintable():
            raise refusal(self.path, f"{what} is not printable: {text[:64]!a}")
        return text

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. Written as one loop over the window because it has to be fast."""
        unpack, window, offset = _U64.unpack_from, self._bytes, self._offset
        for index in range(count):
            if offset + 8 > len(window):
                self._offset = offset
                self._fill(8, what)
                window, offset = self._bytes, 0
            offset += 8 + unpack(window, offset)[0]
            if offset > len(window) and self._start + offset > self.size:
                raise refusal(self.path, f"string {index} of {what} reaches past the end of the file")
        self._offset = offset

    def strings(self, count: int, limit: int, what: str) -> Iterator[bytes]:
        """The next `count` strings, each at most `limit` bytes long."""
        unpack = _U64.unpack_from
        for _ in range(count):
            window, offset = self._bytes, self._offset
            if offset + 8 <= len(window):  # the quick way, where the string lies within the window
                end = offset + 8 + unpack(window, offset)[0]
                if end <= len(window) and end - offset <= limit:
                    self._offset = end
                    yield window[offset + 8:end]
                    continue
            yield self.take(self.text_length(limit, what), what)


class _Kept:
    """How much text and how many strings a file has used up of what it may."""

    def __init__(self) -> None:
        self.text_bytes = 0
        self.strings = 0

    def keeps(self, n_bytes: int) -> bool:
        if n_bytes > MAX_KEPT_TEXT or self.text_bytes + n_bytes > MAX_KEPT_TEXT_IN_ALL:
            return False
        self.text_bytes += n_bytes
        return True


def _read_array(window: Window, kept: _Kept, key: str) -> tuple[str, object]:
    kind = _value_type(window, key)
    if kind == "ARRAY":
        raise refusal(window.path, f"{key} is an array of arrays")
    what = f"the array {key}"
    length = window.number(_U64, what)
    item_bytes = 8 if kind == "STRING" else _SCALARS[kind].size
    if length > window.left // item_bytes:
        raise refusal(window.path, f"{what} claims {length} items of type {kind}, "
                                   f"but only {window.left} bytes are left")
    start = window.position
    if kind == "STRING":
        kept.strings += length
        if kept.strings > MAX_STRINGS:
            raise refusal(window.path, f"up to {what} it has {kept.strings} strings; {MAX_STRINGS} may be")
        window.skip_strings(length, what)
        end = window.position
        if length <= MAX_KEPT_ITEMS and end <= window.size and kept.keeps(end - start):
            window.seek(start)
            texts = window.strings(length, MAX_KEPT_TEXT, what)
            return f"ARRAY[{kind}]", tuple(text.decode(errors="replace") for text in texts)
    elif length <= MAX_KEPT_ITEMS:
        return f"ARRAY[{kind}]", struct.unpack(f"<{length}{_CODES[kind]}", window.take(length * item_bytes, what))
    else:
        window.skip(length * item_bytes, what)
    return f"ARRAY[{kind}]", ArraySummary(kind, length, start, window.position - start)


def _value_type(window: Window, key: str) -> str:
    number = window.number(_U32, f"the type of {key}")
    if number >= len(_VALUE_TYPES):
        raise refusal(window.path, f"{key} has the unknown value type {number}")
    return _VALUE_TYPES[number]


def _read_value(window: Window, kept: _Kept, key: str) -> tuple[str, object]:
    kind = _value_type(window, key)
    if kind == "ARRAY":
        return _read_array(window, kept, key)
    if kind == "STRING":
        length = window.text_length(MAX_HEADER_BYTES, key)
        if kept.keeps(length):
            return kind, window.take(length, key).decode(errors="replace")
        start = window.position
        window.skip(length, key)
        return kind, ArraySummary("UINT8", length, start, length)
    return kind, _SCALARS[kind].unpack(window.take(_SCALARS[kind].size, key))[0]


def _read_tensor(window: Window, index: int) -> TensorInfo:
    name = window.identifier(MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}")
    what = f"tensor {name}"
    n_dims = window.number(_U32, what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise refusal(window.path, f"{what} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = struct.unpack(f"<{n_dims}Q", window.take(8 * n_dims, what))
    if min(shape) < 1 or math.prod(shape) > _INT64_MAX:
        raise refusal(window.path, f"{what} has the impossible shape {list(shape)}")
    number = window.number(_U32, what)
    if (known := tensor_types().get(number)) is None:
        raise refusal(window.path, f"{what} has type {number}, unknown to the installed gguf package")
    ggml_type, block, block_bytes = known
    if shape[0] % block:
        raise refusal(window.path, f"{what} has rows of {shape[0]} weights, "
                                   f"which the {block} of a {ggml_type} block do not divide")
    n_bytes = math.prod(shape) // block * block_bytes
    if n_bytes > _INT64_MAX:
        raise refusal(window.path, f"{what} of shape {list(shape)} takes {n_bytes} bytes")
    return TensorInfo(name, ggml_type, shape, window.number(_U64, what), n_bytes)


_LOOKS_LIKE: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"ggjt", b"tjgg", b"lmgg", b"fmgg"), "an old GGML file; convert the original model again"),
    ((b"FUGG",), "a GGUF with its magic reversed, for a big-endian machine; convert it for this one"),
    ((b"PK\x03\x04",), "a zip archive, perhaps a PyTorch checkpoint (.bin, .pt); convert it to GGUF first"),
    ((b"\x80\x02", b"\x80\x04"), "a Python pickle, perhaps a PyTorch checkpoint; convert it to GGUF first"),
    ((b"\x1f\x8b",), "a gzip archive; unpack it first"),
    ((b"version https://git-lfs",), "a Git LFS pointer, not the model; run `git lfs pull`"),
    ((b"<!DOCTYPE", b"<html"), "a web page, not the model; check the download"),
    ((b"\0\0\0\0",), "an interrupted quantization: the header, which is written last, is zero; make it again"),
)


def _check_magic(path: Path, start: bytes) -> None:
    """Refuse what does not start as a GGUF, and say what it looks like."""
    if start.startswith(b"GGUF"):
        return
    guess = next((f"looks like {what}" for magics, what in _LOOKS_LIKE if start.startswith(magics)),
                 f"starts with {start[:4]!r} instead of 'GGUF'" if start else "is empty")
    # safetensors: the length of a JSON header as a 64-bit number, then the header
    if start[8:9] == b"{" and _U64.unpack_from(start)[0] < MAX_HEADER_BYTES:
        guess = "looks like a safetensors file; convert the model's folder to GGUF first"
    raise NotGguf(f"{path} is not a GGUF: it {guess}")


def _read_counts(window: Window) -> tuple[int, int, int]:
    version = window.number(_U32, "the header")
    if version & 0xFFFF == 0:
        raise refusal(window.path, "it is for a big-endian machine; convert it for this one")
    if version not in {2, 3}:
        raise refusal(window.path, f"it has GGUF version {version}; versions 2 and 3 can be read")
    n_tensors = window.number(_U64, "the header")
    n_keys = window.number(_U64, "the header")
    claims = (("tensors", n_tensors, _MIN_TENSOR_RECORD), ("keys", n_keys, _MIN_KEY_RECORD))
    for what, count, record in claims:
        if count > window.left // record:
            raise refusal(window.path, f"it claims {count} {what}, but only {window.left} bytes are left")
        if count > MAX_ENTRIES:
            raise refusal(window.path, f"it claims {count} {what}; {MAX_ENTRIES} are allowed")
    return version, n_tensors, n_keys


def _check_layout(path: Path, tensors: tuple[TensorInfo, ...], alignment: int, data_bytes: int) -> None:
    """The tensors must follow each other, padded to the alignment, and end within the file."""
    expected = end = 0
    for tensor in tensors:
        if tensor.offset != expected:
            raise refusal(path, f"tensor {tensor.name} has offset {tensor.offset}; "
                                f"the tensors before it end at {expected}")
        end = expected + tensor.n_bytes
        expected = end + -end % alignment
        if expected > _INT64_MAX:
            raise refusal(path, f"the tensors up to {tensor.name} take {expected} bytes")
    if end > data_bytes:
        raise truncation(path, f"it is shorter than its tensors: {end - data_bytes} bytes are missing")


def read_header(path: Path) -> GgufHeader:
    """Read and bound everything before the weights.

    Raises:
        ModelMissing: there is no such file.
        NotAFile: it is a folder, a pipe or a device.
        ModelUnreadable: the system refuses to read it.
        NotGguf: it does not start with GGUF.
        GgufRefused: it is malformed; GgufTruncated where its end is missing.
    """
    with open_regular(path) as descriptor:
        _check_magic(path, os.pread(descriptor, 32, 0))
        window = Window(descriptor, path)
        window.take(4, "the header")
        version, n_tensors, n_keys = _read_counts(window)

        metadata_start, kept = window.position, _Kept()
        metadata: dict[str, object] = {}
        value_types: dict[str, str] = {}
        for index in range(n_keys):
            key = window.identifier(MAX_KEY_BYTES, f"the name of key {index}")
            if key in metadata:
                raise refusal(path, f"the key {key} occurs twice")
            value_types[key], metadata[key] = _read_value(window, kept, key)
        metadata_n_bytes = window.position - metadata_start

        alignment = metadata.get("general.alignment", 32)
        if value_types.get("general.alignment", "UINT32") != "UINT32" or not isinstance(alignment, int):
            raise refusal(path, f"general.alignment is {value_types['general.alignment']}, not UINT32")
        if not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise refusal(path, f"general.alignment is {alignment}, not a power of two from 8 to 2^20")

        named: dict[str, TensorInfo] = {}
        for index in range(n_tensors):
            tensor = _read_tensor(window, index)
            if tensor.name in named:
                raise refusal(path, f"the tensor {tensor.name} occurs twice")
            named[tensor.name] = tensor
        tensors = tuple(named.values())
        data_offset = window.position + -window.position % alignment
        if window.position > window.size:
            raise truncation(path, f"it ends inside its metadata, at byte {window.size}")
        if tensors:
            _check_layout(path, tensors, alignment, window.size - data_offset)
        architecture = metadata.get("general.architecture", "")
        if not isinstance(architecture, str):
            raise refusal(path, f"general.architecture is {value_types['general.architecture']}, not STRING")
        return GgufHeader(path, version, alignment, architecture, MappingProxyType(metadata),
                          MappingProxyType(value_types), metadata_n_bytes, tensors, data_offset, window.size)
