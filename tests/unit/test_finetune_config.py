"""The configuration of a fine-tuning: what is wrong in it is named, with the nearest key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from daemon.finetune_config import FinetuneRefused, FinetuneSpec, options_of, template
from state.manifest import BadName


def write(folder: Path, text: str) -> Path:
    file = folder / "shop.toml"
    file.write_text(text)
    return file


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    spec = FinetuneSpec.read(write(tmp_path, 'model = "base"\nfolder = "work"\n[dataset]\nfiles = ["a.csv", "/b.csv"]\n'
                                             '[press]\ntext = "t.txt"\n[convert]\nllama_cpp = "lc"\n'))
    assert (spec.name, spec.model, spec.folder) == ("shop", str(tmp_path / "base"), tmp_path / "work")
    assert spec.dataset.files == (tmp_path / "a.csv", Path("/b.csv"))
    assert (spec.press.text, spec.convert.llama_cpp) == (tmp_path / "t.txt", tmp_path / "lc")


def test_the_starter_and_ids_are_no_paths(tmp_path: Path) -> None:
    for name in ("starter", "owner/name"):
        assert FinetuneSpec.read(write(tmp_path, f'model = "{name}"\n[dataset]\nsample = true\n')).model == name


@pytest.mark.parametrize(("text", "said"), [
    ("nmae = 'x'\n[dataset]\nsample = true", "nmae is no key. Did you mean name?"),
    ("[dataset]\nsample = true\nlicense = 'x'", "dataset.license is no key. Did you mean licence?"),
    ("[dataset]\nsample = true\n[train]\nbatsh = 1", "train.batsh is no key. Did you mean batch?"),
    ("[dataset]\nsample = true\n[train]\nmodel = 'x'", "train.model is no key"),
    ("[dataset]\nsample = true\n[train]\nepochs = 'many'", "epochs is 'many'"),
    ("[dataset]\nsample = true\n[merge]\nparty = true", "merge.party is no key. Did you mean parity?"),
    ("[dataset]\nsample = true\n[press]\nmax_degradation = 7", "press.max_degradation is 7"),
    ("[dataset]\nsample = true\n[convert]\nouttype = 'q8'", "convert.outtype is 'q8'"),
    ("[dataset]\nsample = true\nhub = 'x'", "[dataset] names hub and sample"),
    ("[dataset]\ndomain = 'x'", "[dataset] names no source"),
    ("[dataset]\nsample = true\nmin_tokens = 9\nmax_tokens = 8", "dataset.min_tokens is more than"),
    ("[dataset\n", "cannot be read"),
    ("dataset = 3", "dataset is 3"),
])
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FinetuneRefused) as problem:
        FinetuneSpec.read(write(tmp_path, text))
    assert said in str(problem.value)
    assert str(tmp_path / "shop.toml") in str(problem.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(FinetuneRefused, match="cannot be read"):
            FinetuneSpec.read(file)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(FinetuneRefused, match="cannot be read"):
        FinetuneSpec.read(tmp_path / "b.toml")


def test_a_name_that_leads_elsewhere_is_refused() -> None:
    with pytest.raises(BadName):
        FinetuneSpec.of({"name": "../x", "dataset": {"sample": True}})


def test_options_of_training_have_their_types() -> None:
    given: dict[str, Any] = {"epochs": 2, "target_modules": ["q_proj"], "learning_rate": 1e-3}
    assert options_of("train", given) == {"epochs": 2.0, "target_modules": ("q_proj",), "learning_rate": 1e-3}


def test_a_spec_comes_back_from_json(tmp_path: Path) -> None:
    spec = FinetuneSpec.read(write(tmp_path, "[dataset]\nfiles = ['a']\n[train]\nepochs = 1\n"))
    assert FinetuneSpec.of(spec.as_json()) == spec


def test_the_template_is_a_configuration_and_says_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, template())
    spec = FinetuneSpec.read(file)
    assert spec.dataset.files == (tmp_path / "rows.jsonl",)
    bare = FinetuneSpec.of({"name": "my-model", "dataset": {"files": [str(tmp_path / "rows.jsonl")]}})
    assert spec == bare
    # every key that is commented out may be used as it stands, but for those that have no default
    text = "\n".join(line.removeprefix("# ") if " = " in line and '= ""' not in line else line
                     for line in template().splitlines()[1:])
    for table in ("dataset", "train", "merge", "convert", "calibrate", "press", "evaluate"):
        assert tomllib.loads(text)[table], table
    read = FinetuneSpec.read(write(tmp_path, text))
    assert read.press.model_copy(update={"gates": None}) == bare.press
    assert (read.press.gates, read.dataset.num_samples) == (("f1:0.05",), 1000)  # no default, so an example


def test_the_template_says_of_every_key_what_it_is() -> None:
    keys = [line for line in template().splitlines() if " = " in line]
    assert len(keys) > 60
    assert [line for line in keys if len(line.partition("  # ")[2]) < 5] == []
