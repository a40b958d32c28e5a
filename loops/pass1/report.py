"""Measurements as rows for the ledger: metric, value, interval, standard error, count, unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from loops.evaluation.names import METRICS
from loops.evaluation.scenarios import Scenario
from loops.pass1.criteria import PERPLEXITY, TEXTS, Ruling
from loops.pass1.gate import Interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """Everything scored of the original or a level.

    Attributes:
        replies: per scenario id the six metrics, `overall`, text and number of tokens.
        preferences: per scenario id margin and probability of the empathic reply.
        multiple_choice: of `Bench.multiple_choice`; empty when not asked for.
        eq_bench: of `Bench.eq_bench`; empty when not asked for.
        answers: of `Bench.answers`; empty when not asked for.
    """

    replies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preferences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    multiple_choice: Mapping[str, Any] = field(default_factory=dict)
    eq_bench: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

#: what the field and the ledger call the statistics of `Divergence`
_NAMES = {"kld": "kl_divergence", "ppl": "perplexity", "same_top": "same_top_token"}
_UNITS = {"kld": "nats/token", "ppl": "", "same_top": "share", "delta_p": "probability", "ln_ppl_ratio": "nats/token"}
_SKIPPED = {"tokens"}


def _mean_row(metric: str, values: Sequence[float], unit: str = "") -> Row:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = fmean(values)
    return {"metric": metric, "value": mean, "error": error, "n": len(values), "unit": unit,
            "low": mean - 1.96 * error if error is not None else None,
            "high": mean + 1.96 * error if error is not None else None}


def _named(metric: str) -> str:
    """Return the metric's long name: `kld_p99` becomes `kl_divergence_p99`."""
    for short, long in _NAMES.items():
        if metric == short or metric.startswith(f"{short}_"):
            return long + metric.removeprefix(short)
    return metric


def _score_rows(scores: Scores) -> list[Row]:
    rows: list[Row] = []
    if scores.replies:
        found = list(scores.replies.values())
        rows.append(_mean_row("score", [one["overall"] for one in found], "0..1"))
        rows += [_mean_row(metric, [one[metric] for one in found], "0..1") for metric in METRICS]
    if scores.preferences:
        chosen = list(scores.preferences.values())
        rows += [_mean_row("forced_choice", [one["forced_choice"] for one in chosen], "0..1"),
                 _mean_row("forced_choice_accuracy", [float(one["margin"] > 0) for one in chosen], "share"),
                 _mean_row("forced_choice_margin", [one["margin"] for one in chosen], "nats/token")]
    if scores.multiple_choice:
        found_choices = scores.multiple_choice
        for metric in ("acc", "acc_norm"):
            low, high = found_choices[f"{metric}_interval"]
            rows.append({"metric": f"multiple_choice_{metric}", "value": found_choices[metric], "low": low,
                         "high": high, "n": len(found_choices["items"]), "unit": "share"})
    if scores.eq_bench:
        n = len(scores.eq_bench["items"])
        rows += [{"metric": "eq_bench", "value": scores.eq_bench["score"], "n": n, "unit": "0..100"},
                 {"metric": "eq_bench_parsed", "value": scores.eq_bench["parsed"] / n, "n": n, "unit": "share"}]
    if scores.answers:
        answered = list(scores.answers.values())
        rows += [_mean_row(name, [one[name] for one in answered], "0..1") for name in TEXTS if name != PERPLEXITY]
        tokens = sum(one["tokens"] for one in answered)
        perplexity = math.exp(min(sum(one["nll"] for one in answered) / max(1, tokens), 700.0))
        rows.append({"metric": PERPLEXITY, "value": perplexity, "n": len(answered)})
    return rows


def seed_rows(per_seed: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """Return the noise of sampling: how far the original's mean score moves from seed to seed.

    Args:
        per_seed: for each seed the overall score of each scenario, at least two seeds.
    """
    means = [fmean(scores) for scores in per_seed]
    within = fmean(stdev(scores) for scores in zip(*per_seed, strict=True))
    return ({"metric": "sampled_score", "value": fmean(means), "low": min(means), "high": max(means), "n": len(means),
             "unit": "0..1, over seeds"},
            {"metric": "seed_spread", "value": stdev(means), "n": len(means), "unit": "0..1, of the mean score"},
            {"metric": "seed_spread_per_scenario", "value": within, "n": len(per_seed[0]), "unit": "0..1"})


def _divergence_rows(divergence: Mapping[str, Any]) -> list[Row]:
    rows = []
    for metric, value in divergence.items():
        if metric in _SKIPPED or metric.endswith("_error"):
            continue
        if isinstance(value, Mapping):
            name = _named(metric.removesuffix("_percentiles"))
            rows += [{"metric": f"{name}_p{p}", "value": at, "n": divergence["tokens"]} for p, at in value.items()]
            continue
        error = divergence.get(f"{metric}_error")
        rows.append({"metric": _named(metric), "value": value, "error": error, "n": divergence["tokens"],
                     "unit": _UNITS.get(metric, ""),
                     "low": value - 1.96 * error if error is not None else None,
                     "high": value + 1.96 * error if error is not None else None})
    return rows


def baseline_rows(perplexity: Mapping[str, Any], scores: Scores, speed: float) -> tuple[Row, ...]:
    """Return the rows of the original."""
    ppl, error = perplexity["ppl"], perplexity["ppl_error"]
    return ({"metric": "perplexity", "value": ppl, "error": error, "low": ppl - 1.96 * error,
             "high": ppl + 1.96 * error, "n": int(perplexity["tokens"])},
            {"metric": "tokens_per_s", "value": speed, "unit": "tokens/s"}, *_score_rows(scores))


def level_rows(divergence: Mapping[str, Any], scores: Scores, loss: Interval | None,
               rulings: Sequence[Ruling] = ()) -> tuple[Row, ...]:
    """Return the rows of a level; without scores when it was rejected before any."""
    rows = _divergence_rows(divergence) + _score_rows(scores)
    if loss is not None:
        rows.append(_loss_row("degradation", loss))
    rows += [_loss_row(f"loss_{ruling.gate.replace('-', '_')}", ruling.loss) for ruling in rulings]
    return tuple(rows)


def _loss_row(metric: str, loss: Interval) -> Row:
    return {"metric": metric, "value": loss.value, "low": loss.low, "high": loss.high, "n": loss.n,
            "unit": f"{100 * loss.confidence:.4g} % interval"}


def response_rows(scenarios: Sequence[Scenario], scores: Scores) -> tuple[Row, ...]:
    """Return the replies with their scores."""
    prompts = {scenario.id: scenario.prompt for scenario in scenarios}
    return tuple({
        "scenario_id": name, "prompt": prompts[name], "text": one["text"], "n_tokens": one["n_tokens"],
        "scores": {metric: one[metric] for metric in ("overall", *METRICS)} | dict(scores.preferences.get(name, {}))}
        for name, one in scores.replies.items())
