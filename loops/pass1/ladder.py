"""Which level to try next, and which of those that passed to take: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PASSED = "passed"
STRATEGIES = ("walk", "bisect", "refine")
REFINEMENTS = 3  #: recipes tried between the last level that passed and the first that did not
PREFERENCES = ("smallest", "score", "score-per-gb")


@dataclass(frozen=True)
class Rung:
    """A level that came to its end.

    Attributes:
        level: its name.
        state: how it ended, `passed` or another.
        n_bytes: its size.
        score: mean score over the scenarios, 0 to 1.
    """

    level: str
    state: str
    n_bytes: int
    score: float = 0.0


def next_level(strategy: str, order: Sequence[str], ended: Mapping[str, str]) -> str | None:
    """Return the level to try next, None when nothing that could still be tried would change the choice.

    Walking goes from the largest to the smallest and stops at the first level that fails after one
    passed. Bisecting takes loss to grow as size falls and halves the range between the smallest known
    to pass and the largest known not to.

    Args:
        strategy: `walk`, `bisect`, or `refine`, which walks first.
        order: levels within the size target, the largest first.
        ended: state of those that came to their end.
    """
    if strategy == "bisect":
        low, high = 0, len(order)  # everything before low is larger than some pass; high and after did not pass
        while low < high:
            middle = (low + high) // 2
            if order[middle] not in ended:
                return order[middle]
            if ended[order[middle]] == PASSED:
                low = middle + 1
            else:
                high = middle
        return None
    passed = False
    for level in order:
        state = ended.get(level)
        if state is None:
            return level
        if passed and state in {"failed", "rejected"}:
            return None
        passed = passed or state == PASSED
    return None


def gap_to_refine(rungs: Sequence[Rung]) -> tuple[int, int] | None:
    """Return the sizes between which a recipe may pass where no level does; None where there is no such gap.

    The upper is of the smallest that passed, the lower of the largest below it that was measured and did not.
    """
    passed = [rung.n_bytes for rung in rungs if rung.state == PASSED]
    if not passed:
        return None
    below = [rung.n_bytes for rung in rungs
             if rung.state in {"failed", "rejected", "inconclusive"} and rung.n_bytes < min(passed)]
    return (max(below), min(passed)) if below else None


def next_size(gap: tuple[int, int], tried: Sequence[tuple[int, bool]]) -> int | None:
    """Return the size of the next recipe to try within a gap; None where no more is to be found out.

    The lower end comes first: a recipe is better than a level of the same size. Then the gap is halved.

    Args:
        gap: sizes of a level that did not pass and of one that did.
        tried: sizes of recipes so far, and whether each passed.
    """
    low, high = gap
    if not tried:
        return low
    if len(tried) >= REFINEMENTS or tried[0][1]:
        return None
    for size, passed in tried:
        low, high = (low, size) if passed else (size, high)
    return (low + high) // 2


def choose(prefer: str, rungs: Sequence[Rung]) -> tuple[Rung | None, str]:
    """Return the level to promote and a sentence that says why; None when none passed.

    Args:
        prefer: `smallest`, `score` (the highest mean score) or `score-per-gb`.
        rungs: all levels that came to their end.
    """
    passed = [rung for rung in rungs if rung.state == PASSED]
    if not passed:
        return None, "No level passed, so nothing is promoted."
    if prefer == "score":
        best = max(passed, key=lambda rung: (rung.score, -rung.n_bytes))
        return best, f"{best.level} scores highest ({best.score:.3f}) of the {len(passed)} that passed."
    if prefer == "score-per-gb":
        best = max(passed, key=lambda rung: rung.score / rung.n_bytes)
        return best, (f"{best.level} has the most score per GB ({best.score / (best.n_bytes / 1e9):.3g}) "
                      f"of the {len(passed)} that passed.")
    best = min(passed, key=lambda rung: rung.n_bytes)
    return best, f"{best.level} is the smallest of the {len(passed)} that passed."
