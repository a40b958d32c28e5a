"""Generating over real HTTP: enough samples come whatever providers do, nothing is asked twice, no key is told."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from author import BRIEF, KEY, Author
from provider_server import Provider as Server
from provider_server import message_of, system_of

from calibration_data.briefs import SYSTEM, fingerprint
from calibration_data.catalogue import Catalogue
from calibration_data.generator import DUPLICATE, MALFORMED, OVERLAP, SCHEMA, Sieve, shipped
from calibration_data.journal import Journal, open_journal
from daemon.errors import Interrupted
from daemon.generating import (
    BARREN_AFTER,
    GIVE_UP_AFTER,
    GenerationGaveUp,
    Order,
    Tally,
    generate,
    provider_writer,
)
from daemon.providers import Connection, JudgeKeyRefused


def ask(order: Order, folder: Path, stop: threading.Event | None = None, sieve: Sieve | None = None,
        show: Any = lambda _tally: None) -> tuple[Tally, Journal]:
    asked = fingerprint(order.brief, provider=order.provider)
    with Connection(order.judge_spec) as connection, open_journal(folder / "journal", asked, "test") as journal:
        writer = provider_writer(order, connection, stop or threading.Event())
        return generate(order, writer, journal, sieve or Sieve((), ()), show), journal


def kept(folder: Path, order: Order) -> int:
    with open_journal(folder / "journal", fingerprint(order.brief, provider=order.provider), "test") as journal:
        return len(journal.samples)


def test_as_many_samples_come_as_were_asked_for(order: Order, server: Server, tmp_path: Path) -> None:
    told: list[Tally] = []
    tally, journal = ask(order, tmp_path, show=told.append)
    assert len(journal.samples) == tally.samples == 12
    assert sorted(sample.topic for sample in journal.samples) == sorted(f"topic {n}" for n in range(12))
    assert len(server.seen) == tally.answers == 3
    assert (tally.sent, tally.received) == (3, 3)
    assert [one.samples for one in told] == [0, *sorted(one.samples for one in told[1:])]
    assert told[-1] == tally


def test_the_request_asks_for_the_form_and_for_the_providers_own_choice_of_words(
        order: Order, server: Server, tmp_path: Path) -> None:
    ask(replace(order, samples=5), tmp_path)
    body, = server.seen
    assert "temperature" not in body
    assert body["model"] == order.model
    assert system_of(body) == SYSTEM
    assert BRIEF.purpose in message_of(body)
    if order.provider == "anthropic":
        assert body["tool_choice"] == {"type": "tool", "name": "samples"}
        assert body["tools"][0]["input_schema"] == SCHEMA
    else:
        assert body["response_format"]["json_schema"]["strict"] is True
        assert body["response_format"]["json_schema"]["schema"] == SCHEMA


def test_no_two_requests_are_the_same(order: Order, server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    ask(replace(order, samples=60), tmp_path)
    ask(replace(order, samples=60, seed=1, brief=replace(BRIEF, name="other")), other)
    assert len({message_of(body) for body in server.seen}) == len(server.seen) == 24


def test_the_first_request_is_alone_and_then_as_many_are_under_way_as_allowed(
        order: Order, server: Server, tmp_path: Path, poll: Any) -> None:
    most: list[int] = []

    def show(tally: Tally) -> None:
        if tally.samples == 5:
            server.open.clear()
            threading.Thread(target=watch, daemon=True).start()

    def watch() -> None:
        poll(lambda: server.waiting == 3, what="three requests under way")
        threading.Event().wait(0.2)
        most.append(server.waiting)
        server.open.set()

    author = Author()

    def write(body: dict[str, Any]) -> dict[str, Any]:
        if not most:
            most.append(server.waiting)
        return author(body)

    server.write = write
    ask(replace(order, samples=60), tmp_path, show=show)
    assert most == [1, 3]


@pytest.mark.parametrize("fault", ["429", "500", "drop"])
def test_what_fails_in_passing_is_tried_again(fault: str, order: Order, server: Server, tmp_path: Path) -> None:
    server.script = ["", fault, "", fault]
    tally, _ = ask(order, tmp_path)
    assert tally.samples == 12
    assert len(server.seen) == 5
    assert tally.dropped == {}


@pytest.mark.parametrize("fault", ["not-json", "wrong-schema", "no-answer", "cut-off"])
def test_malformed_answers_are_dropped_and_counted(fault: str, order: Order, server: Server, tmp_path: Path) -> None:
    server.script = [fault, "", fault]
    tally, journal = ask(order, tmp_path)
    assert len(journal.samples) == 12
    assert dict(tally.dropped) == {MALFORMED: 2}


def test_a_provider_that_goes_down_is_given_up_and_what_came_is_kept(
        order: Order, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.providers.RETRIES", 0)
    server.script = ["", *["500"] * 99]
    with pytest.raises(GenerationGaveUp, match=rf"^{order.provider} .*too busy or broken \(500\): broken; 5 of 12 "
                                               r"samples are kept: .*`--num-samples 5` it is content with them\.$"):
        ask(order, tmp_path)
    assert GIVE_UP_AFTER <= len(server.seen) - 1 <= GIVE_UP_AFTER + order.concurrency
    server.script = []
    tally, journal = ask(order, tmp_path)
    assert tally.samples == len(journal.samples) == 12
    assert len({sample.topic for sample in journal.samples}) == 12


def test_after_failures_fewer_are_asked_at_once_with_a_pause(
        order: Order, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.providers.RETRIES", 0)
    waits: list[float] = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return False

    server.script = ["", "429", "429", "429"]
    tally, _ = ask(replace(order, concurrency=1), tmp_path, Watched())
    assert tally.samples == 12
    assert waits == [0.001, 0.002, 0.004]


@pytest.mark.parametrize(("fault", "what"), [("404", r"refuses the request \(404\): model: there is no such"),
                                             ("500", "too busy or broken"), ("429-for-an-hour", "come back later")])
def test_a_first_request_that_fails_ends_it_at_once(
        fault: str, what: str, order: Order, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.providers.RETRIES", 0)
    server.script = [fault] * 9
    with pytest.raises(GenerationGaveUp, match=f"{what}.*; nothing is kept.$"):
        ask(order, tmp_path)
    assert len(server.seen) == 1


def test_a_model_that_never_keeps_to_the_form_is_given_up(order: Order, server: Server, tmp_path: Path) -> None:
    server.script = ["no-answer"] * 99
    with pytest.raises(GenerationGaveUp, match=rf"{order.provider} \({order.model}\) answers out of form"):
        ask(order, tmp_path)
    assert len(server.seen) <= GIVE_UP_AFTER + order.concurrency


def test_a_model_that_repeats_itself_is_given_up_with_the_reason(order: Order, server: Server, tmp_path: Path) -> None:
    server.write = lambda _body: {"samples": [Author.sample(number) for number in range(5)]}
    with pytest.raises(GenerationGaveUp, match=r"Nothing new comes any more: the last \d+ samples asked for "
                                               r"brought \d+ like another sample; 5 of 12 samples are kept"):
        ask(order, tmp_path)
    assert len(server.seen) <= 1 + BARREN_AFTER // 2 + order.concurrency


def test_what_ships_and_what_is_judged_by_is_dropped(order: Order, server: Server, tmp_path: Path) -> None:
    held_out = Catalogue().held_out("rag")
    copies = [{"topic": "copied", "turns": [{"role": turn.role, "content": turn.text} for turn in sample.turns]}
              for sample in (Catalogue().load("medical")[3], held_out[2])]
    author, first = Author(), iter([copies])
    server.write = lambda body: {"samples": [*next(first, []), *author(body)["samples"]]}
    tally, journal = ask(order, tmp_path, sieve=Sieve(shipped(), [sample.text for sample in held_out]))
    assert Counter(tally.dropped) == {DUPLICATE: 1, OVERLAP: 1}
    assert "copied" not in {sample.topic for sample in journal.samples}


def test_a_key_that_is_refused_costs_one_request_and_one_sentence(
        order: Order, server: Server, tmp_path: Path) -> None:
    server.script = ["401"] * 9
    with pytest.raises(JudgeKeyRefused, match=r"does not take the key .* \(401\)") as refused:
        ask(order, tmp_path)
    assert len(server.seen) == 1
    assert KEY[:8] not in str(refused.value)


def test_a_key_that_is_refused_midway_leaves_what_came(order: Order, server: Server, tmp_path: Path) -> None:
    server.script = ["", "401", "401", "401"]
    with pytest.raises(JudgeKeyRefused, match="5 of 12 samples are kept"):
        ask(order, tmp_path)
    assert kept(tmp_path, order) == 5


def test_a_stop_keeps_what_has_arrived_and_the_same_request_goes_on(
        order: Order, server: Server, tmp_path: Path, poll: Any) -> None:
    stop = threading.Event()

    def show(tally: Tally) -> None:
        if tally.samples == 5:
            server.open.clear()
            threading.Thread(target=stop_when_asked, daemon=True).start()

    def stop_when_asked() -> None:
        poll(lambda: server.waiting == 2, what="two requests under way")
        stop.set()

    with pytest.raises(Interrupted, match=r"^Stopped on request; 5 of 12 samples are kept"):
        ask(order, tmp_path, stop, show=show)
    server.open.set()
    tally, journal = ask(order, tmp_path)
    assert tally.samples == 12
    assert len({entry.number for entry in journal.entries}) == len(journal.entries)


def test_what_was_kept_does_not_come_again(order: Order, server: Server, tmp_path: Path) -> None:
    ask(replace(order, samples=5), tmp_path)
    server.write = Author()
    tally, journal = ask(order, tmp_path)
    assert dict(tally.dropped) == {DUPLICATE: 5}
    assert len({sample.topic for sample in journal.samples}) == len(journal.samples) == 12


def test_with_enough_kept_nobody_is_asked(order: Order, server: Server, tmp_path: Path) -> None:
    ask(order, tmp_path)
    before = len(server.seen)
    assert ask(replace(order, samples=7), tmp_path)[0].samples == 12
    assert len(server.seen) == before
