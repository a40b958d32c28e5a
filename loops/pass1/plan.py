"""The plan of a run: everything that decides its numbers, in one frozen object."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from loops.engine.options import EngineOptions
from loops.evaluation.names import METRICS
from state.faults import NightpressError

DEFAULT_TARGET_BYTES = 24_000_000_000
DEFAULT_MAX_DEGRADATION = 0.07

#: Mean KL divergence beyond which a candidate is rejected before any text is generated. Llama-3-8B
#: has 0.445 at Q2_K without importance matrix (llama.cpp, tools/perplexity/README.md), where its
#: perplexity is up by half; beyond that no task score has been seen to hold.
DEFAULT_MAX_KLD = 0.5

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:([kmgt])(i?)b?|(b))?\s*", re.IGNORECASE)


class BadSize(NightpressError):
    """A size is a number with a unit, such as 20GB, 800MB or 1.5GiB; without a unit it means GB."""

    exit_code = 65


class TargetImpossible(NightpressError):
    """No level is small enough for the target."""

    exit_code = 66


class CannotFinish(NightpressError):
    """This run cannot finish on this machine."""

    exit_code = 67


class BadWeight(NightpressError):
    """A weight is a metric and a number of at least 0, such as metaphor_usage=0; one must be above 0."""

    exit_code = 60


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Return the weights of the emotional metrics that texts such as `empathy=2` give.

    Raises:
        BadWeight: an unknown metric, no number, or nothing left to weigh.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name.strip() not in METRICS:
            raise BadWeight(f"{name.strip()!r} is no emotional metric. They are {', '.join(METRICS)}.")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise BadWeight(f"{text!r} gives no weight. Write a metric and a number, such as empathy=2.") from None
        if not 0 <= weights[name.strip()] < math.inf:
            raise BadWeight(f"The weight of {name.strip()} must be a number of at least 0, not {value}.")
    if len(weights) == len(METRICS) and not any(weights.values()):
        raise BadWeight("All weights are 0, so nothing would be scored.")
    return weights


def parse_size(text: str) -> int:
    """Return the bytes that text names: `20` and `20GB` are 20e9, `800MB` 800e6, `1GiB` 2**30.

    Raises:
        BadSize: the text is no size, or zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadSize(f"{text!r} is no size. Write a number with a unit, such as 20GB, 800MB or 1.5GiB.")
    number, unit, binary, plain = match.groups()
    power = 0 if plain else "kmgt".index((unit or "g").lower()) + 1
    size: int = round(Fraction(number) * (1024 if binary else 1000) ** power)
    if size <= 0:
        raise BadSize(f"{text!r} is no size to aim at: it must be more than nothing.")
    return size


@dataclass(frozen=True)
class PressPlan:
    """What to press, how far, and how to measure it.

    Attributes:
        model: path of the original.
        name: of the model in the ledger and in the deploy directory.
        levels: names; empty for the original ladder.
        target_bytes: candidates larger than this are not built.
        max_degradation: largest relative loss of the mean score that passes.
        max_kld: mean KL divergence beyond which a candidate is rejected without generating.
        max_iterations: most levels to build.
        strategy: `walk`, `bisect`, or `refine`: walk, then try recipes.
        prefer: `smallest`, `score` or `score-per-gb`.
        scenarios: a JSONL file; None for the built-in ones.
        first_scenarios: scenarios at the first look.
        max_scenarios: most scenarios; 0 for all there are.
        text: evaluation text; None for the one that ships.
        text_windows: most windows of 512 tokens to score; 0 for all.
        accept_inconclusive: count what could not be decided as passed.
        allow_requantize: accept an original that is quantized.
        ignore_forecast: start although the forecast says that memory will not do.
        tool: an external llama-quantize.
        timeout_s: deadline of a level; 0 for none.
        simulate: no native work; results are invented and marked so.
        max_tokens: of a reply.
        seed: of the bootstrap.
        gates: such as `empathy:0.05`, see `criteria.parse_gates`.
        weights: of the six emotional metrics in the overall score; 1 where none is given.
        seeds: times that the original answers the first look by sampling, to know the noise; 0 for none.
        eq_bench: file of EQ-Bench v2 questions; None for none.
        multiple_choice: JSONL file of questions with choices; None for none.
        dataset: folder of a dataset whose test rows are answered too; None for none.
        domains: names of calibration domains.
        calibration: files of calibration text besides.
        user_domains: folder of the user's own domains; None for none.
        imatrix: file of an importance matrix to use as it is; None to collect one where it is needed.
        source: where the original was converted from: folder, files, converter, stages; empty for none.
        judge: a provider of a judging model, with or without the model's name, `anthropic:NAME`; None for none.
        options: of the engine.
        blobs: folder for finished levels.
        scratch: folder for checkpoints.
        store_bytes: most disk for the original's log-probabilities.
    """

    model: str
    name: str
    blobs: str
    scratch: str
    levels: tuple[str, ...] = ()
    target_bytes: int = DEFAULT_TARGET_BYTES
    max_degradation: float = DEFAULT_MAX_DEGRADATION
    max_kld: float = DEFAULT_MAX_KLD
    max_iterations: int = 10
    strategy: str = "walk"
    prefer: str = "smallest"
    scenarios: str | None = None
    first_scenarios: int = 25
    max_scenarios: int = 0
    text: str | None = None
    text_windows: int = 0
    accept_inconclusive: bool = False
    allow_requantize: bool = False
    ignore_forecast: bool = False
    tool: str | None = None
    timeout_s: float = 0.0
    simulate: bool = False
    max_tokens: int = 96
    seed: int = 0
    store_bytes: int = 2 << 30
    gates: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    seeds: int = 3
    eq_bench: str | None = None
    multiple_choice: str | None = None
    judge: str | None = None
    dataset: str | None = None
    domains: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    user_domains: str | None = None
    imatrix: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    options: EngineOptions = field(default_factory=EngineOptions)

    def as_json(self) -> dict[str, Any]:
        """Return a dict that json can write and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PressPlan:
        """Return the plan that `as_json` wrote."""
        known = dict(fields)
        known["options"] = EngineOptions(**known.get("options", {}))
        known["levels"] = tuple(known.get("levels", ()))
        for name in ("gates", "domains", "calibration"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)

    @property
    def model_path(self) -> Path:
        """Where the original lies."""
        return Path(self.model)

    @property
    def matrices(self) -> Path:
        """Folder for importance matrices."""
        return Path(self.blobs).parent / "imatrices"

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome: everything but places on this machine.

        What lies in those places decides too: model, scenarios, questions, rows, texts, matrix and tool are named
        by content.
        """
        fields = asdict(self)
        for place in ("model", "blobs", "scratch", "scenarios", "text", "tool", "eq_bench",
                      "multiple_choice", "dataset", "timeout_s", "ignore_forecast", "domains", "calibration",
                      "user_domains", "imatrix", "source"):
            del fields[place]
        return fields


@dataclass(frozen=True)
class SinglePlan:
    """What to make of a model.

    Attributes:
        model: path of the original.
        scratch: folder for checkpoints.
        matrices: folder for importance matrices.
        journals: folder for finished steps.
        domains: names of calibration domains.
        calibration: files of calibration text besides.
        user_domains: folder of the user's own domains.
        imatrix: file of an importance matrix to use as it is.
        merge: files of importance matrices to add up.
        chunks: most pieces of 512 tokens to collect from; 0 for all.
        levels: names, or names of ladders.
        target_bytes: of a file that gets a recipe instead of a level; 0 for none.
        target_bits: the same in bits per weight; 0 for none.
        output: of an importance matrix the file, else the folder.
        stem: of the files' names.
        replace: files that are there.
        allow_requantize: accept an original that is quantized.
        tool: an external llama-quantize.
        options: of the engine.
    """

    model: str
    scratch: str
    matrices: str
    journals: str
    output: str
    stem: str = "model"
    domains: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    user_domains: str | None = None
    imatrix: str | None = None
    merge: tuple[str, ...] = ()
    chunks: int = 128
    levels: tuple[str, ...] = ()
    target_bytes: int = 0
    target_bits: float = 0.0
    replace: bool = False
    allow_requantize: bool = False
    tool: str | None = None
    options: EngineOptions = field(default_factory=EngineOptions)

    def as_json(self) -> dict[str, Any]:
        """Return a dict that json can write and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SinglePlan:
        """Return the plan that `as_json` wrote."""
        known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                 for name, value in fields.items()}
        known["options"] = EngineOptions(**fields.get("options", {}))
        return cls(**known)
