"""Pressing the starter through the real command line, as a user would."""

from __future__ import annotations

import json
import shutil
import sqlite3
from typing import Any

import pytest

from state.check import violations


def _summary(done: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def pressed_once(new_nightpress: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A finished quick run, and where it is: tests get copies."""
    first = new_nightpress(tmp_path_factory.mktemp("pressed"))
    return first, _summary(first.run("--json"))


@pytest.fixture
def pressed(nightpress: Any, pressed_once: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    """A finished quick run of the test's own."""
    first, summary = pressed_once
    for ours, theirs in ((nightpress.state, first.state), (nightpress.deploy, first.deploy)):
        shutil.copytree(theirs, ours, symlinks=True, dirs_exist_ok=True)
    return summary


def test_the_smallest_level_that_passes_is_released_and_verified(nightpress: Any, pressed: dict[str, Any]) -> None:
    current = nightpress.deploy / "starter" / "current"
    manifest = json.loads((current / "manifest.json").read_text())
    assert pressed["run"]["chosen_level"] == manifest["level"] == "Q4_K_M"
    assert (current / "model.gguf").stat().st_size == manifest["bytes"]
    assert manifest["verdict"]["state"] == "passed"
    assert manifest["smoke"]["reply"]
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []


def test_every_number_of_a_level_is_measured_and_recorded(nightpress: Any, pressed: dict[str, Any]) -> None:
    for level in pressed["levels"]:
        found = level["measurements"]
        assert level["bytes"] == level["forecast_bytes"]
        assert found["kl_divergence"]["value"] > 0
        assert found["kl_divergence"]["low"] < found["kl_divergence"]["value"] < found["kl_divergence"]["high"]
        assert 0.9 < found["same_top_token"]["value"] <= 1
        assert found["kl_divergence_p99"]["value"] >= found["kl_divergence_median"]["value"]
        assert found["degradation"]["low"] <= found["degradation"]["value"] <= found["degradation"]["high"]
        assert level["tokens_per_s"] > 0
        assert sum(1 for kind in level["tensor_types"].values() if kind != "F32") > 50


def test_the_ledger_reads_well_by_hand(nightpress: Any, pressed: dict[str, Any]) -> None:
    with sqlite3.connect(nightpress.state / "ledger.db") as connection:
        rows = connection.execute("select * from leaderboard").fetchall()
        latest = connection.execute("select level from latest_run").fetchall()
    assert len(rows) == 2
    assert [name for (name,) in latest] == ["Q8_0", "Q4_K_M"]


def test_the_same_command_again_measures_nothing_twice(nightpress: Any, pressed: dict[str, Any]) -> None:
    again = _summary(nightpress.run("--json"))
    assert again["run"]["id"] != pressed["run"]["id"]
    with sqlite3.connect(nightpress.state / "ledger.db") as connection:
        steps = connection.execute("select count(*) from step where run_id = ?", (again["run"]["id"],)).fetchone()
    assert steps == (0,)
    assert [row["measurements"] for row in again["levels"]] == [row["measurements"] for row in pressed["levels"]]
    assert len(list((nightpress.deploy / "starter" / "releases").iterdir())) == 1  # the same file is released once


def test_fresh_measures_again_and_finds_the_same(nightpress: Any, pressed: dict[str, Any]) -> None:
    again = _summary(nightpress.run("--fresh", "--json"))
    for before, after in zip(pressed["levels"], again["levels"], strict=True):
        assert after["measurements"]["kl_divergence"] == before["measurements"]["kl_divergence"]
        assert after["sha256"] == before["sha256"]


def test_the_summary_file_holds_what_is_needed_to_redo_the_run(nightpress: Any, pressed: dict[str, Any]) -> None:
    (file,) = (nightpress.state / "output").glob("pass1_summary_????????_??????.json")
    summary = json.loads(file.read_text())
    assert summary["plan"]["target_bytes"] == 24_000_000_000
    assert summary["plan"]["facts"]["text_sha256"]
    assert summary["run"]["model_sha256"] == pressed["run"]["model_sha256"]


def test_results_prints_the_last_any_and_a_comparison(nightpress: Any, pressed: dict[str, Any]) -> None:
    nightpress.run("--max-degradation", "0.0001", "--levels", "Q4_K_M", status=3)
    assert "Run 2" in nightpress("results").stdout
    assert "Run 1" in nightpress("results", "1").stdout
    compared = nightpress("results", "1", "2").stdout
    assert "run 1" in compared
    assert "run 2" in compared
    assert [row["id"] for row in json.loads(nightpress("results", "--all", "--json").stdout)] == [2, 1]
    replies = json.loads(nightpress("results", "1", "--replies", "q4_k_m", "--json").stdout)
    assert len(replies) in {4, 6}
    assert all(row["text"] and row["original"] for row in replies)


def test_a_level_that_misses_the_gate_is_not_released(nightpress: Any) -> None:
    done = nightpress.run("--levels", "Q2_K", "--max-degradation", "0", status=3)
    assert "No level passed" in done.stderr
    assert not (nightpress.deploy / "starter").exists()
    assert "only a level that passed" in nightpress("promote", "1", "Q2_K", status=45).stderr


def test_a_level_far_off_is_rejected_before_it_speaks(nightpress: Any) -> None:
    done = nightpress.run("--levels", "Q2_K", "--max-kld", "0.001", "--json", status=3)
    (level,) = json.loads(done.stdout)["levels"]
    assert level["state"] == "rejected"
    assert json.loads(nightpress("results", "1", "--replies", "Q2_K", "--json").stdout) == []


def test_once_measures_one_level_and_releases_nothing(nightpress: Any) -> None:
    done = nightpress.run("--run-once", "q5_k_m", "--json")
    assert [row["level"] for row in json.loads(done.stdout)["levels"]] == ["Q5_K_M"]
    assert not (nightpress.deploy / "starter").exists()
    assert "is deployed" in nightpress("promote").stdout
    assert (nightpress.deploy / "starter" / "current" / "model.gguf").exists()


def test_levels_over_the_target_are_never_built(nightpress: Any) -> None:
    summary = _summary(nightpress.run("--target-size", "5MB", "--json"))
    states = {row["level"]: (row["state"], row["sha256"]) for row in summary["levels"]}
    assert states["Q8_0"] == ("oversize", None)
    assert states["Q4_K_M"][0] == "passed"


def test_bisecting_finds_the_same_with_fewer_levels(nightpress: Any) -> None:
    summary = _summary(nightpress.run("--levels", "Q8_0,Q6_K,Q5_K_M,Q4_K_M", "--strategy", "bisect", "--json"))
    assert summary["run"]["chosen_level"] == "Q4_K_M"
    assert [row["state"] for row in summary["levels"]].count("skipped") >= 1


def test_simulated_results_are_marked_and_cannot_be_promoted(nightpress: Any) -> None:
    done = nightpress.run("--simulate")
    assert "Simulated: every figure above is invented" in done.stdout
    assert "SIMULATED" in done.stdout
    assert not (nightpress.deploy / "starter").exists()
    assert not list((nightpress.state / "blobs").glob("*.gguf"))
    assert "simulated" in nightpress("promote", "1", "Q8_0", status=45).stderr
    with sqlite3.connect(nightpress.state / "ledger.db") as connection:
        assert connection.execute("select * from leaderboard").fetchall() == []


def test_finished_levels_stay_under_the_disk_budget_and_the_release_stands(nightpress: Any) -> None:
    nightpress.run(NIGHTPRESS_DISK_BUDGET_BYTES="1000000")
    nightpress.run("--levels", "Q6_K", NIGHTPRESS_DISK_BUDGET_BYTES="1000000")
    assert len(list((nightpress.state / "blobs").glob("*.gguf"))) <= 2
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []
    assert (nightpress.deploy / "starter" / "current" / "model.gguf").exists()


def test_rollback_needs_no_ledger(nightpress: Any, pressed: dict[str, Any]) -> None:
    nightpress.run("--levels", "Q5_K_M")
    for file in nightpress.state.glob("ledger.db*"):
        file.unlink()
    assert "Release 1 of starter (Q4_K_M) is deployed again" in nightpress("rollback").stdout
    assert nightpress("releases").stdout.count("▸") == 1


def test_what_is_remembered_can_be_exported_and_restored(nightpress: Any, pressed: dict[str, Any]) -> None:
    nightpress("export", "--format", "csv", "-o", str(nightpress.base / "tables"))
    assert (nightpress.base / "tables" / "candidate.csv").read_text().count("\n") == 3
    assert len(json.loads(nightpress("export").stdout)["candidate"]) == 2
    nightpress("restore", status=43)
    (nightpress.state / "ledger.db").write_bytes(b"no database at all" * 100)
    assert "ledger" in nightpress("check", status=4).stdout
    nightpress("restore")
    assert json.loads(nightpress("results", "--json").stdout)["run"]["id"] == 1


def test_models_and_levels_can_be_looked_at(nightpress: Any, starter: Any) -> None:
    facts = json.loads(nightpress("inspect", str(starter), "--json").stdout)
    assert facts["parameters"] == 7_082_240
    assert "llama" in nightpress("inspect", str(starter)).stdout
    levels = json.loads(nightpress("levels", "--json").stdout)["levels"]
    assert len(levels) > 30
    assert next(row for row in levels if row["level"] == "IQ1_S")["needs_imatrix"]
    assert "Q4_K_M" in nightpress("levels", str(starter)).stdout
    assert "extra_buffers" in json.loads(nightpress("engine", "--json").stdout)["probe"]
    assert nightpress("--version").stdout.startswith("nightpress ")


def test_a_small_baseline_hides_little_and_says_how_little(nightpress: Any) -> None:
    windows = ("--text-windows", "12", "--json")  # the first group, of four, is always kept whole
    large, small = (_summary(nightpress.run(*windows, *more)) for more in ((), ("--baseline-disk", "1MB")))
    for whole, cut in zip(large["levels"], small["levels"], strict=True):
        exact, found = (row["measurements"]["kl_divergence"]["value"] for row in (whole, cut))
        hidden = cut["measurements"]["kl_divergence_truncation"]["value"]
        assert exact != found
        assert exact == pytest.approx(found + hidden, rel=0.02)


def test_a_finished_run_gives_its_scratch_back(nightpress: Any, pressed: dict[str, Any]) -> None:
    assert not [path for path in (nightpress.state / "scratch").rglob("*") if path.is_file()]
