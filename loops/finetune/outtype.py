"""Which type a conversion keeps the weights in: `auto` loses nothing, and what another loses is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from loops.finetune.converter import ConversionFailed
from loops.finetune.model_folder import ModelFolder, Stored, read_safetensors

#: of a ggml type the type by safetensors' name
_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_SLICE = 1 << 22  #: weights looked at at once
HALF_LIMIT = 65520.0  #: from here on a number becomes infinite in F16 (IEEE 754 binary16: 65504 is the largest)


def choose(model: ModelFolder, wanted: str, progress: Callable[[float, float], None]) -> tuple[str, tuple[str, ...]]:
    """Return the type to convert to, and notes on what that costs.

    Matrices that are stored in 32 bits are looked through: many hold numbers of 16 bits alone.

    Args:
        model: without pickles.
        wanted: f16, bf16, f32 or auto: the smallest type that holds every weight of the matrices exactly.
        progress: told how many weights of how many were looked at.

    Raises:
        ConversionFailed: a weight is too large for F16, which would make it infinite.
    """
    stored = {tensor.dtype for file in model.safetensors for tensor in read_safetensors(file).values()
              if len(tensor.shape) > 1}
    if wanted == "auto":
        if not stored <= set(_NAMES.values()):
            return wanted, ()  # packed or of 8 bits: llama.cpp knows what to make of it
        fitting = [name for name in ("bf16", "f16") if stored <= {_NAMES[name], "F32"}]
        if "F32" in stored:
            fitting = _holding(model, fitting, progress)
        return (fitting[0] if fitting else "f32"), ()
    if wanted != "f16" or stored <= {"F16"}:
        return wanted, ()
    changed = total = 0
    for name, tensor, values in _values(model, progress):
        if np.abs(values).max(initial=0.0) >= HALF_LIMIT:
            raise ConversionFailed(f"{name} holds {float(np.abs(values).max()):.6g}, and F16 ends at 65,504; convert "
                                   "to bf16 or f32.")
        if tensor.dtype == "BF16":
            with np.errstate(under="ignore"):
                changed += int((values.astype(np.float16).astype(np.float32) != values).sum())
        total += len(values)
    if not changed:
        return wanted, ()
    note = (f"{changed:,} of {total:,} weights ({100 * changed / total:.2g} %) are too small for F16 to hold exactly; "
            "BF16 keeps them as they are.")
    return wanted, (note,)


def _holding(model: ModelFolder, types: list[str], progress: Callable[[float, float], None]) -> list[str]:
    """Return those types that hold every matrix stored in 32 bits exactly."""
    left = list(types)
    for _name, tensor, values in _values(model, progress):
        if tensor.dtype != "F32":
            continue
        if "bf16" in left and (values.view(np.uint32) & 0xFFFF).any():
            left.remove("bf16")
        if "f16" in left:
            with np.errstate(over="ignore", under="ignore"):
                if (values.astype(np.float16).astype(np.float32) != values).any():
                    left.remove("f16")
        if not left:
            break
    return left


def _values(model: ModelFolder, progress: Callable[[float, float], None]) -> Iterator[tuple[str, Stored, Any]]:
    """Yield the weights of every matrix in pieces, in 32 bits, with name and place of the tensor."""
    done, total = 0, model.parameters
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    for file in model.safetensors:
        for name, tensor in read_safetensors(file).items():
            n_weights = math.prod(tensor.shape)
            done += n_weights
            if len(tensor.shape) < 2 or tensor.dtype not in widths:
                continue
            for start in range(0, n_weights, _SLICE):
                count = min(_SLICE, n_weights - start)
                kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.dtype]
                raw = np.fromfile(file, kind, count, offset=tensor.start + start * widths[tensor.dtype])
                values = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw.astype(
                    np.float32, copy=False)
                yield name, tensor, values
            progress(done, total)
