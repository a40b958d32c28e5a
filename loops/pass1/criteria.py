"""What a level must hold: gates with names and limits, and how each is ruled on."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from loops.evaluation.feelings import PLUTCHIK, family_of
from loops.evaluation.names import METRICS
from loops.evaluation.scenarios import Scenario
from loops.pass1.gate import (
    ERROR_RATE,
    LEAST_TAIL,
    Interval,
    Look,
    Verdict,
    combine,
    decide,
    degradation,
    least_scenarios,
    normal_interval,
)
from loops.pass1.spending import expanded
from state.faults import NightpressError

WORST_SLICE = "worst-slice"
JUDGE = "judge"
REPLIES = ("overall", *METRICS)  #: scored on each reply
ITEMS = ("forced_choice", "eq_bench", "multiple_choice")  #: scored on all items at once
PERPLEXITY = "answer_perplexity"  #: of the reference answers of a dataset; the limit is its relative growth
TEXTS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "token_accuracy",
         PERPLEXITY)  #: scored on the rows of a dataset
STATISTICS = (  #: of the whole level; what of them is recorded and grows as a level gets worse
    "perplexity", "same_top_token", "tokens_per_s", "kl_divergence", "kl_divergence_median", "kl_divergence_p90",
    "kl_divergence_p95", "kl_divergence_p99", "kl_divergence_p99.9", "kl_divergence_max", "delta_p_rms")
RELATIVE = ("perplexity", "same_top_token", "tokens_per_s")  #: of them, those whose limit is a share
ABSOLUTE = frozenset(STATISTICS) - frozenset(RELATIVE)
NAMES = (*REPLIES, *ITEMS, *TEXTS, *STATISTICS, WORST_SLICE, JUDGE)
DEFAULTS = ("overall", "forced_choice")
LEAST_SLICE = 8  #: scenarios that a slice must have to be judged by itself


class BadGate(NightpressError):
    """A gate is a metric and the loss that it allows, such as empathy:0.05; `off` instead drops it."""

    exit_code = 59


@dataclass(frozen=True)
class Gate:
    """A metric and its limit.

    Attributes:
        name: one of `NAMES`.
        limit: the largest loss that passes: of scores and speed relative to the original, of perplexity its
            relative growth, of `same_top_token` the share of tokens that change, of the others the value itself.
    """

    name: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}:{self.limit:g}"


def parse_gates(texts: Sequence[str], allowed: float) -> tuple[Gate, ...]:
    """Return the gates that texts such as `empathy:0.05`, `worst-slice` or `forced_choice:off` ask for.

    Overall score and forced choice are on with the limit `allowed` unless a text says otherwise.

    Raises:
        BadGate: an unknown name, a limit that is no number of at least 0, or no gate is left.
    """
    limits: dict[str, float] = dict.fromkeys(DEFAULTS, allowed)
    for text in texts:
        name, colon, value = text.partition(":")
        name = name.strip()
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            raise BadGate(f"There is no metric {name!r} to gate on." + (f" Did you mean {near[0]}?" if near else "")
                          + f" The names are {', '.join(NAMES)}.")
        if value.strip() == "off":
            limits.pop(name, None)
            continue
        if not colon and name in STATISTICS:
            raise BadGate(f"The gate {name} needs a limit, such as {name}:0.05.")
        try:
            limits[name] = float(value) if colon else allowed
        except ValueError:
            raise BadGate(f"{value!r} is no limit for {name}. Write a number such as 0.05, or off.") from None
        if not 0 <= limits[name] < math.inf:
            raise BadGate(f"The limit of {name} must be a number of at least 0, not {value}.")
    if set(limits) <= {JUDGE}:
        raise BadGate("A judge may not be the only gate. Leave overall, forced_choice or another on.")
    return tuple(Gate(name, limit) for name, limit in limits.items())


@dataclass(frozen=True)
class Ruling:
    """What a gate found.

    Attributes:
        gate: its name.
        limit: the loss it allows.
        loss: with interval.
        verdict: of it.
        slice: the worst slice, for the gate of that name.
    """

    gate: str
    limit: float
    loss: Interval
    verdict: Verdict
    slice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "verdict": self.verdict.value}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Ruling:
        """Return what `as_json` wrote."""
        return cls(**{**fields, "loss": Interval(**fields["loss"]), "verdict": Verdict(fields["verdict"])})


def rule(gate: Gate, baseline: Sequence[float], candidate: Sequence[float], look: Look, seed: int) -> Ruling:
    """Rule on paired scores, one per scenario or item; an original that scores nothing cannot lose.

    A single score has no spread, so nothing is concluded from it.
    """
    if not any(baseline):
        nothing = Interval(0.0, 0.0, 0.0, len(baseline), 1.0)
        return Ruling(gate.name, gate.limit, nothing, Verdict.PASS if look.may_pass else Verdict.INCONCLUSIVE)
    loss = degradation(baseline, candidate, look, seed=seed)
    verdict = decide(loss, gate.limit, may_pass=look.may_pass) if len(baseline) > 1 else Verdict.INCONCLUSIVE
    return Ruling(gate.name, gate.limit, loss, verdict)


def rule_on_answers(gate: Gate, baseline: Sequence[tuple[float, int]], candidate: Sequence[tuple[float, int]],
                    fail_tail: float = ERROR_RATE) -> Ruling:
    """Rule on the growth of the perplexity of the reference answers, paired by row.

    exp of the difference of the losses per token, less 1; its interval is that of Student's t on the linearised ratio
    of the sums over rows (Cochran 1977, chapter 6).

    Args:
        gate: on `PERPLEXITY`.
        baseline: of each row the negative log-likelihood in nats and the tokens, by the original.
        candidate: of the same rows, by the level.
        fail_tail: one-sided probability that the lower bound may err.
    """
    tokens = sum(count for _, count in baseline)
    lost = [mine - base for (base, _), (mine, _) in zip(baseline, candidate, strict=True)]
    growth = sum(lost) / tokens
    n = len(lost)
    spread = sum((one - growth * count) ** 2 for one, (_, count) in zip(lost, baseline, strict=True))
    value = math.expm1(min(growth, 700.0))
    error = min((1 + value) * math.sqrt(spread) / tokens if n > 1 else math.inf, 1e300)
    down, up = (-NormalDist().inv_cdf(max(expanded(tail, n), LEAST_TAIL)) * error for tail in (fail_tail, ERROR_RATE))
    loss = Interval(value, value - down, value + up, n, 1 - fail_tail - ERROR_RATE)
    return Ruling(gate.name, gate.limit, loss, decide(loss, gate.limit))


def too_few_rows(gates: Sequence[Gate], rows: int) -> str:
    """Say so, if a level could collapse on more replies than the gates on a dataset allow, and its rows not show it."""
    limits = [found.limit for found in gates if found.name in TEXTS]
    least = least_scenarios(min(limits)) if limits and min(limits) > 0 else 0
    return "" if rows >= least else (
        f"The dataset has {rows} rows to be held to: a loss on few replies that is larger than the limit of "
        f"{100 * min(limits):.3g} % could go unseen in fewer than {least}.")


def rule_on_slices(gate: Gate, scenarios: Sequence[Scenario], baseline: Sequence[float],
                   candidate: Sequence[float], look: Look, seed: int) -> Ruling:
    """Rule on the worst slice by emotion group and by valence.

    Every slice must be within the limit to pass, which needs no correction (intersection-union, see
    `gate.combine`); any slice beyond it fails, so that error is divided among the slices (Bonferroni).

    Limits: a slice of a dozen scenarios shows a loss that all of it has; a rare collapse within it can go unseen.
    """
    members = slices(scenarios)
    narrow = Look(look.size, look.fail_tail / max(1, len(members)), look.pass_tail, look.may_pass)
    rulings = {}
    for name, places in members.items():
        rulings[name] = rule(gate, [baseline[at] for at in places], [candidate[at] for at in places], narrow, seed)
    if not rulings:
        whole = rule(gate, baseline, candidate, look, seed)
        return Ruling(gate.name, gate.limit, whole.loss, whole.verdict, "all")
    worst = max(rulings, key=lambda name: (rulings[name].verdict is Verdict.FAIL, rulings[name].loss.high))
    verdict = combine([found.verdict for found in rulings.values()])
    return Ruling(gate.name, gate.limit, rulings[worst].loss, verdict, worst)


def slices(scenarios: Sequence[Scenario]) -> dict[str, list[int]]:
    """Return the places of the scenarios of each valence and each of Plutchik's emotions, of 8 or more."""
    found: dict[str, list[int]] = {}
    for at, scenario in enumerate(scenarios):
        found.setdefault(scenario.valence, []).append(at)
        family = family_of(scenario.emotion)
        if family is not None:
            found.setdefault(PLUTCHIK[family.shares.index(max(family.shares))], []).append(at)
    return {name: places for name, places in found.items() if len(places) >= LEAST_SLICE}


def rule_on_statistic(gate: Gate, measured: Mapping[str, Mapping[str, Any]], speed: float,
                      original_speed: float, fail_tail: float = ERROR_RATE) -> Ruling:
    """Rule on a statistic of the level, with its standard error where it has one.

    Args:
        gate: one of `STATISTICS`.
        measured: rows of the level by metric, each with value and perhaps error and n.
        speed: tokens per second of the level.
        original_speed: the same of the original.
        fail_tail: one-sided probability that the lower bound may err.
    """
    if gate.name == "tokens_per_s":
        loss = normal_interval(1 - speed / original_speed, 0.0, 1, fail_tail)
    else:
        row = measured["perplexity_ratio" if gate.name == "perplexity" else gate.name]
        value = {"perplexity": row["value"] - 1, "same_top_token": 1 - row["value"]}.get(gate.name, row["value"])
        loss = normal_interval(value, row.get("error") or 0.0, int(row.get("n") or 0), fail_tail)
    return Ruling(gate.name, gate.limit, loss, decide(loss, gate.limit))
