"""What callers hand to the ledger: frozen specifications, one per kind of row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunSpec:
    """A run about to start; `plan` holds everything needed to redo it, JSON-ready."""

    name: str
    model_path: str
    model_sha256: str
    model_bytes: int
    plan: Mapping[str, Any]
    plan_fingerprint: str
    engine: str
    simulated: bool = False


@dataclass(frozen=True)
class MeasurementRow:
    """One number with its interval and standard error; a value that is not finite is stored as NULL."""

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    n: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class ResponseRow:
    """What a model replied to a scenario, and how the reply scored."""

    scenario_id: str
    prompt: str
    text: str
    n_tokens: int
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReleaseRow:
    """A candidate that was promoted; `path` is the folder of the release."""

    model: str
    number: int
    run_id: int
    level: str
    sha256: str
    bytes: int
    path: str


@dataclass(frozen=True)
class JobSpec:
    """Work for the queue; `spec` holds all that is needed to do it, JSON-ready."""

    name: str
    source: str
    spec: Mapping[str, Any]
    key: str = ""
    priority: int = 0
    urgent: bool = False


@dataclass(frozen=True)
class StageSpec:
    """A stage of a fine-tuning about to begin; `inputs` holds its files with their hashes, and its options."""

    pipeline: str
    name: str
    fingerprint: str
    inputs: Mapping[str, Any]
