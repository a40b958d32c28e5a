"""Alpha spending: how much of the error rate each look at growing data may use.

Looking again and again at the same growing data and stopping at the first clear verdict errs more
often than one look. Lan and DeMets (Biometrika 70, 1983) let a function say how much of the error rate
is spent by the time a share t of the data is in; the boundary of each look follows from the joint
distribution of the statistics of all looks so far, whose increments are independent (Armitage,
McPherson and Rowe 1969). The function here is alpha * t^1.5 of the power family (Kim and DeMets,
Biometrika 74, 1987): sparing early, so that the last look keeps most of its power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POWER = 1.5  #: exponent of the spending function
GRID = 1201  #: points of the numerical integral; 10 times more move a tail by less than 1e-6
REACH = 8.0  #: standard deviations that the integral covers below

_NORMAL = NormalDist()


def spent(share: float, rate: float) -> float:
    """Return how much of the error rate may be spent once a share of the data, 0 to 1, is in."""
    part: float = min(1.0, max(0.0, share)) ** POWER
    return rate * part


def _exceeding(points: NDArray[np.float64], bound: float, spread: float) -> NDArray[np.float64]:
    """Return for each starting point the probability that a normal step of this spread ends above bound."""
    import numpy as np

    return np.array([0.5 * math.erfc((bound - point) / spread / math.sqrt(2)) for point in points])


def nominal_tails(sizes: Sequence[int], rate: float) -> tuple[float, ...]:
    """Return the one-sided tail probability that each look may use on its own.

    Used at every look, a test that holds at its nominal tail errs at most at `rate` over all looks.

    Args:
        sizes: observations at each look, growing; the last is the most there can be.
        rate: one-sided error rate over all looks together.

    Raises:
        ValueError: the sizes do not grow, or the rate is no probability.
    """
    if not sizes or sizes[0] < 1 or any(later <= earlier for earlier, later in pairwise(sizes)):
        raise ValueError(f"looks must grow from at least one observation, not {tuple(sizes)}")
    if not 0 < rate < 1:
        raise ValueError(f"{rate} is no error rate")
    return _tails(tuple(sizes), rate)


@functools.lru_cache(maxsize=64)
def _tails(sizes: tuple[int, ...], rate: float) -> tuple[float, ...]:
    """Find each boundary of B(t), a Brownian motion, so that crossing it first at look k has its share."""
    import numpy as np

    tails, before = [], 0.0
    points: NDArray[np.float64] = np.zeros(1)
    mass: NDArray[np.float64] = np.ones(1)  # of B at the last look, where no boundary was crossed
    for size in sizes:
        share = size / sizes[-1]
        spread = math.sqrt(share - before)
        wanted = spent(share, rate) - spent(before, rate)
        low, high = -REACH * math.sqrt(share), REACH * math.sqrt(share)
        for _ in range(50):
            middle = (low + high) / 2
            crossing = float(mass @ _exceeding(points, middle, spread))
            low, high = (middle, high) if crossing > wanted else (low, middle)
        tails.append(1 - _NORMAL.cdf(high / math.sqrt(share)))
        following = np.linspace(-REACH * math.sqrt(share), high, GRID)
        density = np.exp(-0.5 * ((following[:, None] - points) / spread) ** 2) @ mass / (spread * math.sqrt(math.tau))
        step = following[1] - following[0]
        weights = np.full(GRID, step)
        weights[[0, -1]] = step / 2
        points, mass, before = following, density * weights, share
    return tuple(tails)


def expanded(tail: float, count: int) -> float:
    """Return the tail at which a percentile bootstrap of so few observations holds `tail`.

    The bootstrap takes the spread of a sample for that of the population, which is too small by
    sqrt((n - 1) / n), and quantiles of the normal for those of Student's t; Hesterberg (The American
    Statistician 69, 2015) widens the percentiles for both. Quantiles of t by the expansion of
    Abramowitz and Stegun 26.7.5, good to 1e-3 from 10 observations on.

    Args:
        tail: one-sided probability, above 0, below 1/2.
        count: observations; below 10 the expansion for 10 is used.
    """
    z = -_NORMAL.inv_cdf(tail)
    freedom = max(count, 10) - 1
    student = (z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
               + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3))
    return _NORMAL.cdf(-math.sqrt((freedom + 1) / freedom) * student)
