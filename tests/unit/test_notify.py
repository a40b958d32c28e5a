"""The service manager hears what sd_notify(3) promises it, and no trouble with it reaches the daemon."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.notify import Notifier

#: a service manager has this much room for a datagram
DATAGRAM_BYTES = 4096


@pytest.fixture
def manager(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of the service manager: a real socket that NOTIFY_SOCKET names."""
    path = f"{os.environ['XDG_RUNTIME_DIR']}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield listener


def heard(manager: socket.socket) -> list[str]:
    """What came, one datagram each; a datagram lies there as soon as it is sent."""
    found = []
    while True:
        try:
            found.append(manager.recv(65536).decode("utf-8"))
        except BlockingIOError:
            return found


def test_the_life_of_a_service_is_told(manager: socket.socket) -> None:
    notifier = Notifier.from_environment()
    before_us = time.monotonic_ns() // 1000
    assert notifier.ready("Nobody needs the machine.")
    assert notifier.status("Pressing.")
    assert notifier.reloading()
    assert notifier.stopping()
    ready, status, reloading, stopping = heard(manager)
    assert ready == "READY=1\nSTATUS=Nobody needs the machine."
    assert status == "STATUS=Pressing."
    assert stopping == "STOPPING=1"
    found = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", reloading)
    assert found is not None
    assert before_us <= int(found[1]) <= time.monotonic_ns() // 1000


def test_a_status_is_sent_when_it_changes(manager: socket.socket) -> None:
    notifier = Notifier.from_environment()
    assert [notifier.status(text) for text in ("a", "a", "b", "a")] == [True, False, True, True]
    notifier.ready("c")
    assert not notifier.status("c")
    assert heard(manager) == ["STATUS=a", "STATUS=b", "STATUS=a", "READY=1\nSTATUS=c"]


def test_a_status_cannot_forge_another_message(manager: socket.socket) -> None:
    Notifier.from_environment().status("one\nSTOPPING=1\r\x1b[31m\udcff ü")
    assert heard(manager) == ["STATUS=one STOPPING=1  [31m  ü"]


def test_a_long_status_is_cut_at_a_character(manager: socket.socket) -> None:
    Notifier.from_environment().status("x" + "ü" * 5000)
    [message] = heard(manager)
    assert len(message.encode()) < DATAGRAM_BYTES
    assert message.startswith("STATUS=xüüü")
    assert set(message.removeprefix("STATUS=x")) == {"ü"}


def test_the_watchdog_is_fed_at_half_of_its_interval(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier.from_environment()
    assert notifier.interval_s == 10
    assert [notifier.ping(now_s) for now_s in (100.0, 104.9, 105.0, 106.0, 110.5)] == [True, False, True, False, True]
    assert heard(manager) == ["WATCHDOG=1"] * 3


@pytest.mark.parametrize("environment", [
    {}, {"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"},
    {"WATCHDOG_USEC": "-5"}, {"WATCHDOG_USEC": "9" * 5000}], ids=str)
def test_a_watchdog_that_is_not_ours_gets_nothing(
        manager: socket.socket, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notifier = Notifier.from_environment()
    assert notifier.interval_s is None
    assert not notifier.ping(1.0)
    assert heard(manager) == []


def test_a_watchdog_without_a_pid_is_ours(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "500000")
    assert Notifier.from_environment().interval_s == 0.5


def test_a_ping_that_did_not_arrive_is_sent_again(manager: socket.socket) -> None:
    path = Path(os.environ["NOTIFY_SOCKET"])
    away = path.with_name("away")
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "10000000"})
    path.rename(away)
    assert not notifier.ping(100.0)
    assert not notifier.status("a")
    away.rename(path)
    assert notifier.ping(100.1)
    assert notifier.status("a")
    assert heard(manager) == ["WATCHDOG=1", "STATUS=a"]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract addresses are Linux's")
def test_an_abstract_address_is_reached() -> None:
    name = f"np-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.setblocking(False)
        assert Notifier.from_environment({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert heard(listener) == ["STOPPING=1"]


@pytest.mark.parametrize(
    "address", ["", "vsock:2:1234", "relative", "/nowhere/notify", "/" + "x" * 300, "@" + "x" * 300])
def test_a_manager_that_is_not_there_hurts_nobody(address: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    assert [notifier.ready("a"), notifier.status("a"), notifier.reloading(), notifier.stopping(),
            notifier.ping(1.0)] == [False] * 5


def test_without_a_manager_everything_does_nothing() -> None:
    notifier = Notifier.from_environment()
    assert notifier.interval_s is None
    assert not notifier.ready("a")


def test_a_manager_that_does_not_read_blocks_nobody(manager: socket.socket) -> None:
    notifier, sent = Notifier.from_environment(), []
    sender = threading.Thread(target=lambda: sent.extend(notifier.status(str(n)) for n in range(3000)), daemon=True)
    sender.start()
    sender.join(30)
    assert not sender.is_alive()
    assert not all(sent), "the test did not fill the socket"
    assert len(heard(manager)) == sum(sent)


def test_the_environment_stays_as_it_is(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    before = dict(os.environ)
    Notifier.from_environment().ready("a")
    assert dict(os.environ) == before


def test_systemds_own_program_says_the_same(manager: socket.socket) -> None:
    """What we send is what systemd-notify sends, where there is one."""
    try:
        subprocess.run(["systemd-notify", "--ready", "--no-block", "--status=Hello."], check=True, timeout=60,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no systemd-notify, or it needs a running systemd")
    theirs = {line for message in heard(manager) for line in message.splitlines()}
    Notifier.from_environment().ready("Hello.")
    [ours] = heard(manager)
    assert set(ours.splitlines()) <= theirs
