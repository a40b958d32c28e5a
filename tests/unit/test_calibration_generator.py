"""Generated calibration text: requests differ, answers are read leniently, what is new is kept, and kept safely."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration_data import briefs, generator
from calibration_data.briefs import DOMAINS, PERIOD, Brief, GenerationRefused, fingerprint, opening, request, vary
from calibration_data.catalogue import BUILT_IN, Catalogue
from calibration_data.generator import (
    DUPLICATE,
    FOREIGN,
    MALFORMED,
    OVERLAP,
    REPETITIVE,
    Sieve,
    estimate,
    finish,
    price,
    read_answer,
    shipped,
)
from calibration_data.journal import Entry, open_journal
from calibration_data.text import ROLES, Header, Sample, Turn, parse, write
from state.files import DiskFull, StateUnwritable

EXAMPLE = Sample("1", "swarm", (Turn("user", "They left </examples>!"), Turn("assistant", "Look up.")), Header("x"))
BRIEF = Brief("bees", "advice for people who keep bees", examples=(EXAMPLE,))


def conversation(text: str, answer: str = "That can be done, and quite easily, as it happens.") -> dict[str, Any]:
    return {"topic": "bees", "turns": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def samples_of(*texts: str) -> list[Sample]:
    return read_answer([conversation(text) for text in texts], ("en",))[0]


# --- requests ---

def test_every_domain_that_ships_has_a_purpose_and_as_many_subjects() -> None:
    assert set(DOMAINS) == set(BUILT_IN)
    assert {len(set(subjects)) for _, subjects in DOMAINS.values()} == {16}


def test_no_two_requests_of_a_period_have_everything_in_common() -> None:
    lengths = [16, len(briefs.ANGLES), len(briefs.SPEAKERS), len(briefs.LENGTHS), len(briefs.SHAPES)]
    assert math.lcm(*lengths) == math.prod(lengths) == PERIOD
    brief = Brief("m", *DOMAINS["medical"][:1], subjects=DOMAINS["medical"][1])
    assert len({vary(brief, number) for number in range(3000)}) == 3000
    assert vary(brief, 7) == vary(brief, 7 + PERIOD)


def test_languages_take_turns_and_get_to_every_subject() -> None:
    brief = Brief("m", "p", ("en", "de"), DOMAINS["medical"][1])
    seen = {(varied.subject, varied.language) for varied in (vary(brief, number) for number in range(64))}
    assert len(seen) == 32
    assert "code de" in request(brief, 1, 5)


def test_a_request_holds_the_purpose_and_quotes_the_examples_so_that_they_cannot_leave() -> None:
    text = request(BRIEF, 0, 5)
    assert "advice for people who keep bees." in text
    assert "5 samples" in text
    assert text.count("</examples>") == 1
    quoted = json.loads(text[text.index("<examples>\n") + 11:text.index("\n</examples>")])
    assert quoted[0]["turns"][0]["content"] == "They left </examples>!"
    assert "They left" in opening(BRIEF, 0)


def test_a_long_example_is_cut() -> None:
    long = replace(BRIEF, examples=(Sample("1", "", (Turn("user", "word " * 9000),), Header("x")),))
    assert len(request(long, 0, 5)) < 5000
    assert len(opening(long, 0)) < 1000


@pytest.mark.parametrize(("change", "what"), [
    ({"name": "a/b"}, "'a/b' is no name"), ({"purpose": " "}, "purpose is empty"), ({"purpose": "x" * 4001}, "4,001"),
    ({"purpose": "bees \udcff"}, "not plain text"), ({"purpose": "a\0b"}, "not plain text"),
    ({"languages": ("english",)}, "'english' is no language"), ({"languages": ()}, "'' is no language")])
def test_a_brief_that_makes_no_sense_is_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(GenerationRefused, match=what) as refused:
        replace(BRIEF, **change)
    assert "\n" not in str(refused.value)


def test_the_fingerprint_changes_with_all_that_decides_what_is_written() -> None:
    before = fingerprint(BRIEF, provider="openai", model="m")
    others = [fingerprint(replace(BRIEF, **change), provider="openai", model="m") for change in (
        {"name": "b"}, {"purpose": "p"}, {"languages": ("de",)}, {"subjects": ("s",)}, {"examples": ()})]
    others += [fingerprint(BRIEF, provider="local", model="m"), fingerprint(BRIEF, provider="openai", model="n")]
    assert len({before, *others}) == len(others) + 1
    assert fingerprint(BRIEF, model="m", provider="openai") == before


# --- answers ---

def test_a_good_answer_is_taken_whole() -> None:
    one = {"topic": "x", "turns": [{"role": role, "content": f"The {role} says a thing or two here."}
                                   for role in ("system", "user", "assistant", "tool", "assistant")]}
    samples, dropped = read_answer({"samples": [one, conversation("How do I keep bees in a city?")]}, ("en",))
    assert not dropped
    assert [turn.role for turn in samples[0].turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert samples[1].topic == "bees"


def test_what_stands_around_the_samples_is_overlooked() -> None:
    good = [conversation("How do I keep bees in a city?")]
    for answer in ({"samples": good}, good, {"samples": json.dumps(good)}, json.dumps({"samples": good})):
        samples, dropped = read_answer(answer, ("en",))
        assert len(samples) == 1
        assert not dropped


@pytest.mark.parametrize("answer", [
    None, 7, "text", [], {}, {"samples": []}, {"samples": {"a": 1}}, {"stars": 5}, [None], ["x"], [{}],
    [{"turns": "x"}], [{"turns": []}], [{"turns": [None]}], [{"turns": [{"role": "user"}]}], "[" * 100_000,
    [{"turns": [{"role": "user", "content": "A question without any answer at all, sadly."}]}],
    [{"turns": [{"role": "assistant", "content": "An answer that nobody asked for, and so useless."}]}],
    [conversation("short", "yes")], [conversation("", "An answer to a question that is empty, and so no use.")],
    [conversation("How does one keep bees in town? \0")], [conversation("How does one keep bees in town? \ud83d")],
    [{"turns": [{"role": "boss", "content": "A question that is long enough to count?"},
                {"role": "assistant", "content": "An answer that is long enough to count."}]}],
    [{"turns": [{"role": "user", "content": "A question that is long enough to count?"},
                {"role": "system", "content": "Be kind and be brief, and be correct."},
                {"role": "assistant", "content": "An answer that is long enough to count."}]}],
    [conversation("word " * 5000)]])
def test_what_is_out_of_form_is_dropped_and_counted(answer: Any) -> None:
    samples, dropped = read_answer(answer, ("en",))
    assert samples == []
    assert sum(dropped.values()) == 1
    assert set(dropped) <= {MALFORMED, REPETITIVE}


def test_text_that_goes_round_in_circles_is_dropped() -> None:
    samples, dropped = read_answer([conversation("Tell me about bees.", "I am here, and I am listening to you. " * 20)],
                                   ("en",))
    assert (samples, dict(dropped)) == ([], {REPETITIVE: 1})


def test_another_language_is_dropped_where_languages_can_be_told_apart() -> None:
    german = conversation("Wie hält man Bienen in der Stadt, und was ist dabei das Wichtigste für den Anfang?",
                          "Das ist nicht schwer: Man braucht einen ruhigen Platz und die Zeit, sich zu kümmern.")
    assert dict(read_answer([german], ("en", "fr"))[1]) == {FOREIGN: 1}
    assert len(read_answer([german], ("en", "de"))[0]) == 1
    assert len(read_answer([german], ("sv",))[0]) == 1


PIECES = st.sampled_from(["word", "two words", "\n", "\r\n", "%% user", "\\%% x", "\ufeff", "\0", "\u2028", " ", "%%",
                          "Ünï", "蜂", "\x1c", "\t", "\ud800"])
TEXTS = st.lists(PIECES, max_size=14).map("".join)


SHAPES = st.sampled_from([("user", "assistant"), ("system", "user", "assistant"), ("user", "tool", "assistant"),
                          (*ROLES,), ("user", "boss", "assistant")])
CONVERSATIONS = SHAPES.flatmap(lambda roles: st.tuples(*(st.tuples(st.just(role), TEXTS) for role in roles)))


@given(st.lists(st.tuples(TEXTS, CONVERSATIONS), max_size=3))
@settings(max_examples=150, deadline=None)
def test_whatever_is_accepted_a_file_holds_exactly(answer: list[tuple[str, list[tuple[str, str]]]]) -> None:
    samples, dropped = read_answer([{"topic": topic, "turns": [
        {"role": role, "content": text + " a question that is long enough"} for role, text in turns]}
        for topic, turns in answer], ("sv",))
    assert len(samples) + sum(dropped.values()) == max(1, len(answer))
    made = finish(samples, Header("bees", "sv", "mine", "somewhere"))
    assert parse(write(made)) == made
    write(made).encode()


# --- what is new ---

def test_nothing_comes_twice_and_nothing_that_ships() -> None:
    sieve = Sieve(shipped(), ())
    old = [sample for name in BUILT_IN for sample in Catalogue().load(name)[::40]]
    new = samples_of("How do I keep bees in a city?", "Why does the queen stop laying eggs?")
    accepted, dropped = sieve.sift([*old, *new])
    assert accepted == new
    assert dict(dropped) == {DUPLICATE: len(old)}
    assert sieve.sift(new)[0] == []


def test_an_example_does_not_come_back_as_a_sample() -> None:
    example = samples_of("How do I keep bees in a city?")
    assert Sieve(example, ()).sift(example)[0] == []


def test_the_threshold_is_that_of_the_check() -> None:
    from calibration_data.checks import NEAR, near_duplicates

    said = [f"w{number}" for number in range(40)]
    sieve, kept = Sieve((), ()), []
    every = [Sample(str(cut), "", (Turn("user", " ".join(said[:cut] + [f"{cut}v{n}" for n in range(40 - cut)])),),
                    Header("x")) for cut in range(0, 40, 3)]
    kept, dropped = sieve.sift(every)
    repeated = {one.id for one in near_duplicates(every, NEAR)}
    assert [one.id for one in kept] == [one.id for one in every if one.id not in repeated]
    assert 0 < dropped[DUPLICATE] == len(repeated)


def test_what_models_are_judged_by_is_refused_even_in_part() -> None:
    held_out = Catalogue().held_out("medical")[0]
    run = " ".join(held_out.turns[0].text.split()[:11])
    sieve = Sieve((), [sample.text for sample in Catalogue().every_held_out()])
    accepted, dropped = sieve.sift(samples_of(f"My neighbour wrote: {run}. What do you think of it, honestly?"))
    assert (accepted, dict(dropped)) == ([], {OVERLAP: 1})
    assert len(sieve.sift(samples_of("My neighbour keeps bees, and I wonder about the swarm in June."))[0]) == 1


# --- the estimate ---

def test_the_estimate_grows_with_the_samples_and_is_nothing_for_none() -> None:
    few, many = estimate(BRIEF, 10), estimate(BRIEF, 250)
    assert estimate(BRIEF, 0) == estimate(BRIEF, -3) == generator.Estimate(0, 0, 0)
    assert few.requests == 3
    assert many.requests == 55
    assert many.sent > 10 * few.sent
    assert many.received > 10 * few.received > 10 * 10 * 60
    assert estimate(BRIEF, 10, local=True).requests == 11


def test_the_price_is_per_million_of_each() -> None:
    assert price(2_000_000, 1_000_000, 1.5, 10) == 13


# --- the journal ---

ENTRIES = [Entry(3, tuple(samples_of("How do I keep bees in a city?")), {MALFORMED: 1}, 7, 9), Entry(4)]


def fill(path: Path, request: str = "abc") -> None:
    with open_journal(path, request, "openai, m") as journal:
        for entry in ENTRIES:
            journal.append(entry)


def test_what_was_kept_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / ".bees.partial"
    fill(path)
    with open_journal(path, "abc", "openai, m") as journal:
        assert [(one.number, dict(one.dropped), one.sent, one.received) for one in journal.entries] == [
            (3, {MALFORMED: 1}, 7, 9), (4, {}, 0, 0)]
        assert [(one.topic, one.turns) for one in journal.samples] == [
            (one.topic, one.turns) for one in ENTRIES[0].samples]
        journal.append(Entry(5))
    with open_journal(path, "abc", "openai, m") as journal:
        assert [one.number for one in journal.entries] == [3, 4, 5]
        journal.remove()
    assert not path.exists()


def test_a_journal_that_holds_nothing_leaves_no_file(tmp_path: Path) -> None:
    with open_journal(tmp_path / "x", "abc", "m"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_whatever_is_torn_off_its_end_the_whole_lines_stand(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fill(path)
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for length in [0, 5, *(end + shift for end in ends for shift in (0, 1, 9)), len(content)]:
        path.write_bytes(content[:length])
        with open_journal(path, "abc", "m") as journal:
            whole = sum(end < length for end in ends)
            assert len(journal.entries) == max(0, whole - 1)
            journal.append(Entry(9))
        with open_journal(path, "abc", "m") as journal:
            assert journal.entries[-1].number == 9


def test_the_journal_of_another_request_is_left_alone_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fill(path)
    before = path.read_bytes()
    with pytest.raises(GenerationRefused, match=r"answers to another request \(openai, m\).*--fresh"), \
            open_journal(path, "def", "other"):
        pass
    assert path.read_bytes() == before
    with open_journal(path, "def", "other", fresh=True) as journal:
        assert journal.entries == []


@pytest.mark.parametrize("line", ["{}", "7", "null", '{"format": "x"}', '"x"', "not JSON", "[" * 50_000])
def test_a_damaged_journal_is_refused_and_left_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    fill(path)
    for content in (f"{line}\n", path.read_text(encoding="utf-8") + f"{line}\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(GenerationRefused, match="is damaged: `--fresh`"), open_journal(path, "abc", "m"):
            pass
        assert path.read_text(encoding="utf-8") == content
        fill(path.with_name("y"))
        path.write_text(path.with_name("y").read_text(encoding="utf-8"), encoding="utf-8")


def test_one_process_at_a_time_writes_a_journal(tmp_path: Path) -> None:
    with open_journal(tmp_path / "x", "abc", "m"), \
            pytest.raises(GenerationRefused, match="Another command is generating"), \
            open_journal(tmp_path / "x", "abc", "m"):
        pass


def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    fill(path)
    before = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 20, limits[1]))
    try:
        with pytest.raises(DiskFull), open_journal(path, "abc", "m") as journal:
            journal.append(ENTRIES[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    with open_journal(path, "abc", "m") as journal:
        assert [one.number for one in journal.entries] == [3, 4]


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateUnwritable), open_journal(tmp_path / "file" / "x", "abc", "m"):
        pass
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(StateUnwritable), open_journal(tmp_path / "x", "abc", "m"):
            pass
        tmp_path.chmod(0o700)
