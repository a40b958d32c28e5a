"""Scenarios: what a person tells, what they feel, and two replies to it, one empathic, one dismissive."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loops.evaluation.fields import read_items, require_number, require_one_of, require_text
from state.faults import NightpressError

BUILT_IN = Path(__file__).with_name("data") / "scenarios.jsonl"
VALENCES = ("positive", "neutral", "negative")
_TEXTS = ("id", "prompt", "emotion", "valence", "empathic", "dismissive")


class ScenariosRefused(NightpressError):
    """The scenarios cannot be read."""

    exit_code = 28


@dataclass(frozen=True)
class Scenario:
    """One emotional situation.

    Attributes:
        id: unique in its file.
        prompt: what the user says.
        emotion: what the user feels, one word.
        valence: `positive`, `neutral` or `negative`.
        intensity: how strongly, 0 to 1.
        empathic: a reply that recognises the feeling.
        dismissive: an equally fluent reply that does not.
        topic: what it is about; may be empty.
        register: the style it is told in; may be empty.
        traits: what makes it hard, such as `mixed-feelings` or `crisis`; may be empty.
    """

    id: str
    prompt: str
    emotion: str
    valence: str
    intensity: float
    empathic: str
    dismissive: str
    topic: str = ""
    register: str = ""
    traits: tuple[str, ...] = ()


def _parse(fields: Mapping[str, Any], where: str, _number: int) -> Scenario:
    given = {"emotion": fields.get("expected_emotion"), **fields}  # as the original had it
    texts = {name: require_text(given.get(name), where, name, ScenariosRefused) for name in _TEXTS}
    require_one_of(texts["valence"], where, "valence", VALENCES, ScenariosRefused)
    intensity = require_number(fields.get("intensity"), where, "intensity", (0, 1), ScenariosRefused)
    traits = fields.get("traits", [])
    if not isinstance(traits, list) or not all(isinstance(trait, str) for trait in traits):
        raise ScenariosRefused(f"{where} has the traits {traits!r}: a list of texts is needed.")
    return Scenario(**texts, intensity=intensity, topic=str(fields.get("topic", "")),
                    register=str(fields.get("register", "")), traits=tuple(traits))


def read_scenarios(path: Path | None = None) -> tuple[Scenario, ...]:
    """Return the scenarios of a JSONL file in its order; without a path, the built-in ones.

    Raises:
        ScenariosRefused: naming the line.
    """
    path = path or BUILT_IN
    found = read_items(path, "list of scenarios", _parse, ScenariosRefused)
    if not found:
        raise ScenariosRefused(f"{path} holds no scenarios.")
    return found


def fingerprint_of(scenarios: tuple[Scenario, ...]) -> str:
    """Return 16 hex digits that change with any scenario or their order."""
    return hashlib.sha256(repr(scenarios).encode()).hexdigest()[:16]
