"""Every number that was measured reaches the ledger, with its interval, under one name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from loops.engine.divergence import summarise
from loops.evaluation.scenarios import read_scenarios
from loops.pass1.gate import Interval
from loops.pass1.report import baseline_rows, level_rows, response_rows

EACH: dict[str, dict[str, Any]] = {
    "one": {"forced_choice": 0.6, "sentiment_accuracy": 0.9, "response_fluency": 0.3, "margin": 0.4,
            "text": "I see.", "n_tokens": 3},
    "two": {"forced_choice": 0.4, "sentiment_accuracy": 0.5, "response_fluency": 0.3, "margin": -0.2,
            "text": "Hm.", "n_tokens": 2},
}
LOSS = Interval(0.02, -0.01, 0.05, 2, 0.95)


def divergence() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    nll = rng.gamma(2, 1, 100)
    rows = np.column_stack([nll + rng.normal(0, 0.1, 100), nll, rng.gamma(1, 0.1, 100), rng.normal(0, 0.1, 100),
                            rng.random(100) < 0.9, np.full(100, np.nan)])
    return summarise(rows).as_json()


def by_name(rows: tuple[dict[str, Any], ...]) -> dict[str, dict[str, Any]]:
    assert len({row["metric"] for row in rows}) == len(rows)
    return {row["metric"]: row for row in rows}


def test_a_mean_comes_with_its_interval() -> None:
    row = by_name(level_rows(divergence(), EACH, LOSS))["sentiment_accuracy"]
    error = math.sqrt(((0.9 - 0.7) ** 2 + (0.5 - 0.7) ** 2) / 1 / 2)
    assert row["value"] == pytest.approx(0.7)
    assert row["error"] == pytest.approx(error)
    assert (row["low"], row["high"]) == (pytest.approx(0.7 - 1.96 * error), pytest.approx(0.7 + 1.96 * error))
    assert row["n"] == 2


def test_the_score_is_the_mean_of_the_metrics() -> None:
    assert by_name(level_rows(divergence(), EACH, LOSS))["score"]["value"] == pytest.approx((0.6 + 0.4) / 2)


def test_forced_choice_counts_the_scenarios_where_empathy_wins() -> None:
    rows = by_name(level_rows(divergence(), EACH, LOSS))
    assert rows["forced_choice_accuracy"]["value"] == 0.5
    assert rows["forced_choice_margin"]["value"] == pytest.approx(0.1)


def test_one_scenario_alone_has_no_interval() -> None:
    row = by_name(level_rows(divergence(), {"one": EACH["one"]}, LOSS))["score"]
    assert (row["error"], row["low"], row["high"]) == (None, None, None)


def test_the_degradation_carries_the_gates_own_interval() -> None:
    row = by_name(level_rows(divergence(), EACH, LOSS))["degradation"]
    assert (row["value"], row["low"], row["high"], row["n"]) == (0.02, -0.01, 0.05, 2)


def test_every_statistic_of_the_divergence_has_a_row() -> None:
    found = divergence()
    rows = by_name(level_rows(found, {}, None))
    values = [row["value"] for row in rows.values()]
    singles = [value for name, value in found.items()
               if name != "tokens" and not name.endswith("_error") and not isinstance(value, dict)]
    percentiles = [value for table in found.values() if isinstance(table, dict) for value in table.values()]
    assert sorted(values) == sorted(singles + percentiles)


def test_the_known_names_are_written_out() -> None:
    rows = by_name(level_rows(divergence(), {}, None))
    assert {"kl_divergence", "kl_divergence_median", "kl_divergence_max", "kl_divergence_p99.9", "perplexity",
            "perplexity_ratio", "same_top_token", "delta_p_rms", "delta_p_p5"} <= set(rows)
    assert rows["kl_divergence"]["unit"] == "nats/token"


def test_every_error_of_the_divergence_is_in_its_row() -> None:
    found = divergence()
    rows = by_name(level_rows(found, {}, None))
    assert rows["kl_divergence"]["error"] == found["kld_error"]
    assert rows["same_top_token"]["error"] == found["same_top_error"]
    errors = sorted(value for name, value in found.items() if name.endswith("_error"))
    assert sorted(row["error"] for row in rows.values() if row.get("error") is not None) == errors
    assert all(row["n"] == 100 for row in rows.values())


def test_a_level_rejected_before_any_reply_has_no_scores() -> None:
    rows = by_name(level_rows(divergence(), {}, None))
    assert "score" not in rows
    assert "degradation" not in rows


def test_the_original_has_its_perplexity_speed_and_scores() -> None:
    rows = by_name(baseline_rows({"ppl": 8.0, "ppl_error": 0.5, "tokens": 510.0}, EACH, 42.0))
    assert rows["perplexity"]["low"] == pytest.approx(8 - 0.98)
    assert rows["perplexity"]["n"] == 510
    assert rows["tokens_per_s"]["value"] == 42
    assert rows["score"]["value"] == pytest.approx(0.5)


def test_a_reply_keeps_its_prompt_text_and_scores() -> None:
    scenario = read_scenarios()[0]
    (row,) = response_rows((scenario,), {scenario.id: EACH["one"]})
    assert row == {"scenario_id": scenario.id, "prompt": scenario.prompt, "text": "I see.", "n_tokens": 3,
                   "scores": {"forced_choice": 0.6, "sentiment_accuracy": 0.9, "response_fluency": 0.3,
                              "margin": 0.4}}


def test_rows_are_what_json_can_hold() -> None:
    rows = level_rows(divergence(), EACH, LOSS)
    assert json.loads(json.dumps(rows, allow_nan=False)) == list(rows)
