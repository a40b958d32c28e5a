"""The grip on work: whole process groups stop at once, go on, and are never forgotten or mistaken."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.grip import Grip

Poll = Callable[..., Any]
#: a leader and a child of its group, which take no polite signal and wait until they are killed
FAMILY = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGTSTP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
sys.stdout.write("+")
sys.stdout.flush()
os.fork()
while True: signal.pause()
"""


@pytest.fixture
def family() -> Iterator[Callable[[], list[psutil.Process]]]:
    """Start a process with a child in a group of its own; return both."""
    begun: list[subprocess.Popen[bytes]] = []

    def start() -> list[psutil.Process]:
        process = subprocess.Popen([sys.executable, "-S", "-c", FAMILY], stdout=subprocess.PIPE,
                                   start_new_session=True)
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"+"
        leader = psutil.Process(process.pid)
        end = time.monotonic() + 20
        while not leader.children() and time.monotonic() < end:
            threading.Event().wait(0.01)
        return [leader, *leader.children()]

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def all_stopped(processes: list[psutil.Process]) -> bool:
    return all(process.status() == psutil.STATUS_STOPPED for process in processes)


def none_stopped(processes: list[psutil.Process]) -> bool:
    return all(process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING) for process in processes)


def all_dead(processes: list[psutil.Process]) -> bool:
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


def test_a_whole_group_stops_within_a_second_and_goes_on(family: Callable[[], list[psutil.Process]],
                                                        poll: Poll) -> None:
    grip, processes = Grip(), family()
    assert len(processes) == 2
    grip.take(processes[0].pid)
    assert none_stopped(processes)
    grip.stop()
    poll(lambda: all_stopped(processes), 1, "the group's stop")
    assert grip.stopped
    grip.go_on()
    poll(lambda: none_stopped(processes), 5, "the group's going on")
    assert not grip.stopped


def test_every_group_it_holds_is_stopped(family: Callable[[], list[psutil.Process]], poll: Poll) -> None:
    grip, one, two = Grip(), family(), family()
    grip.take(one[0].pid)
    grip.take(two[0].pid)
    grip.stop()
    poll(lambda: all_stopped([*one, *two]), 1, "the stop of both groups")


def test_a_group_that_is_taken_while_stopped_is_stopped_at_once(family: Callable[[], list[psutil.Process]],
                                                               poll: Poll) -> None:
    grip, processes = Grip(), family()
    grip.stop()
    grip.take(processes[0].pid)
    poll(lambda: all_stopped(processes), 1, "the group's stop")
    grip.go_on()
    poll(lambda: none_stopped(processes), 5, "the group's going on")


def test_stopping_and_going_on_twice_is_the_same_as_once(family: Callable[[], list[psutil.Process]],
                                                        poll: Poll) -> None:
    grip, processes = Grip(), family()
    grip.take(processes[0].pid)
    grip.go_on()
    assert none_stopped(processes)
    grip.stop()
    grip.stop()
    poll(lambda: all_stopped(processes), 1, "the group's stop")
    grip.go_on()
    grip.go_on()
    poll(lambda: none_stopped(processes), 5, "the group's going on")


def test_a_group_that_was_let_go_hears_nothing_any_more(family: Callable[[], list[psutil.Process]],
                                                       poll: Poll) -> None:
    grip, ours, theirs = Grip(), family(), family()
    grip.take(ours[0].pid)
    grip.take(theirs[0].pid)
    grip.let_go(theirs[0].pid)
    grip.let_go(theirs[0].pid)
    grip.stop()
    poll(lambda: all_stopped(ours), 1, "the stop of ours")
    assert none_stopped(theirs)
    theirs[0].send_signal(signal.SIGSTOP)
    poll(lambda: theirs[0].status() == psutil.STATUS_STOPPED, 5, "a stop of somebody else's")
    grip.go_on()
    poll(lambda: none_stopped(ours), 5, "ours going on")
    assert theirs[0].status() == psutil.STATUS_STOPPED


def test_a_group_that_is_gone_harms_nothing(family: Callable[[], list[psutil.Process]], poll: Poll) -> None:
    grip, gone, here = Grip(), family(), family()
    grip.take(gone[0].pid)
    grip.take(here[0].pid)
    os.killpg(gone[0].pid, signal.SIGKILL)
    os.waitpid(gone[0].pid, 0)
    grip.stop()
    poll(lambda: all_stopped(here), 1, "the other's stop")
    grip.go_on()
    poll(lambda: none_stopped(here), 5, "the other going on")


def test_its_clock_stands_still_while_stopped(poll: Poll) -> None:
    grip = Grip()
    before, real = grip.worked_s(), time.monotonic()
    poll(lambda: grip.worked_s() > before, 5, "the clock's going")
    grip.stop()
    stood = grip.worked_s()
    threading.Event().wait(0.3)
    assert grip.worked_s() == stood
    grip.stop()  # a second call must not begin to count anew
    assert grip.worked_s() == stood
    grip.go_on()
    poll(lambda: grip.worked_s() > stood, 5, "the clock's going again")
    assert grip.worked_s() - before <= time.monotonic() - real - 0.3


def test_the_first_reason_for_an_end_stays() -> None:
    grip = Grip()
    assert (grip.ended, grip.reason) == (False, "")
    grip.end("Made room.")
    grip.end("Cancelled on request.")
    assert (grip.ended, grip.reason) == (True, "Made room.")
    assert grip.ending.is_set()


def test_an_end_is_seen_by_whoever_waits_for_it(poll: Poll) -> None:
    grip, seen = Grip(), []
    waiting = threading.Thread(target=lambda: seen.append(grip.ending.wait(30)))
    waiting.start()
    grip.end("Enough.")
    waiting.join(30)
    assert seen == [True]


@pytest.mark.parametrize("stopped", [False, True])
def test_an_end_kills_every_group_it_holds_stopped_or_not(family: Callable[[], list[psutil.Process]], poll: Poll,
                                                         stopped: bool) -> None:
    grip, ours, let_go = Grip(), family(), family()
    grip.take(ours[0].pid)
    grip.take(let_go[0].pid)
    grip.let_go(let_go[0].pid)
    if stopped:
        grip.stop()
        poll(lambda: all_stopped(ours), 1, "the group's stop")
    grip.end("Enough.")
    poll(lambda: all_dead(ours), 5, "the group's end")
    assert none_stopped(let_go)


def test_a_group_that_is_taken_after_the_end_is_killed(family: Callable[[], list[psutil.Process]],
                                                      poll: Poll) -> None:
    grip, processes = Grip(), family()
    grip.end("Enough.")
    grip.take(processes[0].pid)
    poll(lambda: all_dead(processes), 5, "the group's end")


def test_a_storm_of_stops_from_many_threads_leaves_it_running(family: Callable[[], list[psutil.Process]],
                                                             poll: Poll) -> None:
    """Stop and go on, each from threads of their own; whoever comes last decides, and no clock runs back."""
    grip, processes, over, read = Grip(), family(), threading.Event(), []
    grip.take(processes[0].pid)

    def read_on() -> None:
        while not over.is_set():
            read.append(grip.worked_s())

    def storm() -> None:
        for _ in range(200):
            grip.stop()
            grip.let_go(processes[0].pid)
            grip.take(processes[0].pid)
            grip.go_on()

    reading, storms = threading.Thread(target=read_on), [threading.Thread(target=storm) for _ in range(8)]
    for thread in (reading, *storms):
        thread.start()
    for thread in storms:
        thread.join(60)
    over.set()
    reading.join(60)
    grip.go_on()
    assert not grip.stopped
    poll(lambda: none_stopped(processes), 10, "the group's going on")
    assert read == sorted(read)
    grip.stop()
    poll(lambda: all_stopped(processes), 2, "the group's stop after the storm")


def test_the_reason_for_an_end_reaches_whoever_asked_for_the_work(tmp_path: Path) -> None:
    from daemon.errors import Interrupted
    from daemon.settings import Settings
    from daemon.supervisor import Pressing
    from loops.pass1.plan import PressPlan
    from loops.starter import STARTER_GGUF
    from state.ledger import Ledger

    grip, settings = Grip(), Settings(state_dir=tmp_path / "state")
    plan = PressPlan(str(STARTER_GGUF), "starter", str(settings.blobs), str(settings.scratch))
    grip.end("Made room: busy: cpu 80 % > 15 %.")
    with Ledger.open(settings.state_dir, "test") as ledger, pytest.raises(Interrupted, match="Made room"):
        Pressing(ledger, settings, plan, lambda _event: None, grip).run()


def test_a_polite_group_is_woken_at_the_end_and_not_killed(
        family: Callable[[], list[psutil.Process]], poll: Poll) -> None:
    grip, processes, other = Grip(), family(), family()
    grip.take(processes[0].pid, polite=True)
    grip.take(other[0].pid)
    grip.stop()
    poll(lambda: all_stopped(processes), 20, "the stop")
    grip.end("enough")
    poll(lambda: other[0].status() == psutil.STATUS_ZOMBIE, 20, "the other group's end")
    poll(lambda: not any(one.status() == psutil.STATUS_STOPPED for one in processes), 20, "the waking")
    assert all(one.status() != psutil.STATUS_ZOMBIE for one in processes)
    late = family()
    grip.take(late[0].pid, polite=True)
    poll(lambda: late[0].status() == psutil.STATUS_ZOMBIE, 20, "the end of one that came late")
