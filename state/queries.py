"""What can be asked of the ledger; every answer is plain JSON-ready dicts."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from state.damage import LedgerDamaged
from state.faults import NightpressError

Row = dict[str, Any]

_JSON = {"plan", "tensor_types", "scores", "data", "result", "gates", "spec", "inputs", "outputs"}
_FLAGS = {"simulated", "urgent"}


class UnknownRun(NightpressError):
    """There is no such run; `nightpress results` lists the runs there are."""

    exit_code: ClassVar[int] = 52


class UnknownJob(NightpressError):
    """There is no such job; `nightpress queue --all` lists the jobs there are."""

    exit_code: ClassVar[int] = 14


def decoded(row: Row) -> Row:
    """Turn the JSON columns of a row into objects and its flags into booleans.

    Raises:
        LedgerDamaged: a JSON column holds no JSON.
    """
    for column in _JSON & row.keys():
        try:
            row[column] = None if row[column] is None else json.loads(row[column])
        except ValueError as error:
            raise LedgerDamaged(
                f"The ledger holds unreadable data in {column!r}; bring it back from its backup with "
                "`nightpress restore --force`."
            ) from error
    for column in _FLAGS & row.keys():
        row[column] = bool(row[column])
    return row


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not the name of a table")
    return name


class Queries:
    """The reading half of the ledger, over one SQLite connection shared by threads."""

    def __init__(self, connection: sqlite3.Connection, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._connection = connection
        self._guard = threading.RLock()

    def rows(self, sql: str, parameters: Iterable[Any] = (), *, raw: bool = False) -> list[Row]:
        """Run one SELECT and return its rows, JSON columns decoded unless `raw`."""
        try:
            with self._guard:
                cursor = self._connection.execute(sql, tuple(parameters))
                names = [column[0] for column in cursor.description]
                found = [dict(zip(names, row, strict=True)) for row in cursor]
                return found if raw else [decoded(row) for row in found]
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise LedgerDamaged from error
            raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let every query of the block see the same moment."""
        with self._guard:
            nested = self._connection.in_transaction
            if not nested:
                self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if not nested:
                    self._connection.execute("COMMIT")

    def stored_rows(self, name: str) -> list[Row]:
        """Return all rows of a table or view exactly as stored."""
        order = " ORDER BY rowid" if name not in ("leaderboard", "latest_run", "queue") else ""
        return self.rows(f'SELECT * FROM "{_identifier(name)}"{order}', raw=True)  # noqa: S608  checked name

    def each_stored_row(self, name: str) -> Iterator[Row]:
        """Yield the rows of a table one after the other, exactly as stored, in the order they were written.

        Takes no guard: for a connection that belongs to one thread.
        """
        cursor = self._connection.execute(f'SELECT * FROM "{_identifier(name)}" ORDER BY rowid')  # noqa: S608  checked
        columns = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(columns, row, strict=True))

    def columns(self, name: str) -> list[str]:
        """Return the column names of a table or view."""
        return [row["name"] for row in self.rows("SELECT name FROM pragma_table_info(?)", (name,))]

    def migrations(self) -> list[str]:
        """Return the names of the schema's steps, in order."""
        return [row["name"] for row in self.rows("SELECT name FROM migration ORDER BY name")]

    def runs(self, limit: int = 20) -> list[Row]:
        """Return the newest runs first, without their plans."""
        rows = self.rows("SELECT * FROM run ORDER BY id DESC LIMIT ?", (limit,))
        for row in rows:
            del row["plan"]
        return rows

    def run(self, run_id: int) -> Row:
        """Return one run.

        Raises:
            UnknownRun: there is none with this number.
        """
        rows = self.rows("SELECT * FROM run WHERE id = ?", (run_id,))
        if not rows:
            raise UnknownRun(f"There is no run {run_id}; `nightpress results` lists the runs there are.")
        return rows[0]

    def latest_run_id(self, include_simulated: bool = True) -> int | None:
        """Return the number of the newest run, None when there is none."""
        where = "" if include_simulated else " WHERE simulated = 0"
        newest: int | None = self.rows(f"SELECT max(id) AS id FROM run{where}")[0]["id"]  # noqa: S608
        return newest

    def find_resumable(self, plan_fingerprint: str) -> int | None:
        """Return the newest interrupted run of this very plan, None when there is none."""
        rows = self.rows(
            "SELECT max(id) AS id FROM run WHERE plan_fingerprint = ? AND state = 'interrupted'",
            (plan_fingerprint,),
        )
        newest: int | None = rows[0]["id"]
        return newest

    def candidates(self, run_id: int) -> list[Row]:
        """Return the levels of a run in ladder order."""
        return self.rows("SELECT * FROM candidate WHERE run_id = ? ORDER BY ordinal, id", (run_id,))

    def measurements(self, run_id: int) -> list[Row]:
        """Return the measurements of a run, the baseline (level '') first."""
        return self.rows("SELECT * FROM measurement WHERE run_id = ? ORDER BY level <> '', id", (run_id,))

    def responses(self, run_id: int, level: str) -> list[Row]:
        """Return the replies of one level of a run in the order they were recorded."""
        return self.rows("SELECT * FROM response WHERE run_id = ? AND level = ? ORDER BY id", (run_id, level))

    def releases(self, model: str | None = None) -> list[Row]:
        """Return the recorded promotions, newest first."""
        return self.rows("SELECT * FROM release WHERE ?1 IS NULL OR model = ?1 ORDER BY id DESC", (model,))

    def events(self, after_id: int = 0, limit: int = 1000) -> list[Row]:
        """Return what happened after event `after_id`, oldest first."""
        return self.rows("SELECT * FROM event WHERE id > ? ORDER BY id LIMIT ?", (after_id, limit))

    def events_of_run(self, run_id: int, action: str) -> list[Row]:
        """Return what happened under one action in a run, oldest first."""
        return self.rows("SELECT * FROM event WHERE run_id = ? AND action = ? ORDER BY id", (run_id, action))

    def jobs(self, *, waiting: bool = False, limit: int = 1000) -> list[Row]:
        """Return the jobs of the queue, what is in work first, then in the order they will be done, then the ended.

        Args:
            waiting: only those queued or in work.
            limit: most to return.
        """
        if "005_queue" not in self.migrations():
            return []
        where = "WHERE state IN ('queued', 'working')" if waiting else ""
        return self.rows(
            f"SELECT * FROM job {where} ORDER BY CASE state WHEN 'working' THEN 0 WHEN 'queued' THEN 1 ELSE 2 END, "  # noqa: S608
            "CASE WHEN state IN ('queued', 'working') THEN urgent END DESC, "
            "CASE WHEN state IN ('queued', 'working') THEN priority END DESC, "
            "CASE WHEN state IN ('queued', 'working') THEN position END, updated_at DESC, id DESC LIMIT ?", (limit,))

    def job(self, job_id: int) -> Row:
        """Return one job.

        Raises:
            UnknownJob: there is none with this number.
        """
        rows = self.rows("SELECT * FROM job WHERE id = ?", (job_id,)) if "005_queue" in self.migrations() else []
        if not rows:
            raise UnknownJob(f"There is no job {job_id}; `nightpress queue --all` lists the jobs there are.")
        return rows[0]

    def leaderboard(self) -> list[Row]:
        """Return the view `leaderboard`: candidates of finished, real runs, newest run and smallest first."""
        return self.rows("SELECT * FROM leaderboard")

    def steps(self, fingerprints: Iterable[str] | None = None) -> dict[str, Row]:
        """Return the results of finished steps by fingerprint; all of them for None."""
        if fingerprints is None:
            rows = self.rows("SELECT fingerprint, result FROM step")
        else:
            rows = self.rows(
                "SELECT fingerprint, result FROM step "
                "WHERE fingerprint IN (SELECT value FROM json_each(?))", (json.dumps(list(fingerprints)),),
            )
        return {row["fingerprint"]: row["result"] for row in rows}

    def steps_of_model(self, model_sha256: str) -> dict[str, Row]:
        """Return the results of all finished steps of runs of one model by fingerprint."""
        rows = self.rows("SELECT step.fingerprint, step.result FROM step JOIN run ON run.id = step.run_id "
                         "WHERE run.model_sha256 = ?", (model_sha256,))
        return {row["fingerprint"]: row["result"] for row in rows}

    def steps_of_run(self, run_id: int) -> dict[str, Row]:
        """Return the results of the finished steps that this very run recorded, by fingerprint."""
        rows = self.rows("SELECT fingerprint, result FROM step WHERE run_id = ?", (run_id,))
        return {row["fingerprint"]: row["result"] for row in rows}

    def crash_count(self, fingerprint: str) -> int:
        """Return how often the worker died over this fingerprint since it was last released."""
        return int(self.rows("SELECT count(*) AS n FROM crash WHERE fingerprint = ?", (fingerprint,))[0]["n"])

    def crashes_without_progress(self, fingerprint: str, run_id: int, level: str, signal: str | None = None) -> int:
        """Return how often the worker died over a fingerprint since a step of this level was last finished.

        With `signal`, only the deaths by it count.
        """
        return int(self.rows(
            "SELECT count(*) AS n FROM crash WHERE fingerprint = ?1 AND (?4 IS NULL OR signal = ?4) AND at >= coalesce("
            "(SELECT max(finished_at) FROM step WHERE run_id = ?2 AND level = ?3), '')",
            (fingerprint, run_id, level, signal))[0]["n"])

    def quarantined(self) -> dict[str, str]:
        """Return the reasons of quarantined fingerprints."""
        rows = self.rows("SELECT * FROM quarantine ORDER BY at")
        return {row["fingerprint"]: row["reason"] for row in rows}

    def cached_hash(self, path: Path) -> str | None:
        """Return the remembered sha256 of `path` while its size, time and inode are the same, else None."""
        resolved = path.resolve()
        facts = resolved.stat()
        rows = self.rows(
            "SELECT sha256 FROM modelfile WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?",
            (str(resolved), facts.st_size, facts.st_mtime_ns, facts.st_ino),
        )
        return str(rows[0]["sha256"]) if rows else None
