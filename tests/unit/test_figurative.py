"""Figurative language: each construction is found, its literal twin is not, and odd input does no harm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops.evaluation.figurative import FIGURATIVE, WEIGHTS, count_figures, domains, features, figurativeness
from loops.evaluation.labelled import read
from loops.evaluation.train_figurative import Texts, fit, scores

TWINS = [  # a figure, the construction it is found by, and a literal sentence with the same words
    ("I feel like a candle in a storm.", "like_a", "I would like a candle for the table."),
    ("He looked at me as if I were furniture.", "as_if", "He looked at me and moved the furniture."),
    ("She is as cold as a stone.", "as_as_a", "The stone in the garden was cold this morning."),
    ("A wave of grief hit me at the station.", "vivid_of_target", "A wave hit the boat at the harbour in August."),
    ("My sorrow drags behind me all day.", "bodiless_doing", "My son drags his school bag down the stairs."),
    ("Grief whispers to me at dinner.", "bodiless_minding", "My sister told me about the dinner."),
    ("I'm carrying so much shame.", "action_done_to_abstract", "I carried the boxes up the stairs."),
    ("The shame crushes me.", "strong_done_to_one", "The car crushed the bins outside the shop."),
    ("Our marriage was a cage.", "abstract_is_source", "The hamster was in a cage in the kitchen."),
    ("You are a lighthouse.", "person_is_a", "We visited the lighthouse on Sunday."),
    ("I'm drowning in quicksand.", "in_bare_vivid", "We were in the park with the kids on Monday."),
    ("He came home with a heavy heart.", "source_beside_target", "He had a heart operation in June."),
    ("Panic has claws.", "bodiless_has", "The cat has a bell and a red collar."),
]

PLAIN = [
    "", "   ", "\n\n", "?!", "...", "42", "Okay.", "Thank you for writing.", "I'm so sorry to hear that.",
    "Are you safe right now?",
    "My appointment is at 9 am on Monday.", "She likes tea and I like coffee.",
]

# not among the sentences the weights were fitted on
UNSEEN_FIGURES = [
    "my anxiety is a smoke alarm with no off switch", "The loneliness swallowed me whole.",
    "hope is a small boat tonight",
    "She carries the whole family on her shoulders.", "his words were knives", "I feel like an old sock.",
    "the memories keep ambushing me", "A mountain of paperwork stands between me and sleep.",
    "My heart is a locked room.",
    "regret chased me all the way home", "It's as if the lights went out inside me.",
    "We are sailing without a compass.",
    "my thoughts spiral every night", "You were my anchor.", "Anger boils in me when he laughs.",
    "I'm at breaking point, like a stretched rope.",
]
UNSEEN_PLAIN = [
    "We took the bus to the hospital on Thursday.", "He forgot to lock the door of the garage.",
    "Do you have someone to talk to tonight?",
    "i called my mum and we talked for an hour", "I am angry with my brother because he lied.",
    "The nurse gave me two tablets.",
    "It is hard to lose a friend.", "she bought a red coat for the winter",
    "The boat leaves at seven from the harbour.",
    "I was sad and I cried.", "My father was a sailor and he is 80 now.", "the kids built a snowman in the yard",
    "I don't know how to tell my parents.", "There was a storm and the train was late.",
    "Please take the pills with food.",
    "my neighbour is fixing the roof this weekend",
]


@pytest.mark.parametrize(("figure", "construction", "literal"), TWINS)
def test_a_construction_is_found_and_its_literal_twin_is_not(figure: str, construction: str, literal: str) -> None:
    assert construction in features(figure)
    assert count_figures(figure) == 1
    assert count_figures(literal) == 0
    assert figurativeness(figure) >= FIGURATIVE > figurativeness(literal)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_and_empty_text_has_no_figure(text: str) -> None:
    assert count_figures(text) == 0
    assert 0 <= figurativeness(text) < 0.5


def test_sentences_are_counted_one_by_one() -> None:
    one, other, plain = "Grief is a heavy coat.", "The guilt gnaws at me.", "I called the doctor on Tuesday."
    assert count_figures(f"{one} {plain} {other}") == 2
    assert figurativeness(f"{one} {plain} {other}") == max(map(figurativeness, (one, plain, other)))


def test_an_extra_plain_sentence_never_takes_a_figure_away() -> None:
    figure = "The shame is a stone in my chest."
    assert figurativeness(figure + " We went to the shop at 5 pm. The bus was late.") >= figurativeness(figure)


@pytest.mark.parametrize("typed", ["im a sinking ship", "I'm a sinking ship", "I’m a SINKING ship",
                                   "i am a sinking ship!!"])
def test_how_it_is_typed_does_not_matter(typed: str) -> None:
    assert count_figures(typed) == 1


def test_sentences_it_was_not_fitted_on() -> None:
    right = sum(map(count_figures, UNSEEN_FIGURES)) + sum(not count_figures(text) for text in UNSEEN_PLAIN)
    assert right / (len(UNSEEN_FIGURES) + len(UNSEEN_PLAIN)) >= 0.8


@given(st.text(max_size=300))
def test_any_text_gets_a_probability(text: str) -> None:
    chance, figures = figurativeness(text), count_figures(text)
    assert 0 <= chance <= 1
    assert (figures > 0) == (chance >= 0.5)


@pytest.mark.parametrize("text", ["like", "as if", "of", "there's", "like like like", "as as as a", "its", "a a a the",
                                  "is", "grief of", "\x00 is a \ud7ff", "心が重い", "- ( , ;", "word " * 5000])
def test_odd_text_does_no_harm(text: str) -> None:
    assert 0 <= figurativeness(text) <= 1


def test_the_same_in_every_process() -> None:
    text = "My heavy heart drags the past up the hill, and the fog of it all follows me home to the kitchen."
    code = f"from loops.evaluation.figurative import figurativeness; print(repr(figurativeness({text!r})))"
    told = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60,
                           env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}).stdout.strip()
            for seed in ("1", "2", "3")}
    assert told == {repr(figurativeness(text))}


def test_a_thousand_sentences_take_less_than_a_second_or_so() -> None:
    told = [f"{text} {number}" for number in range(32) for text in UNSEEN_FIGURES + UNSEEN_PLAIN]
    figurativeness(told[0])
    start = time.process_time()
    for text in told:
        figurativeness(text)
    assert (time.process_time() - start) / len(told) < 0.002  # a tenth of that is usual


def test_what_ships_is_whole() -> None:
    stored = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    assert stored["weights"]
    assert set(domains()) == {"abstract", "time", "body", "person", "event", "vivid", "source", "figure", "thing",
                              "strong", "force", "action", "mental", "state", "literal", "role"}
    assert all(domains().values())


def test_fitting_learns_to_tell_them_apart(tmp_path: Path) -> None:
    rows = [{"text": text, "figurative": True} for text in UNSEEN_FIGURES]
    rows += [{"text": text, "figurative": False} for text in UNSEEN_PLAIN]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    texts = Texts(read([path]))
    names = texts.names()
    table = texts.table(names)
    weights = fit(table, texts.labels(), 1.0)
    assert (weights == fit(table, texts.labels(), 1.0)).all()
    assert scores(texts.gold, texts.chances(weights, names, range(len(rows))))["accuracy"] > 0.8


def test_scores_are_as_defined() -> None:
    reached = scores([True, True, True, False], [0.9, 0.5, 0.1, 0.7])
    assert reached == {"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert scores([], []) == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
