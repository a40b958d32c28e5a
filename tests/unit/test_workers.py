"""Workers end for certain: stopped, blocked, or left behind by a service that was killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.grip import Grip
from daemon.supervisor import Interrupted, run_job
from daemon.workers import WorkerProcess, end_leftover
from state.owner import started

SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stopped_worker_that_does_not_read_can_be_ended(tmp_path: Path, poll: Any) -> None:
    grip = Grip()
    with WorkerProcess({"job": "engine"}, tmp_path / "log", grip) as worker:
        grip.stop()
        poll(lambda: psutil.Process(worker.process.pid).status() == psutil.STATUS_STOPPED, 10, "the stop")
        sending = threading.Thread(target=worker.send, args=({"steps": "x" * 1_000_000},))
        sending.start()
        grip.end("enough")
        sending.join(60)
        assert not sending.is_alive()
    assert gone(worker.process.pid)


def test_a_job_without_ledger_is_interrupted_with_the_reason(tmp_path: Path) -> None:
    grip = Grip()
    grip.stop()
    threading.Timer(0.3, grip.end, args=("Made room.",)).start()
    with pytest.raises(Interrupted, match=r"Made room\."):
        run_job({"job": "engine"}, tmp_path, grip)


def test_the_worker_of_a_killed_service_is_ended_at_the_next_start(tmp_path: Path, poll: Any) -> None:
    log = tmp_path / "worker.log"
    assert end_leftover(log) is False
    with subprocess.Popen(SLEEPER, start_new_session=True) as left:
        (tmp_path / "worker.pid").write_text(f"{left.pid} another start")
        assert end_leftover(log) is False  # its number was given to somebody else
        assert left.poll() is None
        (tmp_path / "worker.pid").write_text(f"{left.pid} {started(left.pid)}")
        assert end_leftover(log) is True
        assert left.wait(60) == -9
    assert end_leftover(log) is False


def test_a_worker_leaves_its_number_for_that(tmp_path: Path) -> None:
    with WorkerProcess({"job": "engine"}, tmp_path / "worker.log", Grip()) as worker:
        pid, since = (tmp_path / "worker.pid").read_text().split(" ", 1)
        assert (int(pid), since) == (worker.process.pid, started(worker.process.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped child with its parent")
def test_what_a_worker_starts_dies_with_it_even_when_stopped(poll: Any) -> None:
    code = ("import subprocess, sys, signal\n"
            "from loops.leash import die_with_parent\n"
            f"child = subprocess.Popen({SLEEPER!r}, preexec_fn=die_with_parent())\n"
            "print(child.pid, flush=True)\n"
            "signal.pause()\n")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        psutil.Process(child).suspend()
        parent.kill()
    poll(lambda: gone(child), 2, "the child's end")
