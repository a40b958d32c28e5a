"""What the crash tests of `state` do in a process of their own: `state_operations.py OPERATION FOLDER`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from state import releases
from state.blobs import BlobStore
from state.manifest import Manifest
from state.owner import tag

OLD, NEW = b"GGUF" + b"old weights" * 5000, b"GGUF" + b"new weights" * 6000


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(content: bytes, model: str = "m", **changes: object) -> Manifest:
    facts: dict[str, object] = {
        "model": model, "level": "Q4_K_M", "sha256": sha(content), "bytes": len(content), "run_id": 1,
        "model_sha256": "0" * 64, "metrics": {"degradation": 0.01}, "verdict": {"state": "passed"},
        "engine": "b1", "nightpress": "0.1.0",
    }
    return Manifest(**{**facts, **changes})  # type: ignore[arg-type]


def blob(base: Path, content: bytes) -> Path:
    store = BlobStore(base / "state" / "blobs", 10**9)
    store.prepare()
    file = store.path(sha(content))
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    file.chmod(0o444)
    return file


def release(base: Path, content: bytes, model: str = "m") -> releases.Release:
    path = blob(base, content)
    staged = releases.stage(base / "deploy", model, path, manifest(content, model))
    return releases.publish(staged, {"prompt": "How are you?", "reply": "Well."})


def promote(base: Path) -> None:
    store = BlobStore(base / "state" / "blobs", 10**9)
    staged = releases.stage(base / "deploy", "m", store.path(sha(NEW)), manifest(NEW))
    releases.publish(staged, {"prompt": "How are you?", "reply": "Well."})


def rollback(base: Path) -> None:
    releases.rollback(base / "deploy", "m")


def retain(base: Path) -> None:
    releases.retain(base / "deploy", "m", 1)


def collect(base: Path) -> None:
    BlobStore(base / "state" / "blobs", 0).collect({sha(OLD)})


def record(base: Path) -> None:
    from state.ledger import Ledger, LevelState

    with Ledger.open(base / "state", "test") as ledger:
        ledger.update_level(1, "Q2_K", LevelState.SKIPPED)


def migrate(base: Path) -> None:
    from state.ledger import Ledger

    Ledger.open(base / "fresh", "test").close()


def recover(base: Path) -> None:
    from state.ledger import Ledger

    with Ledger.open(base / "state", "test") as ledger:
        ledger.recover()


def requeue(base: Path) -> None:
    from state.ledger import Ledger

    with Ledger.open(base / "state", "test") as ledger:
        ledger.requeue_orphans()


def begin_stage(base: Path) -> None:
    from state.ledger import Ledger
    from state.records import StageSpec

    with Ledger.open(base / "state", "test") as ledger:
        ledger.begin_stage(StageSpec("shop", "train", "1" * 32, {"files": {}}))


def end_stage(base: Path) -> None:
    from state.ledger import Ledger
    from state.records import StageSpec
    from state.states import StageState

    with Ledger.open(base / "state", "test") as ledger:
        number = ledger.begin_stage(StageSpec("shop", "merge", "2" * 32, {"files": {}}))
        ledger.end_stage(number, StageState.FINISHED, outputs={"files": {}})


def recover_stages(base: Path) -> None:
    from state.ledger import Ledger

    with Ledger.open(base / "state", "test") as ledger:
        ledger.recover_stages()


def open_damaged(base: Path) -> None:
    from state.ledger import Ledger

    path = base / "state" / "ledger.db"
    if path.exists():
        path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    Ledger.open(base / "state", "test").close()


def back_up(base: Path) -> None:
    from state.backup import write_backup
    from state.ledger import Ledger

    with Ledger.open(base / "state", "test") as ledger:
        write_backup(ledger)


def restore(base: Path) -> None:
    from state.backup import restore_backup

    restore_backup(base / "state", force=True)


def start_and_wait(base: Path) -> None:
    """Start a run with a level being worked on, say so, and keep the ledger until killed."""
    from state.ledger import Ledger, LevelState, RunSpec

    ledger = Ledger.open(base / "state", "nightpress run model.gguf")
    run = ledger.start_run(RunSpec("m", "/m.gguf", "0" * 64, 9, {"levels": ["Q2_K"]}, "plan", "b1"))
    ledger.plan_level(run, "Q2_K", 0, 100)
    ledger.update_level(run, "Q2_K", LevelState.WORKING)
    (base / "state" / "blobs" / "incoming").mkdir(parents=True, exist_ok=True)
    (base / "state" / "blobs" / "incoming" / f"{tag()}-half.gguf").write_bytes(b"GGUF half")
    print(run, flush=True)
    sys.stdin.read()


def write_on(base: Path) -> None:
    """Record events for ever and acknowledge each on standard output after its commit."""
    from state.ledger import Ledger

    with Ledger.open(base / "state", "nightpress run model.gguf") as ledger:
        while True:
            print(ledger.record_event("test", data={"text": "x" * 500}), flush=True)


OPERATIONS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (promote, rollback, retain, collect, record, migrate, recover, requeue, begin_stage, end_stage,
                     recover_stages, open_damaged, back_up, restore, start_and_wait, write_on)
}

if __name__ == "__main__":
    OPERATIONS[sys.argv[1]](Path(sys.argv[2]))
