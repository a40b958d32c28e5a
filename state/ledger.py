"""The ledger: one SQLite file that remembers every run, number, reply and release.

A method that writes returns after its one transaction is on the disk (WAL, synchronous=FULL):
what was acknowledged survives SIGKILL and a power cut. One process writes at a time, kept by
`ledger.lock`; any number may read.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import sqlalchemy
from sqlalchemy.pool import StaticPool
from sqlmodel import Session, create_engine, select

from state.clock import utc_now
from state.damage import LEDGER, LedgerDamaged, connect, degraded, diagnose, finish_setting_aside, set_aside
from state.faults import NightpressError, failpoint
from state.files import explained, make_folder
from state.lock import Lock, StateBusy
from state.migrations import LedgerNewer, migrate
from state.owner import is_live, started
from state.queries import UnknownJob, UnknownRun
from state.records import JobSpec, MeasurementRow, ReleaseRow, ResponseRow, RunSpec
from state.schema import (
    Candidate,
    Crash,
    Event,
    Measurement,
    Modelfile,
    Quarantine,
    Release,
    Response,
    Run,
    Step,
)
from state.stages import Stages
from state.states import IllegalTransition, JobState, LevelState, RunState, advance
from state.transaction import candidate_row, clean, dumps, explained_sql, present, run_row, stored, upsert

__all__ = [
    "JobSpec", "JobState", "Ledger", "LedgerDamaged", "LedgerMissing", "LedgerNewer", "LevelState", "MeasurementRow",
    "ReleaseRow", "ResponseRow", "RunSpec", "RunState", "StateBusy", "UnknownJob", "UnknownRun",
]


class LedgerMissing(NightpressError):
    """Nothing has been recorded yet; start with `nightpress run`."""

    exit_code: ClassVar[int] = 40


# What update_level may set; identity, state, mark and time are not the caller's.
_LEVEL_COLUMNS = set(Candidate.model_fields) - {"id", "run_id", "level", "state", "simulated", "updated_at"}


class Ledger(Stages):
    """The open ledger; a context manager. `degraded` tells of a damaged predecessor not yet restored."""

    def __init__(self, connection: sqlite3.Connection, state_dir: Path, lock: Lock | None) -> None:
        super().__init__(connection, state_dir)
        self._lock = lock
        self._began: set[int] = set()  # runs started or resumed by this very object
        self._engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)

        @sqlalchemy.event.listens_for(self._engine, "begin")
        def begin(transaction: sqlalchemy.Connection) -> None:
            # sqlite3's own implicit BEGIN is off; IMMEDIATE takes the write lock before reading
            transaction.exec_driver_sql("BEGIN IMMEDIATE")

    @property
    def degraded(self) -> str | None:
        """A sentence when a damaged ledger was set aside and not yet restored."""
        return degraded(self.state_dir)

    @classmethod
    def open(cls, state_dir: Path, owner: str) -> Self:
        """Open for writing, creating folder and ledger when missing; `owner` is the command that asks.

        A damaged file is set aside and a fresh ledger started, see `degraded`.

        Raises:
            StateBusy: another process has it open; the message names that process.
            LedgerNewer: written by a newer version; untouched.
            DiskFull, StateUnwritable: as the disk says.
        """
        with explained(state_dir):
            make_folder(state_dir, 0o700)
            lock = Lock.acquire(state_dir / "ledger.lock", owner)
        connection: sqlite3.Connection | None = None
        try:
            with explained_sql(state_dir), explained(state_dir):
                path = state_dir / LEDGER
                finish_setting_aside(state_dir)
                if path.exists():
                    why = diagnose(path)
                    # An empty file is what a first start leaves when killed early, unless there are backups.
                    if why == "it is empty" and not list((state_dir / "backups").glob("ledger-*.json")):
                        why = None
                    if why is not None:
                        set_aside(state_dir, why)
                connection = connect(path)
                path.chmod(0o600)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                failpoint("ledger.opened")
                migrate(connection)
            return cls(connection, state_dir, lock)
        except BaseException:
            if connection is not None:
                connection.close()
            lock.release()
            raise

    @classmethod
    def read(cls, state_dir: Path) -> Self:
        """Open for reading only; takes no lock and works beside a writer.

        Raises:
            LedgerMissing: nothing was recorded yet.
            LedgerDamaged: the file is not readable as a ledger.
            LedgerNewer: written by a newer version.
        """
        path = state_dir / LEDGER
        if not path.is_file() or path.stat().st_size == 0:
            raise LedgerMissing
        with explained_sql(state_dir):
            why = diagnose(path)
            if why is not None:
                raise LedgerDamaged(
                    f"The ledger {path} is damaged ({why}); the next `nightpress run` sets it aside, and "
                    "`nightpress restore` brings it back from its backup."
                )
            return cls(connect(path, read_only=True), state_dir, None)

    def close(self) -> None:
        """Close the file and give the lock back; a second call does nothing."""
        with self._guard:
            self._engine.dispose()
            self._connection.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Session]:
        """One transaction: committed and durable at the end of the block, undone by any exception."""
        with self._guard, explained_sql(self.state_dir), explained(self.state_dir):
            if self._lock is None:
                raise RuntimeError("this ledger was opened for reading")
            with Session(self._engine) as session:
                yield session
                session.flush()
                failpoint("ledger.commit")
                session.commit()
                failpoint("ledger.committed")

    # runs

    def recover(self) -> list[str]:
        """Mark runs whose process is gone as interrupted and their unfinished levels as planned.

        One transaction: killed and repeated, the end is the same. Returns one sentence per run.
        """
        sentences = []
        with self._writing() as session:
            for run in session.exec(select(Run).where(Run.state == RunState.RUNNING.value)):
                mine = run.owner_pid == os.getpid() and run.id not in self._began
                if is_live(run.owner_pid, run.owner_started) and not mine:
                    continue
                run.state = advance(RunState(run.state), RunState.INTERRUPTED).value
                run.ended_at = utc_now()
                count = self._replan(session, run.id)
                session.add(run)
                again = f", {count} level{'s' * (count != 1)} to be done again" if count else ""
                sentences.append(f"Run {run.id} of {run.name} was interrupted{again}.")
            failpoint("ledger.recovering")
        return sentences

    @staticmethod
    def _replan(session: Session, run_id: int | None) -> int:
        levels = session.exec(
            select(Candidate).where(Candidate.run_id == run_id, Candidate.state == LevelState.WORKING.value)
        ).all()
        for level in levels:
            level.state = advance(LevelState(level.state), LevelState.PLANNED).value
            level.updated_at = utc_now()
            session.add(level)
        return len(levels)

    def start_run(self, spec: RunSpec) -> int:
        """Record a run as running, owned by this process, and return its number."""
        with self._writing() as session:
            run = Run(
                **{**asdict(spec), "plan": dumps(spec.plan)},
                owner_pid=os.getpid(), owner_started=started(os.getpid()),
            )
            session.add(run)
            session.flush()
            number = present(run.id)
            self._began.add(number)
        return number

    def resume_run(self, run_id: int) -> None:
        """Set an interrupted or failed run to running again, owned by this process."""
        with self._writing() as session:
            run = run_row(session, run_id)
            run.state = advance(RunState(run.state), RunState.RUNNING).value
            run.ended_at, run.reason = None, ""
            run.owner_pid, run.owner_started = os.getpid(), started(os.getpid())
            session.add(run)
            self._began.add(run_id)

    def end_run(
        self, run_id: int, state: RunState, chosen_level: str | None = None, reason: str = ""
    ) -> None:
        """Record how a run ended; levels still working are planned again unless it is finished.

        Raises:
            IllegalTransition: the run is not running, or finished while a level is still working.
        """
        with self._writing() as session:
            run = run_row(session, run_id)
            run.state = advance(RunState(run.state), state).value
            if self._replan(session, run_id) and state is RunState.FINISHED:
                raise IllegalTransition(
                    f"Run {run_id} cannot finish while a level is working; this is a bug, please report it."
                )
            run.ended_at, run.chosen_level, run.reason = utc_now(), chosen_level, clean(reason)
            session.add(run)

    def set_summary(self, run_id: int, path: Path | str) -> None:
        """Remember where the summary file of a run lies."""
        with self._writing() as session:
            run = run_row(session, run_id)
            run.summary_path = clean(str(path))
            session.add(run)

    # levels

    def plan_level(self, run_id: int, level: str, ordinal: int, forecast_bytes: int | None = None) -> None:
        """Add a level to a run, or refresh the forecast of one that is there; its state stays."""
        with self._writing() as session:
            simulated = run_row(session, run_id).simulated
            found = candidate_row(session, run_id, level)
            candidate = found or Candidate(run_id=run_id, level=level, ordinal=ordinal, simulated=simulated)
            candidate.ordinal, candidate.forecast_bytes = ordinal, forecast_bytes
            candidate.updated_at = utc_now()
            session.add(candidate)

    def update_level(
        self, run_id: int, level: str, state: LevelState | None = None, **columns: Any
    ) -> None:
        """Set columns of a level and advance its state.

        Mappings and lists become JSON; numbers that are not finite become NULL.

        Raises:
            IllegalTransition: the table in `states` has no such step, or it would be worked on outside of
            a running run.
            UnknownRun: the level was never planned.
            TypeError: a column that does not exist or is not the caller's to set.
        """
        if unknown := columns.keys() - _LEVEL_COLUMNS:
            raise TypeError(f"a level has no column {sorted(unknown)}")
        with self._writing() as session:
            candidate = candidate_row(session, run_id, level)
            if candidate is None:
                raise UnknownRun(f"Run {run_id} has no level {level}; see `nightpress results {run_id}`.")
            if state is LevelState.WORKING and run_row(session, run_id).state != RunState.RUNNING:
                raise IllegalTransition(
                    f"{level} cannot be worked on while run {run_id} is not running; please report this bug."
                )
            if state is not None:
                candidate.state = advance(LevelState(candidate.state), state).value
            for name, value in columns.items():
                setattr(candidate, name, stored(value))
            candidate.updated_at = utc_now()
            session.add(candidate)

    def record_measurements(self, run_id: int, level: str, rows: Sequence[MeasurementRow]) -> None:
        """Record numbers of a level ('' for the baseline); the same metric again replaces the old one."""
        with self._writing() as session:
            upsert(session, Measurement, ("run_id", "level", "metric"),
                   [{"run_id": run_id, "level": level, **asdict(row)} for row in rows])

    def record_responses(self, run_id: int, level: str, rows: Sequence[ResponseRow]) -> None:
        """Record replies of a level; the same scenario again replaces the old reply."""
        with self._writing() as session:
            upsert(session, Response, ("run_id", "level", "scenario_id"),
                   [{"run_id": run_id, "level": level, **asdict(row)} for row in rows])

    # checkpoints, crashes, quarantine

    def record_step(
        self, fingerprint: str, run_id: int, level: str, kind: str, result: Mapping[str, Any]
    ) -> None:
        """Record a finished step under its fingerprint; the same fingerprint again replaces it."""
        with self._writing() as session:
            upsert(session, Step, ("fingerprint",), [{
                "fingerprint": fingerprint, "run_id": run_id, "level": level, "kind": kind,
                "result": result, "finished_at": utc_now(),
            }])

    def record_event(
        self, action: str, run_id: int | None = None, level: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Record that something happened and return its number, which only grows."""
        with self._writing() as session:
            event = Event(run_id=run_id, level=level, action=action, data=dumps(data or {}))
            session.add(event)
            session.flush()
            return present(event.id)

    def record_crash(
        self, fingerprint: str, run_id: int, level: str, signal: str | None, detail: str = ""
    ) -> int:
        """Record a death of the worker and return how many there were over this fingerprint."""
        with self._writing() as session:
            session.add(Crash(fingerprint=fingerprint, run_id=run_id, level=level, signal=signal,
                              detail=clean(detail)))
        return self.crash_count(fingerprint)

    def quarantine(self, fingerprint: str, reason: str) -> None:
        """Do not try this fingerprint again until it is released."""
        with self._writing() as session:
            upsert(session, Quarantine, ("fingerprint",),
                   [{"fingerprint": fingerprint, "reason": reason, "at": utc_now()}])

    def release_quarantine(self, fingerprint: str) -> bool:
        """Allow a fingerprint again and forget its crashes; False when it was not quarantined."""
        with self._writing() as session:
            row = session.get(Quarantine, fingerprint)
            if row is not None:
                session.delete(row)
            for crash in session.exec(select(Crash).where(Crash.fingerprint == fingerprint)):
                session.delete(crash)
        return row is not None

    # releases and files

    def record_release(self, row: ReleaseRow) -> int:
        """Record a promotion that has happened; refused by SQL itself for simulated results."""
        with self._writing() as session:
            release = Release(**asdict(row))
            session.add(release)
            session.flush()
            return present(release.id)

    def mark_rolled_back(self, model: str, number: int) -> None:
        """Record that a release was rolled back; one the ledger does not know is fine."""
        with self._writing() as session:
            for release in session.exec(select(Release).where(
                Release.model == model, Release.number == number, Release.rolled_back_at == None,  # noqa: E711
            )):
                release.rolled_back_at = utc_now()
                session.add(release)

    def remember_hash(self, path: Path, sha256: str) -> None:
        """Remember the hash of a file until its size, time or inode changes."""
        resolved = path.resolve()
        facts = resolved.stat()
        with self._writing() as session:
            upsert(session, Modelfile, ("path",), [{
                "path": str(resolved), "size": facts.st_size, "mtime_ns": facts.st_mtime_ns,
                "inode": facts.st_ino, "sha256": sha256,
            }])
