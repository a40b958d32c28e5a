"""The service as its users meet it: it waits, works, makes room, goes on, obeys, and ends."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_service import BUSY, QUIET, Running, running

from loops.starter import STARTER_GGUF
from state.check import violations

QUICK = ("--text-windows", "4", "--evaluation-prompts", "4", "--max-prompts", "6", "--levels", "Q8_0,Q4_K_M")


@pytest.fixture
def service(nightpress: Any) -> Iterator[Running]:
    """A service on the test's folders, not started yet."""
    with running(nightpress.base) as one:
        yield one


def began(service: Running, poll: Any) -> dict[str, Any]:
    """Start the service and wait until it answers."""
    service.start()
    assert service.process is not None
    poll(lambda: service.status() is not None or service.process.poll() is not None, 30, "the service's answer")
    status = service.status()
    assert status is not None, service.log()
    return status


def at(service: Running, poll: Any, state: str, deadline_s: float = 60) -> dict[str, Any]:
    """Wait until the service is in a state."""
    poll(lambda: (service.status() or {}).get("state") == state, deadline_s, f"the state {state}")
    return service.status() or {}


def add(service: Running, **wanted: Any) -> int:
    """Queue the starter, quickly measured."""
    from daemon.settings import Settings
    from loops.engine.options import EngineOptions
    from loops.pass1.plan import PressPlan

    plan = PressPlan(model=str(STARTER_GGUF), name=wanted.pop("name", "starter"), blobs="", scratch="",
                     levels=("Q8_0", "Q4_K_M"), text_windows=4, first_scenarios=4, max_scenarios=6,
                     options=EngineOptions(threads=Settings.load().threads))
    with service.client() as client:
        return int(client.ask("add", {"plan": plan.as_json(), **wanted})["job"])


def test_it_waits_while_the_machine_is_in_use_and_works_when_it_is_idle(
        service: Running, nightpress: Any, poll: Any) -> None:
    service.feel(BUSY)
    began(service, poll)
    number = add(service)
    waiting = at(service, poll, "waiting")
    assert waiting["reason"] == "busy: cpu 80 % > 15 %"
    assert waiting["next"]["id"] == number
    assert service.workers() == []
    service.feel(QUIET)
    poll(lambda: service.jobs()[number] == "done", 120, "the job's end")
    status = service.status()
    assert status is not None
    assert status["release"]["level"] == "Q4_K_M"
    assert status["conditions"] == {}
    assert service.end() == 0
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []


def test_somebody_is_back_the_worker_stops_within_a_second_and_its_memory_is_freed(
        service: Running, nightpress: Any, poll: Any) -> None:
    began(service, poll)
    number = add(service)
    at(service, poll, "working")
    poll(lambda: any(worker.memory_info().rss > 50e6 for worker in service.workers()), 60, "the worker at work")
    (worker,) = service.workers()
    service.feel(BUSY)
    poll(lambda: worker.status() == psutil.STATUS_STOPPED, 5, "the worker's stop")
    assert at(service, poll, "stopped")["reason"] == "busy: cpu 80 % > 15 %"
    poll(lambda: not worker.is_running(), 20, "the worker's end")
    poll(lambda: service.jobs() == {number: "queued"}, 10, "the job's waiting")
    service.feel(QUIET)
    poll(lambda: service.jobs()[number] == "done", 120, "the job's end")
    with sqlite3.connect(nightpress.state / "ledger.db") as connection:
        assert connection.execute("select count(*) from run").fetchone() == (1,)  # the same run went on


def test_a_short_disturbance_stops_the_worker_and_does_not_end_it(service: Running, nightpress: Any, poll: Any) -> None:
    service.environment["NIGHTPRESS_YIELD_AFTER_S"] = "600"
    began(service, poll)
    number = add(service)
    poll(lambda: any(worker.memory_info().rss > 50e6 for worker in service.workers()), 60, "the worker at work")
    (worker,) = service.workers()
    service.feel(BUSY)
    poll(lambda: worker.status() == psutil.STATUS_STOPPED, 5, "the worker's stop")
    service.feel(QUIET)
    poll(lambda: not worker.is_running() or worker.status() != psutil.STATUS_STOPPED, 10, "the worker going on")
    assert service.workers() in ([worker], [])
    poll(lambda: service.jobs()[number] == "done", 120, "the job's end")


def test_short_memory_ends_a_stopped_worker_at_once(service: Running, poll: Any) -> None:
    service.environment["NIGHTPRESS_YIELD_AFTER_S"] = "600"
    began(service, poll)
    add(service)
    poll(service.workers, 60, "the worker")
    (worker,) = service.workers()
    service.feel("memory 40 10 %\n")
    poll(lambda: not worker.is_running(), 10, "the worker's end")


def test_what_was_asked_for_runs_whatever_the_load(service: Running, nightpress: Any, poll: Any) -> None:
    service.feel(BUSY)
    began(service, poll)
    first, second = add(service, name="first"), add(service, name="second")
    answer = json.loads(nightpress("run-now", str(second), "--json").stdout)
    assert answer["state"] == "started"
    poll(lambda: service.jobs()[second] == "done", 120, "the end of what was asked for")
    assert service.jobs()[first] == "queued"
    assert add(service, name="third", urgent=True) == 3
    poll(lambda: service.jobs()[3] == "done", 120, "the end of the urgent one")


def test_run_hands_over_and_prints_what_a_run_of_its_own_prints(service: Running, nightpress: Any, poll: Any) -> None:
    began(service, poll)
    done = nightpress.run("--json")
    summary = json.loads(done.stdout)
    assert summary["run"]["chosen_level"] == "Q4_K_M"
    assert "as job 1" in done.stderr
    assert "Q8_0     passed" in done.stderr
    assert "▸ Q4_K_M" in nightpress("results").stdout
    assert "--threads" in nightpress.run("--threads", "1", status=13).stderr
    failed = nightpress("run", str(nightpress.base / "none.gguf"), status=20)
    assert "none.gguf" in failed.stderr


def test_ctrl_c_ends_the_watching_and_not_the_work(service: Running, nightpress: Any, poll: Any) -> None:
    service.feel(BUSY)
    began(service, poll)
    with nightpress.start("run", *QUICK) as watching:
        assert watching.stderr is not None
        assert "as job 1" in watching.stderr.readline()
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=60)
    assert "nightpress cancel 1" in err
    assert service.jobs() == {1: "queued"}
    assert json.loads(nightpress("cancel", "1", "--json").stdout)["state"] == "removed"
    assert json.loads(nightpress("cancel", "1", "--json").stdout)["state"] == "already_cancelled"


def test_verbs_say_what_they_reached(service: Running, nightpress: Any, poll: Any) -> None:
    service.feel(BUSY)
    began(service, poll)

    def state(*arguments: str) -> str:
        return str(json.loads(nightpress(*arguments, "--json").stdout)["state"])

    assert [state("pause"), state("pause"), state("resume"), state("resume")] == [
        "paused", "already_paused", "resumed", "already_resumed"]
    one, two = add(service, name="one"), add(service, name="two")
    assert state("move", str(two), "1") == "moved"
    assert [row["id"] for row in json.loads(nightpress("queue", "--json").stdout)] == [two, one]
    assert [state("remove", str(one)), state("remove", str(one))] == ["removed", "already_cancelled"]
    assert state("cancel") == "nothing_in_work"
    assert state("reload") == "reloaded"
    assert state("backup") == "written"
    assert state("reevaluate") == "nothing_deployed"
    assert "There is no job 99" in nightpress("remove", "99", status=14).stderr
    assert json.loads(nightpress("health", "--json").stdout)["healthy"]
    assert "nightpress_queue_jobs 1.0" in nightpress("metrics").stdout
    assert "job.queued" in nightpress("events").stdout
    assert "service.ready" in nightpress("logs").stdout
    assert state("stop") == "stopping"
    assert service.process is not None
    assert service.process.wait(60) == 0
    assert "No service" in nightpress("pause", status=12).stderr


def test_a_pause_outlives_a_restart(service: Running, nightpress: Any, poll: Any) -> None:
    began(service, poll)
    nightpress("pause")
    number = add(service)
    assert service.end() == 0
    began(service, poll)
    assert at(service, poll, "paused")["queued"] == 1
    assert "resume" in nightpress("run-now", str(number), status=15).stderr
    nightpress("resume")
    poll(lambda: service.jobs()[number] == "done", 120, "the job's end")
    assert json.loads(nightpress("pause", "--for", "1h", "--json").stdout)["state"] == "paused"
    assert "paused until" in nightpress("status").stdout


@pytest.mark.parametrize("when", ["waiting", "working", "stopped"])
def test_sigterm_in_any_state_ends_it_within_ten_seconds_and_leaves_nothing_behind(
        service: Running, nightpress: Any, poll: Any, when: str) -> None:
    service.environment["NIGHTPRESS_YIELD_AFTER_S"] = "600"
    service.feel(BUSY if when == "waiting" else QUIET)
    began(service, poll)
    add(service)
    if when != "waiting":
        poll(service.workers, 60, "the worker")
    if when == "stopped":
        service.feel(BUSY)
    at(service, poll, when)
    workers = service.workers()
    assert service.end() == 0
    for worker in workers:
        assert not worker.is_running()
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []
    assert service.jobs() == {1: "queued"}
    assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).glob("nightpress/*.sock"))


@pytest.mark.parametrize("when", ["working", "stopped"])
def test_killed_its_worker_is_gone_within_two_seconds_and_the_job_goes_on_later(
        service: Running, nightpress: Any, poll: Any, when: str) -> None:
    service.environment["NIGHTPRESS_YIELD_AFTER_S"] = "600"
    began(service, poll)
    number = add(service)
    poll(service.workers, 60, "the worker")
    if when == "stopped":
        service.feel(BUSY)
        at(service, poll, "stopped")
    workers = service.workers()
    service.kill()
    for worker in workers:
        poll(lambda worker=worker: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 2, "its end")
    service.feel(QUIET)
    began(service, poll)
    poll(lambda: service.jobs()[number] == "done", 120, "the job's end")
    assert service.end() == 0
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []


def test_a_second_service_exits_with_75_and_names_the_first(service: Running, nightpress: Any, poll: Any) -> None:
    status = began(service, poll)
    done = nightpress("daemon", status=75)
    assert f"process {status['pid']} (nightpressd)" in done.stderr


def test_without_a_service_status_says_so_and_shows_the_ledger(nightpress: Any) -> None:
    assert "No service runs" in nightpress("status").stdout
    nightpress("add", str(STARTER_GGUF), "--name", "waits")
    assert "waits" in nightpress("status").stdout
    found = json.loads(nightpress("status", "--json").stdout)
    assert found["running"] is False
    assert [row["name"] for row in found["queue"]] == ["waits"]
    assert nightpress("watch", status=12).stderr.startswith("nightpress: No service listens")


def test_new_settings_are_taken_over_and_wrong_ones_refused(service: Running, nightpress: Any, poll: Any) -> None:
    service.feel(BUSY)
    began(service, poll)
    file = Path(os.environ["NIGHTPRESS_CONFIG_DIR"]) / "nightpress.toml"
    file.write_text(f'[[models]]\npath = "{STARTER_GGUF}"\nname = "declared"\npriority = 5\n')
    assert "models" in nightpress("reload").stdout
    assert [row["name"] for row in json.loads(nightpress("queue", "--json").stdout)] == ["declared"]
    file.write_text("idle_after = 5\n")
    assert "Did you mean idle_after_s?" in nightpress("reload", status=78).stderr
    file.write_text('keep_backups = 3\n')
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    poll(lambda: "keep_backups" in service.log(), 20, "the new settings")
    assert len(json.loads(nightpress("queue", "--json").stdout)) == 1  # what was queued stays


def test_a_settled_file_in_a_watched_folder_is_queued_once(nightpress: Any, poll: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine-f16.gguf").symlink_to(STARTER_GGUF)
    (folder / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with running(nightpress.base, speed=30, NIGHTPRESS_WATCH=str(folder), NIGHTPRESS_WATCH_SETTLE_S="20",
                 SCRIPTED_SCAN_S="2") as service:
        service.feel(BUSY)
        began(service, poll)
        poll(lambda: service.jobs() != {}, 90, "the file's job")
        (row,) = json.loads(nightpress("queue", "--json").stdout)
        assert (row["name"], row["source"]) == ("mine", "folder")


def test_a_model_that_cannot_be_read_fails_and_the_next_is_done(
        service: Running, nightpress: Any, poll: Any, tmp_path: Path) -> None:
    from loops.pass1.plan import PressPlan

    told = tmp_path / "told"
    service.environment["NIGHTPRESS_ON_FAILURE"] = json.dumps(["/bin/sh", "-c", f"cat > {told}"])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(STARTER_GGUF.read_bytes()[:5000])
    began(service, poll)
    with service.client() as client:
        plan = PressPlan(model=str(broken), name="broken", blobs="", scratch="")
        number = client.ask("add", {"plan": plan.as_json()})["job"]
    after = add(service)
    poll(lambda: service.jobs()[number] == "failed", 60, "its failure")
    poll(lambda: service.jobs()[after] == "done", 120, "the next job's end")
    poll(lambda: told.exists() and told.read_text().endswith("}"), 20, "the hook")
    assert json.loads(told.read_text())["model"] == "broken"


def test_a_full_disk_is_tried_again_later_and_the_service_lives(service: Running, nightpress: Any, poll: Any) -> None:
    service.environment["NIGHTPRESS_RETRY_AFTER_S"] = "1"
    service.start(NIGHTPRESS_TESTING="1", NIGHTPRESS_FAILPOINT="backup.written@1:raise:ENOSPC")
    poll(lambda: service.status() is not None, 30, "the service's answer")
    number = add(service)
    poll(lambda: service.jobs()[number] == "done", 180, "the job's end")
    assert "full" in service.log()
    assert service.end() == 0
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []
