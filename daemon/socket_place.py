"""Where the control socket lies: a socket that only our user can reach, and who is at its other end."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Any

from daemon.errors import SettingsWrong
from state.faults import NightpressError
from state.files import explained, make_folder
from state.lock import Lock, StateBusy

#: bytes that a path in `sun_path` may have, without the zero that ends it
LONGEST_PATH = 103 if sys.platform == "darwin" else 107
#: connections that the kernel keeps until they are accepted
BACKLOG = 128


class SocketBusy(NightpressError):
    """Another process listens on the control socket; stop it first, or use the service that runs."""

    exit_code = 6


class SocketRefused(NightpressError):
    """The place of the control socket is not safe to use; name another in the setting `socket_path`."""

    exit_code = 7


class SocketPathLong(SettingsWrong):
    """The path of the control socket is too long for the system; shorten the setting `socket_path`."""


def bind(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, which only our user can connect to from its first moment.

    The folder is made when missing, for our user only. One that exists is closed to others if it holds nothing
    but the socket; a folder with other things in it keeps its mode. A socket that nobody listens on is replaced.

    Raises:
        SocketBusy: somebody listens there.
        SocketRefused: the path, or its folder, is not ours or not what it should be; nothing was deleted.
        SocketPathLong: the path does not fit.
        DiskFull, StateUnwritable: the folder cannot be made or written.
    """
    if (length := len(os.fsencode(path))) > LONGEST_PATH:
        raise SocketPathLong(f"{path} has {length} bytes, and a socket's path may have {LONGEST_PATH}; "
                             "shorten the setting `socket_path`.")
    beside = path.with_name(f"{path.name}.lock")
    with explained(path):
        _close_folder(path.parent, {path.name, beside.name})
        try:
            lock = Lock.acquire(beside, "nightpressd", wait_s=5.0)
        except StateBusy as busy:
            raise SocketBusy(str(busy)) from busy
        with lock:  # a socket is bound before it listens, and would look stale to a second daemon
            _make_way(path)
            return _listen(path)


def _close_folder(folder: Path, ours: set[str]) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if not os.path.lexists(folder):
        make_folder(folder, 0o700)
    try:
        descriptor = os.open(folder, flags)
    except OSError as error:
        raise _refused(folder, f"is no folder, or a symlink to one ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise _refused(folder, f"belongs to user {status.st_uid}")
        if status.st_mode & 0o022:
            raise _refused(folder, "can be written by others")
        if status.st_mode & 0o077 and set(os.listdir(descriptor)) <= ours:  # noqa: PTH208  by descriptor
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _refused(path: Path, why: str) -> SocketRefused:
    return SocketRefused(f"{path} {why}; put it right, or name another place in the setting `socket_path`.")


def _make_way(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise _refused(path, "exists and is no socket")
    if status.st_uid != os.geteuid():
        raise _refused(path, f"belongs to user {status.st_uid}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
            who = f"process {peer(probe)[0]}"
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):  # its queue is full, so somebody listens
            who = "another process"
        except OSError as error:
            raise _refused(path, f"cannot be asked who listens ({error.strerror})") from error
    raise SocketBusy(f"{path} is in use by {who}; stop it first, or use the service that runs.")


def _listen(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        bound.bind(str(path))
    except BaseException:
        bound.close()
        raise
    finally:
        os.umask(mask)
    bound.listen(BACKLOG)
    return bound


def permitted(uid: int, own: int) -> bool:
    """Return whether a process of user `uid` may speak to the service of user `own`."""
    return uid in (own, 0)


def peer(connection: Any) -> tuple[int, int]:
    """Return the process id and the user id of the other end; the process is 0 where the system keeps it back.

    Sources: unix(7), SO_PEERCRED, `struct ucred`; macOS sys/ucred.h, LOCAL_PEERCRED, `struct xucred`.

    Raises:
        OSError: the other end is gone.
    """
    if sys.platform == "darwin":
        _version, uid = struct.unpack_from("=II", connection.getsockopt(0, 1, 76))
        return 0, uid
    pid, uid, _gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
