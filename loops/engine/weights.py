"""What a quantization type makes of weights, tried in the memory of a loaded model: no file is written.

The values come out of the same functions that llama-quantize calls (`ggml_quantize_chunk`, and `to_float` of the
type), given the same importance, so they are those that the quantized file would hold, rounded once more to the
type of the original. What is left out is that the engine also rounds the activations that meet a quantized matrix.

The engine is loaded without a memory map, because a map of the file cannot be written to: the model's size in
memory. Rows are read from the file again whenever they are needed, a few megabytes at a time, so that no second
copy of the model is held.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loops.engine.gguf_check import CheckedModel
from loops.engine.gguf_format import tensor_types
from loops.engine.gguf_header import TensorInfo
from loops.engine.imatrix_file import Imatrix
from loops.engine.levels import UNQUANTIZED, level_named
from loops.engine.model import ContextSpec, Model, NotFinite, load_model, open_context
from loops.engine.native import EngineFailed
from loops.engine.options import EngineOptions
from loops.engine.quantize import NEEDING_IMATRIX, QuantizeSpec, forecast, refuse_quantized
from loops.engine.tensors import Tensor, declare, ggml

Rows = NDArray[np.float32]

SLAB_WEIGHTS = 1 << 18  #: quantized at once by one thread
SAMPLE_WEIGHTS = 1 << 15  #: of a matrix whose error is estimated; 128 rows of 256 gave the whole's error to 2 %
#: what ggml itself refuses to make without an importance (ggml_quantize_requires_imatrix), whatever the tensor
_NEVER_PLAIN = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})
_EXEMPT = ("token_embd.weight", "output.weight")  # may be of a type that needs an importance without having one


class NothingToQuantize(EngineFailed):
    """The model has no matrix that could be quantized."""


class Choice(NamedTuple):
    """How to store one matrix.

    Attributes:
        ggml_type: of the stored tensor, `Q4_K`.
        weighted: quantize it with its importance; without, all columns count alike.
    """

    ggml_type: str
    weighted: bool


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p))


@dataclass(frozen=True)
class _Functions:
    """The functions of ggml that rounding takes."""

    quantize: Any
    traits: Any
    write: Any


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def _functions() -> _Functions:
    pointer, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    return _Functions(
        quantize=declare("ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, i64, i64, i64, pointer),
        traits=declare("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int),
        write=declare("ggml_backend_tensor_set", None, pointer, pointer, size, size))


@functools.cache
def type_sizes() -> Mapping[str, tuple[int, int, int]]:
    """By name of a tensor type: its number, weights per block and bytes per block."""
    return {name: (number, block, n_bytes) for number, (name, block, n_bytes) in tensor_types().items()}


@functools.cache
def _to_float(ggml_type: str) -> Any:
    number, block, n_bytes = type_sizes()[ggml_type]
    traits = _functions().traits(number).contents
    if (traits.type_name.decode().upper(), traits.blck_size, traits.type_size) != (ggml_type.upper(), block, n_bytes):
        raise EngineFailed("The engine describes its tensor types in another way than Nightpress knows: install the "
                           "version of llama-cpp-python that Nightpress asks for.")
    return _ToFloat(traits.to_float)


def rounded(rows: Rows, ggml_type: str, importance: Rows | None) -> Rows:
    """Return what is left of rows when they are stored as ggml_type.

    Args:
        rows: float32 of shape (n, columns), contiguous; the type's block divides the columns.
        ggml_type: a type that the engine can write, `Q4_K`.
        importance: of each column, shape (columns,), or None.
    """
    number, block, n_bytes = type_sizes()[ggml_type]
    columns = rows.shape[1]
    stored = np.empty(rows.size // block * n_bytes, dtype=np.uint8)
    result = np.empty_like(rows)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    _functions().quantize(number, rows.ctypes.data, stored.ctypes.data, 0, len(rows), columns,
                          None if weights is None else weights.ctypes.data)
    _to_float(ggml_type)(stored.ctypes.data, result.ctypes.data, rows.size)
    return result


def _decoded(raw: NDArray[Any], ggml_type: str) -> Rows:
    """Return stored F32, F16 or BF16 values (as their bits) as float32."""
    if ggml_type == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(raw, dtype=np.float32)


def _encoded(rows: Rows, ggml_type: str) -> NDArray[Any]:
    """Return float32 rows as ggml_type stores them, rounded to nearest even."""
    if ggml_type == "F32":
        return rows
    if ggml_type == "F16":
        return rows.astype(np.float16)
    bits = rows.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Matrices:
    """The matrices of a checked original that quantizing changes, read from its files."""

    def __init__(self, checked: CheckedModel, options: EngineOptions, imatrix: Imatrix | None) -> None:
        """Find the matrices.

        Raises:
            AlreadyQuantized: the model is no F32, F16 or BF16 original.
            NothingToQuantize: there are none.
        """
        refuse_quantized(checked, allow=False)
        self.checked, self.options = checked, options
        made = forecast(QuantizeSpec(checked, level_named("Q8_0"), options)).tensor_types
        self.tensors: dict[str, TensorInfo] = {
            tensor.name: tensor for tensor in checked.tensors
            if made[tensor.name] != tensor.ggml_type and tensor.ggml_type in _STORED}
        if not self.tensors:
            raise NothingToQuantize(f"{checked.path.name} has no matrix that could be quantized.")
        self._places = {tensor.name: (header.path, header.data_offset + tensor.offset)
                        for header in checked.headers for tensor in header.tensors}
        self.importance: dict[str, Rows] = {} if imatrix is None else {
            name: entry.weights() for name, entry in imatrix.entries.items() if name in self.tensors}

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return matrices stacked in a tensor, rows of each, and columns."""
        shape = (*self.tensors[name].shape, 1, 1, 1)
        return shape[2] * shape[3], shape[1], shape[0]

    def _stored(self, name: str) -> NDArray[Any]:
        path, offset = self._places[name]
        stacked, rows, columns = self.shape(name)
        return np.memmap(path, dtype=_STORED[self.tensors[name].ggml_type], mode="r", offset=offset,
                         shape=(stacked * rows, columns))

    def columns_weight(self, name: str, number: int) -> Rows | None:
        """Return the importance of the columns of one of the matrices stacked in a tensor, None where unknown."""
        known = self.importance.get(name)
        return None if known is None else known.reshape(-1, self.shape(name)[2])[number]

    def choices(self, name: str, types: tuple[str, ...]) -> list[Choice]:
        """Return how a matrix may be stored: the types that fit its rows, with its importance and without."""
        found, known = [], name in self.importance
        for ggml_type in types:
            if self.shape(name)[2] % type_sizes()[ggml_type][1]:
                continue
            if ggml_type in UNQUANTIZED:
                found.append(Choice(ggml_type, False))
                continue
            if known:
                found.append(Choice(ggml_type, True))
            if ggml_type not in (_NEVER_PLAIN if name in _EXEMPT else NEEDING_IMATRIX):
                found.append(Choice(ggml_type, False))
        return found

    def n_bytes(self, name: str, ggml_type: str) -> int:
        """Return what a matrix takes in a file, padding included."""
        _, block, n_bytes = type_sizes()[ggml_type]
        return -(-self.tensors[name].n_elements // block * n_bytes // 32) * 32

    def check(self, name: str) -> None:
        """Make sure that every weight is a finite number.

        Raises:
            NotFinite: naming the matrix.
        """
        stored = self._stored(name)
        step = max(1, SLAB_WEIGHTS // stored.shape[1])
        for start in range(0, len(stored), step):
            if not np.isfinite(_decoded(stored[start:start + step], self.tensors[name].ggml_type)).all():
                raise NotFinite(f"{self.checked.path.name} is damaged: {name} holds values that are not finite. "
                                "Convert or download it again.")

    def errors(self, name: str, choices: list[Choice]) -> dict[Choice, float]:
        """Return the importance-weighted error of each choice: sum w (x - q)^2 / sum w x^2.

        w is the importance of the column, 1 where it is not known; large matrices are judged by rows taken
        at equal distances, the same on every call.
        """
        stored = self._stored(name)
        stacked, rows, columns = self.shape(name)
        wanted = np.unique(np.linspace(0, len(stored) - 1, max(4, SAMPLE_WEIGHTS // columns)).round().astype(np.int64))
        lost, whole = dict.fromkeys(choices, 0.0), 0.0
        for number in range(stacked):
            mine = wanted[wanted // rows == number]
            if not len(mine):
                continue
            values = _decoded(stored[mine], self.tensors[name].ggml_type)
            weight = self.columns_weight(name, number)
            factor = np.ones(columns, dtype=np.float32) if weight is None else weight
            whole += float((values * values * factor).sum(dtype=np.float64))
            for choice in choices:
                if choice.ggml_type == self.tensors[name].ggml_type:
                    continue
                gap = rounded(values, choice.ggml_type, weight if choice.weighted else None) - values
                lost[choice] += float((gap * gap * factor).sum(dtype=np.float64))
        return {choice: value / whole if whole else 0.0 for choice, value in lost.items()}

    def slabs(self, name: str, choice: Choice | None) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield a matrix as the original stores it, rounded as chosen, with the byte at which each part begins."""
        stored, kind = self._stored(name), self.tensors[name].ggml_type
        stacked, rows, columns = self.shape(name)
        step = max(1, SLAB_WEIGHTS // columns)
        parts = [(number, number * rows + first, number * rows + min(first + step, rows))
                 for number in range(stacked) for first in range(0, rows, step)]

        def make(part: tuple[int, int, int]) -> tuple[int, NDArray[Any]]:
            number, first, last = part
            raw = np.ascontiguousarray(stored[first:last])
            if choice is not None and choice.ggml_type != kind:
                weight = self.columns_weight(name, number) if choice.weighted else None
                raw = _encoded(rounded(_decoded(raw, kind), choice.ggml_type, weight), kind)
            return first * columns * stored.itemsize, raw

        with ThreadPoolExecutor(self.options.thread_count) as pool:
            yield from pool.map(make, parts)


class Weights:
    """A model in memory whose matrices can be rounded and restored. Use `open_weights`."""

    def __init__(self, matrices: Matrices, model: Model, places: Mapping[str, frozenset[int]]) -> None:
        self.matrices, self.model, self.places = matrices, model, places
        self._state: dict[str, Choice] = {}

    def become(self, state: Mapping[str, Choice]) -> None:
        """Let the model have these matrices rounded as chosen, and all others as in the original."""
        for name in sorted(self._state.keys() | state.keys()):
            if name in self.places and self._state.get(name) != state.get(name):
                for offset, raw in self.matrices.slabs(name, state.get(name)):
                    for place in self.places[name]:
                        _functions().write(place, raw.ctypes.data, offset, raw.nbytes)
        self._state = dict(state)


class _Finder:
    """Takes down where the weights lie that the nodes of the engine's graph read."""

    def __init__(self, names: set[str]) -> None:
        self.places: dict[str, set[int]] = {name: set() for name in names}

    def observe(self, address: int, ask: bool, _user_data: object) -> bool:
        """Look at a node before it is computed; never ask for the result."""
        if ask:
            for source in Tensor.from_address(address).src[:2]:
                name = Tensor.from_address(source).name.decode(errors="replace") if source else ""
                if source and name in self.places:
                    self.places[name].add(source)
        return not ask


def _find(model: Model, names: set[str]) -> dict[str, frozenset[int]]:
    ggml()  # the layout is checked before it is relied on
    finder, length = _Finder(names), 32
    with open_context(model, ContextSpec(1, length, shared=False), finder.observe) as context:
        context.decode(np.zeros(length, dtype=np.int32), range(length), [(0,)] * length, [True] * length)
    return {name: frozenset(places) for name, places in finder.places.items() if places}


@contextmanager
def open_weights(matrices: Matrices) -> Iterator[Weights]:
    """Load the original so that its matrices can be rounded in memory, and free it afterwards.

    Raises:
        ModelNotLoaded: with the library's reason.
    """
    # extra buffers would hold the weights in another order
    options = replace(matrices.options, extra_buffers=False)
    with load_model(matrices.checked.path, options, mapped=False) as model:
        yield Weights(matrices, model, _find(model, set(matrices.tensors)))
