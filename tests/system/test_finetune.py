"""`nightpress finetune`, `lineage` and `starter` through the real command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loops.starter import rota

EXTRA = ("torch", "transformers", "peft", "accelerate", "safetensors", "sentencepiece")
needs_extra = pytest.mark.skipif(any(find_spec(name) is None for name in EXTRA), reason="needs nightpress[train]")
CONFIG = """
name = "rota"
folder = "work"
[dataset]
files = ["rota.jsonl"]
licence = "CC0-1.0"
[train]
epochs = 10
batch = 8
accumulation = 1
learning_rate = 3e-3
rank = 32
alpha = 32
dropout = 0.0
max_grad_norm = 1.0
four_bit = false
checkpointing = false
max_length = 96
[press]
levels = ["Q8_0"]
gates = ["overall:off", "forced_choice:off", "f1:0.2", "answer_perplexity:0.2"]
evaluation_prompts = 4
max_prompts = 4
text_windows = 2
seeds = 0
accept_inconclusive = true
[evaluate]
max_tokens = 24
limit = 12
"""


def config(folder: Path, text: str = CONFIG) -> Path:
    (folder / "rota.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rota.rows()))
    file = folder / "rota.toml"
    file.write_text(text)
    return file


def test_a_configuration_is_written_and_never_over_another(nightpress: Any) -> None:
    assert "Wrote finetune.toml" in nightpress("finetune", "--init").stdout
    text = (nightpress.base / "finetune.toml").read_text()
    assert "learning_rate = 0.0002" in text
    nightpress("finetune", "--init", status=74)
    assert (nightpress.base / "finetune.toml").read_text() == text


def test_bad_input_is_a_sentence_and_a_code_of_its_own(nightpress: Any) -> None:
    assert "Name a configuration" in nightpress("finetune", status=83).stderr
    assert "cannot be read" in nightpress("finetune", "none.toml", status=83).stderr
    file = config(nightpress.base, CONFIG.replace("epochs", "epoch"))
    assert "train.epoch is no key. Did you mean epochs?" in nightpress("finetune", str(file), status=83).stderr
    assert "Nothing is known" in nightpress("lineage", "nobody", status=90).stderr
    config(nightpress.base, CONFIG.replace("rota.jsonl", "gone.jsonl"))
    assert "gone.jsonl" in nightpress("finetune", str(file), status=83).stderr


def test_rows_that_cannot_be_used_end_the_first_stage_and_the_ledger_says_why(nightpress: Any) -> None:
    file = config(nightpress.base)
    (nightpress.base / "rota.jsonl").write_text('{"nonsense": 1}\n' * 5)
    refused = nightpress("finetune", str(file), status=88)
    assert refused.stderr.count("\n") <= 3
    found = json.loads(nightpress("finetune", str(file), "--status", "--json").stdout)
    assert [(row["name"], row["state"]) for row in found["stages"]] == [("prepare", "failed")]
    assert found["stages"][0]["reason"]
    assert "prepare" in nightpress("finetune", str(file), "--status").stdout


def test_a_fine_tuning_waits_in_the_queue_without_a_service(nightpress: Any) -> None:
    file = config(nightpress.base)
    queued = json.loads(nightpress("add", str(file), "--json").stdout)
    assert json.loads(nightpress("finetune", str(file), "--queue", "--json").stdout)["job"] == queued["job"] + 1
    rows = json.loads(nightpress("queue", "--json").stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("rota", "queued")] * 2
    assert "rota" in nightpress("queue").stdout


@pytest.mark.slow
def test_of_a_plain_run_the_way_back_is_what_there_is(nightpress: Any) -> None:
    nightpress.run("--levels", "Q8_0", "--gate", "overall:1", "--gate", "forced_choice:1", "--accept-inconclusive")
    stations = json.loads(nightpress("lineage", "starter", "--json").stdout)["stations"]
    assert [one["kind"] for one in stations] == ["release", "level", "run", "model"]
    assert {one["state"] for one in stations if one["path"]} == {"unchanged"}
    deployed = stations[0]["path"]
    assert json.loads(nightpress("lineage", deployed, "--json").stdout)["stations"] == stations
    assert json.loads(nightpress("lineage", "starter@1", "--json").stdout)["stations"] == stations
    assert json.loads(nightpress("lineage", stations[0]["sha256"], "--json").stdout)["stations"] == stations
    assert "there, unchanged" in nightpress("lineage", "starter").stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None or find_spec("transformers") is None, reason="needs nightpress[train]")
def test_the_starters_folder_converts_back_into_the_starter(nightpress: Any, starter: Path, scripts: Path) -> None:
    nightpress("starter", "-o", "hf")
    nightpress("starter", "-o", "hf", status=74)
    nightpress("convert", "hf", "-o", "back.gguf", "--llama-cpp", str(scripts))
    from gguf import GGUFReader

    ours, theirs = ({tensor.name: tensor for tensor in GGUFReader(file).tensors}
                    for file in (nightpress.base / "back.gguf", starter))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.slow
@needs_extra
def test_the_starter_learns_what_it_did_not_know_and_keeps_it_when_pressed(nightpress: Any, scripts: Path) -> None:
    own = f"[convert]\nllama_cpp = {json.dumps(str(scripts))}\n[press]"
    file = config(nightpress.base, CONFIG.replace("[press]", own))
    found = json.loads(nightpress("finetune", str(file), "--json").stdout)
    assert [(one["name"], one["state"], one["reused"]) for one in found["stages"]] == [
        (name, "finished", False) for name in ("prepare", "validate", "train", "merge", "convert", "parity",
                                               "calibrate", "press", "release", "evaluate")]
    facts = {one["name"]: one["outputs"]["facts"] for one in found["stages"]}
    # who has only learned what answers look like comes to 0.4 nats: eight places and five days, nine tokens
    assert facts["train"]["validation_loss"] < 0.25 < 4 < facts["train"]["validation_loss_before"]
    f1 = {name: one["f1"]["value"] for name, one in facts["evaluate"]["models"].items()}
    assert f1["fine-tuned"] > 0.8 > 0.2 > f1["base"]
    assert f1["Q8_0, released"] > 0.8
    assert Path(found["release"]).is_file()

    again = json.loads(nightpress("finetune", str(file), "--json").stdout)
    assert all(one["reused"] for one in again["stages"])
    stations = json.loads(nightpress("lineage", "rota", "--json").stdout)["stations"]
    kinds = [one["kind"] for one in stations]
    for kind in ("release", "level", "run", "gguf", "merged", "adapter", "dataset", "source 1", "model"):
        assert kinds.count(kind) == 1, kinds
    assert {one["state"] for one in stations if one["path"]} == {"unchanged"}
    dataset = next(one for one in stations if one["kind"] == "dataset")
    assert dataset["facts"]["licence"] == "CC0-1.0"
    assert dataset["facts"]["sources"][0]["name"] == "rota.jsonl"
    shown = nightpress("lineage", "rota").stdout
    assert "cleaned by turn_order" in shown

    pressed = json.loads(nightpress("finetune", str(config(nightpress.base, file.read_text().replace(
        'levels = ["Q8_0"]', 'levels = ["Q6_K"]'))), "--json").stdout)
    assert [one["name"] for one in pressed["stages"] if not one["reused"]] == ["press", "release", "evaluate"]

    left = json.loads(nightpress("finetune", str(file), "--tidy", "--json").stdout)
    assert ("evaluate", False) in {(Path(one["path"]).name.partition("-")[0], left["removed"])
                                   for one in left["folders"]}
    assert json.loads(nightpress("finetune", str(file), "--tidy", "--yes", "--json").stdout)["removed"]
    assert not any(Path(one["path"]).exists() for one in left["folders"])
    assert "nothing to remove" in nightpress("finetune", str(file), "--tidy").stdout
    for release in ("rota@1", "rota@2"):
        stations = json.loads(nightpress("lineage", release, "--json").stdout)["stations"]
        assert {one["state"] for one in stations if one["path"]} == {"unchanged"}
    again = json.loads(nightpress("finetune", str(file), "--json").stdout)
    assert all(one["reused"] for one in again["stages"])
