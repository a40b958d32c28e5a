"""What the ledger remembers, answers and refuses."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import state
from state import (
    backup,
    blobs,
    damage,
    faults,
    files,
    ledger,
    lock,
    manifest,
    migrations,
    queries,
    releases,
    states,
)
from state.check import violations
from state.export import export_ledger
from state.ledger import (
    Ledger,
    LevelState,
    MeasurementRow,
    ReleaseRow,
    ResponseRow,
    RunSpec,
    RunState,
    UnknownRun,
)
from state.manifest import NotPromotable
from state.states import IllegalTransition

SPEC = RunSpec("m", "/m.gguf", "0" * 64, 9, {"levels": ["Q4_K_M", "Q2_K"]}, "plan", "b1")


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "state", "test") as opened:
        yield opened


def finished(opened: Ledger, *, simulated: bool = False) -> int:
    run = opened.start_run(RunSpec(**{**SPEC.__dict__, "simulated": simulated}))
    for ordinal, (level, size) in enumerate({"Q4_K_M": 4_500_000, "Q2_K": 2_600_000}.items()):
        opened.plan_level(run, level, ordinal, size)
        opened.update_level(run, level, LevelState.WORKING)
        opened.update_level(
            run, level, LevelState.PASSED, bytes=size, bits_per_weight=4.5, tensor_types={"a": "Q4_K"},
            degradation=0.021, degradation_low=-0.004, degradation_high=0.046, tokens_per_s=12.34)
        opened.record_measurements(run, level, [
            MeasurementRow("kl_divergence", 0.0123456, error=0.001, n=13_000),
            MeasurementRow("same_top_token", 0.951, unit="fraction"),
        ])
    opened.end_run(run, RunState.FINISHED, "Q2_K", "the smallest that passed")
    return run


def test_a_run_comes_back_as_recorded(open_ledger: Ledger) -> None:
    run = finished(open_ledger)
    open_ledger.set_summary(run, Path("/summary.json"))
    found = open_ledger.run(run)
    assert found["plan"] == SPEC.plan
    assert (found["state"], found["chosen_level"], found["simulated"]) == ("finished", "Q2_K", False)
    assert [row["level"] for row in open_ledger.candidates(run)] == ["Q4_K_M", "Q2_K"]
    assert open_ledger.candidates(run)[0]["tensor_types"] == {"a": "Q4_K"}
    assert open_ledger.latest_run_id() == run
    json.dumps([found, open_ledger.candidates(run), open_ledger.measurements(run)], allow_nan=False)


def test_a_level_takes_no_illegal_step_and_no_unknown_column(open_ledger: Ledger) -> None:
    run = open_ledger.start_run(SPEC)
    open_ledger.plan_level(run, "Q2_K", 0, 5)
    with pytest.raises(IllegalTransition):
        open_ledger.update_level(run, "Q2_K", LevelState.PASSED)
    with pytest.raises(TypeError, match="no column"):
        open_ledger.update_level(run, "Q2_K", simulated=False)
    with pytest.raises(UnknownRun):
        open_ledger.update_level(run, "Q3_K_M", LevelState.WORKING)
    open_ledger.update_level(run, "Q2_K", LevelState.WORKING)
    with pytest.raises(IllegalTransition, match="while a level is working"):
        open_ledger.end_run(run, RunState.FINISHED)
    assert open_ledger.run(run)["state"] == "running", "the refused step left nothing behind"
    open_ledger.end_run(run, RunState.INTERRUPTED)
    assert open_ledger.candidates(run)[0]["state"] == "planned"
    with pytest.raises(IllegalTransition, match="not running"):
        open_ledger.update_level(run, "Q2_K", LevelState.WORKING)
    assert open_ledger.find_resumable("plan") == run
    open_ledger.resume_run(run)
    assert open_ledger.find_resumable("plan") is None


def test_planning_again_keeps_the_result(open_ledger: Ledger) -> None:
    run = finished(open_ledger)
    open_ledger.plan_level(run, "Q2_K", 7, 123)
    level = open_ledger.candidates(run)[-1]
    assert (level["state"], level["ordinal"], level["forecast_bytes"]) == ("passed", 7, 123)


def test_numbers_that_are_not_finite_and_broken_text_do_not_break_json(open_ledger: Ledger) -> None:
    run = open_ledger.start_run(SPEC)
    open_ledger.record_measurements(run, "", [MeasurementRow("perplexity", float("inf"), low=float("nan"))])
    open_ledger.record_responses(
        run, "", [ResponseRow("s1", "p", "half \udc80 \x00", 3, {"x": float("nan")})])
    open_ledger.record_measurements(run, "", [])
    assert open_ledger.measurements(run)[0]["value"] is None
    assert open_ledger.responses(run, "")[0]["scores"] == {"x": None}
    json.loads(str(export_ledger(open_ledger, "json")), parse_constant=pytest.fail)


def test_recording_again_replaces(open_ledger: Ledger) -> None:
    run = open_ledger.start_run(SPEC)
    for value in (1.0, 2.0):
        open_ledger.record_measurements(run, "", [MeasurementRow("perplexity", value)])
        open_ledger.record_responses(run, "", [ResponseRow("s1", "p", str(value), 1)])
        open_ledger.record_step("f", run, "", "score", {"value": value})
    assert [row["value"] for row in open_ledger.measurements(run)] == [2.0]
    assert [row["text"] for row in open_ledger.responses(run, "")] == ["2.0"]
    assert open_ledger.steps(["f", "unknown"]) == {"f": {"value": 2.0}}


def test_a_fingerprint_that_crashes_is_counted_quarantined_and_released(open_ledger: Ledger) -> None:
    run = open_ledger.start_run(SPEC)
    assert [open_ledger.record_crash("f", run, "Q2_K", "SIGABRT", "x") for _ in range(2)] == [1, 2]
    open_ledger.quarantine("f", "two crashes: SIGABRT")
    assert open_ledger.quarantined() == {"f": "two crashes: SIGABRT"}
    assert open_ledger.release_quarantine("f") is True
    assert open_ledger.release_quarantine("f") is False
    assert open_ledger.crash_count("f") == 0


def test_a_hash_is_remembered_until_the_file_changes(open_ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    assert open_ledger.cached_hash(file) is None
    open_ledger.remember_hash(file, "a" * 64)
    assert open_ledger.cached_hash(file) == "a" * 64
    os.utime(file, ns=(1, 1))
    assert open_ledger.cached_hash(file) is None


def test_a_simulated_result_cannot_be_released_not_even_in_sql(open_ledger: Ledger) -> None:
    run = finished(open_ledger, simulated=True)
    row = ReleaseRow("m", 1, run, "Q2_K", "a" * 64, 9, "/x")
    with pytest.raises(NotPromotable):
        open_ledger.record_release(row)
    real = finished(open_ledger)
    open_ledger.record_release(ReleaseRow("m", 1, real, "Q2_K", "a" * 64, 9, "/x"))
    connection = sqlite3.connect(open_ledger.state_dir / "ledger.db", isolation_level=None)
    for statement in (
        f"INSERT INTO release VALUES (9, 'm', 2, {run}, 'Q2_K', '', 1, '', '', NULL, 0)",  # noqa: S608
        f"INSERT INTO release VALUES (9, 'm', 2, {real}, 'Q2_K', '', 1, '', '', NULL, 1)",  # noqa: S608
        f"UPDATE release SET run_id = {run}", "UPDATE release SET simulated = 1",  # noqa: S608
        "UPDATE run SET simulated = 0", "UPDATE candidate SET simulated = 0",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(statement)
    connection.close()
    assert [row["run_id"] for row in open_ledger.releases("m")] == [real]


def test_the_views_read_well_by_hand(open_ledger: Ledger) -> None:
    run = finished(open_ledger)
    open_ledger.record_release(ReleaseRow("m", 1, run, "Q2_K", "a" * 64, 9, "/x"))
    assert open_ledger.leaderboard()[0] == {
        "model": "m", "level": "Q2_K", "mb": 2.6, "bpw": 4.5, "degradation_pct": 2.1,
        "interval": "-0.4 to +4.6 %", "kld": 0.01235, "same_top_pct": 95.1, "tokens_per_s": 12.3,
        "verdict": "passed", "run": run, "promoted": "yes",
    }
    open_ledger.mark_rolled_back("m", 1)
    assert open_ledger.leaderboard()[0]["promoted"] == "no"
    finished(open_ledger, simulated=True)
    assert len(open_ledger.leaderboard()) == 2, "simulated runs do not appear"
    assert [row["level"] for row in open_ledger.rows("SELECT * FROM latest_run")] == ["Q4_K_M", "Q2_K"]


def test_threads_share_one_ledger(open_ledger: Ledger) -> None:
    threads = [
        threading.Thread(target=lambda: [open_ledger.record_event("e") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(open_ledger.events(limit=1000)) == 80
    assert [row["id"] for row in open_ledger.events(after_id=78)] == [79, 80]


def test_a_run_of_this_very_process_is_not_recovered_while_it_works(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, "test") as opened:
        opened.start_run(SPEC)
        assert opened.recover() == []
        assert violations(tmp_path, tmp_path / "deploy") == []
    with Ledger.open(tmp_path, "test") as opened:
        assert opened.recover() == ["Run 1 of m was interrupted."]
        assert opened.recover() == []


def test_hand_made_views_are_not_taken_for_damage(tmp_path: Path) -> None:
    Ledger.open(tmp_path, "test").close()
    subprocess.run(["sqlite3", tmp_path / "ledger.db", "CREATE VIEW mine AS SELECT 1"], check=True)
    with Ledger.open(tmp_path, "test") as opened:
        assert opened.degraded is None


def test_only_the_owner_reads_the_state(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "a" / "state", "test").close()
    assert (tmp_path / "a" / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "state" / "ledger.db").stat().st_mode & 0o777 == 0o600


def test_a_state_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(files.StateUnwritable, match="name another"):
        Ledger.open(tmp_path / "state", "test")


def test_every_error_has_a_sentence_and_an_exit_code_of_its_own() -> None:
    modules = (backup, blobs, damage, files, ledger, lock, manifest, migrations, queries, releases, states)
    errors = {
        value for module in modules for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, faults.NightpressError)
    } - {faults.NightpressError}
    codes = [error.exit_code for error in errors]
    assert len(set(codes)) == len(codes)
    for error in errors:
        assert error.exit_code in {14, 75} or 40 <= error.exit_code <= 59  # 14: a job, as others of the service
        assert str(error()).endswith(".")


def test_state_imports_no_other_package_and_rollback_no_database() -> None:
    folder = Path(str(state.__file__)).parent
    for source in folder.glob("*.py"):
        text = source.read_text()
        for package in ("daemon", "loops", "calibration_data"):
            assert f"import {package}" not in text
            assert f"from {package}" not in text
        if source.name not in ("jobs.py", "stages.py", "ledger.py", "schema.py", "transaction.py"):
            assert "sqlmodel" not in text.replace("SQLModel", "")
