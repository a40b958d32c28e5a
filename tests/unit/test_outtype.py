"""`--outtype auto` keeps what is exact, and F16 is refused where it would make weights infinite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loops.finetune.converter import ConversionFailed
from loops.finetune.model_folder import ModelFolder, check_safetensors
from loops.finetune.outtype import choose

ROUND = np.array([[1.0, -2.5, 0.15625, 0.0]], dtype=np.float32)  #: exact in all types


def folder(path: Path, **tensors: tuple[str, np.ndarray]) -> ModelFolder:
    """Return a model of the named tensors, each with the type to be stored in."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        bits = values.astype(np.float32).view(np.uint32)
        raw = ((bits >> 16).astype(np.uint16) if dtype == "BF16" else values.astype(
            {"F32": np.float32, "F16": np.float16}[dtype])).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file = path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return ModelFolder(path, {}, (file,), (), check_safetensors(file))


def auto(path: Path, **tensors: tuple[str, np.ndarray]) -> str:
    return choose(folder(path, **tensors), "auto", lambda _done, _total: None)[0]


def test_auto_takes_the_smallest_type_that_holds_every_matrix(tmp_path: Path) -> None:
    fine = np.array([[1.0, 1 + 2 ** -10]], dtype=np.float32)  # 11 bits: too many for BF16
    finest = np.array([[1.0, 1 + 2 ** -20]], dtype=np.float32)
    large = np.array([[1.0, 2.0 ** 20]], dtype=np.float32)
    assert auto(tmp_path, w=("BF16", ROUND)) == "bf16"
    assert auto(tmp_path, w=("F16", ROUND)) == "f16"
    assert auto(tmp_path, w=("BF16", ROUND), v=("F16", ROUND)) == "f32"
    assert auto(tmp_path, w=("F32", ROUND)) == "bf16"
    assert auto(tmp_path, w=("F32", fine)) == "f16"
    assert auto(tmp_path, w=("F32", finest)) == "f32"
    assert auto(tmp_path, w=("F32", large)) == "bf16"
    assert auto(tmp_path, w=("F32", fine), v=("F32", large)) == "f32"
    assert auto(tmp_path, w=("F32", fine), v=("BF16", ROUND)) == "f32"
    assert auto(tmp_path, w=("BF16", ROUND), norm=("F32", finest[0])) == "bf16"  # vectors stay in 32 bits anyway


def test_f16_is_refused_where_it_would_be_infinite_and_small_losses_are_told(tmp_path: Path) -> None:
    def half(values: list[float]) -> tuple[str, ...]:
        return choose(folder(tmp_path, w=("BF16", np.array([values], dtype=np.float32))), "f16", lambda *_: None)[1]

    assert half([1.0, -60000.0, 2.0 ** -17]) == ()
    with pytest.raises(ConversionFailed, match=r"w holds 65536, and F16 ends at 65,504"):
        half([1.0, -65536.0])
    note, = half([1.0, 1.0, 1.0, 2.0 ** -30])
    assert note.startswith("1 of 4 weights (25 %)")
