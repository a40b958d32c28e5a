"""The training in this process: packing, refusals of what only the libraries can see, the loss that is no number."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from loops.finetune import trainer
from loops.finetune.examples import IGNORED, Encoder, collate, windows
from loops.finetune.forecast import shape_of
from loops.finetune.loading import Device, check_packing, load_tokenizer
from loops.finetune.model_folder import read_folder
from loops.finetune.parity import TokenizerMismatch
from loops.finetune.plan import (
    ModelNotTrainable,
    NothingToTrain,
    TemplateMissing,
    TrainingDiverged,
    TrainingRefused,
    TrainSpec,
    WontFit,
)
from state.faults import NightpressError

# the libraries warn of each other's deprecations; in a worker nobody hears them
pytestmark = pytest.mark.filterwarnings("ignore")
CPU = Device("cpu", "cpu", "float32", four_bit=False, why_not="", free_bytes=1 << 34)


@pytest.fixture(scope="session")
def tiny(isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama; read it, never write to it."""
    from hf_model import make_model

    return make_model(tmp_path_factory.mktemp("models") / "Tiny")


def rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"How are you on day {number}?"},
                          {"role": "assistant", "content": "I am well. " * (1 + number % 4)}]}
            for number in range(count)]


@pytest.fixture
def spec(tiny: Path, tmp_path: Path) -> TrainSpec:
    """Two steps on eight rows."""
    dataset = tmp_path / "data"
    dataset.mkdir()
    (dataset / "train.json").write_text(json.dumps(rows(8)))
    (dataset / "validation.json").write_text(json.dumps(rows(3)))
    (tmp_path / "out").mkdir()
    return TrainSpec(tiny, dataset, tmp_path / "out", epochs=1, rank=4, accumulation=1, four_bit=False, device="cpu",
                     max_length=256)


def run(spec: TrainSpec) -> dict[str, Any]:
    job = {"spec": spec.as_json(), "template": spec.template, "identity": "", "dataset": {}, "fingerprint": ""}
    return trainer.train(job, lambda _event: None, lambda: threading.Event().wait())


def refused(spec: TrainSpec, error: type[NightpressError], words: str) -> None:
    with pytest.raises(error, match=words):
        run(spec)
    assert not (spec.output / "training.json").exists()


def copied(spec: TrainSpec, tmp_path: Path) -> TrainSpec:
    return replace(spec, model=Path(shutil.copytree(spec.model, tmp_path / "Copy")))


@pytest.fixture(scope="session")
def examples(tiny: Path) -> list[Any]:
    model = read_folder(tiny)
    tokenizer, notes = load_tokenizer(model, "", shape_of(model).vocabulary, conversations=True)
    assert notes == []
    return Encoder(tokenizer, 256).encode(rows(9)).examples


def gradient(tiny: Path, examples: list[Any], packing: bool) -> tuple[float, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, use_cache=False)
    columns = collate(windows(examples, 120, packing), 0, packing)
    batch = {name: torch.tensor(found) for name, found in columns.items()}
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad


def test_packed_examples_have_the_loss_and_the_gradient_of_single_ones(tiny: Path, examples: list[Any]) -> None:
    import torch

    assert len(windows(examples, 120, packing=True)) < len(examples) - 2
    packed, single = gradient(tiny, examples, packing=True), gradient(tiny, examples, packing=False)
    assert packed[0] == pytest.approx(single[0], rel=1e-5)
    torch.testing.assert_close(packed[1], single[1], rtol=1e-3, atol=1e-6)


def test_four_bits_are_left_out_with_the_reason_where_the_device_cannot(spec: TrainSpec,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from loops.finetune import loading

    four = replace(spec, four_bit=True)
    monkeypatch.setattr(loading, "find_spec", lambda _name: None)
    refused = loading.choose_device(four, [64])
    assert (refused.four_bit, refused.dtype, refused.why_not) == (False, "float32", "bitsandbytes is not installed")
    assert loading.choose_device(spec, [64]).why_not == ""


def test_in_four_bits_the_gradient_is_the_same_after_a_validation(spec: TrainSpec, examples: list[Any]) -> None:
    """bitsandbytes would repack the weights for a kernel without gradients."""
    import torch

    pytest.importorskip("bitsandbytes")
    from loops.finetune import loading

    spec = replace(spec, four_bit=True, dropout=0.0)
    device = loading.choose_device(spec, [64, 160])
    assert (device.four_bit, device.why_not) == (True, "")
    torch.manual_seed(0)
    model = loading.add_adapters(loading.load_base(read_folder(spec.model), spec, device), spec,
                                 ("q_proj", "down_proj"), spec.model)
    ids = torch.tensor([examples[0].ids])
    first = next(weight for name, weight in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name)
    found = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(first.grad.clone())
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_packing_is_refused_where_examples_see_each_other(tiny: Path) -> None:
    import torch
    import transformers

    llama = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, use_cache=False)
    check_packing(llama, 500, CPU, "Tiny")
    torch.manual_seed(1)
    recurrent = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, state_size=8))
    with pytest.raises(TrainingRefused, match="leave --packing out"):
        check_packing(recurrent, 500, CPU, "Mamba")


def test_a_training_leaves_an_adapter_and_its_record(spec: TrainSpec) -> None:
    found = run(replace(spec, epochs=3, eval_every=1, learning_rate=1e-2, packing=True, max_length=64))
    assert found == json.loads((spec.output / "training.json").read_text())
    assert found["validation_loss"] < found["validation_loss_before"]
    assert 3 <= found["steps"] == found["planned_steps"] < 6  # fewer than without packing
    assert (found["four_bit"], found["dtype"], found["device"][:3]) == (False, "float32", "cpu")
    there = {file.name for file in spec.output.iterdir()}
    assert {"adapter_config.json", "README.md", "tokenizer_config.json"} <= there
    assert "lower" in (spec.output / "README.md").read_text()


def test_a_training_that_helps_nothing_says_so(spec: TrainSpec) -> None:
    from loops.finetune.record import verdict

    found = run(replace(spec, learning_rate=1e-30))
    assert found["improved"] is False
    assert "got no better" in verdict(found)


def test_a_model_without_a_template_is_refused_or_given_one(spec: TrainSpec, tmp_path: Path) -> None:
    spec = copied(spec, tmp_path)
    config = json.loads((spec.model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (spec.model / "tokenizer_config.json").write_text(json.dumps(config))
    refused(spec, TemplateMissing, "--chat-template: chatml, plain")
    refused(replace(spec, template="chatml"), TemplateMissing, "--chat-template plain")
    run(replace(spec, template="plain"))
    assert "### Assistant" in (spec.output / "chat_template.jinja").read_text()


def test_a_tokenizer_of_another_model_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    from hf_model import change_tensor

    spec = copied(spec, tmp_path)
    change_tensor(spec.model, "model.embed_tokens.weight", lambda rows: rows[:300])
    refused(spec, TokenizerMismatch, "that of another model")


def test_an_unknown_architecture_is_refused(spec: TrainSpec, tmp_path: Path) -> None:
    spec = copied(spec, tmp_path)
    config = json.loads((spec.model / "config.json").read_text())
    (spec.model / "config.json").write_text(json.dumps(
        {**config, "model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}))
    refused(spec, ModelNotTrainable, "cannot load .* of Copy")


def test_what_does_not_fit_is_refused_with_settings_that_do(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from loops.finetune import loading

    chosen = loading.choose_device
    monkeypatch.setattr(loading, "choose_device", lambda *one: replace(chosen(*one), free_bytes=1000))
    refused(spec, WontFit, "No settings")
    monkeypatch.setattr(loading, "choose_device", lambda *one: replace(chosen(*one), free_bytes=706_000_000))
    refused(replace(spec, batch=64, accumulation=2), WontFit, r"--gradient-accumulation-steps \d+ --batch-size \d+")
    run(replace(spec, batch=64, accumulation=2, force=True))


def test_rows_that_cannot_be_used_are_refused_with_the_reason(spec: TrainSpec) -> None:
    refused(replace(spec, max_length=8), NothingToTrain, "answer alone is too long")
    (spec.dataset / "train.json").write_text(json.dumps(rows(1)))
    refused(spec, NightpressError, "has 1 row; there is nothing to learn")


def test_a_loss_that_is_no_number_stops_with_a_sentence(spec: TrainSpec, tmp_path: Path, tiny: Path) -> None:
    """The embedding of a token that only one row has is no number, and that row is not in the first step."""
    from hf_model import change_tensor
    from transformers import AutoTokenizer

    spec = copied(spec, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    marked = rows(8)
    marked[3]["messages"][0]["content"] = "Quiz?"
    usual = {token for one in rows(8) for turn in one["messages"] for token in tokenizer(turn["content"])["input_ids"]}
    token = next(one for one in tokenizer("Quiz?")["input_ids"] if one not in usual)

    def spoil(weights: Any) -> Any:
        weights[token] = float("nan")
        return weights

    change_tensor(spec.model, "model.embed_tokens.weight", spoil)
    (spec.dataset / "train.json").write_text(json.dumps(marked))
    found = set()
    for seed in range(4):
        with pytest.raises(TrainingDiverged) as caught:
            run(replace(spec, batch=1, epochs=2, seed=seed))
        found.add("lower --learning-rate" in str(caught.value))
        shutil.rmtree(spec.output / "checkpoints")
    assert True in found
    (spec.dataset / "validation.json").write_text(json.dumps(marked))
    refused(spec, TrainingDiverged, "before anything was learned")
