"""Downloads that go on where they stopped, and are believed only by their hash."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.errors import Interrupted
from loops.events import Event, Progress
from state.faults import NightpressError, failpoint
from state.files import DiskFull, explained, fsync_file, rename

if TYPE_CHECKING:
    import httpx

Show = Callable[[Event], None]
Wait = Callable[[float], None]

ATTEMPTS = 5  #: in a row without a single byte
WAIT_S = 1.0  #: before the second attempt; twice as long each time
MAX_WAIT_S = 60.0
CHUNK = 1 << 20
TIMEOUT_S = 30.0  #: without a byte


class ServerRefused(NightpressError):
    """The server refuses; the message says what it answered."""

    exit_code = 102

    def __init__(self, message: str | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class DownloadInterrupted(NightpressError):
    """The download was interrupted; the same command goes on where it stopped."""

    exit_code = 103


class DownloadDamaged(NightpressError):
    """What was downloaded is not what its hash says, and was removed; run the same command again."""

    exit_code = 104


@dataclass(frozen=True)
class Download:
    """One file to be downloaded.

    Attributes:
        url: of it.
        target: where it is to lie.
        size: in bytes; None where unknown.
        sha256: of its content; '' where unknown.
        git_sha1: the name that git gives its content, for small files on a hub; '' where unknown.
        headers: of the request; sent to the first server only.
    """

    url: str
    target: Path
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> Path:
        """Where an unfinished download lies; another content has another place."""
        content = (self.sha256 or self.git_sha1 or "unknown")[:12]
        return self.target.with_name(f".{self.target.name[:80]}.{content}.part")


class _Busy(Exception):
    """The server asks to come back later."""

    def __init__(self, status: int, after_s: float) -> None:
        super().__init__(f"the server answered {status}")
        self.after_s = after_s


def open_client() -> httpx.Client:
    """Return a client that trusts what this machine trusts, and follows redirects."""
    import certifi
    import httpx

    trust = ssl.create_default_context()
    trust.load_verify_locations(certifi.where())
    return httpx.Client(verify=trust, follow_redirects=True, timeout=TIMEOUT_S, headers={
        "User-Agent": "nightpress", "Accept-Encoding": "identity"})


def wait(seconds: float) -> None:
    """Wait; Ctrl-C ends it."""
    threading.Event().wait(seconds)


def fetch(client: httpx.Client, wanted: Download, show: Show | None = None, pause: Wait = wait) -> None:
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
    import httpx

    part, vain = wanted.part, 0
    with explained(wanted.target.parent):
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
    if wanted.size is not None:
        short = wanted.size - _size(part) - shutil.disk_usage(wanted.target.parent).free
        if short > 0:
            raise DiskFull(f"{wanted.target.name} needs {short / 1e6:,.0f} MB more than are free in "
                           f"{wanted.target.parent}; free some space, then run the same command again.")
    if not (wanted.sha256 or wanted.git_sha1):
        part.unlink(missing_ok=True)  # without a hash nobody knows whether the rest belongs to it
    while wanted.size is None or _size(part) != wanted.size or not part.exists():
        before = _size(part)
        try:
            _take(client, wanted, show)
            if wanted.size is None:
                break
            if _size(part) > wanted.size:
                part.unlink()
                raise DownloadDamaged(f"{wanted.target.name} is longer than the {wanted.size:,} bytes announced.")
            reason = "the connection ended early"
            after_s = 0.0
        except (httpx.TransportError, _Busy) as problem:
            reason = str(problem) or type(problem).__name__
            after_s = problem.after_s if isinstance(problem, _Busy) else 0.0
        except KeyboardInterrupt:
            raise Interrupted("Stopped; the same command goes on where it was.") from None
        if wanted.size is not None and _size(part) == wanted.size:
            break
        vain = 0 if _size(part) > before else vain + 1
        if vain >= ATTEMPTS:
            raise DownloadInterrupted(f"The download of {wanted.target.name} broke off ({reason[:200]}), after "
                                      f"{ATTEMPTS} attempts in vain; the same command goes on where it stopped.")
        try:
            pause(min(MAX_WAIT_S, max(after_s, WAIT_S * 2 ** vain / 2 if vain else 0.0)))
        except KeyboardInterrupt:
            raise Interrupted("Stopped; the same command goes on where it was.") from None
    check(part, wanted)
    with explained(wanted.target):
        fsync_file(part)
        failpoint("download.checked")
        rename(part, wanted.target)


def check(path: Path, wanted: Download) -> None:
    """Compare a file with the hash that is wanted; one that differs is removed.

    Raises:
        DownloadDamaged: it differs.
    """
    expected = wanted.sha256 or wanted.git_sha1
    if not expected:
        return
    digest = hashlib.sha256() if wanted.sha256 else hashlib.sha1(  # git's name of a file, no signature
        f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        path.unlink()
        raise DownloadDamaged(f"{wanted.target.name} was downloaded and is not what its hash says; it was removed. Run "
                              "the same command again.")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _take(client: httpx.Client, wanted: Download, show: Show | None) -> None:
    """Ask once for what is missing and append it."""
    part, have = wanted.part, _size(wanted.part)
    asked = {**wanted.headers, **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", wanted.url, headers=asked) as response:
        status = response.status_code
        if status == 416:  # it has less than we have: begin anew
            part.unlink()
            return
        if status == 429 or status >= 500:
            after = response.headers.get("Retry-After", "")
            raise _Busy(status, float(after) if after.isdecimal() else 0.0)
        if status not in (200, 206):
            raise ServerRefused(f"The server answered {status} to {wanted.url}.", status)
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if status == 206 and start != str(have):
            part.unlink(missing_ok=True)
            return
        if status == 200:  # the whole again
            have = 0
        length = response.headers.get("Content-Length", "")
        total = wanted.size or (have + int(length) if length.isdecimal() else 0)
        with explained(part), part.open("ab" if have else "wb") as stream:
            for block in response.iter_raw():  # as it comes: a fixed size would hold bytes back, and lose them
                stream.write(block)
                have += len(block)
                if show is not None:
                    show(Progress("downloading", wanted.target.name, have, max(total, have)))
                if wanted.size is not None and have > wanted.size:
                    return


def remove_parts(folder: Path, keep: set[Path]) -> None:
    """Remove unfinished downloads of files that are not wanted any more."""
    for part in folder.glob(".*.part"):
        if part not in keep:
            with contextlib.suppress(OSError):
                part.unlink()
