"""Crashes, kills and full disks: one level is lost at most, and the end is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon.grip import Grip
from daemon.workers import WorkerProcess
from state.check import violations


def _figures(nightpress: Any) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way."""
    summary = json.loads(nightpress("results", "--json").stdout)
    return {"chosen": summary["run"]["chosen_level"], "state": summary["run"]["state"], "levels": [
        (row["level"], row["state"], row["sha256"], row["degradation"], row["degradation_high"],
         {name: found["value"] for name, found in row["measurements"].items()}) for row in summary["levels"]]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, new_nightpress: Any) -> dict[str, Any]:
    """The figures of a run that nothing happened to."""
    one = new_nightpress(tmp_path_factory.mktemp("undisturbed"))
    one.run()
    return _figures(one)


#: where the foreground process or its worker is killed -> whether the process itself dies
KILLS = {"supervisor.step@1:kill": True, "supervisor.step@4:kill": True, "supervisor.step@7:kill": True,
         "press.chosen:kill": True, "press.promoted:kill": True, "promote.renamed:kill": True,
         "backup.written:kill": True, "ledger.committed@40:kill": True,
         "baseline.group:kill": False, "divergence.group:kill": False, "quantize.verified@2:kill": False,
         "quantize.renamed@2:kill": False}


@pytest.mark.parametrize("point", KILLS)
def test_killed_anywhere_the_same_command_ends_with_the_same_figures(
        nightpress: Any, undisturbed: dict[str, Any], point: str) -> None:
    with nightpress.start("run", *nightpress.QUICK, NIGHTPRESS_TESTING="1", NIGHTPRESS_FAILPOINT=point) as process:
        process.communicate(timeout=120)
    if KILLS[point]:
        assert process.returncode == -signal.SIGKILL
    nightpress.run()
    assert _figures(nightpress) == undisturbed
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []


@pytest.mark.parametrize("action", ["abort", "segv", "kill"])
def test_a_native_crash_is_retried_and_costs_nothing(nightpress: Any, undisturbed: dict[str, Any], action: str) -> None:
    done = nightpress.run(NIGHTPRESS_TESTING="1", NIGHTPRESS_FAILPOINT=f"quantize.written@2:{action}")
    name = {"abort": "SIGABRT", "segv": "SIGSEGV", "kill": "SIGKILL"}[action]
    assert f"{name}) on Q4_K_M; trying once more" in done.stderr
    assert _figures(nightpress) == undisturbed


def test_a_level_that_kills_the_engine_twice_is_quarantined_and_the_run_goes_on(nightpress: Any) -> None:
    armed = {"NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": "quantize.written:segv"}
    summary = json.loads(nightpress.run("--json", status=3, **armed).stdout)
    assert [row["state"] for row in summary["levels"]] == ["quarantined", "quarantined"]
    assert all("SIGSEGV" in row["reason"] for row in summary["levels"])
    assert summary["run"]["state"] == "finished"
    # harmless now, but remembered: not tried again until it is released
    again = json.loads(nightpress.run("--json", status=3).stdout)
    assert [row["state"] for row in again["levels"]] == ["quarantined", "quarantined"]
    for key in json.loads(nightpress("quarantine", "--json").stdout):
        nightpress("quarantine", "--release", key)
    nightpress.run()


def test_an_engine_that_dies_on_the_original_fails_the_run_with_a_sentence(nightpress: Any) -> None:
    done = nightpress.run("--text-windows", "24", status=71, NIGHTPRESS_TESTING="1",
                          NIGHTPRESS_FAILPOINT="baseline.group:abort")
    assert "SIGABRT" in done.stderr
    with sqlite3.connect(nightpress.state / "ledger.db") as connection:
        assert connection.execute("select state from run").fetchall() == [("failed",)]


def test_a_level_over_its_deadline_is_recorded_and_the_run_goes_on(nightpress: Any) -> None:
    done = nightpress.run("--timeout", "10", "--json", status=3, NIGHTPRESS_TESTING="1",
                          NIGHTPRESS_FAILPOINT="quantize.written:stop")
    assert [row["state"] for row in json.loads(done.stdout)["levels"]] == ["timed_out", "timed_out"]


def test_ctrl_c_stops_cleanly_and_the_same_run_goes_on(nightpress: Any, poll: Any, undisturbed: dict[str, Any]) -> None:
    database = nightpress.state / "ledger.db"

    def steps() -> int:
        try:
            with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
                return int(connection.execute("select count(*) from step").fetchone()[0])
        except sqlite3.Error:
            return 0

    with nightpress.start("run", *nightpress.QUICK) as process:
        poll(lambda: steps() >= 3 or process.poll() is not None, 120, "the third step")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "goes on where it was" in err
    nightpress.run()
    assert _figures(nightpress) == undisturbed
    with sqlite3.connect(database) as connection:
        assert connection.execute("select count(*) from run").fetchone() == (1,)


@pytest.mark.parametrize("passage", range(1, 10))
def test_a_disk_full_at_any_write_loses_nothing(nightpress: Any, undisturbed: dict[str, Any], passage: int) -> None:
    with nightpress.start("run", *nightpress.QUICK, NIGHTPRESS_TESTING="1",
                          NIGHTPRESS_FAILPOINT=f"files.written@{passage}:raise:ENOSPC") as process:
        _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode in {0, 50}
    if process.returncode == 50:
        assert "full" in err
    nightpress("check", "--repair")
    nightpress.run()
    assert _figures(nightpress) == undisturbed


def test_a_damaged_ledger_is_set_aside_and_the_release_stays(nightpress: Any) -> None:
    nightpress.run()
    database = nightpress.state / "ledger.db"
    damaged = b"\x00" * 4096 + database.read_bytes()[4096:]
    database.write_bytes(damaged)
    done = nightpress.run("--simulate")
    assert "nightpress restore" in done.stderr
    (aside,) = nightpress.state.glob("ledger.db.damaged-*[0-9Z]")
    assert aside.read_bytes() == damaged
    assert "▸" in nightpress("releases").stdout
    nightpress("restore", "--force")
    assert json.loads(nightpress("results", "1", "--json").stdout)["run"]["chosen_level"] == "Q4_K_M"


def test_a_stored_level_that_changed_on_disk_is_not_promoted(nightpress: Any) -> None:
    nightpress.run("--once", "Q8_0")
    (blob,) = (nightpress.state / "blobs").glob("*.gguf")
    content = bytearray(blob.read_bytes())
    content[-5000] ^= 0xFF
    blob.chmod(0o644)
    blob.write_bytes(bytes(content))
    assert "changed on disk" in nightpress("promote", status=49).stderr
    assert not (nightpress.deploy / "starter").exists()


def test_no_secret_reaches_the_worker_or_any_file(nightpress: Any, monkeypatch: pytest.MonkeyPatch,
                                                   poll: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-tell-nobody")
    with WorkerProcess({"job": "engine"}, tmp_path / "log", Grip()) as worker:
        environment = Path(f"/proc/{worker.process.pid}/environ")
        if environment.exists():
            poll(lambda: b"GGML_NO_BACKTRACE" in environment.read_bytes(), 5, "the worker's environment")
            assert b"sk-tell-nobody" not in environment.read_bytes()
    nightpress.run(ANTHROPIC_API_KEY="sk-tell-nobody")
    for file in nightpress.base.rglob("*"):
        if file.is_file():
            assert b"sk-tell-nobody" not in file.read_bytes(), file


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_pressing_needs_no_network(nightpress: Any) -> None:
    inside = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no network namespaces")
    program = [str(Path(sys.executable).with_name("nightpress")), "run", *nightpress.QUICK]
    done = subprocess.run([*inside, *program], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **nightpress.places})
    assert done.returncode == 0, done.stderr


def test_a_cpu_that_does_not_survive_extra_buffers_is_found_out_and_remembered(nightpress: Any) -> None:
    armed = {"NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": "probe.level@3:segv"}
    found = json.loads(nightpress("engine", "--again", "--json", **armed).stdout)["probe"]
    assert found["extra_buffers"] is False
    assert "SIGSEGV" in found["reason"]
    assert json.loads(nightpress("engine", "--json").stdout)["probe"] == found
    assert "Extra buffers are off" in nightpress.run("--once", "Q8_0").stderr
