"""What is found in calibration text: near-duplicates, languages, runs of words shared with other texts."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest

from calibration_data.checks import (
    NEAR,
    RUN,
    count_languages,
    count_words,
    guess_language,
    in_other_languages,
    near_duplicates,
    overlaps,
    shingles,
    similarity,
    words,
)
from calibration_data.text import Header, Sample, Turn

PASSAGE = ("The ferry to the outer islands leaves at seven, and whoever misses it waits until the tide "
           "has turned, for the channel is too shallow in the hours between.")


def sample(name: str, *said: str, language: str = "") -> Sample:
    return Sample(name, "", tuple(Turn("user" if number % 2 == 0 else "assistant", text)
                                  for number, text in enumerate(said)), Header("test", language))


def numbered(start: int, stop: int) -> str:
    return " ".join(f"w{number}" for number in range(start, stop))


@pytest.mark.parametrize(("text", "expected"), [
    ("Don’t stop, it's ROCK-and-roll!", ["don't", "stop", "it's", "rock", "and", "roll"]),
    ("snake_case 3.14", ["snake", "case", "3", "14"]),
    ("Straße", ["strasse"]),
    ("你好 world", ["你", "好", "world"]),
    ("यह एक किताब है।", ["यह", "एक", "किताब", "है"]),
    ("--- !", []),
])
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_of_samples_are_those_of_all_turns() -> None:
    assert count_words([sample("a", "one two", "three"), sample("b", "four")]) == 4


def test_similarity_is_what_both_have_over_what_either_has() -> None:
    """14 words are 10 runs of 5; the shift by 4 leaves 6 in both, 14 in either."""
    assert similarity(shingles(numbered(0, 14)), shingles(numbered(4, 18))) == pytest.approx(6 / 14)


def test_a_sample_with_few_changes_is_a_near_duplicate_and_a_fresh_one_is_not() -> None:
    found = near_duplicates([
        sample("first", PASSAGE), sample("other", numbered(0, 40)),
        sample("again", PASSAGE.upper().replace("SEVEN", "nine")), sample("fresh", numbered(50, 90))])
    assert [(one.id, one.like) for one in found] == [("again", "first")]
    assert NEAR <= found[0].similarity < 1


def test_each_near_duplicate_is_told_once_and_with_one_that_stays() -> None:
    found = near_duplicates([sample(str(number), PASSAGE, f"Number {number}.") for number in range(30)])
    assert [(one.id, one.like) for one in found] == [(str(number), "0") for number in range(1, 30)]


def test_samples_of_a_word_or_none_are_compared_as_a_whole() -> None:
    assert [one.id for one in near_duplicates([sample("a", "Yes."), sample("b", "No."), sample("c", "yes!"),
                                               sample("d", "?"), sample("e", "!")])] == ["c", "e"]


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.5, 0.8])
def test_near_duplicates_are_those_that_comparing_every_pair_finds(threshold: float) -> None:
    """Every text repeats parts of a few pools, so that similarities of all sizes occur."""
    chance = random.Random(7)
    pools = [[f"{letter}{number}" for number in range(60)] for letter in "abcd"]
    texts = []
    for _ in range(120):
        pool = chance.choice(pools)
        start, length, own = chance.randrange(20), chance.randrange(15, 41), chance.randrange(3)
        texts.append(" ".join([*pool[start:start + length], *(f"u{chance.randrange(10**6)}" for _ in range(own))]))
    samples = [sample(str(number), text) for number, text in enumerate(texts)]
    kept: list[int] = []
    expected = {}
    for number, text in enumerate(texts):
        best = max((similarity(shingles(text), shingles(texts[other])) for other in kept), default=0.0)
        if best >= threshold:
            expected[str(number)] = best
        else:
            kept.append(number)
    assert 20 < len(expected) < 115
    assert {one.id: one.similarity for one in near_duplicates(samples, threshold)} == expected


def test_the_same_opening_in_thousands_of_samples_costs_seconds_at_most() -> None:
    opening = numbered(0, 30)
    many = [sample(str(number), opening, numbered(1000 * number, 1000 * number + 100)) for number in range(1, 3001)]
    before = time.process_time()
    assert near_duplicates(many, 0.5) == []
    assert time.process_time() - before < 20


@pytest.mark.parametrize(("text", "language"), [
    (PASSAGE, "en"),
    ("Wer die Fähre verpasst, der wartet, bis das Wasser wieder steigt, denn sie ist die letzte.", "de"),
    ("Le bateau part à sept heures et celui qui le manque attend que la marée remonte dans le port.", "fr"),
    ("El barco sale a las siete y el que lo pierde espera en el puerto hasta que suba la marea.", "es"),
    ("La nave parte alle sette e chi la perde aspetta nel porto che la marea torni a salire.", "it"),
    ("O barco parte às sete e quem não o apanha espera no cais que a maré suba, como todos os dias.", "pt"),
    ("De boot vertrekt om zeven uur en wie te laat is, wacht in de haven op het water van de vloed.", "nl"),
    ("渡し船は七時に出て、乗り遅れた人は潮が変わるまで待ちます。", "ja"),
    ("渡船七点开出,错过的人要等到潮水转向。", "zh"),
    ("Паром уходит в семь, а кто опоздал, ждёт прилива.", "ru"),
    ("تغادر العبارة في السابعة ومن يتأخر ينتظر المد", "ar"),
    ("नाव सात बजे चलती है और जो छूट गया वह ज्वार की राह देखता है।", "hi"),
    ('{"tool": "lookup", "arguments": {"town": "Bergen", "days": 2, "unit": "C", "when": "2025"}}', ""),
    ("Too short to tell.", ""), ("", ""), ("12 34 56", ""),
])
def test_the_language_of_a_text_is_told_or_left_open(text: str, language: str) -> None:
    assert guess_language(text) == language


def test_a_foreign_sample_is_told_unless_its_header_names_the_language() -> None:
    german = "Wer die Fähre verpasst, der wartet, bis das Wasser wieder steigt, denn sie ist die letzte."
    samples = [sample("a", PASSAGE), sample("b", german), sample("c", german, language="en, with samples in de, fr"),
               sample("d", PASSAGE, language="de"), sample("e", "1 2 3")]
    assert [one.id for one in in_other_languages(samples)] == ["b", "d"]
    assert count_languages(samples) == {"en": 2, "de": 2, "": 1}


def test_nine_words_in_a_row_overlap_and_eight_do_not() -> None:
    nine, eight = numbered(0, RUN), numbered(100, 100 + RUN - 1)
    mine = [sample("a", f"before {nine} after"), sample("b", f"before {eight} after")]
    other = f"x {nine.upper().replace(' ', ', ')} y {eight} z"
    (found,) = overlaps(mine, {"judge": other})
    assert (found.id, found.other, found.words, found.excerpt) == ("a", "judge", RUN, numbered(0, RUN))


def test_the_longest_run_is_told_once_for_each_text() -> None:
    mine = [sample("a", f"{numbered(0, 12)} break {numbered(20, 40)} break", f"{numbered(60, 70)}")]
    text = f"{numbered(60, 70)} gap {numbered(20, 40)} gap {numbered(0, 12)}"
    assert [(one.other, one.words) for one in overlaps(mine, {"one": text, "two": text, "none": "nothing"})] == [
        ("one", 20), ("two", 20)]


def test_a_run_does_not_go_on_from_one_turn_to_the_next() -> None:
    assert overlaps([sample("a", numbered(0, 5), numbered(5, 10))], {"judge": numbered(0, 10)}) == []


def test_overlaps_of_many_texts_are_those_that_comparing_every_pair_finds() -> None:
    chance = random.Random(3)
    mine = [" ".join(chance.choice("ab") for _ in range(30)) for _ in range(25)]
    others = [" ".join(chance.choice("ab") for _ in range(30)) for _ in range(25)]

    def longest(one: str, other: str) -> int:
        return max((stop - start for start, stop in combinations(range(31), 2)
                    if f" {' '.join(one.split()[start:stop])} " in f" {other} "), default=0)

    expected = {(str(number), str(name)) for number, one in enumerate(mine) for name, other in enumerate(others)
                if longest(one, other) >= RUN}
    found = overlaps([sample(str(number), one) for number, one in enumerate(mine)],
                     {str(name): other for name, other in enumerate(others)})
    assert 10 < len(expected) < 600
    assert {(one.id, one.other) for one in found} == expected
