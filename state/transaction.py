"""One transaction on the ledger: how values are stored, rows found and replaced, refusals explained."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, SQLModel, select

from state.damage import LedgerDamaged
from state.files import DiskFull, StateUnwritable
from state.manifest import NotPromotable
from state.queries import UnknownRun
from state.schema import Candidate, Run


def dumps(value: Any) -> str:
    """Return JSON that every reader accepts: not-finite numbers become null, lone surrogates `?`."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return clean(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def clean(text: str) -> str:
    """Return text that can be stored: lone surrogates become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def stored(value: Any) -> Any:
    """Return a value as its column stores it."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, (Mapping, list, tuple)):
        return dumps(value)
    return _finite(value)


def upsert(
    session: Session, model: type[SQLModel], keys: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Insert rows, or replace the ones whose `keys` are there already."""
    if not rows:
        return
    statement = insert(model)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    session.connection().execute(
        statement.on_conflict_do_update(index_elements=list(keys), set_=changed),
        [{name: stored(value) for name, value in row.items()} for row in rows],
    )


def present(number: int | None) -> int:
    """Return the number a row got on flush."""
    if number is None:
        raise RuntimeError("the row was not written")
    return number


def run_row(session: Session, run_id: int) -> Run:
    """Return a run.

    Raises:
        UnknownRun: there is none with this number.
    """
    run = session.get(Run, run_id)
    if run is None:
        raise UnknownRun(f"There is no run {run_id}; `nightpress results` lists the runs there are.")
    return run


def candidate_row(session: Session, run_id: int, level: str) -> Candidate | None:
    """Return a level of a run, None when it was never planned."""
    return session.exec(
        select(Candidate).where(Candidate.run_id == run_id, Candidate.level == level)
    ).first()


@contextlib.contextmanager
def explained_sql(state_dir: Path) -> Iterator[None]:
    """Turn SQLite's refusals into the same sentences as the operating system's."""
    try:
        yield
    except (DBAPIError, sqlite3.DatabaseError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise DiskFull(
                f"The disk that holds {state_dir} is full; free some space, then run the same command again: "
                "finished work is kept."
            ) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise StateUnwritable(
                f"The ledger in {state_dir} cannot be written ({cause}); make it writable or name another."
            ) from error
        if code == sqlite3.SQLITE_CONSTRAINT and "simulated result" in str(cause):
            raise NotPromotable from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise LedgerDamaged from error
        raise
