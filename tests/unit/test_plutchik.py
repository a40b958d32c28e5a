"""Plutchik's emotions: each is found where it is plain, negation and adverbs count, and odd input does no harm."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops.evaluation.emotions import LABELS, WeightsDamaged
from loops.evaluation.feelings import find_feelings
from loops.evaluation.language import words
from loops.evaluation.plutchik import (
    HEAD,
    PLUTCHIK,
    Felt,
    feel,
    intensity,
    is_negated,
    load,
    mix,
    stability,
    strength_of,
)
from loops.evaluation.train_plutchik import DESPAIR, ONE_OF, even_shares, fit_ridge, fit_softmax, read_cues

PLAIN = [
    ("joy", "I am so happy today, I can't stop smiling!"),
    ("joy", "My daughter was born this morning and we cried with joy."),
    ("trust", "I trust my sister completely, she has never let me down."),
    ("trust", "I gave her my spare key, I feel safe with her."),
    ("fear", "I'm terrified, someone is trying to open my front door."),
    ("fear", "I'm so scared of what the scan will show."),
    ("surprise", "Out of nowhere my brother turned up, I had no idea he was coming!"),
    ("surprise", "Wow, I did not expect that at all."),
    ("sadness", "My grandmother died and I miss her so much."),
    ("sadness", "I am so lonely, nobody called on my birthday."),
    ("disgust", "The fridge was full of maggots, it was disgusting, I gagged."),
    ("disgust", "That stench of vomit on the bus, revolting."),
    ("anger", "He lied to me again and I am furious!"),
    ("anger", "They charged me twice and refused a refund. I'm so angry."),
    ("anticipation", "I can't wait for our trip next week, my bags are already packed."),
    ("anticipation", "Three days to go until the concert, so excited!"),
]
NEUTRAL = ["The meeting is at ten.", "The bus leaves from platform 4 at 9:15.", "The printer is on the second floor.",
           "Water boils at 100 degrees.", "You can change the time zone under Settings."]
ODD = ["", " ", "\n\n", "?!... ---", "🙂🙂🙂", "\x00", "~", "ok", "a", "7", "_", "'", "İ", "ﬁ", "\ud800 help", "ß" * 50,
       "ha" * 3000,
       "no " * 5000, ". a" * 5000, "I'm " + "very " * 2000 + "sad", "我很难过", "م" * 100, "\u202e sad", "<b>sad</b>",
       "not sad, not happy, not angry, not afraid, not surprised, no disgust, no trust, no anticipation"]


def _felt(shares: dict[str, float], strength: float = 0.5) -> Felt:
    return Felt(tuple(shares.get(name, 0.0) for name in PLUTCHIK), strength, 0.0)


@pytest.mark.parametrize(("emotion", "text"), PLAIN)
def test_a_plain_emotion_dominates(emotion: str, text: str) -> None:
    assert feel(text).dominant == emotion


@pytest.mark.parametrize("text", NEUTRAL)
def test_neutral_text_is_hardly_intense(text: str) -> None:
    assert feel(text).intensity < 0.2


def test_every_plain_emotion_is_more_intense_than_every_neutral_text() -> None:
    assert min(intensity(text) for _, text in PLAIN) > max(map(intensity, NEUTRAL))


@pytest.mark.parametrize(("affirmed", "denied", "emotion"), [
    ("I am happy.", "I am not happy.", "joy"), ("I'm angry.", "I'm not angry.", "anger"),
    ("I'm afraid of him.", "I'm not afraid of him.", "fear"), ("I trust him.", "I don't trust him.", "trust"),
    ("It was disgusting.", "It wasn't disgusting.", "disgust"),
    ("I am sad about it.", "I was never sad about it.", "sadness"),
])
def test_negation_weakens_an_emotion(affirmed: str, denied: str, emotion: str) -> None:
    assert feel(denied).strengths[emotion] < 0.75 * feel(affirmed).strengths[emotion]
    assert feel(denied).shares[PLUTCHIK.index(emotion)] < 0.75 * feel(affirmed).shares[PLUTCHIK.index(emotion)]


def test_what_is_not_joy_is_not_felt_as_joy() -> None:
    assert feel("I am not happy.").dominant != "joy"


@pytest.mark.parametrize("text", [
    "I can't stop smiling", "we could not stop laughing", "she never stopped laughing", "I have never been so happy",
    "we couldn't be more proud"])
def test_going_on_and_exceeding_are_no_negation(text: str) -> None:
    tokens = words(text)
    assert not is_negated(tokens, len(tokens) - 1)


def test_a_negation_reaches_three_words() -> None:
    assert is_negated(words("not at all happy"), 3)
    assert not is_negated(words("not one of us is happy"), 5)
    assert not is_negated(words("happy not"), 0)


@pytest.mark.parametrize(("weaker", "stronger"), [
    ("I'm a bit annoyed.", "I'm annoyed."), ("I'm annoyed.", "I'm absolutely furious."),
    ("I'm a little worried.", "I'm extremely worried."), ("I am slightly sad.", "I am so terribly sad."),
    ("i miss him", "I MISS HIM SO MUCH!!!"), ("Might be fun, I guess.", "This will be so much fun!!"),
    ("I suppose I was a bit scared.", "I was so scared that my hands would not stop shaking."),
])
def test_boosters_strengthen_and_dampers_weaken(weaker: str, stronger: str) -> None:
    assert intensity(weaker) < intensity(stronger)


@pytest.mark.parametrize(("text", "expected"), [
    ("i am sad", 0.6), ("i am so sad", 0.6 + 0.4 / 3), ("i am slightly sad", 0.4), ("i am not sad", 0.15)])
def test_the_strength_of_a_named_feeling_follows_its_adverbs(text: str, expected: float) -> None:
    tokens = words(text)
    assert strength_of(tokens, find_feelings(tokens)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("text", DESPAIR)
def test_despair_is_no_wish(text: str) -> None:
    assert feel(text).dominant in {"sadness", "fear"}


@pytest.mark.parametrize("text", [
    "I want to die so badly", "I'm going to kill myself", "I don't want to live like this anymore."])
def test_despair_in_other_words_is_intense_sadness(text: str) -> None:
    assert feel(text).dominant == "sadness"
    assert intensity(text) > 0.45


@pytest.mark.parametrize("text", ["", " ", "?!... ---", "🙂🙂🙂", "\x00", "_"])
def test_no_words_show_nothing(text: str) -> None:
    felt = feel(text)
    assert felt == Felt((0.0,) * 8, 0.0, 0.0)
    assert felt.dominant is None
    assert set(felt.strengths.values()) == {0.0}
    assert intensity(text) == 0


def _check(text: str) -> None:
    felt = feel(text)
    assert all(0 <= share <= 1 for share in felt.shares)
    assert sum(felt.shares) == pytest.approx(1) or not any(felt.shares)
    assert 0 <= felt.intensity <= 1
    assert -1 <= felt.valence <= 1
    assert list(felt.strengths) == list(PLUTCHIK)
    assert all(0 <= strength <= felt.intensity + 1e-12 for strength in felt.strengths.values())
    assert felt.intensity == intensity(text)


@pytest.mark.parametrize("text", ODD)
def test_odd_input_stays_in_bounds(text: str) -> None:
    _check(text)


@given(st.text(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_text_stays_in_bounds(text: str) -> None:
    _check(text)


@given(st.lists(st.sampled_from([
    "i", "not", "so", "sad", "never", "happy", "stop", "CRYING", "!", "?", ".", "no no", "\n"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_words_of_feeling_stay_in_bounds(parts: list[str]) -> None:
    _check(" ".join(parts))


def test_the_strongest_emotion_has_the_intensity_of_the_whole() -> None:
    felt = _felt({"joy": 0.75, "trust": 0.25}, 0.8)
    assert felt.dominant == "joy"
    assert felt.strengths["joy"] == pytest.approx(0.8)
    assert felt.strengths["trust"] == pytest.approx(0.8 / 3)


def test_a_long_text_is_read_to_its_limit_only() -> None:
    assert feel("I am so sad. " * 2000).shares == feel("I am so sad. " * 5000).shares


def test_the_same_text_feels_the_same_in_another_process() -> None:
    script = "import sys; from loops.evaluation.plutchik import feel; [print(feel(t)) for t in sys.argv[1:]]"
    texts = [text for _, text in PLAIN]
    found = subprocess.run([sys.executable, "-c", script, *reversed(texts)], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[2], env={"PYTHONPATH": "", "PYTHONHASHSEED": "7"})
    assert found.stdout.splitlines()[::-1] == [str(feel(text)) for text in texts]


def test_turns_without_change_are_stable() -> None:
    same = feel(PLAIN[0][1])
    assert stability([]) == stability([same]) == stability([same] * 5) == 1


def test_the_greatest_change_is_least_stable() -> None:
    swings = [_felt({"joy": 1.0}, 1.0), _felt({"sadness": 1.0}, 0.0)] * 3
    assert stability(swings) == pytest.approx(0)


def test_stability_counts_shares_and_intensity_alike() -> None:
    assert stability([_felt({"joy": 1}, 0.2), _felt({"joy": 1}, 0.8)]) == pytest.approx(0.7)
    assert stability([_felt({"joy": 1}), _felt({"joy": 0.4, "fear": 0.6})]) == pytest.approx(0.7)
    calm = [_felt({"joy": 1}), _felt({"joy": 0.9, "trust": 0.1}), _felt({"joy": 0.8, "trust": 0.2})]
    assert stability(calm) > stability([calm[0], _felt({"anger": 1}), calm[2]])


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.floats(0, 1), st.floats(0, 1)), max_size=8))
def test_stability_is_a_share_whichever_way_the_turns_run(turns: list[tuple[int, int, float, float]]) -> None:
    felt = [_felt({PLUTCHIK[one]: 1 - share, PLUTCHIK[other]: share if one != other else 1.0}, strength)
            for one, other, share, strength in turns]
    assert 0 <= stability(felt) <= 1
    assert stability(felt) == pytest.approx(stability(felt[::-1]))


def test_mixing_gives_each_label_to_its_emotions() -> None:
    alone = {label: mix(np.eye(len(LABELS))[[index]]) for index, label in enumerate(LABELS)}
    assert all(alone[label].sum() == pytest.approx(float(label != "neutral")) for label in LABELS)
    for emotion, labels in ONE_OF.items():
        assert all(PLUTCHIK[int(alone[label].argmax())] == emotion for label in labels.split())
    assert mix(np.eye(len(LABELS))).sum() == pytest.approx(len(LABELS) - 1)


def test_a_hundred_texts_take_less_than_a_second_of_processor() -> None:
    texts = [f"{text} {number}" for number in range(10) for _, text in PLAIN[:10]]
    feel(texts[0])
    taken = []
    for _ in range(3):
        texts = [f"{text}!" for text in texts]
        start = time.process_time()
        for text in texts:
            feel(text)
        taken.append(time.process_time() - start)
    assert min(taken) < 1


def test_the_head_is_small_and_belongs_to_the_situations_on_file() -> None:
    assert HEAD.stat().st_size < 300_000
    cues: dict[str, set[int]] = {}
    for cue, group in read_cues():
        cues.setdefault(cue, set()).add(group)
    assert {cue: set(groups) for cue, groups in load().cues.items()} == cues


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", HEAD.read_bytes()[:1000], HEAD.read_bytes()[:-100]])
def test_a_damaged_head_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plutchik.npz"
    path.write_bytes(content)
    with pytest.raises(WeightsDamaged, match=r"plutchik\.npz.*Install nightpress again"):
        load(path)


@pytest.mark.parametrize("name", [
    "terms", "cues", "cue_groups", "mean", "by_measure", "by_term", "bias", "rarity", "spread"])
def test_a_head_with_arrays_that_do_not_fit_is_named(name: str, tmp_path: Path) -> None:
    with np.load(HEAD, allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays[name] = arrays[name][:len(arrays[name]) // 2]
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    path = tmp_path / "plutchik.npz"
    path.write_bytes(content.getvalue())
    with pytest.raises(WeightsDamaged, match=r"plutchik\.npz"):
        load(path)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsDamaged, match="Install nightpress again"):
        load(tmp_path / "plutchik.npz")


def test_the_fits_find_what_is_there() -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(400, 5))
    gold = (table[:, :3] * 3).argmax(axis=1).astype(np.int64)
    weights, bias = fit_softmax(table, gold, even_shares(gold), 1e-4)
    assert (np.argmax(table @ weights + bias, axis=1) == gold).mean() > 0.97
    wanted = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    found, constant = fit_ridge(table, table @ wanted + 0.7, np.ones(400), 1e-6)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert math.isclose(constant, 0.7, abs_tol=1e-3)


def test_even_shares_let_each_emotion_count_the_same() -> None:
    gold = np.array([0] * 90 + [1] * 10)
    assert [even_shares(gold)[gold == index].sum() for index in (0, 1)] == pytest.approx([0.5, 0.5])
    assert [even_shares(gold, 0.0)[gold == index].sum() for index in (0, 1)] == pytest.approx([0.9, 0.1])
    assert all(one == pytest.approx(other) for one, other in itertools.pairwise(even_shares(gold, 0.0)))
