"""What is refused before a training starts anything, what it is forecast to take, what counts as a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon import training
from daemon.grip import Grip
from daemon.settings import Settings
from daemon.training import Trained, TrainSpec, find_model, train
from loops.finetune import checkpoints, extra
from loops.finetune.extra import TrainExtraMissing
from loops.finetune.faults import DatasetUnreadable
from loops.finetune.forecast import Shape, adapter_weights, fitting, forecast, shape_of, targets
from loops.finetune.model_folder import NoModelFolder, PickledWeights, read_folder
from loops.finetune.plan import ModelNotTrainable, TrainingRefused
from state.faults import NightpressError
from state.lock import Lock, StateBusy

TENSORS = {"model.embed_tokens.weight": [10, 8], "model.layers.0.self_attn.q_proj.weight": [8, 8],
           "model.layers.0.mlp.up_proj.weight": [16, 8], "model.layers.0.mlp.down_proj.weight": [8, 16],
           "model.norm.weight": [8]}


def write_weights(file: Path, tensors: dict[str, list[int]]) -> None:
    import math

    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    """A model that says what it is, and a dataset of two rows."""
    model, dataset = tmp_path / "Model", tmp_path / "data"
    model.mkdir()
    dataset.mkdir()
    (model / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 10}))
    (model / "tokenizer.json").write_text("{}")
    write_weights(model / "model.safetensors", TENSORS)
    (dataset / "train.json").write_text('[{"text": "one"}, {"text": "two"}]')
    return TrainSpec(model, dataset, tmp_path / "out")


def attempt(spec: TrainSpec) -> Trained:
    return train(spec, Settings.load(), Grip(), lambda _event: None)


@pytest.mark.parametrize(("change", "words"), [
    ({"epochs": 0.0}, "epochs is 0.0; it is above 0"), ({"batch": 0}, "batch is 0; it is at least 1"),
    ({"learning_rate": float("nan")}, "learning rate is nan"), ({"dropout": 1.0}, "dropout is 1.0"),
    ({"schedule": "zigzag"}, "'zigzag' is no schedule"), ({"device": "abacus"}, "'abacus' is no device"),
    ({"template": "nowhere.jinja"}, "is no chat template")])
def test_settings_that_make_no_sense_are_refused(spec: TrainSpec, change: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingRefused, match=words):
        attempt(replace(spec, **change))
    assert not spec.output.exists()


def _remove(name: str) -> Callable[[TrainSpec], None]:
    return lambda spec: (spec.model.parent / name).unlink()


def _pickle(spec: TrainSpec) -> None:
    (spec.model / "model.safetensors").rename(spec.model / "pytorch_model.bin")


def _rename_modules(spec: TrainSpec) -> None:
    write_weights(spec.model / "model.safetensors", {"h.0.attn.c_attn.weight": [8, 24], "wte.weight": [10, 8]})


def _sizeless(spec: TrainSpec) -> None:
    (spec.model / "config.json").write_text('{"architectures": ["Odd"]}')


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (_remove("Model/config.json"), NoModelFolder, "has no config.json"),
    (_remove("data/train.json"), DatasetUnreadable, "has no train.json"), (_pickle, PickledWeights, "safetensors only"),
    (_rename_modules, ModelNotTrainable, "It has c_attn"), (_sizeless, ModelNotTrainable, "how many layers"),
    (lambda spec: shutil.rmtree(spec.dataset), DatasetUnreadable, "check the spelling")])
def test_what_cannot_be_trained_is_refused(spec: TrainSpec, spoil: Callable[[TrainSpec], None],
                                           error: type[NightpressError], words: str) -> None:
    spoil(spec)
    with pytest.raises(error, match=words):
        attempt(spec)
    assert not spec.output.exists()


def test_modules_that_the_model_has_not_are_named(spec: TrainSpec) -> None:
    with pytest.raises(ModelNotTrainable, match="no module 'w_q'; it has down_proj, q_proj, up_proj"):
        attempt(replace(spec, target_modules=("up_proj", "w_q")))
    shape = shape_of(read_folder(spec.model))
    assert targets(shape, (), "Model") == ("q_proj", "up_proj", "down_proj")
    assert (shape.parameters, shape.linear, shape.vocabulary) == (80 + 64 + 128 + 128 + 8, 320, 10)


def test_without_the_extra_it_says_how_to_install_it(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(TrainExtraMissing, match=r"Training needs peft.*nightpress\[train\]"):
        attempt(spec)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may get as far as a worker, and the extra is not needed."""
    monkeypatch.setattr(training, "require", lambda *_names: None)
    monkeypatch.setattr(training, "run_job", lambda *_given: pytest.fail("a worker was started"))


def test_a_folder_with_something_else_is_refused(spec: TrainSpec, worker: None) -> None:
    spec.output.mkdir()
    (spec.output / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingRefused, match="is not empty"):
        attempt(spec)
    with pytest.raises(TrainingRefused, match="a folder of its own"):
        attempt(replace(spec, output=spec.model))
    assert [file.name for file in spec.output.iterdir()] == ["thesis.txt"]


def test_another_training_in_the_folder_is_refused_with_the_difference(spec: TrainSpec, worker: None) -> None:
    (spec.output / "checkpoints").mkdir(parents=True)
    (spec.output / "checkpoints" / "plan.json").write_text(json.dumps(
        {"fingerprint": "other", "spec": replace(spec, rank=8).as_json()}))
    with pytest.raises(TrainingRefused, match="rank 8 instead of 64"):
        attempt(spec)


def test_only_one_trains_into_a_folder(spec: TrainSpec, worker: None) -> None:
    spec.output.mkdir()
    with Lock.acquire(spec.output / ".nightpress-train.lock", "nightpress train"), pytest.raises(StateBusy):
        attempt(spec)


def test_what_shapes_the_result_and_only_that_is_in_the_fingerprint(spec: TrainSpec) -> None:
    def of(one: TrainSpec) -> str:
        return one.fingerprint("model", {"train.json": "a"}, "")

    assert of(replace(spec, output=Path("/elsewhere"), keep=9, threads=3, force=True, log_every=1)) == of(spec)
    assert of(replace(spec, seed=1)) != of(spec) != spec.fingerprint("model", {"train.json": "b"}, "")
    assert TrainSpec.from_json(json.loads(json.dumps(spec.as_json()))) == spec


def test_a_name_stands_for_a_folder_or_what_was_pulled(spec: TrainSpec, isolated: Path) -> None:
    settings = Settings.load()
    assert find_model(str(spec.model), settings) == spec.model
    pulled = settings.state_dir / "models" / "owner" / "name"
    pulled.mkdir(parents=True)
    assert find_model("owner/name", settings) == pulled
    with pytest.raises(NoModelFolder, match="nightpress pull owner/other"):
        find_model("owner/other", settings)


MILLIONS = Shape(110_000_000, 100_000_000, {"q_proj": ((1000, 1000),) * 10}, 10, 1000, 1000, 4000, 10_000)


def test_the_forecast_counts_as_its_sources_do(spec: TrainSpec) -> None:
    def of(**change: Any) -> Any:
        return forecast(MILLIONS, replace(spec, batch=1, rank=10, **change), ("q_proj",), 100, "cuda", 2)

    assert adapter_weights(MILLIONS, ("q_proj",), 10) == 10 * 10 * 2000
    assert of().weights == pytest.approx(100e6 * (0.5 + 4 / 64) + 4 * 10e6)
    assert of(double_quant=True).weights == pytest.approx(100e6 * (0.5 + 0.127 / 8) + 4 * 10e6, rel=1e-4)
    assert of(four_bit=False).weights == 220_000_000
    assert (of().adapters, of().gradients, of().optimizer) == (800_000, 800_000, 1_600_000)
    assert of(checkpointing=False).activations > 5 * (of().activations - 100 * 160_000)
    assert of(max_length=50).activations * 2 == pytest.approx(of().activations, abs=2)
    assert sum(list(of().as_json().values())[:-1]) == of().total


def test_settings_that_fit_are_found_the_harmless_first(spec: TrainSpec) -> None:
    def total(one: TrainSpec) -> int:
        return forecast(MILLIONS, one, ("q_proj",), 2048, "cuda", 2).total

    def fits(most: int) -> Callable[[TrainSpec], bool]:
        return lambda one: total(one) <= most

    found = fitting(replace(spec, checkpointing=False), fits(total(replace(spec, batch=2))), 2048, four_bit=True)
    assert found == {"--gradient-checkpointing": "", "--gradient-accumulation-steps": 8, "--batch-size": 2}
    little = fitting(spec, fits(total(replace(spec, batch=1, rank=8, max_length=512))), 2048, four_bit=True)
    assert little["--max-length"] == 512
    assert fitting(spec, lambda _one: False, 2048, four_bit=True) == {}


def make_checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x" * 100)
    if whole:
        checkpoints.mark(path, 2.5, 7)
    return path


def test_a_checkpoint_that_is_not_whole_does_not_count(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 100)
    make_checkpoint(tmp_path, 200, whole=False)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.step, found.seconds, found.peak_bytes) == (100, 2.5, 7)
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_bytes(b"x" * 99)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_so_many_checkpoints_are_kept_and_the_best(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        make_checkpoint(tmp_path, step)
    for step in (9, 11):
        checkpoints.best_folder(tmp_path, step).mkdir()
    checkpoints.rotate(tmp_path, 2, best=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-9", "checkpoint-10", "checkpoint-11"]
    checkpoints.tidy(tmp_path, start=10, best=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-9", "checkpoint-10"]


def test_the_best_is_the_first_with_the_lowest_loss() -> None:
    history = [{"step": 1, "loss": 0.1}, {"step": 2, "eval_loss": 3.0}, {"step": 4, "eval_loss": 2.0},
               {"step": 6, "eval_loss": 2.0}, {"step": 8, "eval_loss": 2.5}]
    assert (checkpoints.best_step(history), checkpoints.evaluations_since_best(history)) == (4, 2)
    assert (checkpoints.best_step([]), checkpoints.evaluations_since_best([])) == (0, 0)
