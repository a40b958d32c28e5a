"""The invariants: what `nightpress check` prints and the crash tests assert to be empty."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from state import releases
from state.blobs import BlobStore
from state.damage import LEDGER, connect, diagnose
from state.faults import NightpressError
from state.files import orphans, sha256_file
from state.owner import is_live
from state.states import JobState, LevelState, RunState, StageState

if TYPE_CHECKING:
    from state.ledger import Ledger  # imports SQLModel, which checking does without


def violations(
    state_dir: Path, deploy_dir: Path, *, deep: bool = False, blobs_dir: Path | None = None
) -> list[str]:
    """Return a sentence for every broken invariant; `deep` also hashes every release and blob.

    Nothing is changed. Covered: the deploy directory, the blob store, temporary files of dead
    processes, and the ledger's integrity, states and owners.
    """
    store = BlobStore(blobs_dir or state_dir / "blobs", 0)
    found = _deployed(deploy_dir, deep)
    if deep:
        found += [
            f"Blob {path} does not hold what its name says." for path in store.blobs()
            if sha256_file(path) != path.stem
        ]
    left = [*releases.stale(deploy_dir), *store.orphans(),
            *(path for folder in _folders(state_dir, store) for path in orphans(folder))]
    found += [f"{path} was left behind by a process that is gone." for path in left]
    return found + _ledger(state_dir)


def notes(state_dir: Path, deploy_dir: Path) -> list[str]:
    """Return what is worth knowing but breaks nothing: releases that the ledger does not know."""
    path = state_dir / LEDGER
    known: set[tuple[str, int]] = set()
    with contextlib.suppress(sqlite3.DatabaseError, OSError), contextlib.closing(
        connect(path, read_only=True)
    ) as connection:
        known = set(connection.execute("SELECT model, number FROM release"))
    return [
        f"Release {release.number} of {release.model} is not in the ledger."
        for release in releases.list_releases(deploy_dir) if (release.model, release.number) not in known
    ]


def repair(state_dir: Path, deploy_dir: Path, *, blobs_dir: Path | None = None) -> list[str]:
    """Clean up as the next start does and return what was done; repeated, it does nothing more.

    Raises:
        StateBusy: a Nightpress process has the ledger open.
    """
    from state.ledger import Ledger

    with Ledger.open(state_dir, "nightpress check --repair") as ledger:
        return tidy(ledger, deploy_dir, blobs_dir=blobs_dir)


def tidy(ledger: Ledger, deploy_dir: Path, *, blobs_dir: Path | None = None) -> list[str]:
    """Remove what dead processes left behind and mark their runs as interrupted; return what was done."""
    state_dir = ledger.state_dir
    store = BlobStore(blobs_dir or state_dir / "blobs", 0)
    done = [*releases.clean_staging(deploy_dir), *store.clean_incoming()]
    for folder in _folders(state_dir, store):
        for path in orphans(folder):
            path.unlink(missing_ok=True)
            done.append(path)
    return [f"Removed {path}." for path in done] + ledger.recover() + ledger.requeue_orphans() + ledger.recover_stages()


def _folders(state_dir: Path, store: BlobStore) -> list[Path]:
    """Return where temporary files may lie."""
    return [store.root, state_dir, state_dir / "backups", *(state_dir / "scratch").glob("*/")]


def _deployed(deploy_dir: Path, deep: bool) -> list[str]:
    found = []
    for model in releases.models(deploy_dir):
        try:
            releases.current(deploy_dir, model)
            numbers = releases.numbers(deploy_dir, model)
        except NightpressError as error:
            found.append(str(error))
            continue
        for number in numbers:
            try:
                release = releases.load(deploy_dir / model, number)
            except NightpressError as error:
                found.append(str(error))
                continue
            if deep and sha256_file(release.model_path) != release.manifest.sha256:
                found.append(f"{release.model_path} does not hold what its manifest says.")
    return list(dict.fromkeys(found))


def _ledger(state_dir: Path) -> list[str]:
    path = state_dir / LEDGER
    if not path.exists() or path.stat().st_size == 0:
        return []
    why = diagnose(path)
    if why is not None:
        return [f"The ledger {path} is damaged ({why})."]
    found = []
    with contextlib.closing(connect(path, read_only=True)) as connection:
        for (line,) in connection.execute("PRAGMA integrity_check"):
            if line != "ok":
                found.append(f"The ledger is damaged: {line}.")
        for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
            found.append(f"Row {row} of {table} belongs to no {parent}.")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'run'").fetchone():
            return found
        run_states, level_states = set(map(str, RunState)), set(map(str, LevelState))
        for number, state, pid, since in connection.execute(
            "SELECT id, state, owner_pid, owner_started FROM run"
        ):
            if state not in run_states:
                found.append(f"Run {number} is in no legal state ({state}).")
            if state == RunState.RUNNING and not is_live(pid, since):
                found.append(f"Run {number} is marked running, but its process is gone.")
        for number, level, state, run_state in connection.execute(
            "SELECT c.run_id, c.level, c.state, r.state FROM candidate c JOIN run r ON r.id = c.run_id"
        ):
            if state not in level_states:
                found.append(f"{level} of run {number} is in no legal state ({state}).")
            if state == LevelState.WORKING and run_state != RunState.RUNNING:
                found.append(f"{level} of run {number} is marked working, but the run is {run_state}.")
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchone():
            for number, state, pid, since in connection.execute(
                "SELECT id, state, owner_pid, owner_started FROM job"
            ):
                if state not in set(map(str, JobState)):
                    found.append(f"Job {number} is in no legal state ({state}).")
                if state == JobState.WORKING and not is_live(pid, since):
                    found.append(f"Job {number} is marked working, but its service is gone.")
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'stage'").fetchone():
            for number, name, state, pid, since in connection.execute(
                "SELECT id, name, state, owner_pid, owner_started FROM stage"
            ):
                if state not in set(map(str, StageState)):
                    found.append(f"Stage {number} ({name}) is in no legal state ({state}).")
                if state == StageState.WORKING and not is_live(pid, since):
                    found.append(f"Stage {number} ({name}) is marked working, but its process is gone.")
        for model, number in connection.execute(
            "SELECT p.model, p.number FROM release p JOIN run r ON r.id = p.run_id "
            "LEFT JOIN candidate c ON c.run_id = p.run_id AND c.level = p.level "
            "WHERE p.simulated = 1 OR r.simulated = 1 OR c.simulated = 1"
        ):
            found.append(f"Release {number} of {model} is of a simulated result.")
    return found
