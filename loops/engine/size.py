"""The exact size of a quantized file, computed before it is written."""

from __future__ import annotations

from collections.abc import Mapping

from loops.engine.gguf_check import CheckedModel
from loops.engine.gguf_format import tensor_types

#: metadata that quantizing sets or removes, each with the bytes of its value
_SET_KEYS = {"general.quantization_version": 4, "general.file_type": 4}
_DROPPED_KEYS = ("split.no", "split.count", "split.tensors.count")


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def file_size(model: CheckedModel, types: Mapping[str, str]) -> int:
    """Return the exact size of model written as one GGUF with the given tensor types.

    The layout is that of gguf.cpp: 24 bytes of header, the metadata, one record per tensor,
    then every tensor padded to 32 bytes.
    """
    sizes = {name: (block, block_bytes) for name, block, block_bytes in tensor_types().values()}
    alignment = 32  # llama.cpp writes with the default, whatever the original has
    first = model.headers[0]
    meta = 24 + first.metadata_n_bytes
    for key, value_bytes in _SET_KEYS.items():
        if key not in first.metadata:
            meta += 8 + len(key) + 4 + value_bytes
    for key in _DROPPED_KEYS:
        if key in first.metadata:
            meta -= 8 + len(key) + 4 + (4 if key.endswith("tensors.count") else 2)
    data = 0
    for tensor in model.tensors:
        meta += 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8
        block, block_bytes = sizes[types[tensor.name]]
        data += _padded(tensor.n_elements // block * block_bytes, alignment)
    return _padded(meta, alignment) + data
