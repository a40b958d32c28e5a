"""A fine-tuning in the service: it makes room in the middle of a training, and goes on at the step where it was."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_service import BUSY, QUIET, running

from loops.starter import rota

CONFIG = """
name = "rota"
folder = "work"
[dataset]
files = ["rota.jsonl"]
[train]
epochs = 4
batch = 8
accumulation = 1
learning_rate = 3e-3
rank = 8
four_bit = false
checkpointing = false
max_length = 64
eval_every = 1000
save_every = 1000
log_every = 1
"""


def stages(state: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(f"file:{state / 'ledger.db'}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT name, state FROM stage ORDER BY id").fetchall()


BRIEF = """
[calibrate]
matrix = "none"
[press]
levels = ["Q8_0"]
max_degradation = 0.5
evaluation_prompts = 3
max_prompts = 3
text_windows = 2
seeds = 1
gates = []
[evaluate]
enabled = false
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers", "peft", "accelerate")),
    reason="needs nightpress[train]")]


def test_the_command_hands_over_follows_and_prints_what_it_prints_by_itself(nightpress: Any, poll: Any) -> None:
    (nightpress.base / "rota.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rota.rows()))
    (nightpress.base / "rota.toml").write_text(CONFIG.replace("epochs = 4", "epochs = 0.05") + BRIEF)
    with running(nightpress.base) as service:
        service.start()
        poll(lambda: service.status() is not None, 30, "the service's answer")
        assert "leave --threads out" in nightpress("finetune", "rota.toml", "--threads", "1", status=13).stderr
        done = nightpress("finetune", "rota.toml", "--json")
        assert service.jobs() == {1: "done"}
        assert service.end() == 0
    assert "as job 1" in done.stderr
    assert "train" in done.stderr
    found = json.loads(done.stdout)
    assert (found["chosen"], [one["reused"] for one in found["stages"]]) == ("Q8_0", [False] * len(found["stages"]))
    alone = json.loads(nightpress("finetune", "rota.toml", "--json").stdout)
    assert alone == {**found, "stages": [{**one, "reused": True} for one in found["stages"]]}


def test_it_writes_a_checkpoint_makes_room_and_goes_on_where_it_was(nightpress: Any, poll: Any) -> None:
    (nightpress.base / "rota.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rota.rows()))
    (nightpress.base / "rota.toml").write_text(CONFIG)
    with running(nightpress.base) as service:
        service.start()
        poll(lambda: service.status() is not None, 30, "the service's answer")
        number = json.loads(nightpress("add", "rota.toml", "--json").stdout)["job"]
        work = nightpress.base / "work"
        poll(lambda: list(work.glob("train-*/checkpoints/before.json")), 240, "the training's begin")
        (worker,) = service.workers()
        service.feel(BUSY)
        poll(lambda: worker.status() == psutil.STATUS_STOPPED, 5, "the worker's stop")
        poll(lambda: not worker.is_running(), 40, "the worker's end")
        poll(lambda: service.jobs() == {number: "queued"}, 10, "the job's waiting")
        assert stages(nightpress.state)[-1] == ("train", "interrupted")
        (checkpoint,) = work.glob("train-*/checkpoints/checkpoint-*")
        service.feel(QUIET)
        poll(lambda: ("train", "finished") in stages(nightpress.state), 240, "the training's end")
        assert service.end() == 0
    (record,) = work.glob("train-*/training.json")
    done = json.loads(record.read_text())
    assert [step for step, _, _ in done["losses"]] == list(range(1, done["steps"] + 1))  # none twice, none left out
    assert 1 <= int(checkpoint.name.rpartition("-")[2]) < done["steps"]
