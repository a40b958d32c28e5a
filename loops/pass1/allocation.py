"""Which option each matrix gets, so that a sum of costs is lowest and a sum of bytes stays within a budget.

This is the multiple-choice knapsack problem. It is solved in three steps (Kellerer, Pferschy, Pisinger: Knapsack
Problems, 2004, chapter 11): Lagrangian relaxation, by bisection on the price of a byte, which gives a lower bound;
greedy filling, which gives a first allocation; and a search over all others that the bound does not exclude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 200_000  #: kept per group; beyond it the least promising go, and the bound says what that may cost
_BISECTIONS = 200

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """One option per group.

    Attributes:
        chosen: number of the option of each group.
        n_bytes: of all of them.
        cost: of all of them.
        bound: no allocation within the budget costs less; equal to the cost where it is proven to be lowest.
    """

    chosen: tuple[int, ...]
    n_bytes: int
    cost: float
    bound: float


@dataclass(frozen=True)
class _Group:
    """The options of a group that no other dominates, fewest bytes first; `numbers` are their places in the input."""

    n_bytes: Whole
    costs: Numbers
    numbers: Whole


def _efficient(n_bytes: Sequence[int], costs: Sequence[float]) -> _Group:
    order = sorted(range(len(n_bytes)), key=lambda place: (n_bytes[place], costs[place], place))
    kept: list[int] = []
    for place in order:
        if not kept or costs[place] < costs[kept[-1]]:
            kept.append(place)
    return _Group(np.array([n_bytes[place] for place in kept], dtype=np.int64),
                  np.array([costs[place] for place in kept], dtype=np.float64), np.array(kept, dtype=np.int64))


def _at_price(groups: Sequence[_Group], price: float) -> list[int]:
    return [int(np.argmin(group.costs + price * group.n_bytes)) for group in groups]


def _total(groups: Sequence[_Group], chosen: Sequence[int]) -> tuple[int, float]:
    return (sum(int(group.n_bytes[place]) for group, place in zip(groups, chosen, strict=True)),
            float(sum(float(group.costs[place]) for group, place in zip(groups, chosen, strict=True))))


def _price(groups: Sequence[_Group], budget: int) -> tuple[float, float]:
    """Return the lowest price found at which the budget holds, and the bound there."""
    low, high = 0.0, 1.0
    while _total(groups, _at_price(groups, high))[0] > budget:
        high *= 4
    best, bound = high, -np.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        n_bytes, cost = _total(groups, _at_price(groups, middle))
        value = cost + middle * (n_bytes - budget)
        if value > bound:
            best, bound = middle, value
        low, high = (middle, high) if n_bytes > budget else (low, middle)
    return best, float(bound)


def _filled(groups: Sequence[_Group], chosen: list[int], budget: int) -> list[int]:
    """Return chosen with upgrades that still fit, the most gain per byte first."""
    used = _total(groups, chosen)[0]
    while True:
        steps = [((float(group.costs[place] - group.costs[better]))
                  / float(group.n_bytes[better] - group.n_bytes[place]), -index, better)
                 for index, (group, place) in enumerate(zip(groups, chosen, strict=True))
                 for better in range(place + 1, len(group.costs))
                 if used + group.n_bytes[better] - group.n_bytes[place] <= budget]
        if not steps:
            return chosen
        _, index, better = max(steps)
        used += int(groups[-index].n_bytes[better] - groups[-index].n_bytes[chosen[-index]])
        chosen[-index] = better


def allocate(groups: Sequence[tuple[Sequence[int], Sequence[float]]], budget: int) -> Allocation:
    """Choose one option per group so that the bytes stay within budget and the cost is lowest.

    Args:
        groups: bytes and costs of the options of each; costs are not negative.
        budget: in bytes.

    Raises:
        ValueError: even the smallest options do not fit.
    """
    made = [_efficient(*group) for group in groups]
    if sum(int(group.n_bytes[0]) for group in made) > budget:
        raise ValueError("even the smallest options do not fit the budget")
    largest = [len(group.costs) - 1 for group in made]
    n_bytes, cost = _total(made, largest)
    if n_bytes <= budget:
        return Allocation(_named(made, largest), n_bytes, cost, cost)
    price, bound = _price(made, budget)
    start = _at_price(made, price)
    if _total(made, start)[0] > budget:  # just below the price where the budget begins to hold
        start = _at_price(made, price * (1 + 1e-9) + 1e-300)
    if _total(made, start)[0] > budget:
        start = [0] * len(made)
    first = _filled(made, start, budget)
    chosen, bound = _search(made, first, budget, price, bound)
    n_bytes, cost = _total(made, chosen)
    return Allocation(_named(made, chosen), n_bytes, cost, min(bound, cost))


def _named(groups: Sequence[_Group], chosen: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(group.numbers[place]) for group, place in zip(groups, chosen, strict=True))


def _search(groups: Sequence[_Group], first: list[int], budget: int, price: float,
            bound: float) -> tuple[list[int], float]:
    """Return the best allocation, at least as good as `first`, and a bound on what any other costs.

    Groups are added one after the other to a list of partial allocations. One is dropped when another has
    no more bytes and no more cost, or when its cost with the cheapest options of the groups to come, bytes
    paid at `price`, reaches the best known: no completion can then be better.
    """
    best = _total(groups, first)[1]
    priced = [group.costs + price * group.n_bytes for group in groups]
    rest = np.append(np.cumsum([values.min() for values in priced][::-1])[::-1], 0.0)
    smallest = np.append(np.cumsum([int(group.n_bytes[0]) for group in groups][::-1])[::-1], 0)
    slack = 1e-12 * max(abs(best), 1e-300)
    n_bytes, costs = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[Whole, Whole]] = []  # of every partial allocation: the one it extends, and by which option
    lost = np.inf
    for index, group in enumerate(groups):
        count = len(group.costs)
        parents, options = np.repeat(np.arange(len(costs)), count), np.tile(np.arange(count), len(costs))
        n_bytes, costs = n_bytes[parents] + group.n_bytes[options], costs[parents] + group.costs[options]
        least = costs + price * (n_bytes - budget) + rest[index + 1]
        kept = np.flatnonzero((n_bytes + smallest[index + 1] <= budget) & (least < best - slack))
        order = kept[np.lexsort((costs[kept], n_bytes[kept]))]
        if len(order):
            lowest = np.minimum.accumulate(costs[order])
            order = order[np.append(True, costs[order][1:] < lowest[:-1])]
        if len(order) > MAX_STATES:
            by_promise = order[np.argsort(least[order], kind="stable")]
            lost = min(lost, float(least[by_promise[MAX_STATES]]))
            order = np.sort(by_promise[:MAX_STATES])
        if not len(order):
            return first, min(best, lost)
        n_bytes, costs = n_bytes[order], costs[order]
        steps.append((parents[order], options[order]))
    place = int(np.argmin(costs))
    found = min(float(costs[place]), lost)
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[place]))
        place = int(parents[place])
    return chosen[::-1], max(bound, found) if lost < np.inf else found
