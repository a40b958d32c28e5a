"""The queue in the ledger: its order, its steps, and that nothing of it is lost or done twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from state.backup import BackupRefused, read_backup, restore_backup, tables_of, write_backup
from state.check import repair, violations
from state.ledger import JobSpec, JobState, Ledger, RunSpec, RunState, UnknownJob
from state.migrations import MIGRATIONS, migrate
from state.states import JOB_TRANSITIONS, IllegalTransition

RUN = RunSpec("m", "/m.gguf", "0" * 64, 9, {}, "plan", "b1")
BEFORE_THE_QUEUE = "004_gates"
#: begins a job that waits, says so, and keeps the ledger until killed
BEGIN = """
import sys
from pathlib import Path
from state.ledger import Ledger
with Ledger.open(Path(sys.argv[1]), "nightpressd") as ledger:
    for row in ledger.jobs(waiting=True): ledger.begin_job(row["id"])
    print("begun", flush=True)
    sys.stdin.read()
"""
REQUEUE = """
import sys
from pathlib import Path
from state.ledger import Ledger
with Ledger.open(Path(sys.argv[1]), "nightpressd") as ledger:
    ledger.requeue_orphans()
"""


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def ledger(state_dir: Path) -> Iterator[Ledger]:
    with Ledger.open(state_dir, "test") as opened:
        yield opened


def spec(name: str = "m", **facts: Any) -> JobSpec:
    return JobSpec(name, facts.pop("source", "command"), facts.pop("spec", {"plan": None}), **facts)


def order(ledger: Ledger) -> list[str]:
    return [row["name"] for row in ledger.jobs(waiting=True)]


def take(ledger: Ledger, job_id: int, *states: JobState) -> int:
    for state in states:
        if state is JobState.WORKING:
            ledger.begin_job(job_id)
        else:
            ledger.end_job(job_id, state)
    return job_id


def old_ledger(state_dir: Path) -> None:
    """A ledger as it was before there was a queue, with a run and an event in it."""
    state_dir.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(state_dir / "ledger.db", isolation_level=None)) as connection:
        migrate(connection, upto=BEFORE_THE_QUEUE)
        connection.execute(
            "INSERT INTO run (created_at, name, model_path, model_sha256, model_bytes, plan, plan_fingerprint, state, "
            "simulated, engine) VALUES ('2025-01-01T00:00:00.000Z', 'old', '/m', '0', 9, '{}', 'p', 'failed', 0, 'b')")
        connection.execute("INSERT INTO event (at, action) VALUES ('2025-01-01T00:00:00.000Z', 'old')")


# --- order ---


def test_a_job_comes_back_as_it_was_given(ledger: Ledger) -> None:
    given_spec = {"plan": {"model": "/ü \udc80.gguf", "x": 1.5}, "promoting": True}
    number = ledger.add_job(spec("m", spec=given_spec, source="folder", key="k", priority=3, urgent=True))
    row = ledger.job(number)
    assert row["spec"] == {"plan": {"model": "/ü ?.gguf", "x": 1.5}, "promoting": True}
    assert [row[name] for name in ("name", "source", "key", "priority", "urgent", "state", "attempts", "reason")] == [
        "m", "folder", "k", 3, True, "queued", 0, ""]
    assert ledger.has_job("k")
    assert not ledger.has_job("other")
    assert not ledger.has_job("K")


def test_urgent_comes_first_then_priority_then_who_came_first(ledger: Ledger) -> None:
    for name, priority, urgent in (("third", 0, False), ("fourth", 0, False), ("last", -100, False),
                                   ("second", 5, False), ("first", -5, True)):
        ledger.add_job(spec(name, priority=priority, urgent=urgent))
    assert order(ledger) == ["first", "second", "third", "fourth", "last"]


def test_what_is_in_work_stands_first_and_what_ended_last(ledger: Ledger) -> None:
    ended, working, waiting = (ledger.add_job(spec(name)) for name in ("ended", "working", "waiting"))
    urgent = ledger.add_job(spec("urgent", urgent=True))
    take(ledger, ended, JobState.WORKING, JobState.DONE)
    take(ledger, working, JobState.WORKING)
    assert [row["id"] for row in ledger.jobs()] == [working, urgent, waiting, ended]
    assert [row["id"] for row in ledger.jobs(waiting=True)] == [working, urgent, waiting]
    assert [row["id"] for row in ledger.jobs(limit=2)] == [working, urgent]


def test_a_job_that_waits_again_keeps_its_place(ledger: Ledger) -> None:
    first = ledger.add_job(spec("first"))
    ledger.add_job(spec("second"))
    take(ledger, first, JobState.WORKING, JobState.QUEUED)
    assert order(ledger) == ["first", "second"]


def test_moving_takes_the_priority_of_the_place(ledger: Ledger) -> None:
    for name, priority in (("a", 5), ("b", 0), ("c", 0)):
        ledger.add_job(spec(name, priority=priority))
    assert ledger.move_job(3, 1) == 1
    assert order(ledger) == ["c", "a", "b"]
    assert ledger.job(3)["priority"] == 5
    assert ledger.move_job(3, 99) == 3
    assert order(ledger) == ["a", "b", "c"]
    assert ledger.move_job(2, -7) == 1
    assert order(ledger) == ["b", "a", "c"]


def test_what_does_not_wait_cannot_be_moved(ledger: Ledger) -> None:
    number = take(ledger, ledger.add_job(spec()), JobState.WORKING)
    for wrong in (number, 99, 0, -1):
        with pytest.raises(UnknownJob):
            ledger.move_job(wrong, 1)
    assert ledger.add_job(spec("alone")) == 2
    assert ledger.move_job(2, 5) == 1


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=6),
       st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=4))
def test_a_moved_job_stands_where_it_was_moved_to(ledger: Ledger, jobs: list[tuple[int, bool]],
                                                 moves: list[tuple[int, int]]) -> None:
    with ledger._writing() as session:
        session.connection().exec_driver_sql("DELETE FROM job")
    numbers = [ledger.add_job(spec(priority=priority, urgent=urgent)) for priority, urgent in jobs]
    for index, place in moves:
        moved = numbers[index % len(numbers)]
        others = [row["id"] for row in ledger.jobs(waiting=True) if row["id"] != moved]
        got = ledger.move_job(moved, place)
        assert got == min(place, len(numbers))
        assert [row["id"] for row in ledger.jobs(waiting=True)] == [*others[:got - 1], moved, *others[got - 1:]]


# --- steps ---


WAYS: dict[JobState, tuple[JobState, ...]] = {
    JobState.QUEUED: (), JobState.WORKING: (JobState.WORKING,), JobState.DONE: (JobState.WORKING, JobState.DONE),
    JobState.FAILED: (JobState.WORKING, JobState.FAILED), JobState.CANCELLED: (JobState.CANCELLED,),
    JobState.QUARANTINED: (JobState.WORKING, JobState.QUARANTINED)}


@pytest.mark.parametrize("old", JobState)
@pytest.mark.parametrize("new", JobState)
def test_a_job_takes_only_the_steps_of_the_table(ledger: Ledger, old: JobState, new: JobState) -> None:
    number = take(ledger, ledger.add_job(spec()), *WAYS[old])
    if new is old or new in JOB_TRANSITIONS[old]:
        take(ledger, number, new)
        assert ledger.job(number)["state"] == new
    else:
        with pytest.raises(IllegalTransition):
            take(ledger, number, new)
        assert ledger.job(number)["state"] == old


def test_beginning_counts_an_attempt_and_names_the_owner(ledger: Ledger) -> None:
    number = ledger.add_job(spec(urgent=True))
    ledger.begin_job(number)
    row = ledger.job(number)
    assert (row["attempts"], row["owner_pid"], row["urgent"]) == (1, os.getpid(), True)
    ledger.end_job(number, JobState.QUEUED, "Later.", not_before="2030-01-01T00:00:00.000Z")
    row = ledger.job(number)
    assert (row["attempts"], row["owner_pid"], row["urgent"], row["reason"], row["not_before"]) == (
        1, None, True, "Later.", "2030-01-01T00:00:00.000Z")
    ledger.begin_job(number)
    row = ledger.job(number)
    assert (row["attempts"], row["reason"], row["not_before"]) == (2, "", None)
    ledger.end_job(number, JobState.DONE, "Done.", attempts=0)
    row = ledger.job(number)
    assert (row["attempts"], row["urgent"], row["reason"]) == (0, False, "Done.")


def test_progress_makes_the_attempts_count_anew_and_the_run_stays_known(ledger: Ledger) -> None:
    number, run = ledger.add_job(spec()), ledger.start_run(RUN)
    for _ in range(3):
        take(ledger, number, JobState.WORKING, JobState.QUEUED)
    ledger.begin_job(number)
    assert ledger.job(number)["attempts"] == 4
    ledger.note_progress(number, run)
    assert (ledger.job(number)["attempts"], ledger.job(number)["run_id"]) == (1, run)
    ledger.end_job(number, JobState.QUEUED)
    assert ledger.job(number)["run_id"] == run


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.QUARANTINED])
def test_hastening_queues_again_what_did_not_end_well(ledger: Ledger, state: JobState) -> None:
    number = ledger.add_job(spec())
    take(ledger, number, JobState.WORKING)
    ledger.end_job(number, state, "No.", not_before="2030-01-01T00:00:00.000Z")
    ledger.hasten_job(number)
    row = ledger.job(number)
    assert (row["state"], row["urgent"], row["attempts"], row["reason"], row["not_before"]) == (
        "queued", True, 0, "", None)


def test_hastening_leaves_what_is_in_work_at_work_and_what_is_done_done(ledger: Ledger) -> None:
    working, done = (take(ledger, ledger.add_job(spec()), JobState.WORKING) for _ in range(2))
    ledger.hasten_job(working)
    row = ledger.job(working)
    assert (row["state"], row["urgent"], row["attempts"], row["owner_pid"]) == ("working", True, 1, os.getpid())
    ledger.end_job(done, JobState.DONE)
    with pytest.raises(IllegalTransition):
        ledger.hasten_job(done)


def test_a_job_that_is_not_there_is_told(ledger: Ledger) -> None:
    for wrong in (0, -1, 99):
        for what in (ledger.job, ledger.begin_job, ledger.hasten_job):
            with pytest.raises(UnknownJob, match=f"There is no job {wrong};"):
                what(wrong)


# --- a service that is gone ---


def test_a_killed_services_job_waits_again_and_the_check_says_so_before(state_dir: Path) -> None:
    with Ledger.open(state_dir, "test") as ledger:
        ledger.add_job(spec("interrupted"))
    with subprocess.Popen([sys.executable, "-c", BEGIN, str(state_dir)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        assert violations(state_dir, state_dir / "deploy") == [], "its service is at work"
        process.kill()
    gone = "Job 1 is marked working, but its service is gone."
    assert violations(state_dir, state_dir / "deploy") == [gone]
    environment = {**os.environ, "NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": "jobs.requeueing:kill"}
    killed = subprocess.run([sys.executable, "-c", REQUEUE, str(state_dir)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert violations(state_dir, state_dir / "deploy") == [gone], "killed within, nothing of it was done"
    assert repair(state_dir, state_dir / "deploy") == ["Job 1 of interrupted was interrupted and waits again."]
    assert repair(state_dir, state_dir / "deploy") == []
    assert violations(state_dir, state_dir / "deploy") == []
    with Ledger.read(state_dir) as ledger:
        row = ledger.job(1)
        assert (row["state"], row["owner_pid"], row["owner_started"]) == ("queued", None, None)
        assert row["attempts"] == 1, "a job that kills the service must not be begun for ever"


def test_the_job_of_a_live_process_is_left_to_it(ledger: Ledger) -> None:
    mine = take(ledger, ledger.add_job(spec()), JobState.WORKING)
    assert ledger.requeue_orphans() == []
    assert ledger.job(mine)["state"] == "working"


def test_a_process_with_the_same_number_is_not_the_same_process(ledger: Ledger) -> None:
    number = take(ledger, ledger.add_job(spec()), JobState.WORKING)
    with ledger._writing() as session:
        session.connection().exec_driver_sql("UPDATE job SET owner_started = 'another boot:1'")
    assert len(ledger.requeue_orphans()) == 1
    assert ledger.job(number)["state"] == "queued"


def test_only_deaths_since_the_last_finished_step_of_the_level_count(ledger: Ledger) -> None:
    run = ledger.start_run(RUN)

    def count(signal_name: str | None = None) -> int:
        return ledger.crashes_without_progress("f", run, "Q2_K", signal_name)

    assert count() == 0
    for name in ("SIGSEGV", "SIGKILL", "SIGKILL"):
        ledger.record_crash("f", run, "Q2_K", name)
    ledger.record_crash("other", run, "Q2_K", "SIGKILL")
    assert (count(), count("SIGKILL"), count("SIGABRT")) == (3, 2, 0)
    ledger.record_step("s", run, "Q8_0", "score", {})
    assert count() == 3, "a step of another level is no progress of this one"
    with ledger._writing() as session:
        session.connection().exec_driver_sql("UPDATE crash SET at = '2020-01-01T00:00:00.000Z'")
    ledger.record_step("t", run, "Q2_K", "score", {})
    assert count() == 0
    with ledger._writing() as session:
        session.connection().exec_driver_sql("UPDATE step SET finished_at = '2021-01-01T00:00:00.000Z'")
    ledger.record_crash("f", run, "Q2_K", "SIGSEGV")
    assert (count(), ledger.crash_count("f")) == (1, 4)


# --- memos and events ---


def test_what_is_kept_in_mind_outlives_a_restart(state_dir: Path) -> None:
    for value in ({"until": None}, [1, "ä"], None, "text"):
        with Ledger.open(state_dir, "test") as ledger:
            ledger.keep_in_mind("paused", value)
            ledger.keep_in_mind("other", 1)
        with Ledger.open(state_dir, "test") as ledger:
            assert ledger.in_mind("paused") == value
            assert ledger.in_mind("unknown") is None
            assert len(ledger.rows("SELECT * FROM memo")) == 2


def test_events_before_a_moment_are_forgotten_and_counted(ledger: Ledger) -> None:
    for action in ("old", "older", "new"):
        ledger.record_event(action)
    with ledger._writing() as session:
        session.connection().exec_driver_sql("UPDATE event SET at = '2020-01-01T00:00:00.000Z' WHERE action <> 'new'")
    assert ledger.forget_events("2020-01-01T00:00:00.000Z") == 0
    assert ledger.forget_events("2021-01-01T00:00:00.000Z") == 2
    assert ledger.forget_events("2021-01-01T00:00:00.000Z") == 0
    assert [row["action"] for row in ledger.events()] == ["new"]


# --- older ledgers and backups ---


def test_a_ledger_from_before_the_queue_is_read_as_one_without_jobs(state_dir: Path) -> None:
    old_ledger(state_dir)
    before = (state_dir / "ledger.db").read_bytes()
    with Ledger.read(state_dir) as ledger:
        assert ledger.jobs() == ledger.jobs(waiting=True) == []
        with pytest.raises(UnknownJob):
            ledger.job(1)
        assert [row["name"] for row in ledger.runs()] == ["old"]
    assert (state_dir / "ledger.db").read_bytes() == before
    assert violations(state_dir, state_dir / "deploy") == []
    with Ledger.open(state_dir, "test") as ledger:
        assert ledger.add_job(spec()) == 1
        assert [row["name"] for row in ledger.runs()] == ["old"]


def test_jobs_and_memos_come_back_from_a_backup(state_dir: Path) -> None:
    with Ledger.open(state_dir, "test") as ledger:
        run = ledger.start_run(RUN)
        ledger.end_run(run, RunState.FINISHED)
        for name in ("a", "b"):
            ledger.add_job(spec(name, spec={"plan": {"model": "/ü"}}, priority=2, key=name))
        ledger.begin_job(1)
        ledger.end_job(1, JobState.DONE, "Good.", run_id=run)
        ledger.keep_in_mind("paused", {"until": None})
        before = (ledger.jobs(), ledger.stored_rows("memo"))
        write_backup(ledger)
    (state_dir / "ledger.db").unlink()
    restore_backup(state_dir)
    with Ledger.open(state_dir, "test") as ledger:
        assert (ledger.jobs(), ledger.stored_rows("memo")) == before
        assert ledger.add_job(spec("c")) == 3
        assert order(ledger) == ["b", "c"]


def test_a_backup_from_before_the_queue_is_restored_and_brought_up_to_date(state_dir: Path) -> None:
    old_ledger(state_dir)
    with Ledger.read(state_dir) as ledger:
        path = write_backup(ledger)
    assert not {"job", "memo"} & set(json.loads(path.read_text())["tables"])
    assert read_backup(path)["migrations"][-1] == BEFORE_THE_QUEUE
    (state_dir / "ledger.db").unlink()
    restore_backup(state_dir)
    with Ledger.open(state_dir, "test") as ledger:
        assert ledger.migrations() == [name for name, _ in MIGRATIONS]
        assert [row["name"] for row in ledger.runs()] == ["old"]
        assert ledger.jobs() == []
        assert ledger.add_job(spec()) == 1
    assert violations(state_dir, state_dir / "deploy") == []


def test_a_table_is_looked_for_only_where_it_was_made() -> None:
    steps = [name for name, _ in MIGRATIONS]
    assert {"job", "memo"} <= set(tables_of(steps))
    assert set(tables_of(steps)) - set(tables_of(steps[:4])) == {"job", "memo", "stage"}
    assert tables_of([]) == []
    assert tables_of(steps).index("run") < tables_of(steps).index("job"), "parents before children"


def test_a_ledger_that_holds_only_jobs_is_not_replaced_unasked(state_dir: Path) -> None:
    with Ledger.open(state_dir, "test") as ledger:
        write_backup(ledger)
        ledger.add_job(spec("precious"))
    with pytest.raises(BackupRefused, match="--force"):
        restore_backup(state_dir)
