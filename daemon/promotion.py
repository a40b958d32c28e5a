"""Promotion: from a level that passed to the release that everybody sees."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from daemon.grip import Grip
from daemon.settings import Settings
from daemon.supervisor import run_job
from loops.engine.options import EngineOptions
from loops.evaluation.names import METRICS as EMOTIONAL
from state import releases
from state.backup import write_backup
from state.blobs import BlobStore
from state.ledger import Ledger, ReleaseRow
from state.manifest import Manifest, NotPromotable
from state.releases import Release

#: measurements that go into the manifest
METRICS = ("score", *EMOTIONAL, "forced_choice", "forced_choice_accuracy", "eq_bench", "multiple_choice_acc_norm",
           "judge", "kl_divergence", "same_top_token", "perplexity", "perplexity_ratio", "tokens_per_s")


def promote(ledger: Ledger, settings: Settings, run_id: int, level: str, options: EngineOptions,
            grip: Grip | None = None) -> Release:
    """Promote a level of a run: verify its file, ask the smoke prompt, swap the pointer, record it.

    The same file is not released twice in a row: then the present release is returned.

    Raises:
        NotPromotable: it did not pass, is simulated, or was never measured.
        BlobDamaged: its file is gone or changed; the run has to be repeated.
        WorkerRefused: it does not load or answer; the old release stays.
    """
    manifest = _manifest(ledger, ledger.run(run_id), check_promotable(ledger, run_id, level))
    now = releases.current(settings.deploy, manifest.model)
    if now is not None and now.manifest.sha256 == manifest.sha256:
        _record(ledger, run_id, now)  # killed between publishing and recording: the record is made up for
        return now
    blobs = BlobStore(settings.blobs, settings.disk_budget_bytes)
    blobs.verify(manifest.sha256)
    blobs.touch(manifest.sha256)
    staged = releases.stage(settings.deploy, manifest.model, blobs.path(manifest.sha256), manifest)
    try:
        answer = run_job({"job": "smoke", "model": str(staged.model_path), "sha256": manifest.sha256,
                          "options": asdict(options)}, settings.state_dir, grip)
    except BaseException:
        staged.discard()
        raise
    release = releases.publish(staged, dict(answer.result))
    _record(ledger, run_id, release)
    releases.retain(settings.deploy, manifest.model, settings.keep_releases)
    write_backup(ledger, settings.keep_backups)
    return release


def check_promotable(ledger: Ledger, run_id: int, level: str) -> dict[str, Any]:
    """Return the row of a level that a run has.

    Raises:
        UnknownRun: there is no such run.
        NotPromotable: it has no such level.
    """
    ledger.run(run_id)
    rows = ledger.candidates(run_id)
    found = next((row for row in rows if row["level"] == level.upper()), None)
    if found is None:
        levels = ", ".join(row["level"] for row in rows) or "none"
        raise NotPromotable(f"Run {run_id} has no level {level!r}; it has {levels}.")
    return found


def _record(ledger: Ledger, run_id: int, release: Release) -> None:
    known = ledger.releases(release.model)
    if any(row["number"] == release.number and row["sha256"] == release.manifest.sha256 for row in known):
        return
    ledger.record_release(ReleaseRow(release.model, release.number, run_id, release.manifest.level,
                                     release.manifest.sha256, release.manifest.bytes, str(release.path)))
    ledger.record_event("release.promoted", run_id, release.manifest.level,
                        {"model": release.model, "number": release.number})


def _manifest(ledger: Ledger, run: dict[str, Any], candidate: dict[str, Any]) -> Manifest:
    found = {row["metric"]: row for row in ledger.measurements(run["id"]) if row["level"] == candidate["level"]}
    metrics = {name: {key: found[name][key] for key in ("value", "low", "high", "n")}
               for name in METRICS if name in found}
    metrics["tokens_per_s"] = {"value": candidate["tokens_per_s"]}
    facts = run["plan"].get("facts", {})
    return Manifest(
        model=releases.slug(run["name"]), level=candidate["level"], sha256=candidate["sha256"] or "",
        bytes=candidate["bytes"] or 0, run_id=run["id"], model_sha256=run["model_sha256"], metrics=metrics,
        verdict={"state": candidate["state"], "reason": candidate["reason"],
                 "degradation": candidate["degradation"], "low": candidate["degradation_low"],
                 "high": candidate["degradation_high"], "allowed": run["plan"].get("max_degradation"),
                 "scenarios": candidate["n_scenarios"]},
        engine=run["engine"], nightpress=metadata.version("nightpress"), license=facts.get("license"),
        base_model=facts.get("base_model") or facts.get("model_name"), imatrix=candidate["imatrix"],
        simulated=bool(candidate["simulated"]))
