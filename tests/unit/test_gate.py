"""Promise 3: the gate lets through what is as good, stops what is worse, and says when it cannot tell."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loops.pass1.gate import Interval, Verdict, decide, degradation, look_sizes

ALLOWED = 0.07
RUNS = 200

Floats = NDArray[np.float64]


def originals(rng: np.random.Generator, count: int) -> Floats:
    return np.clip(rng.normal(0.7, 0.12, count), 0.05, 1)


def press(baseline: Floats, candidate: Floats, looks: tuple[int, ...], seed: int) -> Verdict:
    """Look as a run does: at ever more scenarios until the verdict is clear."""
    verdict = Verdict.INCONCLUSIVE
    for size in looks:
        loss = degradation(list(baseline[:size]), list(candidate[:size]), looks=len(looks), seed=seed)
        verdict = decide(loss, ALLOWED)
        if verdict is not Verdict.INCONCLUSIVE:
            break
    return verdict


def rates(true_loss: float, noise: float, scenarios: int = 40) -> Counter[Verdict]:
    """How often each verdict falls on a model with this true loss whose replies differ at random."""
    rng = np.random.default_rng(round(1000 * true_loss) + round(100 * noise))
    found: Counter[Verdict] = Counter()
    for run in range(RUNS):
        baseline = originals(rng, scenarios)
        candidate = np.clip(baseline * (1 - true_loss) + rng.normal(0, noise, scenarios), 0, 1)
        found[press(baseline, candidate, look_sizes(25, scenarios, 0), run)] += 1
    return found


def test_the_original_against_itself_has_lost_exactly_nothing() -> None:
    scores = list(originals(np.random.default_rng(1), 25))
    loss = degradation(scores, scores)
    assert (loss.value, loss.low, loss.high) == (0.0, 0.0, 0.0)
    assert decide(loss, 0.0) is Verdict.PASS


def test_a_clear_loss_fails() -> None:
    rng = np.random.default_rng(2)
    scores = originals(rng, 25)
    loss = degradation(list(scores), list(scores * 0.7 + rng.normal(0, 0.02, 25)))
    assert loss.value == pytest.approx(0.3, abs=0.03)
    assert decide(loss, ALLOWED) is Verdict.FAIL


def test_a_clear_gain_passes() -> None:
    scores = originals(np.random.default_rng(3), 25)
    loss = degradation(list(scores), list(np.minimum(1, scores * 1.1)))
    assert loss.value < 0
    assert decide(loss, ALLOWED) is Verdict.PASS


def test_noise_around_the_limit_is_inconclusive() -> None:
    rng = np.random.default_rng(4)
    scores = originals(rng, 25)
    loss = degradation(list(scores), list(scores * (1 - ALLOWED) + rng.normal(0, 0.1, 25)))
    assert loss.low < ALLOWED < loss.high
    assert decide(loss, ALLOWED) is Verdict.INCONCLUSIVE


def test_the_same_scores_and_seed_give_the_same_interval() -> None:
    rng = np.random.default_rng(5)
    baseline, candidate = list(originals(rng, 25)), list(originals(rng, 25))
    assert degradation(baseline, candidate, seed=3) == degradation(baseline, candidate, seed=3)
    assert degradation(baseline, candidate, seed=3) != degradation(baseline, candidate, seed=4)


def test_pairing_sees_a_loss_that_unpaired_scores_would_hide() -> None:
    """The scenarios differ by far more than the models; only pairs show the loss."""
    baseline = np.linspace(0.05, 1, 40)
    paired = degradation(list(baseline), list(baseline * 0.9))
    shuffled = degradation(list(baseline), list(np.random.default_rng(0).permutation(baseline * 0.9)))
    assert paired.high - paired.low < 1e-9
    assert shuffled.high - shuffled.low > 0.2


def test_more_looks_widen_the_interval() -> None:
    """Bonferroni: the error rate of five per cent is divided among the looks."""
    rng = np.random.default_rng(6)
    baseline, candidate = list(originals(rng, 25)), list(originals(rng, 25))
    one, four = (degradation(baseline, candidate, looks=looks) for looks in (1, 4))
    assert (one.confidence, four.confidence) == (pytest.approx(0.95), pytest.approx(0.9875))
    assert four.low < one.low < one.high < four.high


def test_more_scenarios_narrow_the_interval() -> None:
    rng = np.random.default_rng(7)
    baseline = originals(rng, 400)
    candidate = baseline * 0.95 + rng.normal(0, 0.1, 400)
    few, many = (degradation(list(baseline[:n]), list(candidate[:n])) for n in (25, 400))
    assert many.n == 400
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_interval_is_that_of_the_normal_theory_where_both_hold() -> None:
    rng = np.random.default_rng(8)
    baseline = np.full(400, 0.8)
    candidate = baseline - rng.normal(0.04, 0.1, 400)
    loss = degradation(list(baseline), list(candidate))
    error = (candidate / 0.8).std(ddof=1) / 20
    assert loss.low == pytest.approx(loss.value - 1.96 * error, abs=error / 5)
    assert loss.high == pytest.approx(loss.value + 1.96 * error, abs=error / 5)


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_a_model_as_good_as_the_original_is_rarely_rejected(noise: float) -> None:
    found = rates(0.0, noise)
    assert found[Verdict.FAIL] <= 0.05 * RUNS
    assert noise > 0.05 or found[Verdict.PASS] >= 0.95 * RUNS


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_a_model_worse_than_allowed_is_rarely_accepted(noise: float) -> None:
    found = rates(1.5 * ALLOWED, noise)
    assert found[Verdict.PASS] <= 0.06 * RUNS
    assert noise > 0.05 or found[Verdict.FAIL] >= 0.5 * RUNS


def test_a_model_exactly_at_the_limit_is_mostly_undecided() -> None:
    """The hardest case for the error rates: each side may be wrong in 2.5 % of the runs."""
    found = rates(ALLOWED, 0.1)
    assert found[Verdict.PASS] <= 0.06 * RUNS
    assert found[Verdict.FAIL] <= 0.06 * RUNS


@pytest.mark.parametrize(("baseline", "candidate"), [([], []), ([0.5], []), ([0.5], [0.5, 0.5])])
def test_what_cannot_be_paired_is_refused(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError, match="paired"):
        degradation(baseline, candidate)


def test_an_original_that_scores_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 on every"):
        degradation([0.0, 0.0], [0.5, 0.5])


def test_a_resample_of_scenarios_where_the_original_scores_nothing_does_no_harm() -> None:
    loss = degradation([0.0, 0.0, 0.9], [0.0, 0.0, 0.9])
    assert (loss.low, loss.high) == (0.0, 0.0)


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.01, 0.07, Verdict.PASS), (0.01, 0.0701, Verdict.INCONCLUSIVE), (0.07, 0.08, Verdict.INCONCLUSIVE),
    (0.0701, 0.08, Verdict.FAIL)])
def test_only_an_interval_on_one_side_of_the_limit_decides(low: float, high: float, verdict: Verdict) -> None:
    assert decide(Interval(0.05, low, high, 25, 0.95), ALLOWED) is verdict


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 400))
def test_looks_grow_from_the_first_to_the_cap(first: int, available: int, cap: int) -> None:
    sizes = look_sizes(first, available, cap)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == (min(available, cap) if cap else available)
    assert 1 <= sizes[0] <= max(1, first)


@given(st.integers(1, 300), st.integers(1, 300))
def test_each_look_at_most_doubles_and_few_are_needed(first: int, available: int) -> None:
    sizes = look_sizes(first, available, 0)
    assert all(later <= 8 / 3 * earlier for earlier, later in pairwise(sizes))
    assert len(sizes) <= 2 + np.log2(max(1, available / first))


def test_the_built_in_scenarios_are_looked_at_twice() -> None:
    assert look_sizes(25, 40, 0) == (25, 40)
