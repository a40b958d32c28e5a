"""Models that are no GGUF: found by name, judged before any work, and cleaned up within the disk budget."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from daemon import sources
from daemon.intake import Folders, name_of, reevaluations
from daemon.settings import Settings
from daemon.sources import NoSuchModel, clean, converted_folder, locate
from loops.finetune.lora import BaseQuantized
from loops.finetune.model_folder import NoModelFolder, PickledWeights
from loops.pass1.plan import PressPlan
from loops.starter import STARTER_GGUF
from state.manifest import slug


@pytest.fixture(autouse=True)
def extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "require", lambda *_names: None)  # nothing here gets as far as needing the extra
    monkeypatch.chdir(tmp_path)


def make(folder: Path, config: str = '{"architectures": ["LlamaForCausalLM"]}') -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    return folder


def test_a_model_is_found_by_path_and_by_the_id_it_was_pulled_as(tmp_path: Path) -> None:
    settings = Settings.load()
    pulled = make(settings.state_dir.absolute() / "models" / "owner" / "Tiny-1.5B")
    assert locate(Path("owner/Tiny-1.5B"), settings) == pulled
    assert locate(Path("hf:owner/Tiny-1.5B"), settings) == pulled
    assert name_of(pulled) == slug("Tiny-1.5B")
    mine = make(tmp_path / "owner" / "Tiny-1.5B")
    assert locate(Path("owner/Tiny-1.5B"), settings) == mine
    assert locate(Path("some.gguf"), settings) == tmp_path / "some.gguf"
    with pytest.raises(NoSuchModel, match="hf:owner/Other pulls it first"):
        locate(Path("owner/Other"), settings)


def test_a_folder_that_cannot_be_converted_is_refused_at_once(tmp_path: Path) -> None:
    settings = Settings.load()
    with pytest.raises(BaseQuantized, match="gptq"):
        locate(make(tmp_path / "a", '{"quantization_config": {"quant_method": "gptq"}}'), settings)
    pickled = make(tmp_path / "b")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(PickledWeights, match="nightpress convert b --allow-pickle"):
        locate(pickled, settings)
    adapter = make(tmp_path / "c")
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    with pytest.raises(NoModelFolder, match="nightpress merge c"):
        locate(adapter, settings)


def test_converted_models_go_by_age_when_the_budget_is_spent_and_never_the_one_in_use() -> None:
    settings = Settings.load().model_copy(update={"disk_budget_bytes": 250})
    files = [converted_folder(settings) / str(number) / "m.gguf" for number in range(3)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(100))
        file.with_suffix(".json").write_text("{}")
        os.utime(file, (number, number))
    assert clean(settings, keep=files[0]) == 1
    assert [file.is_file() for file in files] == [True, False, True]
    assert not files[1].parent.exists()
    settings.blobs.mkdir(parents=True)
    (settings.blobs / "level.gguf").write_bytes(bytes(200))
    assert clean(settings, keep=files[2]) == 1
    assert [file.is_file() for file in files] == [False, False, True]


def test_watched_folders_find_model_folders_once_and_pass_over_what_is_under_way(tmp_path: Path) -> None:
    watch = tmp_path / "watch"
    model = make(watch / "Tiny-1.5B")
    make(watch / ".nightpress-merge-0" / "made" / "Hidden")
    make(watch / "training" / "checkpoint-100")
    make(watch / "4bit", '{"quantization_config": {"quant_method": "awq"}}')
    settings = Settings.load().model_copy(update={"watch": (watch,), "watch_settle_s": 10.0})
    folders = Folders()
    assert list(folders.scan(settings, 0.0)) == []
    found = list(folders.scan(settings, 11.0))
    assert [job.spec["plan"]["model"] for job in found] == [str(model)]
    assert found[0].name == slug("Tiny-1.5B")
    assert list(folders.scan(settings, 22.0)) == []
    (model / "config.json").write_text('{"architectures": ["Other"]}')
    assert list(folders.scan(settings, 33.0)) == []
    assert len(list(folders.scan(settings, 44.0))) == 1


def test_a_deployed_model_is_measured_again_from_the_folder_that_it_came_from(tmp_path: Path) -> None:
    folder, gone = make(tmp_path / "Tiny"), tmp_path / "converted" / "Tiny.gguf"
    plan = PressPlan(str(gone), "tiny", "b", "s", source={"folder": str(folder), "stages": []})
    job, = reevaluations({"tiny": plan.as_json()})
    assert job.spec["plan"]["model"] == str(folder)
    assert replace(plan, source={}).identity() == plan.identity()


def test_the_starter_is_found_by_its_word_unless_something_here_is_called_so(tmp_path: Path) -> None:
    settings = Settings.load()
    assert locate(Path("starter"), settings) == STARTER_GGUF.absolute()
    (tmp_path / "starter").write_bytes(b"mine")
    assert locate(Path("starter"), settings) == tmp_path / "starter"
