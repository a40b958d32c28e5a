"""A ledger file that cannot be trusted: how it is recognised, and how it is set aside without losing it.

SQLite keeps no checksums, so a flipped bit inside a stored text is not noticed here; a broken
header, page, index or schema is.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import ClassVar

from state.clock import utc_compact
from state.faults import NightpressError, failpoint
from state.files import rename, write_atomic
from state.migrations import MIGRATIONS, applied, refuse_newer

LEDGER = "ledger.db"
MARKER = "degraded.txt"
_BESIDE = ("-wal", "-shm")


class LedgerDamaged(NightpressError):
    """The ledger is damaged; bring it back from its last backup with `nightpress restore`."""

    exit_code: ClassVar[int] = 42


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a ledger file with the pragmas every connection needs, in autocommit mode.

    Read-only, no byte of the database changes; where even SQLite's side files cannot be
    created (a read-only medium), the file is read as it lies.
    """
    base = path.resolve().as_uri()
    connection = sqlite3.connect(
        base + ("?mode=ro" if read_only else ""), uri=True, isolation_level=None, timeout=10.0,
        check_same_thread=False,
    )
    if read_only:
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN:
                connection.close()
                raise
            connection.close()
            connection = sqlite3.connect(
                base + "?mode=ro&immutable=1", uri=True, isolation_level=None, check_same_thread=False
            )
        except sqlite3.DatabaseError:
            connection.close()
            raise
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def diagnose(path: Path) -> str | None:
    """Return what is wrong with the ledger file at `path`, None when it is sound.

    Raises:
        LedgerNewer: it is sound but written by a newer version; not a byte has changed.
    """
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        connection = connect(path, read_only=True)
    except sqlite3.DatabaseError as error:
        return _reason(error)
    try:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            return str(verdict)
        names = applied(connection)
        refuse_newer(names)
        if not names:
            foreign = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            return "it is not a ledger" if foreign else None
        if len(names) == len(MIGRATIONS) and not _expected_shape() <= _shape(connection):
            return "its tables are not those of a ledger"
    except sqlite3.DatabaseError as error:
        return _reason(error)
    finally:
        connection.close()
    return None


def _reason(error: sqlite3.DatabaseError) -> str:
    """Return the message of an error that means damage; raise any other (locked, unreadable)."""
    transient = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
                 sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in transient:
        raise error
    return str(error)


def _shape(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    return {
        (kind, name, " ".join((sql or "").split()))
        for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")
    }


def _expected_shape() -> set[tuple[str, str, str]]:
    from state.migrations import migrate

    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        migrate(connection)
        return _shape(connection)
    finally:
        connection.close()


def finish_setting_aside(state_dir: Path) -> None:
    """Move away the side files of a ledger that is gone: replayed into a new one they would ruin it."""
    if (state_dir / LEDGER).exists():
        return
    stamp = utc_compact()
    for suffix in _BESIDE:
        stray = state_dir / (LEDGER + suffix)
        if stray.exists():
            rename(stray, _free(state_dir, stamp).with_name(f"{LEDGER}{suffix}.damaged-{stamp}"))


def set_aside(state_dir: Path, why: str) -> Path:
    """Rename the ledger so that nothing overwrites it, and return its new path.

    The loss is first written into `degraded.txt`, where it stays until a restore has finished.
    The database moves before its side files: see `finish_setting_aside`.
    """
    stamp = utc_compact()
    target = _free(state_dir, stamp)
    backups = list((state_dir / "backups").glob("ledger-*.json"))
    how = ("Bring it back from its backup with `nightpress restore`" if backups else
           "There is no backup of it, so `nightpress restore` cannot help and results start anew")
    sentence = (
        f"The ledger was set aside as {target.name} ({why}); deployed models are untouched. "
        f"{how}; to go on without it, delete {state_dir / MARKER}."
    )
    write_atomic(state_dir / MARKER, (sentence + "\n").encode())
    failpoint("ledger.set_aside_marked")
    rename(state_dir / LEDGER, target)
    failpoint("ledger.set_aside_renamed")
    for suffix in _BESIDE:
        side = state_dir / (LEDGER + suffix)
        if side.exists():
            rename(side, target.with_name(target.name + suffix))
    return target


def _free(state_dir: Path, stamp: str) -> Path:
    target = state_dir / f"{LEDGER}.damaged-{stamp}"
    count = 1
    while target.exists():
        count += 1
        target = state_dir / f"{LEDGER}.damaged-{stamp}-{count}"
    return target


def degraded(state_dir: Path) -> str | None:
    """Return the sentence that tells of a damaged ledger not yet restored."""
    try:
        return (state_dir / MARKER).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
