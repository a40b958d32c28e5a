"""Where recipes are tried: between the smallest level that passed and the largest below it that did not."""

from __future__ import annotations

import pytest

from loops.pass1.ladder import Rung, gap_to_refine, next_level, next_size


@pytest.mark.parametrize(("states", "gap"), [
    ([("a", "passed", 50), ("b", "failed", 40), ("c", "skipped", 30)], (40, 50)),
    ([("a", "passed", 50), ("b", "inconclusive", 45), ("c", "rejected", 30)], (45, 50)),
    ([("a", "passed", 50), ("b", "passed", 40), ("c", "failed", 30), ("d", "failed", 60)], (30, 40)),
    ([("a", "passed", 50), ("b", "passed", 40)], None),
    ([("a", "passed", 50), ("b", "error", 40), ("c", "crashed", 30), ("d", "skipped", 20)], None),
    ([("a", "failed", 50), ("b", "failed", 40)], None),
    ([], None)])
def test_the_gap(states: list[tuple[str, str, int]], gap: tuple[int, int] | None) -> None:
    assert gap_to_refine([Rung(name, state, n_bytes) for name, state, n_bytes in states]) == gap


def test_refining_walks_first() -> None:
    order = ["a", "b", "c"]
    for ended in ({}, {"a": "passed"}, {"a": "passed", "b": "failed"}, {"a": "failed", "b": "passed", "c": "passed"}):
        assert next_level("refine", order, ended) == next_level("walk", order, ended)


@pytest.mark.parametrize(("passing", "tried"), [
    (40, [40]),                 # as small as the level that failed: nothing smaller is asked for
    (48, [40, 60, 50]),
    (60, [40, 60, 50]),
    (61, [40, 60, 70]),
    (99, [40, 60, 70])])
def test_recipes_are_tried_at_the_failed_size_first_and_then_the_gap_is_halved(passing: int, tried: list[int]) -> None:
    done: list[tuple[int, bool]] = []
    while (size := next_size((40, 80), done)) is not None:
        done.append((size, size >= passing))
    assert [size for size, _ in done] == tried
