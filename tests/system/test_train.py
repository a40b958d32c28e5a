"""`nightpress train` through the real command line: killed, asked to end, gone on to the same bits."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from state.files import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers", "peft", "accelerate")),
    reason="needs nightpress[train]")]
STEPS = 16


@pytest.fixture(scope="module")
def place(isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, `Tiny`, and a dataset, `data`."""
    from hf_model import make_model

    folder = tmp_path_factory.mktemp("train")
    make_model(folder / "Tiny")
    (folder / "data").mkdir()
    for name, count in (("train", 64), ("validation", 6)):
        (folder / "data" / f"{name}.json").write_text(json.dumps([{"messages": [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}. " * (1 + number % 3)}]}
            for number in range(count)]))
    return folder


def call(place: Path, output: str) -> tuple[str, ...]:
    return ("train", "--model-name", str(place / "Tiny"), "--dataset-path", str(place / "data"), "-o", output,
            "--epochs", "2", "--batch-size", "2", "--gradient-accumulation-steps", "4", "--lora-r", "8",
            "--learning-rate", "0.01", "--save-steps", "3", "--eval-steps", "4", "--logging-steps", "1",
            "--threads", "1", "--device", "cpu")


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if (found := re.match(r"Step (\d+) of", line)) and int(found[1]) >= step:
            return
    pytest.fail(f"step {step} never came")


def test_a_training_that_was_killed_and_stopped_ends_with_the_same_bits(nightpress: Any, place: Path) -> None:
    whole = nightpress(*call(place, "whole"))
    record = json.loads((nightpress.base / "whole" / "training.json").read_text())
    assert (record["steps"], record["dataset"]["files"]["train.json"]["sha256"]) == (
        STEPS, sha256_file(place / "data" / "train.json"))
    assert record["validation_loss"] < 0.9 * record["validation_loss_before"]
    assert "lower" in whole.stdout

    killed_at, stopped_at = sorted(random.SystemRandom().sample(range(3, STEPS - 1), 2))
    with nightpress.start(*call(place, "parts")) as process:
        wait_for_step(process, killed_at)
        process.kill()
    with nightpress.start(*call(place, "parts")) as process:
        wait_for_step(process, stopped_at)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    steps = [int(path.parent.name.rpartition("-")[2])
             for path in (nightpress.base / "parts" / "checkpoints").glob("checkpoint-*/complete.json")]
    assert max(steps) >= stopped_at, "it wrote no checkpoint when it was asked to end"
    again = nightpress(*call(place, "parts"))
    assert f"Going on after step {max(steps)} of {STEPS}" in again.stderr
    parts = json.loads((nightpress.base / "parts" / "training.json").read_text())
    for name in ("best_step", "validation_loss", "validation_losses", "validation_loss_before"):
        assert parts[name] == record[name], (name, killed_at, stopped_at)
    adapters = {sha256_file(nightpress.base / name / "adapter_model.safetensors") for name in ("whole", "parts")}
    last = {sha256_file(nightpress.base / name / "checkpoints" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
            for name in ("whole", "parts")}
    assert (len(adapters), len(last)) == (1, 1), (killed_at, stopped_at)

    done = nightpress(*call(place, "parts"), "--json")
    assert json.loads(done.stdout)["was_there"] is True
    other = nightpress(*call(place, "parts"), "--seed", "5", status=106)
    assert "seed 0 instead of 5" in other.stderr


def test_a_training_that_is_paused_goes_on(place: Path, isolated: Path) -> None:
    from daemon.grip import Grip
    from daemon.settings import Settings
    from daemon.training import TrainSpec, train
    from loops.events import Event, Note

    grip, notes = Grip(), []

    def show(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.message)
            if event.message.startswith("Step 2 "):
                grip.stop()
                threading.Event().wait(0.5)
                grip.go_on()
    spec = TrainSpec(place / "Tiny", place / "data", isolated / "out", epochs=1, rank=4, patience=1, eval_every=1,
                     learning_rate=1e-30, log_every=1, threads=1, device="cpu")
    done = train(spec, Settings.load(), grip, show)
    assert (done.steps, done.best_step, done.improved) == (2, 1, False)
    assert "Stopping early: no better for 1 evaluation." in notes


def test_a_setting_that_makes_no_sense_is_one_sentence(nightpress: Any, place: Path) -> None:
    found = nightpress(*call(place, "x"), "--lora-dropout", "1.5", status=106)
    assert found.stderr == "nightpress: dropout is 1.5; it is from 0 to below 1.\n"
