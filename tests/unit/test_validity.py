"""The metrics prefer what people would, on the bank and on labelled texts that nothing was fitted to."""

from __future__ import annotations

from statistics import fmean

import pytest
from validity import NEARLY_NOTHING, SPOILT, Bank, agreement, figure_share, score_bank, share_above, spoilt_means

from loops.evaluation.labelled import rank_correlation
from loops.evaluation.language import words
from loops.evaluation.scenarios import read_scenarios


@pytest.fixture(scope="module")
def bank() -> Bank:
    return score_bank(read_scenarios(), shuffles=2)


def test_the_empathic_reply_scores_higher_overall(bank: Bank) -> None:
    assert share_above(bank.empathic, bank.dismissive, "overall") >= 0.95


@pytest.mark.parametrize("metric", ["emotional_match", "empathy", "emotional_intensity", "sentiment_accuracy"])
def test_the_empathic_reply_scores_higher_in_each_metric(bank: Bank, metric: str) -> None:
    assert share_above(bank.empathic, bank.dismissive, metric) >= 0.85


def test_a_reply_with_a_figure_has_the_higher_metaphor_usage(bank: Bank) -> None:
    share, pairs = figure_share(bank)
    assert pairs > 80
    assert share >= 0.85


def test_a_reply_to_another_scenario_scores_lower(bank: Bank) -> None:
    assert fmean(share_above(bank.empathic, other, "overall") for other in bank.shuffled) >= 0.9


def test_length_explains_little(bank: Bank) -> None:
    lengths = [float(len(words(scenario.empathic))) for scenario in bank.scenarios]
    assert abs(rank_correlation([scores["overall"] for scores in bank.empathic], lengths)) < 0.2


def test_spoilt_replies_score_nearly_nothing_where_they_should() -> None:
    means = spoilt_means(read_scenarios()[:60])
    over = {(name, metric): means[name][metric] for name, (_, metrics) in SPOILT.items() for metric in metrics
            if means[name][metric] > NEARLY_NOTHING.get(name, 0.1)}
    assert over == {}


def test_unseen_labelled_texts_are_graded_much_as_their_graders_did() -> None:
    found = agreement()
    assert min(found[scale]["rank correlation"] for scale in ("reaction", "interpretation", "exploration")) > 0.7
    assert found["intensity"]["rank correlation"] > 0.7
    assert found["figurative language"]["F1"] > 0.75
    assert found["Plutchik's emotions"]["accuracy"] > 0.6
