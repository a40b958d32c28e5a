"""The gate: is a candidate no worse than the original by more than the user allows?

A non-inferiority test on paired scores. Each scenario is answered by both models, so what is
resampled is the scenario; the quantity is the relative loss of the mean score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from loops.pass1.spending import expanded, nominal_tails

RESAMPLES = 10_000
ERROR_RATE = 0.025  #: of each of the two errors, passing what lost too much and failing what did not
LEAST_TAIL = 1e-15  #: below it the normal quantile is no number
COLLAPSE = 1.5  #: a loss of so many times the limit must not go unseen, however rarely it shows


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


@dataclass(frozen=True)
class Look:
    """One look at growing data.

    Attributes:
        size: scenarios used.
        fail_tail: one-sided probability that the lower bound may err.
        pass_tail: the same of the upper bound.
        may_pass: False where so few scenarios could have missed a collapse and more are at hand.
    """

    size: int
    fail_tail: float = ERROR_RATE
    pass_tail: float = ERROR_RATE
    may_pass: bool = True


def degradation(baseline: Sequence[float], candidate: Sequence[float], look: Look | None = None, *,
                seed: int = 0) -> Interval:
    """Estimate the relative loss of the mean score by a paired bootstrap.

    Percentile interval over 10,000 seeded resamples of the scenarios (Efron and Tibshirani 1993,
    chapter 13), its percentiles widened for small samples (`spending.expanded`); never narrower than the one of
    Student's t on the linearised ratio (Cochran 1977, chapter 6), because resamples of few scenarios cannot tell a tail
    of one in a million.

    Limits: it sees only what the scenarios show. A model that collapses on one reply in ten and is
    unchanged on the others can show nothing on 25 scenarios, and then the interval is too narrow;
    `least_scenarios` is the remedy.

    Args:
        baseline: scores of the original, one per scenario, 0 to 1.
        candidate: scores of the candidate on the same scenarios.
        look: the tails to use; None for a single look at all.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ, there are no scenarios, or the original scores nothing.
    """
    import numpy as np  # here, so that reading gates does without

    base, cand = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if base.shape != cand.shape or not base.size:
        raise ValueError(f"{base.size} baseline scores and {cand.size} of the candidate cannot be paired")
    if base.mean() <= 0:
        raise ValueError("the original scores 0 on every scenario, so nothing can be lost")
    look = look or Look(base.size)
    picks = np.random.default_rng(seed).integers(0, base.size, (RESAMPLES, base.size))
    base_means = base[picks].mean(axis=1)
    losses = 1 - cand[picks].mean(axis=1) / np.where(base_means > 0, base_means, math.nan)
    tails = [max(expanded(tail, base.size), LEAST_TAIL) for tail in (look.fail_tail, look.pass_tail)]
    low, high = np.nanquantile(losses, [tails[0], 1 - tails[1]])
    value = float(1 - cand.mean() / base.mean())
    error = float((cand - (1 - value) * base).std() / base.mean() / math.sqrt(base.size))
    down, up = (-NormalDist().inv_cdf(tail) * error for tail in tails)
    return Interval(value, min(float(low), value - down), max(float(high), value + up), int(base.size),
                    1 - look.fail_tail - look.pass_tail)


def normal_interval(value: float, error: float, count: int, fail_tail: float = ERROR_RATE) -> Interval:
    """Return the interval of a statistic with a known standard error, by the normal distribution."""
    down, up = (-NormalDist().inv_cdf(tail) * error for tail in (fail_tail, ERROR_RATE))
    return Interval(value, value - down, value + up, count, 1 - fail_tail - ERROR_RATE)


def decide(loss: Interval, allowed: float, *, may_pass: bool = True) -> Verdict:
    """Pass when the whole interval is within what is allowed, fail when it is all beyond, else inconclusive."""
    if loss.high <= allowed:
        return Verdict.PASS if may_pass else Verdict.INCONCLUSIVE
    return Verdict.FAIL if loss.low > allowed else Verdict.INCONCLUSIVE


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of several gates together: one that fails decides, all must pass.

    That all must pass needs no correction for their number: the union of the errors is bounded by
    the worst single gate (intersection-union test, Berger, Technometrics 24, 1982). That one failure
    decides does; `plan_looks` divides that error among the gates.
    """
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if all(verdict is Verdict.PASS for verdict in verdicts) else Verdict.INCONCLUSIVE


def least_scenarios(allowed: float) -> int:
    """Return the fewest scenarios that would hardly miss a collapse of 1.5 times what is allowed.

    The loss that shows least often is one reply in so many gone altogether. Of n scenarios none
    shows it with probability (1 - 1.5 allowed)^n, which must be at most the error rate: the rule of three
    (Hanley and Lippman-Hand, JAMA 249, 1983). 34 for 7 per cent.
    """
    rate = min(1.0, COLLAPSE * allowed)
    if rate >= 1:
        return 1
    return math.ceil(math.log(ERROR_RATE) / math.log1p(-rate)) if rate > 0 else 1 << 31


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


def plan_looks(sizes: Sequence[int], allowed: float, *, gates: int = 1) -> tuple[Look, ...]:
    """Return the looks at these sizes, the error rates divided among them by alpha spending.

    Args:
        sizes: of `look_sizes`.
        allowed: the strictest limit, which says how few scenarios are too few to pass.
        gates: how many gates could fail the candidate; the error of failing is divided among them.
    """
    least = min(least_scenarios(allowed), sizes[-1])
    fails = nominal_tails(sizes, ERROR_RATE / gates)
    passing = [size for size in sizes if size >= least]
    passes = [ERROR_RATE] * (len(sizes) - len(passing)) + list(nominal_tails(passing, ERROR_RATE))
    return tuple(Look(size, fail, tail, size >= least) for size, fail, tail in zip(sizes, fails, passes, strict=True))
