"""Backups go round, refuse what is torn, and never take the place of something sound unasked."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from state.backup import BackupRefused, backups, latest_backup, restore_backup, write_backup
from state.export import export_ledger
from state.ledger import Ledger, LevelState, MeasurementRow, ReleaseRow, ResponseRow, RunSpec, StateBusy
from state.migrations import MIGRATIONS, LedgerNewer


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "state", "test") as ledger:
        run = ledger.start_run(RunSpec("m", "/m", "0" * 64, 9, {"ä": [1, 2.5]}, "plan", "b1"))
        ledger.plan_level(run, "Q2_K", 0, 5)
        ledger.update_level(run, "Q2_K", LevelState.WORKING, degradation=0.1 + 0.2)
        ledger.record_measurements(run, "", [MeasurementRow("perplexity", 5.0), MeasurementRow("x", None)])
        ledger.record_responses(run, "Q2_K", [ResponseRow("s1", 'say "hi", now', "line\none\x00", 3)])
        ledger.record_step("f", run, "Q2_K", "score", {"a": 1})
        ledger.record_event("started", run, None, {"a": None})
        ledger.record_crash("f", run, "Q2_K", "SIGSEGV")
        ledger.quarantine("f", "why")
        ledger.record_release(ReleaseRow("m", 1, run, "Q2_K", "a" * 64, 9, "/x"))
        yield ledger


def test_what_goes_into_a_backup_comes_out(filled: Ledger) -> None:
    before = str(export_ledger(filled, "json"))
    path = write_backup(filled)
    filled.close()
    (filled.state_dir / "ledger.db").unlink()
    assert restore_backup(filled.state_dir) == path
    with Ledger.open(filled.state_dir, "test") as ledger:
        assert str(export_ledger(ledger, "json")) == before
        ledger.record_event("still.writable")


def test_only_the_newest_backups_stay(filled: Ledger) -> None:
    written = [write_backup(filled, keep=2) for _ in range(4)]
    assert backups(filled.state_dir) == sorted(set(written), reverse=True)[:2]
    assert latest_backup(filled.state_dir) == written[-1]
    assert latest_backup(filled.state_dir).stat().st_mode & 0o777 == 0o600  # type: ignore[union-attr]


def test_an_open_ledger_is_not_restored_over(filled: Ledger) -> None:
    write_backup(filled)
    with pytest.raises(StateBusy):
        restore_backup(filled.state_dir, force=True)


def test_a_sound_ledger_is_replaced_only_by_force_and_then_kept(filled: Ledger) -> None:
    write_backup(filled)
    filled.record_event("later")
    filled.close()
    with pytest.raises(BackupRefused, match="--force"):
        restore_backup(filled.state_dir)
    restore_backup(filled.state_dir, force=True)
    with Ledger.read(filled.state_dir) as ledger:
        assert [row["action"] for row in ledger.events()] == ["started"]
        assert ledger.degraded is None
    aside = next(filled.state_dir.glob("ledger.db.damaged-*"))
    (filled.state_dir / "aside").mkdir()
    aside.rename(filled.state_dir / "aside" / "ledger.db")
    with Ledger.read(filled.state_dir / "aside") as ledger:
        assert [row["action"] for row in ledger.events()] == ["started", "later"]


@pytest.mark.parametrize("harm", ["torn", "edited", "empty", "list", "lacks"])
def test_a_damaged_backup_is_refused_and_the_older_offered(harm: str, filled: Ledger) -> None:
    older = write_backup(filled)
    filled.record_event("later")
    newer = write_backup(filled)
    filled.close()
    text = newer.read_text()
    document = json.loads(text)
    del document["tables"]["run"]
    newer.write_text({
        "torn": text[: len(text) // 2], "edited": text.replace("later", "never"), "empty": "", "list": "[]",
        "lacks": json.dumps(document),
    }[harm])
    before = (filled.state_dir / "ledger.db").read_bytes()
    with pytest.raises(BackupRefused, match=str(older)):
        restore_backup(filled.state_dir, force=True)
    assert (filled.state_dir / "ledger.db").read_bytes() == before
    restore_backup(filled.state_dir, older, force=True)


def test_a_backup_of_an_older_schema_migrates_and_of_a_newer_is_refused(filled: Ledger) -> None:
    path = write_backup(filled)
    filled.close()
    document = json.loads(path.read_text())
    for candidate in document["tables"]["candidate"]:
        del candidate["gates"], candidate["imatrix"]  # later steps brought them
    body = json.dumps(document["tables"], ensure_ascii=False, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps({**document, "migrations": [MIGRATIONS[0][0]]}))
    restore_backup(filled.state_dir, force=True)
    with Ledger.read(filled.state_dir) as ledger:
        assert ledger.migrations() == [name for name, _ in MIGRATIONS]
    path.write_text(json.dumps({**document, "migrations": ["999_future"]}))
    with pytest.raises(LedgerNewer):
        restore_backup(filled.state_dir, force=True)


def test_backups_of_the_fresh_ledger_do_not_push_out_those_of_the_lost_one(filled: Ledger) -> None:
    good = write_backup(filled)
    filled.close()
    (filled.state_dir / "ledger.db").write_bytes(b"ruined" * 100)
    with Ledger.open(filled.state_dir, "test") as fresh:
        for _ in range(4):
            write_backup(fresh, keep=1)
    assert latest_backup(filled.state_dir) == good
    assert restore_backup(filled.state_dir) == good


def test_no_backup_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BackupRefused, match="There is no backup"):
        restore_backup(tmp_path)


def test_exports_hold_every_table(filled: Ledger, tmp_path: Path) -> None:
    written = export_ledger(filled, "csv", tmp_path / "csv")
    assert {path.stem for path in map(Path, written)} >= {"run", "candidate", "response", "leaderboard"}
    with (tmp_path / "csv" / "response.csv").open(newline="") as stream:
        assert next(csv.DictReader(stream))["prompt"] == 'say "hi", now'
    assert export_ledger(filled, "json", tmp_path / "all.json") == [tmp_path / "all.json"]
    assert json.loads((tmp_path / "all.json").read_text())["run"][0]["plan"] == {"ä": [1, 2.5]}
    with pytest.raises(ValueError, match="needs a folder"):
        export_ledger(filled, "csv")
