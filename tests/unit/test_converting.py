"""What is refused before a conversion starts anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from daemon import converting
from daemon.converting import ConvertSpec, convert
from daemon.grip import Grip
from daemon.settings import Settings
from loops.finetune.converter import Converter
from loops.finetune.model_folder import NoModelFolder, PickledWeights
from loops.pass1.single import OutputThere
from state.files import DiskFull
from state.lock import Lock, StateBusy


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(converting, "require", lambda *_names: None)  # nothing here gets as far as needing the extra
    return folder


def attempt(spec: ConvertSpec) -> None:
    convert(spec, Settings.load(), Grip(), lambda _event: None, Converter(spec.source))


def test_what_the_disk_has_no_room_for_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match="needs about 17 MB"):
        attempt(ConvertSpec(model))


def test_an_adapter_without_its_base_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    shutil.copy(model / "model.safetensors", adapter / "adapter_model.safetensors")
    with pytest.raises(NoModelFolder, match="which is owner/base, is needed too"):
        attempt(ConvertSpec(adapter))
    with pytest.raises(NoModelFolder, match="both --base and --adapter"):
        attempt(ConvertSpec(model, base=model))


def test_pickles_are_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(PickledWeights, match="--allow-pickle"):
        attempt(ConvertSpec(model))
    assert [path.name for path in tmp_path.iterdir()] == ["Model"]


def test_a_file_that_is_there_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(OutputThere, match="--force"):
        attempt(ConvertSpec(model, output=tmp_path / "out.gguf"))


def test_the_same_conversion_does_not_run_twice_at_once(model: Path, tmp_path: Path) -> None:
    name = converting._fingerprint(ConvertSpec(model), {"model": converting.read_folder(model)}, Converter(model))[:16]
    work = tmp_path / f".nightpress-convert-{name}"
    work.mkdir(exist_ok=True)
    with Lock.acquire(work / "lock", "another"), pytest.raises(StateBusy):
        attempt(ConvertSpec(model))
