"""Killed, or out of space, at every failpoint of `state`: the invariants hold, the work can be repeated."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from state import releases
from state.backup import write_backup
from state.blobs import BlobStore
from state.check import repair, violations
from state.files import DiskFull
from state.ledger import Ledger, LevelState, RunSpec, RunState
from state.migrations import MIGRATIONS

SCRIPT = Path(__file__).parents[1] / "fakes" / "state_operations.py"
_spec = importlib.util.spec_from_file_location("state_operations", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
ops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ops)

CASES = {
    "files.written": "promote", "files.synced": "back_up",
    "promote.staged": "promote", "promote.verified": "promote", "promote.described": "promote",
    "promote.renamed": "promote", "promote.linked": "promote", "promote.swapped": "promote",
    "rollback.chosen": "rollback", "rollback.linked": "rollback", "rollback.swapped": "rollback",
    "retain.renamed": "retain",
    "blob.removed": "collect",
    "ledger.opened": "record", "ledger.commit": "record", "ledger.committed": "record",
    "ledger.recovering": "recover", "jobs.requeueing": "requeue", "migration.applied": "migrate",
    "ledger.set_aside_marked": "open_damaged", "ledger.set_aside_renamed": "open_damaged",
    "stage.beginning": "begin_stage", "stage.ending": "end_stage", "stages.recovering": "recover_stages",
    "backup.written": "back_up",
    "restore.built": "restore", "restore.set_aside": "restore", "restore.renamed": "restore",
}
# the manifest is written twice in a promotion, the schema in several steps: each passage is a case
PASSAGES = {"files.written": 2, "files.synced": 1, "migration.applied": len(MIGRATIONS)}
POINTS = [
    f"{name}@{passage}" if PASSAGES.get(name, 1) > 1 else name
    for name in CASES for passage in range(1, PASSAGES.get(name, 1) + 1)
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases 1 to 3 of the model m, the newest current; a ledger with a run, and its backup."""
    base = tmp_path_factory.mktemp("template")
    with Ledger.open(base / "state", "test") as ledger:
        run = ledger.start_run(RunSpec("m", "/m.gguf", "0" * 64, 9, {}, "plan", "b1"))
        ledger.plan_level(run, "Q2_K", 0)
        ledger.end_run(run, RunState.INTERRUPTED)
        for content in (ops.OLD, ops.OLD + b"2", ops.OLD + b"3"):
            ops.release(base, content)
        write_backup(ledger)
    ops.blob(base, ops.NEW)
    return base


@pytest.fixture
def base(template: Path, tmp_path: Path) -> Path:
    """A copy of the template; hard links become copies, which changes nothing here."""
    shutil.copytree(template, tmp_path / "base", symlinks=True)
    return tmp_path / "base"


def deployed(base: Path) -> int:
    found = releases.current(base / "deploy", "m")
    assert found is not None
    return found.number


def child(operation: str, base: Path, failpoint: str) -> int:
    environment = {**os.environ, "NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": failpoint}
    done = subprocess.run([sys.executable, str(SCRIPT), operation, str(base)], env=environment, timeout=120)
    return done.returncode


def assert_sound(base: Path, operation: str) -> None:
    """Nothing torn before repair, nothing left behind after it, and the same command succeeds."""
    expected = {"promote": {3, 4}, "rollback": {2, 3}}.get(operation, {3})
    number = deployed(base)
    assert number in expected
    repair(base / "state", base / "deploy")
    assert violations(base / "state", base / "deploy", deep=True) == []
    assert repair(base / "state", base / "deploy") == []
    assert deployed(base) == number
    ops.OPERATIONS[operation](base)
    assert violations(base / "state", base / "deploy", deep=True) == []
    with Ledger.read(base / "state") as ledger:
        ledger.candidates(1)


def test_every_failpoint_has_a_crash_case() -> None:
    names = []
    for source in Path(releases.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "failpoint":
                assert isinstance(node.args[0], ast.Constant), f"{source.name}: name the failpoint literally"
                names.append(node.args[0].value)
    assert sorted(names) == sorted(CASES), "a failpoint without a case, or a name used twice"


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_failpoint_nothing_is_torn(point: str, base: Path) -> None:
    operation = CASES[point.partition("@")[0]]
    assert child(operation, base, f"{point}:kill") == -signal.SIGKILL
    assert_sound(base, operation)


@pytest.mark.parametrize("point", POINTS)
def test_out_of_space_at_a_failpoint_is_a_sentence_and_nothing_is_torn(
    point: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = CASES[point.partition("@")[0]]
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", f"{point}:raise:ENOSPC")
    monkeypatch.setattr("state.faults._passages", {})
    with pytest.raises(DiskFull, match="is full; free some space"):
        ops.OPERATIONS[operation](base)
    monkeypatch.delenv("NIGHTPRESS_TESTING")
    if operation in ("promote", "rollback") and not point.endswith("swapped"):
        assert deployed(base) == 3, "the old release stays current"
        assert releases.stale(base / "deploy") == []
    assert_sound(base, operation)


def test_recovery_killed_and_repeated_ends_the_same(base: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "start_and_wait", str(base)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        run = int(process.stdout.readline())
        process.kill()
    assert any("its process is gone" in line for line in violations(base / "state", base / "deploy"))
    assert child("recover", base, "ledger.recovering:kill") == -signal.SIGKILL
    assert child("recover", base, "ledger.committed:kill") == -signal.SIGKILL
    repair(base / "state", base / "deploy")
    assert violations(base / "state", base / "deploy", deep=True) == []
    with Ledger.open(base / "state", "test") as ledger:
        assert ledger.recover() == []
        assert ledger.run(run)["state"] == RunState.INTERRUPTED
        assert ledger.candidates(run)[0]["state"] == LevelState.PLANNED
        assert ledger.find_resumable("plan") == run
    assert BlobStore(base / "state" / "blobs", 0).orphans() == []
