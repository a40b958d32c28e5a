"""Named ladders: what stands in them, and what keeps a level out of `knees`."""

from __future__ import annotations

import random

import pytest

from loops.engine import ladders
from loops.engine.ladders import EXPECTED, FULL, IQ, KNEES, LADDERS, ORIGINAL_LADDER, TRAINED_FOR, expand, knees, use_of
from loops.engine.levels import UNQUANTIZED, UnknownLevel, level_named, levels, parse_ladder

TABLES = (
    {name: (size, ladders._LLAMA_3_8B_MATRIX.get(name, kld)) for name, (size, kld) in ladders._LLAMA_3_8B.items()},
    ladders._STARTER)


def dominated(name: str, points: dict[str, tuple[float, float]]) -> bool:
    size, off = points[name]
    return any(other[0] <= size and other[1] <= off and other != (size, off) for other in points.values())


def test_knees_are_the_points_that_no_other_dominates_from_large_to_small() -> None:
    assert knees({"a": (8, 1), "b": (6, 3), "c": (5, 2), "d": (4, 9), "e": (4, 5)}) == ("a", "c", "e")
    assert knees({}) == ()


@pytest.mark.parametrize("seed", range(20))
def test_knees_agree_with_comparing_every_pair(seed: int) -> None:
    rng = random.Random(seed)
    points = {str(number): (float(rng.randrange(12)), float(rng.randrange(12))) for number in range(15)}
    found = knees(points)
    assert {points[name] for name in found} == {
        points[name] for name in points if not dominated(name, points)}
    assert [points[name][0] for name in found] == sorted({points[name][0] for name in found}, reverse=True)


def test_of_two_levels_that_are_the_same_file_one_stays() -> None:
    assert knees({"Q8_0": (8, 1), "MXFP4_MOE": (8, 1)}) == ("Q8_0",)


def test_with_slack_a_larger_level_has_to_be_worth_its_size() -> None:
    points = {"large": (9.0, 0.95), "small": (8.0, 1.0)}
    assert knees(points) == ("large", "small")
    assert knees(points, slack=0.1) == ("small",)


def test_the_full_ladder_has_every_quantized_level_of_the_library() -> None:
    assert set(FULL) == set(levels()) - UNQUANTIZED - {"NVFP4"}
    assert len(FULL) == len(set(FULL))


def test_the_iq_ladder_has_every_iq_type() -> None:
    assert set(IQ) == {name for name in levels() if name.startswith("IQ")}


def test_every_level_outside_the_knees_is_dominated_in_every_table_that_knows_it() -> None:
    for name in set(FULL) - set(KNEES) - set(TRAINED_FOR):
        for table in TABLES:
            if name in table:
                size, off = table[name]
                better = [other for other, point in table.items() if other != name
                          and point[0] <= size and point[1] <= off / (1 - ladders.SLACK)]
                assert better, name


def test_the_knees_reproduce_the_known_orderings() -> None:
    """Of llama.cpp's own tables: IQ2_M beats Q2_K, IQ3_S beats Q3_K_S, IQ4_XS beats Q4_0."""
    assert {"Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "IQ3_S", "IQ2_M"} <= set(KNEES)
    assert not {"Q2_K", "Q2_K_S", "Q3_K_S", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *TRAINED_FOR} & set(KNEES)


def test_what_is_expected_grows_as_the_bits_of_a_family_fall() -> None:
    for family in (("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L", "Q2_K"),
                   ("IQ4_XS", "IQ3_S", "IQ2_M", "IQ2_XXS", "IQ1_S")):
        shares = [EXPECTED[name] for name in family]
        assert shares == sorted(shares)
    assert EXPECTED["Q4_K_M"] == pytest.approx(0.031273 / 1.8296, rel=1e-3)


def test_every_level_has_a_use() -> None:
    assert [name for name in levels() if name != "NVFP4" and not use_of(name)] == []


@pytest.mark.parametrize(("given", "meant"), [
    ("original", ORIGINAL_LADDER), ("KNEES", KNEES), (" iq ", IQ), ("full", FULL),
    ("iq, q4_k", (*IQ, "Q4_K_M")), ("Q6_K,original", ("Q6_K", "Q8_0", "Q5_K_M", "Q4_K_M", "Q3_K_L", "Q2_K"))])
def test_ladders_stand_for_their_levels_wherever_levels_are_listed(given: str, meant: tuple[str, ...]) -> None:
    assert tuple(level.name for level in parse_ladder(given)) == meant


def test_expanding_leaves_what_is_no_ladder() -> None:
    assert expand(["Q9_9", "Original"]) == ("Q9_9", *ORIGINAL_LADDER)


@pytest.mark.parametrize(("typed", "near"), [("knee", "knees"), ("ful", "full"), ("orignal", "original")])
def test_a_misspelt_ladder_is_refused_with_its_name(typed: str, near: str) -> None:
    with pytest.raises(UnknownLevel, match=rf"{typed}.*mean.*{near}.*\?"):
        level_named(typed)


def test_no_ladder_has_the_name_of_a_level() -> None:
    assert not {name.upper() for name in LADDERS} & set(levels())
