"""From raw rows to a released model: every stage resumable, recorded in the ledger with what it was given and made.

A stage is done once for the same inputs: its fingerprint is over the hashes of its files and the options that shape
what comes out. When a key of the configuration changes, the first stage that it touches is done again, and of those
after it the ones that are given something else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from daemon.download import Show
from daemon.errors import Interrupted
from daemon.finetune_config import FinetuneSpec
from daemon.grip import Grip
from daemon.settings import Settings
from loops.events import Note
from loops.fingerprint import fingerprint
from state.check import tidy
from state.faults import NightpressError, failpoint
from state.files import explained, make_folder, sha256_file
from state.ledger import Ledger
from state.lock import Lock
from state.queries import Row
from state.records import StageSpec
from state.states import StageState

VERSION = 1  #: of what stages make; a new one does everything again


def folder_of(spec: FinetuneSpec, settings: Settings) -> Path:
    """Return where everything of a fine-tuning lies."""
    return spec.folder or settings.state_dir.absolute() / "finetune" / spec.name


@dataclass(frozen=True)
class Made:
    """What a stage made.

    Attributes:
        files: by role, files and folders.
        facts: worth knowing, JSON-ready.
        run_id: of the run it led to.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    run_id: int | None = None


@dataclass
class Bench:
    """What stages work with.

    Attributes:
        spec: what is wanted.
        made: by the stages before, by name.
    """

    spec: FinetuneSpec
    ledger: Ledger
    settings: Settings
    grip: Grip
    show: Show
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return folder_of(self.spec, self.settings)

    def file(self, stage: str, role: str) -> Path:
        """Return what a stage made."""
        return self.made[stage].files[role]


@dataclass(frozen=True)
class Stage:
    """One step of the way.

    Attributes:
        name: of it.
        inputs: the files and folders it is given, by role.
        options: what else shapes the outcome, JSON-ready.
        work: does it; is given a folder of its own for these inputs, which may hold what an interrupted attempt left.
        wanted: tells whether the configuration wants it.
    """

    name: str
    inputs: Callable[[Bench], Mapping[str, Path]]
    options: Callable[[Bench], Mapping[str, Any]]
    work: Callable[[Bench, Path], Made]
    wanted: Callable[[Bench], bool] = lambda _bench: True


@dataclass(frozen=True)
class Reached:
    """A stage that is finished: its row in the ledger, and whether it was before."""

    row: Mapping[str, Any]
    again: bool


@dataclass(frozen=True)
class Finetuned:
    """What came of a fine-tuning.

    Attributes:
        name: of it.
        folder: with everything that was made.
        stages: in order.
        run_id: of the pressing; None where none was wanted.
        chosen: level.
        release: path of the released file; None for none.
    """

    name: str
    folder: Path
    stages: tuple[Reached, ...]
    run_id: int | None
    chosen: str | None
    release: Path | None

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON document."""
        return {"name": self.name, "folder": str(self.folder), "run": self.run_id, "chosen": self.chosen,
                "release": str(self.release) if self.release else None,
                "stages": [shown(one.row) | {"reused": one.again} for one in self.stages]}


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what people and programs want to know of a row of the ledger."""
    return {name: row[name] for name in ("id", "name", "state", "reason", "started_at", "ended_at", "run_id", "inputs",
                                         "outputs")}


def plain(value: Any) -> Any:
    """Return a value, also a dataclass, as JSON holds it; paths become text."""
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value,
                                 default=str))


def finetune(spec: FinetuneSpec, ledger: Ledger, settings: Settings, grip: Grip, show: Show, *,
             began: Callable[[str, int, int], None] | None = None,
             stages: tuple[Stage, ...] | None = None) -> Finetuned:
    """Do what of a fine-tuning is not done yet; interrupted, the same call goes on at the same stage and step.

    Args:
        spec: what is wanted.
        ledger: open for writing.
        settings: where things lie.
        grip: by which the work is stopped or ended.
        show: is shown every event.
        began: is told the name of each stage, its place from 0, and how many there are.
        stages: the way; that of `daemon.finetune_stages` unless given.

    Raises:
        StateBusy: another process is at this fine-tuning.
        Interrupted: the grip was asked to end it.
        NightpressError: a stage failed, which is recorded with the reason; what was finished stays.
    """
    from daemon.finetune_stages import STAGES

    bench = Bench(spec, ledger, settings, grip, show)
    with explained(bench.folder):
        make_folder(bench.folder, 0o755)
    tidy(ledger, settings.deploy)
    reached: list[Reached] = []
    with Lock.acquire(bench.folder / ".lock", "nightpress finetune"):
        wanted = [stage for stage in stages or STAGES if stage.wanted(bench)]
        for place, stage in enumerate(wanted):
            if began is not None:
                began(stage.name, place, len(wanted))
            reached.append(_reach(bench, stage, f"{place + 1} of {len(wanted)}"))
    press, release = bench.made.get("press", Made()), bench.made.get("release", Made())
    return Finetuned(spec.name, bench.folder, tuple(reached), press.run_id, press.facts.get("chosen"),
                     release.files.get("model"))


def _reach(bench: Bench, stage: Stage, place: str) -> Reached:
    """Do a stage, unless it is done already and what it made still stands."""
    ledger, name = bench.ledger, bench.spec.name
    key, inputs = _key(bench, stage)
    there = ledger.finished_stage(name, stage.name, key)
    if there is not None and stands(there, ledger):
        bench.made[stage.name] = _recorded(there)
        bench.show(Note(f"Stage {place}, {stage.name}: done before."))
        return Reached(there, again=True)
    if bench.grip.ended:
        raise Interrupted(bench.grip.reason)
    bench.show(Note(f"Stage {place}, {stage.name}."))
    number = ledger.begin_stage(StageSpec(name, stage.name, key, inputs))
    work = _folder(bench, stage, key)
    if there is not None:  # changed since, or in part gone: nothing to go on with
        shutil.rmtree(work, ignore_errors=True)
    try:
        with explained(work):
            made = stage.work(bench, work)
            failpoint("finetune.stage_made")
            outputs = {"files": {role: describe_path(path, ledger) for role, path in made.files.items()},
                       "facts": plain(made.facts)}
    except (Interrupted, KeyboardInterrupt) as problem:
        ledger.end_stage(number, StageState.INTERRUPTED, str(problem) or "Stopped on request.")
        raise
    except NightpressError as problem:
        ledger.end_stage(number, StageState.FAILED, str(problem))
        raise
    except BaseException as problem:
        ledger.end_stage(number, StageState.FAILED, f"A bug: {type(problem).__name__}: {problem}")
        raise
    ledger.end_stage(number, StageState.FINISHED, outputs=outputs, run_id=made.run_id)
    failpoint("finetune.stage_recorded")
    bench.made[stage.name] = made
    row = ledger.finished_stage(name, stage.name, key)
    if row is None:
        raise RuntimeError(f"stage {stage.name} was not recorded")
    return Reached(row, again=False)


def _key(bench: Bench, stage: Stage) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint of a stage, and what it is over."""
    files = {role: describe_path(path, bench.ledger) for role, path in stage.inputs(bench).items()}
    options = plain(stage.options(bench))
    key = fingerprint(f"finetune {stage.name}", version=VERSION, options=options,
                      files={role: one["sha256"] for role, one in files.items()})
    return key, {"files": files, "options": options}


def _recorded(row: Row) -> Made:
    outputs = row["outputs"]
    return Made({role: Path(one["path"]) for role, one in outputs["files"].items()}, outputs["facts"], row["run_id"])


def _folder(bench: Bench, stage: Stage, key: str) -> Path:
    return bench.folder / f"{stage.name}-{key[:8]}"


def superseded(spec: FinetuneSpec, ledger: Ledger, settings: Settings, used: Iterable[Path] = (), *,
               stages: tuple[Stage, ...] | None = None) -> list[Path]:
    """Return the folders of stages that were made by other configurations of a fine-tuning, and stand unused.

    Args:
        spec: as it is now; what is finished of it, and the first stage that is not, are not superseded.
        ledger: open for writing, as hashes are remembered.
        settings: where things lie.
        used: files and folders; what one of them lies in is not superseded either.
        stages: the way; that of `daemon.finetune_stages` unless given.
    """
    from daemon.finetune_stages import STAGES

    bench = Bench(spec, ledger, settings, Grip(), lambda _event: None)
    kept: set[Path] = set()
    for stage in stages or STAGES:
        if not stage.wanted(bench):
            continue
        key, _ = _key(bench, stage)
        kept.add(_folder(bench, stage, key))
        there = ledger.finished_stage(spec.name, stage.name, key)
        if there is None or not stands(there, ledger):
            break
        bench.made[stage.name] = _recorded(there)
    for path in used:
        kept |= {path, *path.parents}
    names = "|".join(stage.name for stage in stages or STAGES)
    return sorted(folder for folder in bench.folder.glob("*-*") if folder.is_dir() and not folder.is_symlink()
                  and re.fullmatch(rf"(?:{names})-[0-9a-f]{{8}}", folder.name) and folder not in kept)


def describe_path(path: Path, ledger: Ledger | None = None) -> dict[str, Any]:
    """Return path, sha256 and bytes of a file; of a folder also the hash of each of its files, as `parts`.

    Of a folder count the files that lie directly in it, in an adapter's those of the adapter; hidden ones do not. Its
    own hash is over their names and hashes.

    Raises:
        OSError: it is not there.
    """
    if path.is_dir():
        parts = {file.name: hash_of(file, ledger) for file in _parts(path)}
        return {"path": str(path.absolute()), "sha256": _joined(parts), "parts": parts,
                "bytes": sum((path / name).stat().st_size for name in parts)}
    return {"path": str(path.absolute()), "sha256": hash_of(path, ledger), "bytes": path.stat().st_size}


def _parts(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    if any(file.name == "adapter_config.json" for file in files):  # beside it lie records of the training
        files = [file for file in files if file.name.startswith("adapter_")]
    return files


def _joined(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_of(file: Path, ledger: Ledger | None = None) -> str:
    """Return the sha256 of a file; with a ledger a remembered one, as long as size, time and inode are the same."""
    known = ledger.cached_hash(file) if ledger is not None else None
    if known is None:
        known = sha256_file(file)
        if ledger is not None:
            ledger.remember_hash(file, known)
    return known


def state_of(entry: Mapping[str, Any], ledger: Ledger | None = None) -> str:
    """Return `unchanged`, `changed` or `gone` for what `describe_path` described."""
    try:
        now = describe_path(Path(entry["path"]), ledger)
    except OSError:
        return "gone"
    return "unchanged" if now["sha256"] == entry["sha256"] else "changed"


def stands(row: Row, ledger: Ledger) -> bool:
    """Tell whether everything that a finished stage made is still there and unchanged."""
    return all(state_of(entry, ledger) == "unchanged" for entry in row["outputs"]["files"].values())
