"""What a loop reports: frozen records, one JSON line each.

The worker prints them; the supervisor reads them and is the only one who writes them down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Work under way; shown, never stored. `done` of `total` in any unit."""

    stage: str
    level: str
    done: float
    total: float


@dataclass(frozen=True)
class Note:
    """Something a person should know that stops nothing."""

    message: str


@dataclass(frozen=True)
class Opened:
    """The model and the plan are sound; the worker waits for what is already done.

    Attributes:
        name: of the model, for people.
        model_sha256: over all its files.
        model_bytes: of all its files.
        bits_per_weight: as it is.
        plan_fingerprint: same value, same run.
        engine: the build, as `EngineBuild.id` and its parts.
        facts: licence, base models, architecture, parameters, for the manifest.
    """

    name: str
    model_sha256: str
    model_bytes: int
    bits_per_weight: float
    plan_fingerprint: str
    engine: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class StepDone:
    """A checkpoint: the same fingerprint need never be computed again."""

    fingerprint: str
    kind: str
    level: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class LevelPlanned:
    """A level and what it will take, before any work."""

    level: str
    ordinal: int
    forecast_bytes: int
    bits_per_weight: float
    fallbacks: int
    tensor_types: Mapping[str, str]


@dataclass(frozen=True)
class LevelStarted:
    """Work on a level begins; its deadline runs from here."""

    level: str


@dataclass(frozen=True)
class LevelMeasured:
    """Numbers of a level, or of the original when level is empty.

    Attributes:
        measurements: rows with metric, value and where known low, high, error, n, unit.
        responses: rows with scenario_id, prompt, text, n_tokens, scores.
        columns: facts of the candidate such as bytes, sha256, tokens_per_s.
    """

    level: str
    measurements: tuple[Mapping[str, Any], ...] = ()
    responses: tuple[Mapping[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """Importance matrices were compared on text that none of them was made from.

    Attributes:
        level: that was built with each of them.
        used: name of the one that did best; `none` for no matrix.
        reason: a sentence.
        rows: per matrix and text: `matrix`, `text`, `kld` and `error` in nats per token, `n` predictions, `bytes`.
    """

    level: str
    used: str
    reason: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class LevelDone:
    """A level came to its end in one of the states of `state.states.LevelState`."""

    level: str
    state: str
    reason: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The job is done.

    Attributes:
        chosen: the level to promote, None when none passes.
        reason: a sentence.
        result: whatever the job has to tell besides.
    """

    chosen: str | None
    reason: str
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The job cannot be done; message is a sentence for the user."""

    kind: str
    exit_code: int
    message: str


Event = (Progress | Note | Opened | StepDone | LevelPlanned | LevelStarted | LevelMeasured | Calibrated
         | LevelDone | Finished | Failed)

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (
    Progress, Note, Opened, StepDone, LevelPlanned, LevelStarted, LevelMeasured, Calibrated,
    LevelDone, Finished, Failed)}


def to_line(event: Event) -> str:
    """Return event as one line of ASCII JSON without the newline; NaN and infinity are refused.

    ASCII, because a path may hold bytes that are no UTF-8 and a reply a character that some take for
    the end of a line.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps({"event": type(event).__name__, **asdict(event)}, allow_nan=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def from_line(line: str) -> Event:
    """Return the event that line holds.

    Raises:
        ValueError: the line is no event.
    """
    try:
        fields = json.loads(line, parse_constant=_refuse)
        kind = _KINDS[fields.pop("event")]
        event: Event = kind(**{name: tuple(value) if isinstance(value, list) else value
                               for name, value in fields.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(f"not an event: {line[:200]!r}") from problem
    return event
