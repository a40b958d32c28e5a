"""Events come out of the pipe as they went in, and nothing else passes for one."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops import events
from loops.events import (
    Calibrated,
    Event,
    Failed,
    Finished,
    LevelDone,
    LevelMeasured,
    LevelPlanned,
    LevelStarted,
    Note,
    Opened,
    Progress,
    StepDone,
    from_line,
    to_line,
)

EVERY: tuple[Event, ...] = (
    Progress("quantize", "Q4_K_M", 0.5, 1.0),
    Note("Ein Häuschen, 家, 😀, a \"quote\", a \\ and a\nline"),
    Opened("m", "0" * 64, 10, 16.0, "f" * 32, {"version": "1", "parts": [1, 2]}, {"license": None}),
    StepDone("f" * 32, "score", "", {"a": {"b": [1, 2.5, None, True]}}),
    LevelPlanned("Q4_K_M", 3, 10**12, 4.9, 2, {"token_embd.weight": "Q6_K"}),
    LevelStarted("Q4_K_M"),
    LevelMeasured("Q4_K_M", ({"metric": "kld", "value": 0.1}, {"metric": "ppl", "value": 2}), ({"text": "Hm."},),
                  {"bytes": 3}),
    LevelMeasured(""),
    Calibrated("IQ2_S", "general", "It does best.", ({"matrix": "general", "text": "medical", "kld": 0.1, "n": 255},)),
    LevelDone("Q4_K_M", "passed", "It holds.", {"bytes": 3}),
    Finished(None, "No level passed.", {"looks": [25, 40]}),
    Finished("Q2_K", "The smallest."),
    Failed("GgufRefused", 23, "It is broken."),
)


def test_the_cases_here_cover_every_kind() -> None:
    assert {type(event) for event in EVERY} == set(events._KINDS.values())


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event: Event) -> None:
    assert from_line(to_line(event)) == event


@given(st.text())
def test_any_text_travels_in_one_plain_line(text: str) -> None:
    line = to_line(Note(text))
    assert from_line(line) == Note(text)
    assert line.isascii()
    assert len(line.splitlines()) == 1


def test_a_path_that_is_no_utf8_travels() -> None:
    path = b"model-\xff.gguf".decode(errors="surrogateescape")
    assert from_line(to_line(Failed("NotGguf", 22, path))) == Failed("NotGguf", 22, path)
    to_line(Note(path)).encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_sent(value: float) -> None:
    for event in (Progress("a", "b", value, 1), LevelMeasured("a", ({"value": value},)),
                  StepDone("f", "k", "", {"deep": [{"x": value}]})):
        with pytest.raises(ValueError, match="JSON"):
            to_line(event)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_not_taken(constant: str) -> None:
    line = to_line(Progress("a", "b", 7.0, 1.0)).replace("7.0", constant)
    assert constant in line
    with pytest.raises(ValueError, match="not an event"):
        from_line(line)


GARBAGE = {
    "empty": "", "no JSON": "hello", "a number": "3", "a list": "[]", "null": "null", "a string": '"Note"',
    "no kind": '{"message": "x"}', "unknown kind": '{"event": "Nope"}', "kind of a list": '{"event": ["Note"]}',
    "a method": '{"event": "__class__"}', "too few fields": '{"event": "Progress", "stage": "x"}',
    "too many fields": '{"event": "Note", "message": "x", "more": 1}', "cut off": to_line(EVERY[0])[:-3],
    "two at once": to_line(EVERY[0]) + to_line(EVERY[0]), "deep": "[" * 100_000, "binary": "\0\x01\ufffd",
    "a huge number": '{"event": "Note", "message": ' + "9" * 10_000 + "}"}


@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not an event"):
        from_line(line)


@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="replace"))
       | st.dictionaries(st.sampled_from(["event", "message", "stage"]),
                         st.none() | st.text() | st.integers()).map(json.dumps))
def test_any_line_is_an_event_or_refused(line: str) -> None:
    with suppress(ValueError):
        assert type(from_line(line)) in events._KINDS.values()


def test_events_cannot_be_changed() -> None:
    for event in EVERY:
        with pytest.raises(AttributeError):
            setattr(event, fields(event)[0].name, "other")
