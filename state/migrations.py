"""How the ledger's tables came to be: named steps, each one transaction with its own bookkeeping row.

A step that has shipped is never edited; a change of the schema is a new step at the end.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import ClassVar

from state.clock import utc_now
from state.faults import NightpressError, failpoint


class LedgerNewer(NightpressError):
    """The ledger was written by a newer Nightpress; it was left untouched. Update Nightpress to use it."""

    exit_code: ClassVar[int] = 41


_TABLES = (
    """CREATE TABLE run (
        id INTEGER PRIMARY KEY, created_at TEXT NOT NULL, ended_at TEXT, name TEXT NOT NULL,
        model_path TEXT NOT NULL, model_sha256 TEXT NOT NULL, model_bytes INTEGER NOT NULL,
        plan TEXT NOT NULL, plan_fingerprint TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'interrupted', 'finished', 'failed')),
        simulated INTEGER NOT NULL CHECK (simulated IN (0, 1)), engine TEXT NOT NULL,
        chosen_level TEXT, reason TEXT NOT NULL DEFAULT '', owner_pid INTEGER, owner_started TEXT,
        summary_path TEXT)""",
    "CREATE INDEX run_plan_fingerprint ON run (plan_fingerprint)",
    """CREATE TABLE candidate (
        id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES run (id), level TEXT NOT NULL,
        ordinal INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('planned', 'working', 'passed', 'failed', 'inconclusive',
            'rejected', 'oversize', 'skipped', 'crashed', 'timed_out', 'error', 'quarantined')),
        forecast_bytes INTEGER, bytes INTEGER, bits_per_weight REAL, sha256 TEXT, fallbacks INTEGER,
        tensor_types TEXT NOT NULL DEFAULT '{}', degradation REAL, degradation_low REAL,
        degradation_high REAL, reason TEXT NOT NULL DEFAULT '', tokens_per_s REAL, n_scenarios INTEGER,
        simulated INTEGER NOT NULL CHECK (simulated IN (0, 1)), built_s REAL, measured_s REAL,
        signal TEXT, updated_at TEXT NOT NULL, UNIQUE (run_id, level))""",
    """CREATE TABLE measurement (
        id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES run (id), level TEXT NOT NULL,
        metric TEXT NOT NULL, value REAL, low REAL, high REAL, error REAL, n INTEGER,
        unit TEXT NOT NULL DEFAULT '', UNIQUE (run_id, level, metric))""",
    """CREATE TABLE response (
        id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES run (id), level TEXT NOT NULL,
        scenario_id TEXT NOT NULL, prompt TEXT NOT NULL, text TEXT NOT NULL, n_tokens INTEGER NOT NULL,
        scores TEXT NOT NULL DEFAULT '{}', UNIQUE (run_id, level, scenario_id))""",
    """CREATE TABLE release (
        id INTEGER PRIMARY KEY, model TEXT NOT NULL, number INTEGER NOT NULL,
        run_id INTEGER NOT NULL REFERENCES run (id), level TEXT NOT NULL, sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL, path TEXT NOT NULL, promoted_at TEXT NOT NULL, rolled_back_at TEXT,
        simulated INTEGER NOT NULL DEFAULT 0 CHECK (simulated = 0))""",
    """CREATE TABLE event (
        id INTEGER PRIMARY KEY, at TEXT NOT NULL, run_id INTEGER, level TEXT, action TEXT NOT NULL,
        data TEXT NOT NULL DEFAULT '{}')""",
    """CREATE TABLE step (
        fingerprint TEXT PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES run (id), level TEXT NOT NULL,
        kind TEXT NOT NULL, result TEXT NOT NULL, finished_at TEXT NOT NULL)""",
    """CREATE TABLE crash (
        id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, run_id INTEGER NOT NULL REFERENCES run (id),
        level TEXT NOT NULL, at TEXT NOT NULL, signal TEXT, detail TEXT NOT NULL DEFAULT '')""",
    "CREATE INDEX crash_fingerprint ON crash (fingerprint)",
    "CREATE TABLE quarantine (fingerprint TEXT PRIMARY KEY, reason TEXT NOT NULL, at TEXT NOT NULL)",
    """CREATE TABLE modelfile (
        path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
        sha256 TEXT NOT NULL)""",
)

# What was simulated stays marked so, and no release can point at it: not from Python, not by hand.
_SIMULATED = "SELECT RAISE(ABORT, 'a simulated result cannot be promoted')"
_IS_SIMULATED = """EXISTS (SELECT 1 FROM run WHERE id = NEW.run_id AND simulated = 1)
    OR EXISTS (SELECT 1 FROM candidate WHERE run_id = NEW.run_id AND level = NEW.level AND simulated = 1)"""
_TRIGGERS = (
    f"CREATE TRIGGER release_is_real BEFORE INSERT ON release WHEN {_IS_SIMULATED} BEGIN {_SIMULATED}; END",
    f"""CREATE TRIGGER release_stays_real BEFORE UPDATE OF run_id, level ON release WHEN {_IS_SIMULATED}
        BEGIN {_SIMULATED}; END""",
    """CREATE TRIGGER run_mark_stays BEFORE UPDATE OF simulated ON run WHEN OLD.simulated <> NEW.simulated
        BEGIN SELECT RAISE(ABORT, 'the mark of a simulated run cannot be changed'); END""",
    """CREATE TRIGGER candidate_mark_stays BEFORE UPDATE OF simulated ON candidate
        WHEN OLD.simulated <> NEW.simulated
        BEGIN SELECT RAISE(ABORT, 'the mark of a simulated candidate cannot be changed'); END""",
)

_VIEWS = (
    """CREATE VIEW leaderboard AS
    SELECT r.name AS model, c.level AS level, round(c.bytes / 1e6, 1) AS mb,
        round(c.bits_per_weight, 2) AS bpw, round(100 * c.degradation, 2) AS degradation_pct,
        CASE WHEN c.degradation_low IS NOT NULL AND c.degradation_high IS NOT NULL THEN
            printf('%+.1f to %+.1f %%', 100 * c.degradation_low, 100 * c.degradation_high) END AS interval,
        round(k.value, 5) AS kld, round(100 * t.value, 2) AS same_top_pct,
        round(c.tokens_per_s, 1) AS tokens_per_s, c.state AS verdict, r.id AS run,
        CASE WHEN EXISTS (SELECT 1 FROM release p WHERE p.run_id = r.id AND p.level = c.level
            AND p.rolled_back_at IS NULL) THEN 'yes' ELSE 'no' END AS promoted
    FROM candidate c JOIN run r ON r.id = c.run_id
    LEFT JOIN measurement k ON k.run_id = r.id AND k.level = c.level AND k.metric = 'kl_divergence'
    LEFT JOIN measurement t ON t.run_id = r.id AND t.level = c.level AND t.metric = 'same_top_token'
    WHERE r.state = 'finished' AND r.simulated = 0 AND c.simulated = 0
    ORDER BY r.id DESC, c.bytes IS NULL, c.bytes, c.ordinal""",
    """CREATE VIEW latest_run AS
    SELECT c.level AS level, c.state AS verdict,
        round(coalesce(c.bytes, c.forecast_bytes) / 1e6, 1) AS mb, round(c.bits_per_weight, 2) AS bpw,
        round(100 * c.degradation, 2) AS degradation_pct,
        round(c.tokens_per_s, 1) AS tokens_per_s, c.reason AS reason, r.name AS model, r.id AS run,
        r.state AS run_state, CASE c.simulated WHEN 1 THEN 'yes' ELSE 'no' END AS simulated
    FROM candidate c JOIN run r ON r.id = c.run_id
    WHERE r.id = (SELECT max(id) FROM run)
    ORDER BY c.ordinal""",
)

_QUEUE = (
    """CREATE TABLE job (
        id INTEGER PRIMARY KEY AUTOINCREMENT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, name TEXT NOT NULL,
        source TEXT NOT NULL, key TEXT NOT NULL DEFAULT '', spec TEXT NOT NULL, priority INTEGER NOT NULL DEFAULT 0,
        position INTEGER NOT NULL DEFAULT 0, urgent BOOLEAN NOT NULL DEFAULT 0, state TEXT NOT NULL, not_before TEXT,
        attempts INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', run_id INTEGER REFERENCES run (id),
        owner_pid INTEGER, owner_started TEXT)""",
    "CREATE INDEX job_key ON job (key)",
    "CREATE TABLE memo (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE VIEW queue AS
    SELECT id AS job, name, state, source, priority, CASE urgent WHEN 1 THEN 'yes' ELSE 'no' END AS urgent,
        attempts, not_before, run_id AS run, reason
    FROM job WHERE state IN ('queued', 'working')
    ORDER BY state <> 'working', urgent DESC, priority DESC, position, id""",
)

_STAGES = (
    """CREATE TABLE stage (
        id INTEGER PRIMARY KEY AUTOINCREMENT, pipeline TEXT NOT NULL, name TEXT NOT NULL, fingerprint TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('working', 'interrupted', 'finished', 'failed')),
        inputs TEXT NOT NULL, outputs TEXT NOT NULL DEFAULT '{}', started_at TEXT NOT NULL, ended_at TEXT,
        reason TEXT NOT NULL DEFAULT '', run_id INTEGER REFERENCES run (id), owner_pid INTEGER, owner_started TEXT)""",
    "CREATE INDEX stage_fingerprint ON stage (fingerprint)",
    "CREATE INDEX stage_pipeline ON stage (pipeline)",
    # what is finished says where a deployed file comes from: nothing may change it afterwards
    """CREATE TRIGGER stage_finished_stays BEFORE UPDATE ON stage WHEN OLD.state = 'finished'
        BEGIN SELECT RAISE(ABORT, 'a finished stage cannot be changed'); END""",
)

MIGRATIONS: Sequence[tuple[str, Sequence[str]]] = (
    ("001_tables", _TABLES),
    ("002_simulated_stays_simulated", _TRIGGERS),
    ("003_views", _VIEWS),
    ("004_gates", ("ALTER TABLE candidate ADD COLUMN gates TEXT NOT NULL DEFAULT '[]'",)),
    ("005_queue", _QUEUE),
    ("006_imatrix", ("ALTER TABLE candidate ADD COLUMN imatrix TEXT NOT NULL DEFAULT ''",)),
    ("007_stages", _STAGES),
)

_BOOKKEEPING = "CREATE TABLE IF NOT EXISTS migration (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL)"


def applied(connection: sqlite3.Connection) -> list[str]:
    """Return the names of the steps this ledger carries, in order; none for a fresh file."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'migration'").fetchone():
        return []
    return [name for (name,) in connection.execute("SELECT name FROM migration ORDER BY name")]


def refuse_newer(names: Sequence[str]) -> None:
    """Refuse a ledger that carries a step this version does not know.

    Raises:
        LedgerNewer: naming the first unknown step.
    """
    known = {name for name, _ in MIGRATIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LedgerNewer(
            f"The ledger was written by a newer Nightpress (it carries {unknown[0]!r}) and was left "
            "untouched. Update Nightpress to use it."
        )


def migrate(connection: sqlite3.Connection, upto: str | None = None) -> list[str]:
    """Apply the missing steps, up to and including `upto`, and return their names.

    Killed at any moment, a step is either wholly there with its row or not at all.
    The connection must be in autocommit mode (`isolation_level=None`).

    Raises:
        LedgerNewer: before anything is written.
    """
    present = applied(connection)
    refuse_newer(present)
    added = []
    for name, statements in MIGRATIONS:
        if name not in present:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(_BOOKKEEPING)
                for statement in statements:
                    connection.execute(statement)
                connection.execute("INSERT INTO migration VALUES (?, ?)", (name, utc_now()))
                failpoint("migration.applied")
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            added.append(name)
        if name == upto:
            break
    return added
