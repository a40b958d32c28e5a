"""`nightpress merge`, and Hugging Face folders where a GGUF may stand, through the real command line."""

from __future__ import annotations

import json
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_extra = pytest.mark.skipif(find_spec("torch") is None or find_spec("transformers") is None
                                 or find_spec("peft") is None, reason="needs nightpress[train]")


@pytest.fixture(scope="session")
def forms(isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `Tiny` and two adapters for it; read them, never write to them."""
    from hf_model import make_adapter, make_model

    folder = tmp_path_factory.mktemp("forms")
    base = make_model(folder / "Tiny")
    make_adapter(base, folder / "one", folder / "merged")
    shutil.copytree(folder / "one", folder / "two")
    return folder


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if "merge" in file.name)


@pytest.mark.slow
@needs_extra
def test_a_merge_says_what_base_and_adapter_say(nightpress: Any, forms: Path) -> None:
    call = ("merge", str(forms / "one"), "--base", str(forms / "Tiny"), "-o", "merged")
    found = json.loads(nightpress(*call, "--json").stdout)
    stage, = found["stages"]
    assert (stage["stage"], stage["tokens"]) == ("merging", 256)
    assert stage["mean_kl"] < 2e-4
    folder = nightpress.base / "merged"
    record = json.loads((folder / "merge.json").read_text())
    assert [one["weight"] for one in record["adapters"]] == [1.0]
    assert set(record["base"]["files"]) >= {"model.safetensors", "config.json", "tokenizer.model"}
    assert record["files"].keys() >= {"model.safetensors", "config.json"}
    assert left(nightpress.base) == ["merged"]
    again = json.loads(nightpress(*call, "--json").stdout)
    assert again["again"]
    assert again["files"] == found["files"]
    several = ("merge", str(forms / "one"), str(forms / "two"), "--base", str(forms / "Tiny"), "-o", "merged")
    assert "--force" in nightpress(*several, status=74).stderr
    half = nightpress(*several, "--force", "--json")
    assert "Each of the 2 adapters counts 0.5" in half.stderr
    assert json.loads(half.stdout)["stages"][0]["mean_kl"] < 2e-4
    nightpress(*several, "--weights", "0.3,-2", "--force")
    assert left(nightpress.base) == ["merged"]
    (nightpress.base / "mine").mkdir()
    assert "not made by" in nightpress(*call[:-1], "mine", "--force", status=74).stderr


@pytest.mark.slow
@needs_extra
def test_what_does_not_go_together_is_one_sentence_and_leaves_nothing(nightpress: Any, forms: Path,
                                                                      tmp_path: Path) -> None:
    base = Path(shutil.copytree(forms / "Tiny", tmp_path / "Tiny"))
    config = json.loads((base / "config.json").read_text())

    def refused(status: int, *arguments: str) -> str:
        done = nightpress("merge", *arguments, "-o", "out", status=status)
        assert done.stderr.count("nightpress: ") == 1
        assert not (nightpress.base / "out").exists()
        assert left(nightpress.base) == []
        return str(done.stderr)

    one = str(forms / "one")
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert "stored quantized (awq)" in refused(113, one, "--base", str(base))
    (base / "config.json").write_text(json.dumps(config))
    other = Path(shutil.copytree(base, tmp_path / "Other"))
    assert "--any-base" in refused(114, one, "--base", str(other))
    assert "as many weights" in refused(114, one, "--base", str(base), "--weights", "1,2")
    assert "is a LoRA adapter itself" in refused(94, one, "--base", one)
    adapter = Path(shutil.copytree(forms / "one", tmp_path / "adapter"))
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "use_qalora": True}))
    assert "use_qalora" in refused(115, str(adapter), "--base", str(base))
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    (adapter / "tokenizer.model").write_bytes(other_tokenizer())
    assert "is not that of Tiny" in refused(97, str(adapter), "--base", str(base))


def other_tokenizer() -> bytes:
    """Return a tokenizer of the same size, made of other talk."""
    import random

    from loops.starter import train

    return bytes(train.train_tokenizer(random.Random(4), dialogues=600))


@pytest.mark.slow
@needs_extra
def test_a_failed_comparison_names_the_stage_and_delivers_nothing(nightpress: Any, forms: Path, poll: Any) -> None:
    """What was merged is spoilt between merging and reading it, as a broken disk would."""
    from hf_model import change_tensor

    call = ("merge", str(forms / "one"), "--base", str(forms / "Tiny"), "-o", "out")
    with nightpress.start(*call) as process:
        poll(lambda: list(nightpress.base.glob(".nightpress-merge-*/merged.json")), 120, "the merge")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    made, = nightpress.base.glob(".nightpress-merge-*/made/out")
    change_tensor(made, "model.layers.1.mlp.down_proj.weight", lambda weights: weights * 1.05)
    done = nightpress(*call, status=101)
    assert "Stage merging changed the model" in done.stderr
    assert left(nightpress.base) == []
    assert not (nightpress.base / "out").exists()


@pytest.mark.slow
@needs_extra
def test_a_folder_is_pressed_as_a_gguf_is(nightpress: Any, forms: Path, converter_home: Path) -> None:
    shutil.copytree(converter_home, nightpress.state, dirs_exist_ok=True)
    pulled = nightpress.state / "models" / "owner" / "Tiny"
    shutil.copytree(forms / "Tiny", pulled)
    done = nightpress.run("owner/Tiny", "--levels", "Q8_0", "--json", "--max-degradation", "1", "--gate", "overall:1")
    summary = json.loads(done.stdout)
    assert summary["run"]["name"] == "Tiny"
    source = summary["plan"]["source"]
    assert source["folder"] == str(pulled)
    assert [stage["stage"] for stage in source["stages"]] == ["conversion"]
    assert f"Converted from {pulled}" in nightpress("results").stdout
    kept, = (nightpress.state / "converted").glob("*/*.gguf")
    before = kept.stat().st_ino
    found = json.loads(nightpress("quantize", str(pulled), "--level", "Q8_0", "--json").stdout)
    assert Path(found[0]["path"]).name == "Tiny-Q8_0.gguf"
    assert kept.stat().st_ino == before
    nightpress("levels", "owner/Tiny", "--ladder", "original")
    nightpress("quantize", "owner/Tiny", "--level", "Q8_0", "--force", NIGHTPRESS_DISK_BUDGET_BYTES="1000")
    assert not kept.exists()
    added = json.loads(nightpress("add", "owner/Tiny", "--json").stdout)
    assert added["state"] == "queued"


@pytest.mark.slow
@needs_extra
def test_folders_that_are_no_model_are_one_sentence(nightpress: Any, forms: Path) -> None:
    assert "hf:owner/none" in nightpress("run", "owner/none", status=116).stderr
    assert "nightpress merge" in nightpress("run", str(forms / "one"), status=94).stderr
    assert "config.json" in nightpress("quantize", str(forms), status=94).stderr
    assert "config.json" in nightpress("add", str(forms), status=94).stderr
