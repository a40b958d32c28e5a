"""Figures of many rows, their intervals, and what is a clear difference."""

from __future__ import annotations

import math
import random

import pytest

from loops.answers.overlap import compare
from loops.answers.statistics import FORMS, Measured, differ, summarise

TEXT = Measured(nll=30.0, tokens=10, foreseen=4)


def rows(count: int, right: float, nll: float = 2.0, seed: int = 1) -> list[Measured]:
    """Rows whose replies are right so often; every reference has five words and ten tokens."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        reference = f"answer number {number} is this"
        reply = reference if chance.random() < right else "nothing of the kind at all"
        found.append(Measured(10 * nll * chance.uniform(0.5, 1.5), 10, round(10 * right), compare(reply, reference)))
    return found


def test_every_metric_is_a_ratio_of_sums_over_rows() -> None:
    one = Measured(4.0, 2, 1, compare("cat", "cat"))
    other = Measured(6.0, 8, 2, compare("dog", "bird"), 0.25)
    found = summarise([one, other, TEXT])
    assert found["loss"].value == pytest.approx((4 + 6 + 30) / 20)
    assert found["perplexity"].value == pytest.approx(math.exp(2.0))
    assert found["token_accuracy"].value == pytest.approx(3 / 10)  # a text has no answer
    assert found["exact_match"].value == found["f1"].value == 0.5
    assert found["semantic_similarity"].value == 0.25
    assert (found["loss"].n, found["f1"].n, found["semantic_similarity"].n) == (3, 2, 1)
    assert set(found) == set(FORMS)


def test_texts_have_a_perplexity_and_nothing_else() -> None:
    assert set(summarise([TEXT, TEXT])) == {"loss", "perplexity"}


def test_nothing_has_no_metrics_and_one_row_no_interval() -> None:
    assert summarise([]) == {}
    found = summarise(rows(1, 1.0))
    assert found["f1"].value == 1
    assert {(one.low, one.high) for one in found.values()} == {(None, None)}


def test_corpus_bleu_of_resamples_is_that_of_their_sums() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    asked = [("the cat sat on the mat today", "the cat sat on the red mat today"), ("a dog", "a dog ran far away now")]
    found = summarise([Measured(1.0, 1, 1, compare(*pair)) for pair in asked])["bleu"]
    whole = sacrebleu.corpus_bleu([one for one, _ in asked], [[two for _, two in asked]]).score / 100
    alone = [sacrebleu.corpus_bleu([one], [[two]]).score / 100 for one, two in asked]
    assert found.value == pytest.approx(whole)
    assert (found.low, found.high) == pytest.approx((min(alone), max(alone)), abs=1e-9)  # of two rows, one twice


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_value() -> None:
    sample = rows(60, 0.5)
    first = summarise(sample, seed=3)
    assert first == summarise(sample, seed=3)
    assert first != summarise(sample, seed=4)
    for one in first.values():
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.value <= one.high


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(120):
        found = summarise(rows(80, 0.5, seed=seed), seed=seed)["exact_match"]
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    assert 104 <= held <= 120  # 95 % of 120 is 114, its standard deviation 2.4


def test_a_model_does_not_differ_from_itself() -> None:
    sample = rows(40, 0.5)
    for one in differ(sample, sample).values():
        assert (one.value, one.low, one.high, one.clear, one.better) == (0, 0, 0, False, "")


def test_a_clear_difference_names_the_better_model_whatever_direction_is_good() -> None:
    weak, strong = rows(60, 0.2, nll=3.0), rows(60, 0.9, nll=1.0)
    for found, better in ((differ(weak, strong), "second"), (differ(strong, weak), "first")):
        for name in ("loss", "perplexity", "f1", "rougeL", "bleu"):
            assert found[name].clear
            assert found[name].better == better, name
    assert differ(weak, strong)["loss"].value < 0 < differ(weak, strong)["f1"].value


def test_pairs_see_what_apart_would_drown() -> None:
    chance = random.Random(1)
    base = [chance.uniform(5, 50) for _ in range(50)]
    first = [Measured(value, 10, 0) for value in base]
    second = [Measured(value * 1.02, 10, 0) for value in base]
    apart = [summarise(sample)["loss"] for sample in (first, second)]
    assert apart[0].high is not None
    assert apart[1].low is not None
    assert apart[0].high > apart[1].low
    found = differ(first, second)["loss"]
    assert found.clear
    assert found.better == "first"


def test_a_perplexity_beyond_numbers_is_still_a_number() -> None:
    found = summarise([Measured(1e6, 10, 0), Measured(2e6, 10, 0)])["perplexity"]
    assert math.isfinite(found.value)
