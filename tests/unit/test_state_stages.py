"""The stages of fine-tunings in the ledger: found again, never rewritten, the way back from a hash."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from state.backup import latest_backup, restore_backup, write_backup
from state.check import repair, violations
from state.export import export_ledger
from state.ledger import Ledger
from state.records import StageSpec
from state.states import STAGE_TRANSITIONS, IllegalTransition, StageState, advance

INPUTS = {"files": {"model": {"path": "/m", "sha256": "a" * 64}}, "options": {"epochs": 3}}
OUTPUTS = {"files": {"adapter": {"path": "/a", "sha256": "b" * 64}}, "facts": {"loss": 0.5}}
#: begins a stage, says so, and keeps the ledger until killed
BEGIN = """
import sys
from pathlib import Path
from state.ledger import Ledger
from state.records import StageSpec
with Ledger.open(Path(sys.argv[1]), "test") as ledger:
    print(ledger.begin_stage(StageSpec("shop", "train", "1" * 32, {"files": {}})), flush=True)
    sys.stdin.read()
"""


def spec(name: str = "train", fingerprint: str = "1" * 32, **changes: Any) -> StageSpec:
    return StageSpec(**{"pipeline": "shop", "name": name, "fingerprint": fingerprint, "inputs": INPUTS, **changes})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "state", "test") as opened:
        yield opened


def test_a_stage_comes_back_as_it_was_given(ledger: Ledger) -> None:
    number = ledger.begin_stage(spec())
    row, = ledger.stages()
    assert (row["id"], row["pipeline"], row["name"], row["state"]) == (number, "shop", "train", "working")
    assert (row["inputs"], row["outputs"], row["owner_pid"]) == (INPUTS, {}, os.getpid())
    ledger.end_stage(number, StageState.FINISHED, outputs=OUTPUTS)
    row, = ledger.stages("shop")
    assert (row["state"], row["outputs"], row["owner_pid"]) == ("finished", OUTPUTS, None)
    assert row["ended_at"] >= row["started_at"]
    assert ledger.stages("another") == []


@pytest.mark.parametrize("state", [StageState.INTERRUPTED, StageState.FAILED])
def test_what_did_not_finish_goes_on_in_the_same_row(ledger: Ledger, state: StageState) -> None:
    number = ledger.begin_stage(spec())
    ledger.end_stage(number, state, "No disk.")
    assert ledger.stages()[0]["reason"] == "No disk."
    assert ledger.begin_stage(spec()) == number
    assert (ledger.stages()[0]["state"], ledger.stages()[0]["reason"]) == ("working", "")


def test_other_inputs_are_another_row(ledger: Ledger) -> None:
    number = ledger.begin_stage(spec())
    ledger.end_stage(number, StageState.INTERRUPTED)
    assert ledger.begin_stage(spec(fingerprint="2" * 32)) != number
    assert ledger.begin_stage(spec(pipeline="other")) != number
    assert ledger.begin_stage(spec("merge")) != number


def test_only_what_finished_counts_as_finished(ledger: Ledger) -> None:
    assert ledger.finished_stage("shop", "train", "1" * 32) is None
    number = ledger.begin_stage(spec())
    assert ledger.finished_stage("shop", "train", "1" * 32) is None
    ledger.end_stage(number, StageState.FAILED, outputs=OUTPUTS)
    assert ledger.finished_stage("shop", "train", "1" * 32) is None
    assert ledger.stages_that_made("b" * 64) == []
    number = ledger.begin_stage(spec())
    ledger.end_stage(number, StageState.FINISHED, outputs=OUTPUTS)
    again = ledger.begin_stage(spec())
    ledger.end_stage(again, StageState.FINISHED, outputs=OUTPUTS)
    found = ledger.finished_stage("shop", "train", "1" * 32)
    assert found is not None
    assert (found["id"], again > number) == (again, True)
    assert [row["id"] for row in ledger.stages_that_made("b" * 64)] == [again, number]
    assert ledger.stages_that_made("a" * 64) == []


def test_a_finished_stage_is_never_changed_not_even_by_hand(ledger: Ledger, tmp_path: Path) -> None:
    number = ledger.begin_stage(spec())
    ledger.end_stage(number, StageState.FINISHED, outputs=OUTPUTS)
    with pytest.raises(IllegalTransition):
        ledger.end_stage(number, StageState.FAILED)
    with pytest.raises(IntegrityError, match="finished stage cannot be changed"):
        ledger.end_stage(number, StageState.FINISHED, outputs={})
    connection = sqlite3.connect(tmp_path / "state" / "ledger.db")
    with pytest.raises(sqlite3.IntegrityError, match="finished stage cannot be changed"):
        connection.execute("UPDATE stage SET outputs = '{}'")
    connection.close()
    assert ledger.stages()[0]["outputs"] == OUTPUTS


def test_every_state_has_a_row() -> None:
    assert set(STAGE_TRANSITIONS) == set(StageState)


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(StageState, 2)))
def test_a_stage_takes_only_steps_of_the_table(old: StageState, new: StageState) -> None:
    if new in STAGE_TRANSITIONS[old]:
        assert advance(old, new) is new
    else:
        with pytest.raises(IllegalTransition, match=f"A stage cannot go from {old} to {new}"):
            advance(old, new)


def test_a_stage_whose_process_was_killed_is_found_and_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with subprocess.Popen([sys.executable, "-c", BEGIN, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert violations(state, tmp_path / "deploy") == [
        f"Stage {number} (train) is marked working, but its process is gone."]
    assert "Stage train of shop was interrupted." in repair(state, tmp_path / "deploy")
    assert violations(state, tmp_path / "deploy") == []
    assert repair(state, tmp_path / "deploy") == []
    with Ledger.open(state, "test") as ledger:
        assert ledger.begin_stage(spec()) == number


def test_a_stage_in_work_is_left_alone(ledger: Ledger) -> None:
    ledger.begin_stage(spec())
    assert ledger.recover_stages() == []
    assert ledger.stages()[0]["state"] == "working"


def test_stages_survive_a_restore_and_are_exported(ledger: Ledger) -> None:
    number = ledger.begin_stage(spec())
    ledger.end_stage(number, StageState.FINISHED, outputs=OUTPUTS)
    text = export_ledger(ledger, "json")
    assert isinstance(text, str)
    assert '"adapter"' in text
    write_backup(ledger)
    before = ledger.stages()
    ledger.close()
    assert latest_backup(ledger.state_dir) is not None
    restore_backup(ledger.state_dir, force=True)
    with Ledger.read(ledger.state_dir) as restored:
        assert restored.stages() == before
