"""The way back from a deployed file to its data: each station with its hash, and whether it is still as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from daemon.finetuning import describe_path, state_of
from daemon.settings import Settings
from state import releases
from state.faults import NightpressError
from state.ledger import Ledger, LedgerMissing
from state.queries import Row

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"(?P<model>.+)@(?P<number>[1-9][0-9]{0,8})")


class LineageUnknown(NightpressError):
    """Nothing is known of this: name a deployed model, MODEL@RELEASE, a file, a folder, or the sha256 of a file."""

    exit_code: ClassVar[int] = 90


@dataclass(frozen=True)
class Station:
    """One thing on the way back.

    Attributes:
        kind: release, level, matrix, run, model, gguf, merged, adapter, dataset, source, …
        what: a line for people.
        sha256: of it; '' where it is no file.
        path: where it lay; '' likewise.
        state: unchanged, changed or gone; '' likewise.
        facts: more, JSON-ready.
    """

    kind: str
    what: str
    sha256: str = ""
    path: str = ""
    state: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def trace(name: str, settings: Settings) -> list[Station]:
    """Return the way back, what was asked for first.

    Args:
        name: a deployed model, with `@NUMBER` one of its releases; a file or folder; or a sha256.
        settings: where things lie.

    Raises:
        LineageUnknown: nothing is known of it.
    """
    try:
        ledger = Ledger.read(settings.state_dir)
    except LedgerMissing:
        ledger = None
    try:
        found = list(_Walk(settings, ledger).begin(name))
    finally:
        if ledger is not None:
            ledger.close()
    return found


class _Walk:
    """Follows hashes through releases, runs and stages; every hash once."""

    def __init__(self, settings: Settings, ledger: Ledger | None) -> None:
        self._settings, self._ledger = settings, ledger
        self._seen: set[str] = set()
        self._runs: set[int] = set()

    def begin(self, name: str) -> Iterator[Station]:
        release = self._release(name)
        if release is not None:
            yield from self._of_release(release)
            return
        path = Path(name).expanduser()
        if path.exists():
            entry = describe_path(path)
            sha256, named = entry["sha256"], str(path.absolute())
        elif _SHA256.fullmatch(name.lower()):
            sha256, named = name.lower(), ""
        else:
            raise LineageUnknown(f"There is no release, file or folder {name!r}. " + str(LineageUnknown()))
        for found in releases.list_releases(self._settings.deploy):
            if found.manifest.sha256 == sha256:
                yield from self._of_release(found)
                return
        stations = list(self._of_hash(sha256))
        if not stations:
            raise LineageUnknown(f"No release, level or stage has the hash {sha256[:16]}…: {named or 'it'} was not "
                                 "made here, or was changed since.")
        yield from stations

    def _release(self, name: str) -> releases.Release | None:
        deploy = self._settings.deploy
        numbered = _NUMBERED.fullmatch(name)
        model = numbered["model"] if numbered else name
        if "/" in model or model not in releases.models(deploy):
            return None
        if numbered:
            return releases.load(deploy / model, int(numbered["number"]))
        return releases.current(deploy, model)

    def _of_release(self, release: releases.Release) -> Iterator[Station]:
        manifest = release.manifest
        entry = {"path": str(release.model_path), "sha256": manifest.sha256}
        current = releases.current_number(self._settings.deploy, release.model) == release.number
        yield Station("release", f"{release.model}, release {release.number}{', deployed' if current else ''}: "
                      f"{manifest.level}, {manifest.bytes:,} bytes, {manifest.created_at}", manifest.sha256,
                      entry["path"], state_of(entry), {"licence": manifest.license, "smoke": dict(manifest.smoke)})
        yield from self._of_run(manifest.run_id, manifest.level, manifest.sha256)
        yield from self._of_hash(manifest.model_sha256)

    def _of_run(self, run_id: int, level: str, sha256: str = "") -> Iterator[Station]:
        """Yield a level and its run; a run of another ledger with the same number is no station."""
        rows = self._ledger.rows("SELECT * FROM run WHERE id = ?", (run_id,)) if self._ledger else []
        levels = {row["level"]: row for row in self._ledger.candidates(run_id)} if self._ledger and rows else {}
        found = levels.get(level)
        if not rows or found is None or (sha256 and found["sha256"] != sha256):
            yield Station("run", f"run {run_id} is not in this ledger")
            return
        run = rows[0]
        yield Station("level", f"{level}: {found['state']}, loss {_share(found['degradation'])}, "
                      f"{found['bits_per_weight'] or 0:.2f} bits per weight; importance matrix: "
                      f"{found['imatrix'] or 'none'}", found["sha256"] or "",
                      facts={"tensor_types": found["tensor_types"], "gates": found["gates"],
                             "reason": found["reason"]})
        plan = run["plan"]
        yield Station("run", f"run {run_id} of {run['name']}, {run['state']}, {run['created_at']}, engine "
                      f"{run['engine']}",
                      facts={key: plan.get(key) for key in ("gates", "max_degradation", "target_bytes", "calibration",
                                                            "domains", "dataset", "strategy")})
        self._runs.add(run_id)
        if not self._stages(run["model_sha256"]):
            entry = {"path": run["model_path"], "sha256": run["model_sha256"]}
            yield Station("model", f"{Path(run['model_path']).name}, {run['model_bytes']:,} bytes; how it was made is "
                          "not recorded", run["model_sha256"], run["model_path"], state_of(entry, None))

    def _stages(self, sha256: str) -> list[Row]:
        return self._ledger.stages_that_made(sha256) if self._ledger else []

    def _of_hash(self, sha256: str) -> Iterator[Station]:
        """Yield what made the file with a hash, and then what that was made from."""
        if not sha256 or sha256 in self._seen or self._ledger is None:
            return
        self._seen.add(sha256)
        made = self._stages(sha256)
        if made:
            yield from self._of_stage(made[0], sha256)
            return
        rows = self._ledger.rows("SELECT run_id, level FROM candidate WHERE sha256 = ? ORDER BY id DESC LIMIT 1",
                                 (sha256,))
        if rows and rows[0]["run_id"] not in self._runs:
            run = self._ledger.run(rows[0]["run_id"])
            yield from self._of_run(run["id"], rows[0]["level"], sha256)
            yield from self._of_hash(run["model_sha256"])

    def _of_stage(self, row: Row, sha256: str) -> Iterator[Station]:
        for role, entry in row["outputs"]["files"].items():
            parts = entry.get("parts", {})
            if sha256 == entry["sha256"] or sha256 in parts.values():
                self._seen |= {entry["sha256"]}
                facts = {"stage": row["name"], "fine_tuning": row["pipeline"], "at": row["ended_at"],
                         "options": row["inputs"]["options"], **row["outputs"]["facts"]}
                if parts:
                    facts["parts"] = parts
                if role == "dataset":
                    facts |= _dataset_facts(Path(entry["path"]))
                yield Station(role, f"{_SAID.get(row['name'], 'made')} in {row['pipeline']}, {row['ended_at']}"
                              f"{_more(row['name'], facts)}", entry["sha256"], entry["path"],
                              state_of(entry, None), facts)
        if row["name"] == "release" and row["run_id"]:
            yield from self._of_run(row["run_id"], row["outputs"]["facts"]["level"])
        for role, entry in row["inputs"]["files"].items():
            if entry["sha256"] in self._seen:
                continue
            if self._stages(entry["sha256"]):
                yield from self._of_hash(entry["sha256"])
                continue
            self._seen.add(entry["sha256"])
            yield Station(role, f"given to the stage {row['name']}", entry["sha256"], entry["path"],
                          state_of(entry, None), {"parts": entry.get("parts", {})})


_SAID = {"prepare": "prepared", "train": "trained", "merge": "merged", "convert": "converted", "calibrate": "made",
         "release": "released", "evaluate": "measured", "validate": "checked"}


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def _more(stage: str, facts: Mapping[str, Any]) -> str:
    """Return what of a stage is worth a line."""
    if stage == "train" and facts.get("validation_loss") is not None:
        return (f"; loss on validation {facts['validation_loss_before']:.3f} before, {facts['validation_loss']:.3f} "
                f"after, {facts['steps']} steps on {facts['device']}")
    if stage in ("convert", "merge"):
        return "".join(f"; {one['stage']} agrees to {one['mean_kl']:.1g} nats" for one in facts.get("stages", ())
                       if "mean_kl" in one)
    if stage == "prepare" and "rows" in facts:
        rows = ", ".join(f"{count} {name}" for name, count in facts["rows"].items())
        return f"; rows: {rows}; licence {facts.get('licence') or 'not said'}; seed {facts.get('seed')}"
    if stage == "calibrate":
        return f"; {facts.get('rows')} training rows"
    return ""


def _dataset_facts(folder: Path) -> dict[str, Any]:
    """Return what the manifest of a dataset tells of its sources; nothing where it is gone."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return {"sources": manifest["sources"], "steps": manifest["steps"], "licence": manifest["licence"],
                "seed": manifest["seed"], "rows": {name: one["rows"] for name, one in manifest["splits"].items()},
                "splits": {name: one["sha256"] for name, one in manifest["splits"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


