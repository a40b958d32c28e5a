"""Measurements as rows for the ledger: metric, value, interval, standard error, count, unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from loops.evaluation.scenarios import Scenario
from loops.pass1.bench import METRICS
from loops.pass1.gate import Interval

Row = dict[str, Any]

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


def _score_rows(each: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    if not each:
        return []
    found = list(each.values())
    return [
        _mean_row("score", [fmean(one[metric] for metric in METRICS) for one in found], "0..1"),
        *(_mean_row(metric, [one[metric] for one in found], "0..1") for metric in METRICS),
        _mean_row("forced_choice_accuracy", [float(one["margin"] > 0) for one in found], "share"),
        _mean_row("forced_choice_margin", [one["margin"] for one in found], "nats/token"),
    ]


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


def baseline_rows(perplexity: Mapping[str, Any], each: Mapping[str, Mapping[str, Any]],
                  speed: float) -> tuple[Row, ...]:
    """Return the rows of the original."""
    ppl, error = perplexity["ppl"], perplexity["ppl_error"]
    return ({"metric": "perplexity", "value": ppl, "error": error, "low": ppl - 1.96 * error,
             "high": ppl + 1.96 * error, "n": int(perplexity["tokens"])},
            {"metric": "tokens_per_s", "value": speed, "unit": "tokens/s"}, *_score_rows(each))


def level_rows(divergence: Mapping[str, Any], each: Mapping[str, Mapping[str, Any]],
               loss: Interval | None) -> tuple[Row, ...]:
    """Return the rows of a level; without scores when it was rejected before any."""
    rows = _divergence_rows(divergence) + _score_rows(each)
    if loss is not None:
        rows.append({"metric": "degradation", "value": loss.value, "low": loss.low, "high": loss.high, "n": loss.n,
                     "unit": f"share, {100 * loss.confidence:g} % interval"})
    return tuple(rows)


def response_rows(scenarios: Sequence[Scenario], each: Mapping[str, Mapping[str, Any]]) -> tuple[Row, ...]:
    """Return the replies with their scores."""
    prompts = {scenario.id: scenario.prompt for scenario in scenarios}
    return tuple({"scenario_id": name, "prompt": prompts[name], "text": one["text"], "n_tokens": one["n_tokens"],
                  "scores": {metric: one[metric] for metric in (*METRICS, "margin")}} for name, one in each.items())
