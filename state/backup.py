"""The ledger as one JSON document: written after every candidate, and read back when SQLite fails.

A backup carries its own hash, so a torn or edited one is refused rather than restored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

from state.clock import utc_compact, utc_now
from state.damage import LEDGER, MARKER, connect, degraded, diagnose, finish_setting_aside, set_aside
from state.faults import NightpressError, failpoint
from state.files import explained, fsync_folder, make_folder, write_atomic
from state.lock import Lock
from state.migrations import MIGRATIONS, applied, migrate, refuse_newer
from state.queries import Queries

FORMAT = 1
# Parents before children, so that the rows can go back in this order.
TABLES = ("run", "candidate", "measurement", "response", "release", "event", "step", "crash", "quarantine",
          "modelfile", "job", "memo", "stage")
#: the step that made a table, where not the first
_SINCE = {"job": "005_queue", "memo": "005_queue", "stage": "007_stages"}
_SUFFIX_DEGRADED = "-degraded"


class BackupRefused(NightpressError):
    """The backup cannot be used; name an older one."""

    exit_code: ClassVar[int] = 43


def _dump(tables: dict[str, list[dict[str, Any]]]) -> str:
    return json.dumps(tables, ensure_ascii=False, separators=(",", ":"))


def _stream(state_dir: Path) -> Iterator[bytes]:
    """Yield a backup part by part, of one moment of the ledger, a row in memory at a time.

    Over a connection of its own, so that nobody who writes meanwhile waits.
    """
    with contextlib.closing(connect(state_dir / LEDGER, read_only=True)) as connection:
        ledger = Queries(connection, state_dir)
        connection.execute("BEGIN")
        head = {"format": FORMAT, "created_at": utc_now(), "migrations": ledger.migrations()}
        yield json.dumps(head)[:-1].encode() + b', "tables": '
        digest = hashlib.sha256()
        for part in _tables(ledger):
            content = part.encode("utf-8", "replace")
            digest.update(content)
            yield content
        yield b', "sha256": "' + digest.hexdigest().encode() + b'"}\n'


def _tables(ledger: Queries) -> Iterator[str]:
    """Yield what `_dump` returns of all tables, in parts."""
    separator = "{"
    for table in tables_of(ledger.migrations()):
        yield f'{separator}"{table}":['
        first = True
        for row in ledger.each_stored_row(table):
            yield ("" if first else ",") + json.dumps(row, ensure_ascii=False, separators=(",", ":"))
            first = False
        yield "]"
        separator = ","
    yield "}"


def tables_of(migrations: Collection[str]) -> list[str]:
    """Return the tables of a ledger that carries these steps of the schema, parents before children."""
    return [table for table in TABLES if _SINCE.get(table, MIGRATIONS[0][0]) in migrations]


def write_backup(ledger: Queries, keep: int = 5) -> Path:
    """Write all tables to `backups/ledger-<UTC>.json` and keep the newest `keep` of them.

    While the ledger is degraded, its backups are named apart and the ones of the damaged
    ledger stay, whatever their number: they are what a restore needs.

    Raises:
        DiskFull, StateUnwritable: as the disk says; earlier backups stay.
    """
    from state.transaction import explained_sql  # loads SQLModel

    folder = ledger.state_dir / "backups"
    kind = _SUFFIX_DEGRADED if degraded(ledger.state_dir) else ""
    with explained(folder):
        make_folder(folder, 0o700)
        path = folder / f"ledger-{utc_compact()}{kind}.json"
        with explained_sql(ledger.state_dir):
            write_atomic(path, _stream(ledger.state_dir))
        failpoint("backup.written")
        everything = backups(ledger.state_dir)
        alike = [old for old in everything if old.stem.endswith(_SUFFIX_DEGRADED) == bool(kind)]
        for old in alike[max(keep, 1):]:
            if old != path:  # a clock set back must not make the newest look oldest
                old.unlink()
        fsync_folder(folder)
    return path


def backups(state_dir: Path) -> list[Path]:
    """Return the backups, newest first."""
    return sorted((state_dir / "backups").glob("ledger-*.json"), key=lambda path: path.name, reverse=True)


def latest_backup(state_dir: Path) -> Path | None:
    """Return the newest backup worth restoring, None when there is none.

    After damage that is the newest of the lost ledger, not of the fresh one that replaced it.
    """
    found = backups(state_dir)
    if degraded(state_dir):
        found = [path for path in found if not path.stem.endswith(_SUFFIX_DEGRADED)] or found
    return found[0] if found else None


def read_backup(path: Path) -> dict[str, Any]:
    """Return the document of a backup after checking that it is whole and unchanged.

    Raises:
        BackupRefused: it is not; the message offers the next older one.
        LedgerNewer: it is of a newer version.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        tables = document["tables"]
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, not {FORMAT}")
        if hashlib.sha256(_dump(tables).encode("utf-8", "replace")).hexdigest() != document["sha256"]:
            raise ValueError("its content does not match its hash")
        names = [str(name) for name in document["migrations"]]
        if missing := {"run", *tables_of(names)} - tables.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        older = [other for other in backups(path.parent.parent) if other.name < path.name]
        offer = f"the next older one is {older[0]}" if older else "there is no older one"
        raise BackupRefused(f"The backup {path} is incomplete or damaged ({error}); {offer}.") from error
    refuse_newer(names)
    return document


def restore_backup(state_dir: Path, path: Path | None = None, *, force: bool = False) -> Path:
    """Build a new ledger from a backup, put it in place of the present one, return the backup used.

    Without `path` the newest backup is taken. With `force` a present ledger that is sound and
    not empty is set aside first; nothing is ever deleted.

    Raises:
        BackupRefused: no backup, a damaged one, or a present ledger that would be replaced.
        StateBusy: a Nightpress process has the ledger open.
    """
    with explained(state_dir):
        source = path or latest_backup(state_dir)
        if source is None:
            raise BackupRefused(f"There is no backup in {state_dir / 'backups'}; results start anew.")
        document = read_backup(source)
        make_folder(state_dir, 0o700)
        with Lock.acquire(state_dir / "ledger.lock", "nightpress restore"):
            finish_setting_aside(state_dir)
            present = state_dir / LEDGER
            why = diagnose(present) if present.exists() else "it is missing"
            if why is None and not force and _rows(present):
                raise BackupRefused(
                    "The present ledger is sound and not empty; `nightpress restore --force` sets it aside "
                    "and puts the backup in its place."
                )
            content = _build(document, source)
            failpoint("restore.built")
            if present.exists():
                if why is None:
                    _fold(present)
                set_aside(state_dir, why or "a restore takes its place")
            failpoint("restore.set_aside")
            write_atomic(present, content)
            failpoint("restore.renamed")
            (state_dir / MARKER).unlink(missing_ok=True)
            fsync_folder(state_dir)
    return source


def _rows(path: Path) -> int:
    with contextlib.closing(connect(path, read_only=True)) as connection:
        if not applied(connection):
            return 0
        tables = {"run", "event", "job", "stage"} & set(tables_of(applied(connection)))
        return sum(int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 - fixed names
                   for table in tables)


def _fold(path: Path) -> None:
    """Bring what waits in the write-ahead log into the file, so that one rename moves all of it."""
    with contextlib.closing(connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _build(document: dict[str, Any], source: Path) -> bytes:
    """Return the bytes of a ledger with the rows of a backup, brought to the present schema."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        try:
            last = document["migrations"][-1] if document["migrations"] else MIGRATIONS[0][0]
            migrate(connection, upto=last)
            connection.execute("BEGIN")
            for table in tables_of(document["migrations"]):
                for row in document["tables"][table]:
                    names = ", ".join(f'"{name}"' for name in _columns(connection, table, row))
                    marks = ", ".join("?" * len(row))
                    connection.execute(
                        f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))  # noqa: S608
            connection.execute("COMMIT")
            migrate(connection)
            if connection.execute("PRAGMA foreign_key_check").fetchone():
                raise ValueError("its rows do not fit together")
        except (sqlite3.Error, ValueError, AttributeError, TypeError) as error:
            raise BackupRefused(
                f"The backup {source} cannot be restored ({error}); name an older one."
            ) from error
        return connection.serialize()


def _columns(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> list[str]:
    known = {name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))}
    if unknown := row.keys() - known:
        raise ValueError(f"{table} has no column {sorted(unknown)}")
    return list(row)
