"""Finished work is found again, and only when nothing that decides it has changed."""

from __future__ import annotations

from typing import Any

import pytest

from loops.events import Event, StepDone
from loops.pass1.steps import Steps


class Work:
    """Counts how often it is done."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.times = result, 0

    def __call__(self) -> dict[str, Any]:
        self.times += 1
        return self.result


def test_a_step_is_done_once_and_reported_once() -> None:
    told: list[Event] = []
    steps, work = Steps(told.append, {}, engine="b"), Work({"x": 1})
    assert steps.run("measure", "Q2_K", work, of="file") == {"x": 1}
    assert steps.run("measure", "Q2_K", work, of="file") == {"x": 1}
    assert work.times == 1
    assert told == [StepDone(steps.name("measure", of="file"), "measure", "Q2_K", {"x": 1})]
    assert steps.reused == 1


def test_a_step_done_earlier_is_not_done_again() -> None:
    told: list[Event] = []
    first = Steps(told.append, {}, engine="b")
    first.run("measure", "Q2_K", Work({"x": 1}), of="file")
    done = {event.fingerprint: event.result for event in told if isinstance(event, StepDone)}
    again, work = Steps(told.append, done, engine="b"), Work({"x": 2})  # type: ignore[arg-type]
    assert again.run("measure", "Q2_K", work, of="file") == {"x": 1}
    assert work.times == 0
    assert len(told) == 1


def test_any_other_part_kind_or_engine_makes_another_step() -> None:
    steps = Steps(lambda _event: None, {}, engine="b")
    names = {steps.name("measure", of="file"), steps.name("measure", of="other"), steps.name("score", of="file"),
             steps.name("measure", of="file", seed=1), steps.name("measure", file="of"),
             Steps(lambda _event: None, {}, engine="c").name("measure", of="file")}
    assert len(names) == 6


def test_a_result_that_no_longer_holds_is_made_again() -> None:
    told: list[Event] = []
    steps = Steps(told.append, {}, engine="b")
    steps.run("quantize", "Q2_K", Work({"file": "gone"}), to="Q2_K")
    work = Work({"file": "there"})
    assert steps.run("quantize", "Q2_K", work, lambda result: result["file"] == "there", to="Q2_K") == {"file": "there"}
    assert work.times == 1
    assert len(told) == 2
    assert steps.reused == 0


def test_what_fails_is_not_remembered() -> None:
    told: list[Event] = []
    steps = Steps(told.append, {}, engine="b")

    def fail() -> dict[str, Any]:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        steps.run("measure", "", fail)
    assert told == []
    assert steps.run("measure", "", Work({"x": 1})) == {"x": 1}


def test_the_memory_that_was_handed_in_is_not_changed() -> None:
    done: dict[str, dict[str, Any]] = {}
    Steps(lambda _event: None, done, engine="b").run("measure", "", Work({"x": 1}))
    assert done == {}
