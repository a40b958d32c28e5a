"""What is alike: pairs, duplicates and groups, and splits that part none of them."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration_data.text import TEXT, Turn
from loops.finetune import near
from loops.finetune.extra import TrainExtraMissing
from loops.finetune.faults import DatasetRefused, TooFewRows
from loops.finetune.near import groups, near_duplicates, near_pairs, shingles, similarity
from loops.finetune.records import Row
from loops.finetune.splits import parse_shares, part

VOCABULARY = ("sun", "moon", "rain", "snow", "wind", "fog", "hail", "frost", "cloud", "storm", "river", "lake", "hill",
              "field", "stone", "tree", "leaf", "root", "bird", "fish")


def passage(number: int, text: str, **more: str) -> Row:
    return Row(f"r:{number}", (Turn(TEXT, text),), **more)


def asked(number: int, question: str, answer: str, **more: str) -> Row:
    return Row(f"r:{number}", (Turn("user", question), Turn("assistant", answer)), **more)


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of forty words, every fourth with one to four words of the one before it changed."""
    chance = random.Random(seed)
    made: list[str] = []
    for number in range(count):
        words = made[-1].split() if number % 4 == 3 else [chance.choice(VOCABULARY) for _ in range(40)]
        for _ in range(chance.randint(1, 4) if number % 4 == 3 else 0):
            words[chance.randrange(40)] = f"word{chance.randrange(10**6)}"
        made.append(" ".join(words))
    return made


def test_similarity_is_what_both_have_over_what_either_has() -> None:
    one, other = shingles("a b c d e"), shingles("A, b; c d x")
    assert one == {("a", "b", "c"), ("b", "c", "d"), ("c", "d", "e")}
    assert similarity(one, other) == 2 / 4
    assert similarity(frozenset(), frozenset()) == 0
    assert shingles("a b") == {("a", "b")}
    assert shingles("?!") == frozenset()


def test_all_pairs_above_the_threshold_are_found_and_no_other() -> None:
    said = texts(60)
    sets = [shingles(text) for text in said]
    expected = [(first, second) for second in range(60) for first in range(second)
                if similarity(sets[first], sets[second]) >= 0.6]
    assert len(expected) >= 10
    assert [(pair.first, pair.second) for pair in near_pairs(said, 0.6)] == expected


def test_minhash_finds_nearly_all_of_them_and_no_other_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasketch")
    said = texts(600)
    exact = near_pairs(said)
    monkeypatch.setattr(near, "FEW", 100)
    found = near_pairs(said)
    assert set(found) <= set(exact)
    assert len(found) >= 0.97 * len(exact) > 50
    assert found == near_pairs(said)


def test_beyond_some_thousands_the_library_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "FEW", 10)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert near_pairs(texts(10))
    with pytest.raises(TrainExtraMissing, match=r"datasketch.*nightpress\[train\]"):
        near_pairs(texts(11))


def test_rows_about_one_context_are_together_but_no_duplicates() -> None:
    context = texts(1)[0]
    rows = [asked(1, "Who?", "The bird.", context=context), asked(2, "What falls?", "The rain.", context=context),
            asked(3, "Where?", "Here.")]
    assert list(near_duplicates(rows)) == []
    assert groups(rows) == [[0, 1], [2]]


def test_a_short_context_keeps_its_questions_together_as_well() -> None:
    rows = [asked(1, "Who is it that sings there?", "A bird.", context="Birds sing."),
            asked(2, "And when do we hear them most?", "At dawn.", context="Birds  sing.")]
    assert groups(rows) == [[0, 1]]


def test_long_answers_keep_their_questions_together_and_short_ones_do_not() -> None:
    answer = "The treaty was signed in the spring of that year."
    rows = [asked(1, "When was it signed?", answer), asked(2, "Tell me of the treaty then!", answer.upper()),
            asked(3, "Is it raining?", "Yes."), asked(4, "Do fish swim about at night?", "Yes.")]
    assert groups(rows) == [[0, 1], [2], [3]]


def test_what_is_near_the_same_row_is_in_one_group() -> None:
    words = [f"w{number}" for number in range(60)]
    rows = [passage(number, " ".join(words[number * 4:number * 4 + 30])) for number in range(6)]
    assert groups(rows, 0.6) == [[0, 1, 2, 3, 4, 5]]
    assert near.similarity(shingles(rows[0].text), shingles(rows[5].text)) < 0.6


@given(st.lists(st.sampled_from(texts(24, seed=5)), min_size=12, max_size=60), st.integers(0, 99))
def test_splits_hold_every_row_once_and_nothing_alike_in_two(chosen: list[str], seed: int) -> None:
    rows = [passage(number, text) for number, text in enumerate(chosen)]
    if len(groups(rows)) < 3:
        with pytest.raises(TooFewRows):
            part(rows, seed=seed)
        return
    splits = part(rows, seed=seed)
    assert all(splits.values())
    assert sorted(row.id for found in splits.values() for row in found) == sorted(row.id for row in rows)
    home = {row.id: name for name, found in splits.items() for row in found}
    for pair in near_pairs([row.text for row in rows]):
        assert home[rows[pair.first].id] == home[rows[pair.second].id]
    assert all(found == sorted(found, key=rows.index) for found in splits.values())


def test_the_seed_decides_and_the_shares_are_met() -> None:
    rows = [passage(number, f"{number} {number * 7} {number * 13} {number * 17}") for number in range(200)]
    splits = part(rows, seed=3)
    assert {name: len(found) for name, found in splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert splits == part(rows, seed=3)
    assert splits != part(rows, seed=4)
    assert {name: len(found) for name, found in part(rows, (0.5, 0.25, 0.25)).items()} == {
        "train": 100, "validation": 50, "test": 50}


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_go_where_they_fit(seed: int) -> None:
    rows = [asked(number, f"{number}?", f"{number * 7}.", context="abc"[(number >= 10) + (number >= 90)])
            for number in range(100)]
    assert [len(found) for found in part(rows, seed=seed).values()] == [80, 10, 10]


@pytest.mark.parametrize(("count", "told"), [(0, "are 0 rows"), (1, "is 1 row;"), (2, "are 2 rows")])
def test_too_few_rows_are_refused(count: int, told: str) -> None:
    with pytest.raises(TooFewRows, match=told):
        part([passage(number, VOCABULARY[number]) for number in range(count)])
    with pytest.raises(TooFewRows, match="5 rows, of which only 1 differs"):
        part([passage(number, "the very same") for number in range(5)])
    three = part([passage(number, VOCABULARY[number]) for number in range(3)])
    assert [len(found) for found in three.values()] == [1, 1, 1]


@pytest.mark.parametrize("text", ["0.8,0.1", "0.8,0.2,0", "a,b,c", "0.8,0.1,0.2", "nan,0.5,0.5", "0.9,-0.1,0.2"])
def test_shares_that_make_no_whole_are_refused(text: str) -> None:
    with pytest.raises(DatasetRefused, match="--shares"):
        parse_shares(text)
    assert parse_shares("0.7,0.2,0.1") == (0.7, 0.2, 0.1)
