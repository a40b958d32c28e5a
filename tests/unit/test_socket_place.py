"""The place of the control socket: nobody else gets in, and nothing of others is deleted."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hostile_clients import (
    AS_ROOT,
    STRANGER,
    Poll,
    connect,
    leave,
    mode,
)

from daemon.listening import (
    LONGEST_PATH,
    SocketBusy,
    SocketPathLong,
    SocketRefused,
    bind,
)
from state.lock import Lock, StateBusy


def test_the_socket_is_ours_alone_from_the_moment_of_bind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(mode(Path(address)))
            with pytest.raises(StateBusy):  # nobody else decides meanwhile
                Lock.acquire(place.with_name(f"{place.name}.lock"), "second")

    before = os.umask(0)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", Watched)
            bind(place).close()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (mode(place.parent), mode(place)) == (0o700, 0o600)


def test_a_readable_folder_of_ours_is_closed_unless_it_holds_other_things(place: Path) -> None:
    place.parent.mkdir()
    place.parent.chmod(0o755)
    bind(place).close()
    assert mode(place.parent) == 0o700
    place.parent.chmod(0o755)
    (place.parent / "other").touch()
    bind(place).close()
    assert mode(place.parent) == 0o755


@pytest.mark.parametrize("wrong", ["symlink", "file", "writable by the group", "writable by others",
                                   pytest.param("foreign", marks=AS_ROOT)])
def test_a_folder_that_others_can_change_is_refused(place: Path, wrong: str) -> None:
    folder = place.parent
    if wrong == "symlink":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    elif wrong == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod({"writable by the group": 0o720, "writable by others": 0o702}.get(wrong, 0o700))
        if wrong == "foreign":
            os.chown(folder, STRANGER, -1)
    with pytest.raises(SocketRefused, match="socket_path"):
        bind(place)
    assert not place.exists()


def test_a_socket_that_nobody_listens_on_is_replaced(place: Path) -> None:
    leave(place)
    before = place.lstat()
    with bind(place), connect(place):
        assert place.lstat().st_mtime_ns > before.st_mtime_ns


@pytest.mark.parametrize("backlog", [8, 0])
def test_a_live_socket_is_left_alone_even_when_its_queue_is_full(place: Path, backlog: int) -> None:
    with bind(place) as bound:
        bound.listen(backlog)
        waiting = [connect(place) for _ in range(backlog == 0)]
        with pytest.raises(SocketBusy, match=str(place)) as caught:
            bind(place)
        assert backlog == 0 or f"process {os.getpid()}" in str(caught.value)
        for client in waiting:
            client.close()
        assert place.is_socket()


@pytest.mark.parametrize("thing", ["file", "folder", "symlink", pytest.param("foreign", marks=AS_ROOT)])
def test_nothing_but_our_own_stale_socket_is_ever_deleted(place: Path, thing: str) -> None:
    place.parent.mkdir(mode=0o700)
    if thing == "file":
        place.write_text("kept")
    elif thing == "folder":
        place.mkdir()
    elif thing == "symlink":
        leave(place.with_name("stale"))
        place.symlink_to("stale")
    else:
        leave(place)
        os.chown(place, STRANGER, -1)
    before = place.lstat()
    with pytest.raises(SocketRefused, match="socket_path"):
        bind(place)
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_live_socket_of_another_kind_is_refused(place: Path) -> None:
    place.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(place))
        with pytest.raises(SocketRefused):
            bind(place)
        assert place.is_socket()


def test_a_path_too_long_names_the_setting(place: Path) -> None:
    longest = place.parent / ("x" * (LONGEST_PATH - len(str(place.parent)) - 1))
    bind(longest).close()
    with pytest.raises(SocketPathLong, match="socket_path"):
        bind(longest.with_name(longest.name + "x"))


def test_a_second_daemon_waits_while_the_first_decides(place: Path, poll: Poll) -> None:
    caught: list[Exception] = []

    def second() -> None:
        try:
            bind(place).close()
        except SocketBusy as busy:
            caught.append(busy)

    place.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as first:
        with Lock.acquire(place.with_name(f"{place.name}.lock"), "first"):
            first.bind(str(place))  # and does not listen yet, so that it looks stale
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.3)
            assert place.is_socket()
            first.listen(8)
        thread.join(60)
    assert len(caught) == 1


