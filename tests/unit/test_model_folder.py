"""Model folders, read before any other library sees them; no extra is needed for that."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from loops.finetune.extra import TrainExtraMissing, require
from loops.finetune.model_folder import (
    NoModelFolder,
    TokenizerMissing,
    WeightsDamaged,
    is_legacy,
    read_adapter,
    read_folder,
    stage,
)
from state.faults import NightpressError


def safetensors(shape: tuple[int, ...] = (2, 3), cut: int = 0) -> bytes:
    size = 2
    for side in shape:
        size *= side
    header = json.dumps({"w": {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(size)
    return whole[:len(whole) - cut]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def test_a_folder_says_what_it_is(model: Path) -> None:
    found = read_folder(model)
    assert (found.architecture, found.parameters, found.pickles) == ("LlamaForCausalLM", 6, ())
    assert found.forecast_bytes(2) >= 12


@pytest.mark.parametrize(("name", "content", "error", "said"), [
    ("config.json", None, NoModelFolder, "no config.json"),
    ("config.json", b"{", NoModelFolder, "no JSON"),
    ("config.json", b"\xff\xfe\x00", NoModelFolder, "no JSON in UTF-8"),
    ("config.json", b"[" * 100_000, NoModelFolder, "no JSON"),
    ("config.json", b"[]", NoModelFolder, "not an object"),
    ("tokenizer.json", None, TokenizerMissing, "no tokenizer"),
    ("model.safetensors", None, NoModelFolder, "no weights"),
    ("model.safetensors", b"", WeightsDamaged, "cut off"),
    ("model.safetensors", b"\xff" * 64, WeightsDamaged, "no safetensors file"),
    ("model.safetensors", struct.pack("<Q", 4) + b"nope" + bytes(8), WeightsDamaged, "header makes no sense"),
    ("model.safetensors", struct.pack("<Q", 2) + b"{}", WeightsDamaged, "holds no weights"),
    ("model.safetensors", safetensors(cut=1), WeightsDamaged, "cut off or damaged"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', WeightsDamaged,
     "lacks model-00001-of-00002.safetensors"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', WeightsDamaged, "not in the folder"),
    ("model.safetensors.index.json", b"{}", WeightsDamaged, "lists no weights"),
])
def test_what_is_wrong_is_said(model: Path, name: str, content: bytes | None, error: type[NightpressError],
                               said: str) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    with pytest.raises(error, match=said):
        read_folder(model)


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    for name, content, said in (("a.gguf", b"GGUF" + bytes(9), "is a GGUF already"), ("b", b"x", "is a file"),
                                ("c", b"algg" + bytes(9), "old format")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NoModelFolder, match=said):
            read_folder(tmp_path / name)
    with pytest.raises(NoModelFolder, match="no folder"):
        read_folder(tmp_path / "missing")


def test_pickles_are_weights_only_where_there_are_no_others(model: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(b"pickle")
    assert read_folder(model).pickles == ()
    (model / "model.safetensors").unlink()
    assert [file.name for file in read_folder(model).pickles] == ["pytorch_model.bin"]


def test_neither_code_nor_pickles_are_staged(model: Path, tmp_path: Path) -> None:
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin", "native.so", "x.pkl"):
        (model / name).write_bytes(b"")
    staged = stage(model, tmp_path / "staged")
    assert staged.name == "My-Model"
    assert sorted(file.name for file in staged.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (staged / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_adapters_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(NoModelFolder, match="IA3"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(NoModelFolder, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path)


def test_legacy_formats_are_known_by_their_magic(tmp_path: Path) -> None:
    for number, name in ((0x67676D6C, "ggml"), (0x67676D66, "ggmf"), (0x67676A74, "ggjt"), (0x46554747, "")):
        (tmp_path / "file").write_bytes(struct.pack("<I", number))
        assert is_legacy(tmp_path / "file") == name


def test_a_missing_extra_is_one_sentence() -> None:
    with pytest.raises(TrainExtraMissing, match=r"Converting needs no_such_library.*pip install 'nightpress\[train\]'"):
        require("Converting", "json", "no_such_library")
    with pytest.raises(TrainExtraMissing, match=r"no_such\.part"):
        require("Converting", "no_such.part")
