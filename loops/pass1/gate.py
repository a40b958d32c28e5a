"""The gate: is a candidate no worse than the original by more than the user allows?

A non-inferiority test on paired scores. Each scenario is answered by both models, so what is
resampled is the scenario; the quantity is the relative loss of the mean score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

RESAMPLES = 10_000
ERROR_RATE = 0.05  #: two-sided, over all looks together


class Verdict(StrEnum):
    """What the gate says; only `pass` lets a candidate through."""

    PASS = "passed"  # noqa: S105 - a verdict, not a password
    FAIL = "failed"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A relative loss with its confidence interval; 0.07 is seven per cent worse than the original.

    Attributes:
        value: point estimate, 1 - mean(candidate) / mean(baseline).
        low: lower bound.
        high: upper bound.
        n: scenarios.
        confidence: of the interval, two-sided.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float


def degradation(baseline: Sequence[float], candidate: Sequence[float], *, looks: int = 1, seed: int = 0) -> Interval:
    """Estimate the relative loss of the mean score by a paired bootstrap.

    Percentile interval over 10,000 seeded resamples of the scenarios (Efron and Tibshirani 1993,
    chapter 13). With several looks at growing data the error rate is divided among them
    (Bonferroni), so that it holds over all looks together.

    Limits: it sees only what the scenarios show. A model that collapses on one reply in ten and is
    unchanged on the others can show nothing on 25 scenarios, and then the interval is too narrow;
    more scenarios are the remedy.

    Args:
        baseline: scores of the original, one per scenario, 0 to 1.
        candidate: scores of the candidate on the same scenarios.
        looks: how many times the data may be looked at.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ, there are no scenarios, or the original scores nothing.
    """
    base, cand = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if base.shape != cand.shape or not base.size:
        raise ValueError(f"{base.size} baseline scores and {cand.size} of the candidate cannot be paired")
    if base.mean() <= 0:
        raise ValueError("the original scores 0 on every scenario, so nothing can be lost")
    picks = np.random.default_rng(seed).integers(0, base.size, (RESAMPLES, base.size))
    base_means = base[picks].mean(axis=1)
    losses = 1 - cand[picks].mean(axis=1) / np.where(base_means > 0, base_means, math.nan)
    tail = ERROR_RATE / looks / 2
    low, high = np.nanquantile(losses, [tail, 1 - tail])
    return Interval(float(1 - cand.mean() / base.mean()), float(low), float(high), int(base.size), 1 - 2 * tail)


def decide(loss: Interval, allowed: float) -> Verdict:
    """Pass when the whole interval is within what is allowed, fail when it is all beyond, else inconclusive."""
    if loss.high <= allowed:
        return Verdict.PASS
    return Verdict.FAIL if loss.low > allowed else Verdict.INCONCLUSIVE


def look_sizes(first: int, available: int, cap: int) -> tuple[int, ...]:
    """Return how many scenarios each look uses: first, then doubling, the last at the cap.

    Args:
        first: scenarios at the first look, at least one.
        available: scenarios there are.
        cap: most to use; 0 means all.
    """
    most = min(available, cap) if cap else available
    sizes = [min(max(1, first), most)]
    while sizes[-1] < most:
        sizes.append(most if sizes[-1] * 2 > most * 0.75 else sizes[-1] * 2)
    return tuple(sizes)
