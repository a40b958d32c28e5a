"""How far a run is: never back, never beyond the end, and no estimate before there is something to estimate from."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.course import Course, Place
from loops.events import Event, LevelDone, LevelPlanned, LevelStarted, Note, Progress

STAGES = ("hash", "baseline", "quantize", "divergence", "forced choice", "replies", "fluency", "promoting", "anything")


def planned(*levels: str) -> list[Event]:
    return [LevelPlanned(level, ordinal, 100, 4.5, 0, {}) for ordinal, level in enumerate(levels)]


def followed(events: Iterable[Event], worked_s: float = 100.0) -> Place:
    course = Course()
    for event in events:
        course.take(event, worked_s)
    return course.place


def test_at_first_it_starts_and_promises_nothing() -> None:
    assert Course().place == Place("", "starting", 0.0, 0, 0, None)


def test_the_original_counts_as_one_level_of_all() -> None:
    done = followed([*planned("A", "B", "C"), Progress("baseline", "", 50, 100)])
    assert done == Place("", "baseline", 0.3 / 4, 0, 3, pytest.approx(100 * (1 - 0.075) / 0.075))


@pytest.mark.parametrize(("stage", "share"), [
    ("quantize", 0.15), ("divergence", 0.6), ("forced choice", 0.7), ("replies", 0.95), ("fluency", 1.0), ("new", 1.0)])
def test_a_finished_stage_is_its_share_of_the_level(stage: str, share: float) -> None:
    place = followed([*planned("A"), Progress(stage, "A", 7, 7)])
    assert (place.level, place.stage) == ("A", stage)
    assert place.share == pytest.approx((1 + share) / 2)


def test_levels_that_ended_count_once_and_the_one_at_work_not_as_ended() -> None:
    events = [*planned("A", "B"), LevelDone("A", "passed", ""), LevelDone("A", "passed", ""),
              Progress("quantize", "B", 0, 10)]
    assert followed(events) == Place("B", "quantize", pytest.approx(2 / 3), 1, 2, pytest.approx(50))


def test_a_level_that_is_done_again_counts_as_at_work() -> None:
    place = followed([*planned("A", "B"), LevelDone("A", "crashed", ""), Progress("quantize", "A", 0, 10)])
    assert place.share == pytest.approx(1 / 3)


def test_a_level_that_is_planned_twice_counts_once() -> None:
    assert followed([*planned("A", "B"), *planned("A"), Progress("baseline", "", 0, 1)]).levels == 2


def test_no_estimate_before_three_percent() -> None:
    course = Course()
    course.take(Progress("hash", "", 1, 1), 50)
    assert course.place.left_s is None
    course.take(Progress("baseline", "", 10, 100), 60)
    assert course.place.share == pytest.approx(0.03)
    assert course.place.left_s is None
    course.take(Progress("baseline", "", 50, 100), 60)
    assert course.place.left_s == pytest.approx(60 * 0.85 / 0.15)


def test_time_left_is_of_the_time_it_worked() -> None:
    """Twice as long worked for the same share, twice as long still to go; what was stopped is in neither."""
    events = [*planned("A"), Progress("replies", "A", 1, 2)]
    once, twice = followed(events, 30).left_s, followed(events, 60).left_s
    assert once is not None
    assert twice == pytest.approx(2 * once)


def test_what_is_no_progress_moves_nothing() -> None:
    events = [*planned("A"), Progress("quantize", "A", 1, 2)]
    assert followed([*events, Note("hm"), LevelStarted("A")]) == followed(events)


@given(st.lists(st.one_of(
    st.builds(Progress, st.sampled_from(STAGES), st.sampled_from(("", "A", "B", "C")), st.floats(0, 150),
              st.sampled_from((0.0, 1.0, 100.0))),
    st.builds(LevelDone, st.sampled_from("ABC"), st.just("passed"), st.just("")),
    st.sampled_from(planned("A", "B", "C")))))
def test_it_never_goes_back_and_never_beyond_the_end(events: list[Event]) -> None:
    course, places = Course(), [Place()]
    for second, event in enumerate(events):
        course.take(event, float(second))
        places.append(course.place)
    assert all(before.share <= after.share for before, after in pairwise(places))
    assert all(0 <= place.share <= 1 and (place.left_s is None or place.left_s >= 0) for place in places)
