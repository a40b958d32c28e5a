"""Levels are the library's own, found under the names that people type."""

from __future__ import annotations

import pytest

from loops.engine.levels import ORIGINAL_LADDER, Level, UnknownLevel, level_named, levels, parse_ladder
from loops.engine.native import library


def test_every_level_of_the_library_is_known_under_its_own_number() -> None:
    lib = library()
    numbers = {int(getattr(lib, name)) for name in dir(lib)
               if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"}
    assert {level.ftype for level in levels().values()} == numbers
    assert levels()["Q4_K_M"].ftype == lib.LLAMA_FTYPE_MOSTLY_Q4_K_M


def test_no_two_names_mean_the_same_level() -> None:
    assert len({level.ftype for level in levels().values()}) == len(levels())


def test_the_original_ladder_exists_in_this_library() -> None:
    assert set(ORIGINAL_LADDER) <= set(levels())


@pytest.mark.parametrize(("typed", "meant"), [
    ("Q4_K_M", "Q4_K_M"), ("q4_k_m", "Q4_K_M"), ("q4-k-m", "Q4_K_M"), (" Q8_0 ", "Q8_0"), ("Q4_K", "Q4_K_M"),
    ("q5_k", "Q5_K_M"), ("Q3_K", "Q3_K_M"), ("Q2_K", "Q2_K"), ("f16", "F16"), ("bf16", "BF16"),
    ("iq4-xs", "IQ4_XS")])
def test_a_level_is_found_as_people_type_it(typed: str, meant: str) -> None:
    assert level_named(typed) == levels()[meant]


@pytest.mark.parametrize(("typed", "near"), [("Q4_K_X", "Q4_K"), ("Q5K_M", "Q5_K_M"), ("IQ4XS", "IQ4_XS")])
def test_an_unknown_level_is_refused_with_the_nearest_names(typed: str, near: str) -> None:
    with pytest.raises(UnknownLevel, match=f"{typed!r}.*{near}"):
        level_named(typed)


@pytest.mark.parametrize("typed", ["", "😀", "Q4_K_M\n\nQ2_K", "__class__"])
def test_a_senseless_level_is_refused_with_the_usual_names(typed: str) -> None:
    with pytest.raises(UnknownLevel):
        level_named(typed)


def test_without_a_list_the_ladder_is_the_original_six_in_order() -> None:
    assert tuple(level.name for level in parse_ladder(None)) == ORIGINAL_LADDER


def test_a_list_keeps_its_order_and_drops_repeats() -> None:
    assert parse_ladder("q4_k,Q8_0,,Q4_K_M, q8-0,") == (level_named("Q4_K_M"), level_named("Q8_0"))


@pytest.mark.parametrize("text", ["", ",", " , ,"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(UnknownLevel, match="empty"):
        parse_ladder(text)


def test_one_unknown_name_refuses_the_whole_list() -> None:
    with pytest.raises(UnknownLevel, match="Q9_9"):
        parse_ladder("Q8_0,Q9_9")


def test_levels_can_be_kept_in_sets() -> None:
    assert {Level("A", 1), Level("A", 1)} == {Level("A", 1)}
