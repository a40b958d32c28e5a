"""What the service tells its manager, over a real notification socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_service import BUSY, Running, running


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.lines: list[str] = []

    def told(self) -> list[str]:
        """Everything that came so far, line by line."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines += self._socket.recv(4096).decode().split("\n")
        return self.lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager() -> Iterator[Manager]:
    one = Manager(Path(os.environ["XDG_RUNTIME_DIR"]) / "notify")
    yield one
    one.close()


@pytest.fixture
def service(nightpress: Any, manager: Manager) -> Iterator[Running]:
    with running(nightpress.base, NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="2000000") as one:
        one.feel(BUSY)
        yield one


def test_it_says_ready_only_once_the_socket_answers(service: Running, manager: Manager, poll: Any) -> None:
    service.start()
    poll(lambda: "READY=1" in manager.told(), 60, "READY")
    assert service.status() is not None
    assert "STATUS=nothing to do; busy" in manager.told()
    assert service.end() == 0
    assert manager.told().index("READY=1") < manager.told().index("STOPPING=1")


def test_a_reload_is_announced_and_finished(service: Running, manager: Manager, poll: Any) -> None:
    service.start()
    poll(lambda: "READY=1" in manager.told(), 60, "READY")
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    poll(lambda: manager.told().count("READY=1") == 2, 20, "the second READY")
    told = manager.told()
    assert told.index("RELOADING=1") < len(told) - 1 - told[::-1].index("READY=1")


def test_only_the_main_loop_pings_so_a_loop_that_hangs_is_seen(service: Running, manager: Manager, poll: Any) -> None:
    service.start()
    poll(lambda: manager.told().count("WATCHDOG=1") >= 3, 60, "three pings")
    service.sensors.unlink()
    os.mkfifo(service.sensors)  # reading it blocks: the main loop hangs at its next look
    waits = poll_quiet(manager, poll)
    assert waits, "pings went on although the main loop hung"
    assert service.status() is not None  # the socket still answers: it alone must not feed the watchdog
    with service.sensors.open("w") as waking:
        service.feel(BUSY)  # in the pipe's place, before the next look could hang in it again
        waking.write(BUSY)
    before = manager.told().count("WATCHDOG=1")
    poll(lambda: manager.told().count("WATCHDOG=1") > before, 20, "pings again")


def poll_quiet(manager: Manager, poll: Any) -> bool:
    """Wait for four seconds, twice the limit, without a ping; False when that does not come within 30 s."""
    import time

    end, quiet_since, count = time.monotonic() + 30, time.monotonic(), -1

    def quiet() -> bool:
        nonlocal quiet_since, count
        now = manager.told().count("WATCHDOG=1")
        if now != count:
            quiet_since, count = time.monotonic(), now
        return time.monotonic() - quiet_since > 4 or time.monotonic() > end

    poll(quiet, 40, "quiet")
    return time.monotonic() - quiet_since > 4


@pytest.mark.parametrize("step", [1, 3])
def test_killed_in_its_main_loop_it_starts_again_as_if_nothing_had_been(
        service: Running, nightpress: Any, poll: Any, step: int) -> None:
    service.start(NIGHTPRESS_TESTING="1", NIGHTPRESS_FAILPOINT=f"service.step@{step}:kill")
    assert service.process is not None
    assert service.process.wait(60) == -signal.SIGKILL
    service.start()
    poll(lambda: service.status() is not None, 30, "the service's answer")
    assert service.end() == 0
