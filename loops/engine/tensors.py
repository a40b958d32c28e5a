"""The engine's own tensors, read where they lie.

`struct ggml_tensor` is no part of llama.h, so its layout is declared here and checked against the library's own
answers before it is trusted.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from loops.engine.native import EngineFailed, library

F32 = 0  #: number of the tensor type
_SOURCES = 10  # GGML_MAX_SRC


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8))


class _InitParameters(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Ggml:
    """The functions of ggml that reading a tensor takes, and the numbers of two operations."""

    is_host: Any
    read: Any
    n_bytes: Any
    mul_mat: int
    mul_mat_id: int


def declare(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of the library that llama.h does not have, by its result and its arguments."""
    function = getattr(library().llama_cpp._lib, name)  # the library that llama.h's functions are taken from
    function.restype, function.argtypes = result, list(arguments)
    return function


@functools.cache
def ggml() -> Ggml:
    """Return ggml's functions, once two multiplications made by the library look as declared above.

    Raises:
        EngineFailed: the engine lays its tensors out otherwise.
    """
    pointer, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    op_name = declare("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    init, free = declare("ggml_init", pointer, _InitParameters), declare("ggml_free", None, pointer)
    new = declare("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, i64, i64, i64)
    set_name = declare("ggml_set_name", pointer, pointer, ctypes.c_char_p)
    multiply = declare("ggml_mul_mat", pointer, pointer, pointer, pointer)
    get_data = declare("ggml_get_data", pointer, pointer)
    overhead = int(declare("ggml_tensor_overhead", size)())
    context = init(_InitParameters(1 << 20, None, False))
    if not context:
        raise EngineFailed("The engine has no memory for a tensor.")
    try:
        weights, rows = new(context, F32, 24, 5, 1), new(context, F32, 24, 7, 3)
        set_name(weights, b"blk.0.layout.weight")
        product = multiply(context, weights, rows)
        made, given, fed = (Tensor.from_address(address) for address in (product, weights, rows))
        numbers = {op_name(number): number for number in range(made.op + 2)}
        seen = (given.name, given.type, given.data, tuple(fed.ne), tuple(fed.nb), tuple(made.src[:3]), made.view_src,
                op_name(made.op), op_name(made.op + 1), tuple(made.ne))
        expected = (b"blk.0.layout.weight", F32, get_data(weights), (24, 7, 3, 1), (4, 96, 672, 2016),
                    (weights, rows, None), None, b"MUL_MAT", b"MUL_MAT_ID", (5, 7, 3, 1))
        # an object of ggml's memory pool takes 32 bytes more than the tensor in it
        if seen != expected or overhead - 32 != ctypes.sizeof(Tensor):
            raise EngineFailed("The engine lays its tensors out in another way than Nightpress knows: install the "
                               "version of llama-cpp-python that Nightpress asks for.")
    finally:
        free(context)
    return Ggml(
        is_host=declare("ggml_backend_buffer_is_host", ctypes.c_bool, pointer),
        read=declare("ggml_backend_tensor_get", None, pointer, pointer, size, size),
        n_bytes=declare("ggml_nbytes", size, pointer),
        mul_mat=numbers[b"MUL_MAT"], mul_mat_id=numbers[b"MUL_MAT_ID"])


def values(address: int, kind: type[np.generic]) -> NDArray[Any]:
    """Return a tensor of 4-byte numbers, with ggml's shape reversed: where it lies, or copied from another device."""
    functions, tensor = ggml(), Tensor.from_address(address)
    length = int(functions.n_bytes(address))
    if not functions.is_host(tensor.buffer):
        raw = ctypes.create_string_buffer(length)
        functions.read(address, raw, 0, length)
    else:
        raw = (ctypes.c_char * length).from_address(tensor.data)
    flat = np.frombuffer(memoryview(raw), dtype=kind)
    return as_strided(flat, shape=tensor.ne[::-1], strides=tensor.nb[::-1], writeable=False)
