"""The ledger against SIGKILL, a second opener, a full disk and broken files."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from state.backup import latest_backup, restore_backup, write_backup
from state.damage import diagnose
from state.files import DiskFull
from state.ledger import Ledger, LedgerDamaged, LedgerMissing, LevelState, RunSpec, RunState, StateBusy
from state.migrations import MIGRATIONS, LedgerNewer, applied, migrate
from state.schema import TABLES

SCRIPT = Path(__file__).parents[1] / "fakes" / "state_operations.py"
_spec = importlib.util.spec_from_file_location("state_operations", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
ops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ops)

SPEC = RunSpec("m", "/m.gguf", "0" * 64, 9, {"levels": ["Q2_K"]}, "plan", "b1")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a few hundred rows over many pages, and one backup."""
    state = tmp_path_factory.mktemp("template") / "state"
    with Ledger.open(state, "test") as ledger:
        run = ledger.start_run(SPEC)
        ledger.plan_level(run, "Q2_K", 0)
        ledger.update_level(run, "Q2_K", LevelState.WORKING)
        ledger.update_level(run, "Q2_K", LevelState.PASSED, bytes=100)
        for number in range(40):
            ledger.record_step(f"{number}" * 8, run, "Q2_K", "score", {"text": "x" * 900})
        ledger.end_run(run, RunState.FINISHED)
        write_backup(ledger)
    return state


@pytest.fixture
def state(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "state")
    return tmp_path / "state"


def aside(state: Path) -> list[Path]:
    """Return the databases that were set aside, without their side files."""
    return [file for file in state.glob("ledger.db.damaged-*") if not file.name.endswith(("-wal", "-shm"))]


def test_acknowledged_rows_survive_sigkill(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "write_on", str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(100):
            acknowledged = int(process.stdout.readline())
        process.kill()
        for line in process.stdout:
            if line.endswith(b"\n"):
                acknowledged = int(line)
    with Ledger.open(tmp_path / "state", "test") as ledger:
        found = [event["id"] for event in ledger.events(limit=100_000)]
        assert ledger.degraded is None
    assert found[:acknowledged] == list(range(1, acknowledged + 1))


def test_every_commit_is_synced(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "state", "test") as ledger:
        assert ledger.rows("PRAGMA journal_mode")[0]["journal_mode"] == "wal"
        assert ledger.rows("PRAGMA synchronous")[0]["synchronous"] == 2
        assert ledger.rows("PRAGMA foreign_keys")[0]["foreign_keys"] == 1


def test_a_second_opener_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "start_and_wait", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = rf"process {process.pid} \(nightpress run model.gguf\)"
        with pytest.raises(StateBusy, match=first) as caught:
            Ledger.open(tmp_path / "state", "nightpress daemon")
        assert caught.value.exit_code == 75
        with Ledger.read(tmp_path / "state") as ledger:
            assert ledger.runs()[0]["state"] == "running", "reading goes on beside the writer"
        process.kill()
    Ledger.open(tmp_path / "state", "test").close()


@pytest.mark.parametrize("damage", ["garbage", "zeroed", "truncated", "short", "emptied", "text"])
def test_a_damaged_ledger_is_set_aside_and_restored(damage: str, state: Path) -> None:
    path = state / "ledger.db"
    content = path.read_bytes()
    broken = {
        "garbage": random.Random(7).randbytes(100) + content[100:], "zeroed": bytes(100) + content[100:],
        "truncated": content[: len(content) // 2 // 4096 * 4096], "short": content[:50], "emptied": b"",
        "text": b"this is not a database at all\n" * 50,
    }[damage]
    path.write_bytes(broken)
    if broken:
        with pytest.raises(LedgerDamaged, match="nightpress restore"):
            Ledger.read(state)
    with Ledger.open(state, "test") as ledger:
        assert "nightpress restore" in str(ledger.degraded)
        assert ledger.runs() == []
        write_backup(ledger, keep=1)
    assert [file.read_bytes() for file in aside(state)] == [broken], "nothing overwrites the damaged file"
    restore_backup(state)
    with Ledger.open(state, "test") as ledger:
        assert ledger.degraded is None
        assert ledger.candidates(1)[0]["state"] == "passed"
        assert len(ledger.steps()) == 40


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_are_found_or_harmless(seed: int, state: Path) -> None:
    path, draw = state / "ledger.db", random.Random(seed)
    content = bytearray(path.read_bytes())
    page = draw.randrange(len(content) // 4096) * 4096
    for _ in range(40):
        content[page + draw.randrange(4096)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    try:
        ledger = Ledger.open(state, "test")
    except LedgerNewer:
        assert path.read_bytes() == content
        return
    with ledger:
        ledger.record_event("still.writable")
        assert bool(aside(state)) == bool(ledger.degraded)
        for file in aside(state):
            assert file.read_bytes() == content


def test_two_ledgers_damaged_at_once_both_stay(state: Path) -> None:
    for text in (b"first" * 99, b"second" * 99):
        (state / "ledger.db").write_bytes(text)
        for side in state.glob("ledger.db-*"):
            side.unlink()
        Ledger.open(state, "test").close()
    assert {file.read_bytes()[:5] for file in aside(state)} == {b"first", b"secon"}


def test_the_log_of_a_lost_ledger_is_not_replayed_into_a_new_one(state: Path) -> None:
    (state / "ledger.db-wal").write_bytes(b"stray")
    (state / "ledger.db").unlink()
    with Ledger.open(state, "test") as ledger:
        assert ledger.runs() == []
    assert [file.read_bytes() for file in state.glob("ledger.db-wal.damaged-*")] == [b"stray"]


def test_a_newer_ledger_is_refused_untouched(state: Path) -> None:
    with sqlite3.connect(state / "ledger.db", isolation_level=None) as connection:
        connection.execute("INSERT INTO migration VALUES ('999_future', 'now')")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = (state / "ledger.db").read_bytes()
    for opened in (lambda: Ledger.open(state, "test"), lambda: Ledger.read(state)):
        with pytest.raises(LedgerNewer, match="999_future"):
            opened()
    assert (state / "ledger.db").read_bytes() == before
    assert list(state.glob("*.damaged-*")) == []


@pytest.mark.parametrize("steps", range(len(MIGRATIONS)))
def test_an_old_ledger_migrates_and_keeps_its_rows(steps: int, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    migrate(connection, upto=MIGRATIONS[steps][0])
    connection.execute(
        "INSERT INTO run (created_at, name, model_path, model_sha256, model_bytes, plan, plan_fingerprint, "
        "state, simulated, engine) VALUES ('2026', 'm', '/m', '', 1, '{}', 'f', 'finished', 0, 'e')")
    connection.close()
    with Ledger.open(tmp_path, "test") as ledger:
        assert ledger.migrations() == [name for name, _ in MIGRATIONS]
        assert ledger.run(1)["name"] == "m"
        assert ledger.leaderboard() == []
    assert diagnose(tmp_path / "ledger.db") is None


def test_the_classes_and_the_tables_have_the_same_columns() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    assert applied(connection) == [name for name, _ in MIGRATIONS]
    for table in TABLES:
        name = str(table.__tablename__)
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
        assert sorted(columns) == sorted(table.model_fields), name
    connection.close()


def test_a_full_database_is_a_sentence_and_loses_nothing(state: Path) -> None:
    with Ledger.open(state, "test") as ledger:
        pages = ledger.rows("PRAGMA page_count")[0]["page_count"]
        ledger.rows(f"PRAGMA max_page_count={pages}")
        with pytest.raises(DiskFull, match="finished work is kept"):
            ledger.record_step("big", 1, "", "k", {"text": "x" * 100_000})
        assert len(ledger.steps()) == 40
        ledger.rows("PRAGMA max_page_count=100000")
        ledger.record_step("big", 1, "", "k", {"text": "x" * 100_000})


def test_reading_before_the_first_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerMissing, match="nightpress run"):
        Ledger.read(tmp_path / "nowhere")
    assert latest_backup(tmp_path / "nowhere") is None
