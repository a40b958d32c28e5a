"""Files written so that a reader, or a power cut, sees the old content or the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from state.faults import NightpressError, failpoint
from state.owner import has_live_tag, tag


class DiskFull(NightpressError):
    """The disk is full; free some space, then run the same command again: finished work is kept."""

    exit_code: ClassVar[int] = 50


class StateUnwritable(NightpressError):
    """A folder of Nightpress cannot be written; make it writable or name another one."""

    exit_code: ClassVar[int] = 51


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OURS = re.compile(r"\.[0-9]{1,10}-[0-9a-f]{8}-[0-9a-f]{8}\.tmp$")  # as `temporary_beside` ends a name
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into a sentence.

    Raises:
        DiskFull: no space or quota left.
        StateUnwritable: read-only, not permitted, or not a folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"The disk that holds {path} is full; free some space, then run the same command again: "
                "finished work is kept."
            ) from error
        if error.errno in _UNWRITABLE:
            raise StateUnwritable(
                f"{path} cannot be written ({os.strerror(error.errno)}); make it writable or name another."
            ) from error
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable; works on a read-only file too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int) -> None:
    """Create `folder` and its parents when missing, exactly with `mode` whatever the umask; durable.

    A folder that exists keeps its mode.
    """
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        make_folder(folder.parent, mode)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    folder.chmod(mode)
    fsync_folder(folder.parent)


def temporary_beside(path: Path) -> Path:
    """Return a fresh hidden name in the folder of `path`, marked as this process's."""
    return path.with_name(f".{path.name[:80]}.{tag()}-{secrets.token_hex(4)}.tmp")


def rename(old: Path, new: Path) -> None:
    """Rename within one file system, replacing a file or symlink at `new`; durable on return."""
    os.replace(old, new)  # noqa: PTH105  Path.replace follows the same call; os.replace names the promise
    fsync_folder(new.parent)
    if old.parent != new.parent:
        fsync_folder(old.parent)


def write_atomic(path: Path, content: bytes | Iterable[bytes], mode: int = 0o600) -> None:
    """Replace `path` by `content`, whole or in parts; on return it is durable, on any failure the old file stands.

    Raises:
        OSError: as the operating system says; the temporary file is gone.
    """
    temporary = temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.writelines([content] if isinstance(content, bytes) else content)
            failpoint("files.written")
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        failpoint("files.synced")
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def orphans(folder: Path) -> list[Path]:
    """Return the temporary files in `folder` whose process is gone; what others name so is not ours to judge."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob(".*.tmp") if _OURS.search(path.name) and not has_live_tag(path.name))


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content in lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
