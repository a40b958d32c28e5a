"""Downloads that go on where they stopped, and are believed only by their hash.

The client is httpx's, or the one that huggingface_hub made, which may be of another version of that library.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.errors import Interrupted
from loops.events import Event, Progress
from state.faults import NightpressError, failpoint
from state.files import explained, fsync_file, rename

Show = Callable[[Event], None]
Wait = Callable[[float], None]

ATTEMPTS = 5  #: in a row without a single byte
WAIT_S = 1.0  #: before the second attempt; twice as long each time
MAX_WAIT_S = 60.0
CHUNK = 1 << 20
TIMEOUT_S = 30.0  #: without a byte
STOPPED = "Stopped; the same command goes on where it was."


class ServerRefused(NightpressError):
    """The server refuses; the message says what it answered."""

    exit_code = 102

    def __init__(self, message: str | None = None, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code  #: what a hub calls the reason


class DownloadInterrupted(NightpressError):
    """The download was interrupted; the same command goes on where it stopped."""

    exit_code = 103


class DownloadDamaged(NightpressError):
    """What was downloaded is not what its hash says, and was removed; run the same command again."""

    exit_code = 104


@dataclass(frozen=True)
class Download:
    """One file to be downloaded; one of the hashes is known.

    Attributes:
        url: of it.
        target: where it is to lie.
        size: in bytes; None where unknown.
        sha256: of its content; '' where unknown.
        git_sha1: the name that git gives its content, for small files on a hub; '' where unknown.
        headers: of the request.
    """

    url: str
    target: Path
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """What the content is known by."""
        return self.sha256 or self.git_sha1

    @property
    def part(self) -> Path:
        """Where an unfinished download lies; another content has another place."""
        return self.target.with_name(f".{self.target.name[:80]}.{self.hash[:12]}.part")

    @property
    def done(self) -> int:
        """How many bytes of an unfinished download there are."""
        return self.part.stat().st_size if self.part.exists() else 0


class _Busy(ConnectionError):
    """The server asks to come back later."""


def wait(seconds: float) -> None:
    """Wait; Ctrl-C ends it."""
    threading.Event().wait(seconds)


def broken(client: Any) -> tuple[type[Exception], ...]:
    """Return what a client raises where there is no connection, or it breaks."""
    library = importlib.import_module(type(client).__module__.partition(".")[0])
    return library.TransportError, library.InvalidURL, ConnectionError


def fetch(client: Any, wanted: Download, show: Show | None = None, pause: Wait = wait) -> None:
    """Download a file; it appears complete, and with the right hash.

    A dropped connection is taken up again where it broke, here and in a later call.

    Args:
        client: to ask with.
        wanted: the file.
        show: is told how far it is.
        pause: waits between attempts.

    Raises:
        ServerRefused: with the server's status.
        DownloadInterrupted: the connection breaks again and again; what came is kept.
        DownloadDamaged: the content is not what its hash says, and was removed.
        DiskFull: what came is kept.
        Interrupted: Ctrl-C; what came is kept.
    """
    vain, whole = 0, wanted.size is not None and wanted.done == wanted.size and wanted.part.exists()
    with explained(wanted.target.parent):
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        while not whole:
            before = wanted.done
            try:
                whole, reason = _take(client, wanted, before, show), "the connection ended early"
            except broken(client) as problem:
                reason = str(problem) or type(problem).__name__
            if not whole:
                vain = 0 if wanted.done > before else vain + 1
                if vain >= ATTEMPTS:
                    raise DownloadInterrupted(f"The download of {wanted.target.name} broke off ({reason[:200]}), after "
                                              f"{ATTEMPTS} attempts in vain; the same command goes on where it broke.")
                pause(min(MAX_WAIT_S, WAIT_S * 2 ** (vain - 1) if vain else 0.0))
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None
    _check(wanted)
    with explained(wanted.target):
        fsync_file(wanted.part)
        failpoint("download.checked")
        rename(wanted.part, wanted.target)


def _check(wanted: Download) -> None:
    """Compare what came with the hash that is wanted; what differs is removed."""
    digest = hashlib.sha256() if wanted.sha256 else hashlib.sha1(  # git's name of a file, no signature
        f"blob {wanted.done}\0".encode(), usedforsecurity=False)
    with wanted.part.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != wanted.hash:
        wanted.part.unlink()
        raise DownloadDamaged(f"{wanted.target.name} was downloaded and is not what its hash says; it was removed. Run "
                              "the same command again.")


def _take(client: Any, wanted: Download, have: int, show: Show | None) -> bool:
    """Ask once for what is missing and append it; return whether that is all."""
    asked = {**wanted.headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", wanted.url, headers=asked, follow_redirects=True, timeout=TIMEOUT_S) as response:
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Busy(f"the server answered {status}")
        if status == 416 or (status == 206 and not response.headers.get("Content-Range", "").startswith(
                f"bytes {have}-")):  # it has less than we have, or sends another part: begin anew
            wanted.part.unlink(missing_ok=True)
            return False
        if status not in (200, 206):
            raise ServerRefused(f"The server answered {status} to {wanted.target.name}.", status,
                                response.headers.get("X-Error-Code", ""))
        have = have if status == 206 else 0  # with 200 it sends the whole again
        length = response.headers.get("Content-Length", "")
        total = wanted.size if wanted.size is not None else have + int(length) if length.isdecimal() else 0
        with explained(wanted.part), wanted.part.open("ab" if have else "wb") as stream:
            for block in response.iter_raw():  # as it comes: a fixed size would hold bytes back, and lose them
                stream.write(block)
                have += len(block)
                if show is not None:
                    show(Progress("downloading", wanted.target.name, have, max(total, have)))
                if wanted.size is not None and have > wanted.size:
                    break  # never more than was announced; the hash tells the rest
    return wanted.size is None or have >= wanted.size
