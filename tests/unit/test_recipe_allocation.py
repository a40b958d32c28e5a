"""The allocation of bytes is the best there is, and costs that nobody measured are foretold from those that were."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

import loops.pass1.allocation as module
from loops.engine.imatrix_file import Entry, Imatrix
from loops.engine.weights import Choice
from loops.pass1.allocation import Allocation, allocate
from loops.pass1.recipe import Recipe
from loops.pass1.sensitivity import Costs, as_text, doubtful, from_text, kind_of, units_of

Groups = list[tuple[list[int], list[float]]]

Q3, Q4, Q4_PLAIN, Q8 = Choice("Q3_K", True), Choice("Q4_K", True), Choice("Q4_K", False), Choice("Q8_0", True)


def some_groups(draw: random.Random, most: int, options: int) -> Groups:
    """Sizes with many ties, costs that span magnitudes or are round and tie as well."""
    found = []
    for _ in range(draw.randint(1, most)):
        count = draw.randint(1, options)
        found.append(([draw.randint(1, 40) * 32 for _ in range(count)],
                      [draw.choice([draw.random() ** 6, draw.randint(0, 3) / 4]) for _ in range(count)]))
    return found


def lowest_cost(groups: Groups, budget: int) -> float:
    return min(sum(costs[place] for (_, costs), place in zip(groups, places, strict=True))
               for places in itertools.product(*(range(len(costs)) for _, costs in groups))
               if sum(sizes[place] for (sizes, _), place in zip(groups, places, strict=True)) <= budget)


def assert_consistent(found: Allocation, groups: Groups, budget: int) -> None:
    picked = [(sizes[place], costs[place]) for (sizes, costs), place in zip(groups, found.chosen, strict=True)]
    assert found.n_bytes == sum(size for size, _ in picked) <= budget
    assert found.cost == pytest.approx(sum(cost for _, cost in picked), abs=1e-12)
    assert found.bound <= found.cost


@pytest.mark.parametrize("seed", range(150))
def test_no_allocation_costs_less(seed: int) -> None:
    draw = random.Random(seed)
    groups = some_groups(draw, 6, 5)
    budget = draw.randint(sum(min(sizes) for sizes, _ in groups), sum(max(sizes) for sizes, _ in groups))
    found = allocate(groups, budget)
    assert_consistent(found, groups, budget)
    assert found.cost == pytest.approx(lowest_cost(groups, budget), abs=1e-12)
    assert found.bound == pytest.approx(found.cost, abs=1e-9)


def large(seed: int) -> Groups:
    """Like a model of 226 matrices: the error falls fourfold per bit, by factors that differ from one to the next."""
    draw, found = random.Random(seed), []
    for _ in range(226):
        weights, scale = draw.choice([32768, 65536, 196608]), 10 ** draw.uniform(-5, -2)
        bits = [2.0625, 2.3125, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16]
        found.append(([int(weights * bit / 8) for bit in bits],
                      [scale * 4 ** -bit * draw.uniform(0.7, 1.4) for bit in bits]))
    return found


@pytest.mark.parametrize("share", [0.17, 0.28, 0.5])
def test_it_is_proven_best_for_a_large_model_too(share: float) -> None:
    groups = large(1)
    budget = int(share * sum(sizes[-1] for sizes, _ in groups))
    found = allocate(groups, budget)
    assert_consistent(found, groups, budget)
    assert found.bound >= found.cost * (1 - 1e-9)
    assert allocate(groups, budget) == found


def test_where_the_search_is_cut_short_the_bound_says_what_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = large(2)
    budget = int(0.25 * sum(sizes[-1] for sizes, _ in groups))
    whole = allocate(groups, budget)
    monkeypatch.setattr(module, "MAX_STATES", 2)
    cut = allocate(groups, budget)
    assert_consistent(cut, groups, budget)
    assert cut.bound <= whole.cost <= cut.cost
    assert cut.bound < cut.cost < cut.bound * 1.02


def test_a_budget_for_everything_is_not_spent_on_what_brings_nothing() -> None:
    assert allocate([([1, 2, 3], [5.0, 1.0, 1.0]), ([4, 1], [0.0, 0.0])], 100) == Allocation((1, 1), 3, 1.0, 1.0)


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest"):
        allocate([([10, 20], [1.0, 0.0])], 9)


NAMES = [f"blk.{layer}.{kind}.weight" for layer in range(32) for kind in ("attn_q", "ffn_up")] + ["output.weight"]


@pytest.mark.parametrize("limit", [1, 3, 9, 20, 40, 64, 65])
def test_every_matrix_is_in_one_unit_and_units_stay_within_their_number(limit: int) -> None:
    units = units_of(NAMES, limit)
    assert sorted(itertools.chain(*units)) == sorted(NAMES)
    assert len(units) <= max(limit, 3)  # one per kind at the least
    assert all(len({kind_of(name) for name in unit}) == 1 for unit in units)


def test_first_and_last_layer_are_measured_alone_and_bands_are_neighbours() -> None:
    units = units_of(NAMES, 9)
    assert ("blk.0.attn_q.weight",) in units
    assert ("blk.31.ffn_up.weight",) in units
    inner = [unit for unit in units if "ffn_up" in unit[0] and len(unit) > 1]
    assert [name for unit in inner for name in unit] == [f"blk.{layer}.ffn_up.weight" for layer in range(1, 31)]


def costs_of_two() -> Costs:
    errors: dict[str, dict[Choice, float]] = {
        "a": {Q3: 1e-2, Q4: 1e-3, Q4_PLAIN: 2e-3, Q8: 1e-5, Choice("F16", False): 0.0},
        "b": {Q3: 2e-2, Q4: 2e-3, Q8: 2e-5}}
    return Costs(errors, single={"a": {Q3: 5e-2}})


def test_unmeasured_costs_follow_the_error_from_what_was_measured() -> None:
    costs = costs_of_two()
    assert costs.of("a") == pytest.approx({Q3: 5e-2, Q4: 5e-3, Q4_PLAIN: 1e-2, Q8: 5e-5, Choice("F16", False): 0.0})
    costs.single["a"][Q8] = 2e-4  # four times what was foretold
    found = costs.of("a")
    assert found[Q8] == 2e-4
    assert found[Q4] == pytest.approx(5e-3 * 4 ** (1 / 3))  # a third of the way, in logarithms
    assert costs.is_known("a", Q8)
    assert not costs.is_known("a", Q4)


def test_what_was_measured_without_importance_speaks_for_what_goes_without() -> None:
    costs = costs_of_two()
    costs.single["a"][Q4_PLAIN] = 4e-3  # twice its error; with importance it is five times
    assert costs.of("a")[Q4] == pytest.approx(5e-3)
    costs = Costs({"a": {**costs.errors["a"], Choice("Q3_K", False): 4e-2}}, single=costs.single)
    assert costs.of("a")[Choice("Q3_K", False)] == pytest.approx(8e-2)


def test_a_matrix_that_nothing_is_known_of_costs_as_the_others_do() -> None:
    assert costs_of_two().of("b")[Q4] == pytest.approx(2e-3 * 5)


def test_a_unit_measured_together_is_shared_out_by_error() -> None:
    costs = costs_of_two()
    costs.single.clear()
    costs.units.append(({"a": Q3, "b": Q3}, 0.3))
    assert costs.of("a")[Q3] == pytest.approx(0.1)
    assert costs.of("b")[Q3] == pytest.approx(0.2)
    assert costs.of("b")[Q4] == pytest.approx(0.02)


def test_what_carries_the_cost_is_looked_at_first_and_nothing_twice() -> None:
    costs = costs_of_two()
    sizes = {"a": {Q3: 34, Q4: 45, Q4_PLAIN: 45, Q8: 85, Choice("F16", False): 160}, "b": {Q3: 34, Q4: 45, Q8: 85}}
    state = {"a": Q4, "b": Q8}
    assert doubtful(costs, state, sizes, 1) == [("a", Q4)]
    wanted = doubtful(costs, state, sizes, 99)
    assert ("a", Q4_PLAIN) in wanted
    assert ("a", Q3) not in wanted  # known
    for name, choice in wanted:
        costs.single.setdefault(name, {})[choice] = costs.of(name)[choice]
    assert doubtful(costs, state, sizes, 99) == []


def test_a_choice_survives_being_written_down() -> None:
    assert [from_text(as_text(choice)) for choice in (Q4, Q4_PLAIN)] == [Q4, Q4_PLAIN]


RECIPE = Recipe({"blk.0.ffn_up.weight": "Q4_K", "blk.1.ffn_up.weight": "Q6_K", "output.weight": "Q4_K"},
                ("blk.1.ffn_up.weight",), "Q4_K_M", 1234, 0.5)


def test_a_recipe_leaves_out_the_importance_that_harms() -> None:
    entry = Entry(np.ones(4, dtype=np.float32), np.ones(1, dtype=np.int64))
    whole = Imatrix(dict.fromkeys(RECIPE.types, entry), (), 1, 512)
    left = RECIPE.importance(whole)
    assert left is not None
    assert sorted(left.entries) == ["blk.0.ffn_up.weight", "output.weight"]
    assert RECIPE.importance(Imatrix({"blk.1.ffn_up.weight": entry}, (), 1, 512)) is None
    assert RECIPE.importance(None) is None
