"""The summary of a run: one JSON file with everything needed to understand and to redo it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from state.files import explained, make_folder, write_atomic
from state.ledger import Ledger


def summarise(ledger: Ledger, run_id: int) -> dict[str, Any]:
    """Return a run with its plan, baseline, levels and measurements, as JSON can hold them."""
    run = ledger.run(run_id)
    measured: dict[str, dict[str, Any]] = {}
    for row in ledger.measurements(run_id):
        measured.setdefault(row["level"], {})[row["metric"]] = {
            key: row[key] for key in ("value", "low", "high", "error", "n", "unit")}
    plan = run.pop("plan")
    compared = ledger.events_of_run(run_id, "calibration.compared")
    return {
        "nightpress": metadata.version("nightpress"), "run": run, "plan": plan,
        "baseline": measured.get("", {}),
        "levels": [{**{key: value for key, value in row.items() if key not in {"id", "run_id"}},
                    "measurements": measured.get(row["level"], {})} for row in ledger.candidates(run_id)],
        "calibration": compared[-1]["data"] if compared else None,
        "releases": [row for row in ledger.releases() if row["run_id"] == run_id]}


def write_summary(ledger: Ledger, run_id: int, folder: Path) -> Path:
    """Write `pass1_summary_YYYYMMDD_HHMMSS.json` into folder and remember where it lies.

    Raises:
        StateUnwritable, DiskFull: as the disk says.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    with explained(folder):
        make_folder(folder, 0o755)
        path, number = folder / f"pass1_summary_{stamp}.json", 1
        while path.exists():
            number += 1
            path = folder / f"pass1_summary_{stamp}_{number}.json"
        ledger.set_summary(run_id, path)
        write_atomic(path, json.dumps(summarise(ledger, run_id), indent=2, ensure_ascii=False).encode(), mode=0o644)
    return path
