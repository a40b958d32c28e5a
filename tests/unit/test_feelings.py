"""The vocabulary of feelings is well formed and found in English as people type it; topics and copies are told."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops.evaluation.feelings import (
    OF_NAME,
    PLUTCHIK,
    RELATED,
    VOCABULARY,
    Family,
    Feeling,
    family_of,
    find_feelings,
    kinship,
    vocabulary,
)
from loops.evaluation.language import LONGEST, normalise, sentences, stem, words
from loops.evaluation.relevance import (
    content_stems,
    copied_share,
    drop_copies,
    information,
    on_topic,
    relevance,
    shared_weight,
)
from loops.evaluation.scenarios import read_scenarios
from loops.evaluation.valence import compound, is_affective, rating

FAMILIES = tuple(vocabulary().families.values())
#: of each family, as the file has it; no score uses it, but whoever adds a family or a scenario is held to it
VALENCE = {name: float(valence) for name, valence in
           re.findall(r"^\[(\w+)\] (\S+) ", VOCABULARY.read_text(encoding="utf-8"), re.MULTILINE)}
PROMPT = ("My old dog died yesterday in my arms. He was with me for fourteen years, and the house is so quiet now.")


def named(text: str) -> list[tuple[str, str]]:
    """The words of each feeling found in text, with its family."""
    tokens = words(normalise(text))
    return [(" ".join(tokens[found.start:found.end]), found.feeling.family.name) for found in find_feelings(tokens)]


# the vocabulary

@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_the_shares_of_a_family_are_a_whole(family: Family) -> None:
    assert len(family.shares) == len(PLUTCHIK)
    assert min(family.shares) >= 0
    assert sum(family.shares) == pytest.approx(1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_a_family_has_a_valence_and_is_known_by_its_own_name(family: Family) -> None:
    assert -1 <= VALENCE[family.name] <= 1
    assert family_of(family.name) == family


@pytest.mark.parametrize("name", PLUTCHIK)
def test_each_of_plutchiks_emotions_is_a_family_that_is_mostly_itself(name: str) -> None:
    family = vocabulary().families[name]
    assert PLUTCHIK[family.shares.index(max(family.shares))] == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_the_name_of_a_family_is_of_middling_strength(family: Family) -> None:
    assert vocabulary().entries[(stem(family.name),)] == Feeling(family, OF_NAME)


def test_strengths_lie_above_0_and_at_most_at_1() -> None:
    known = vocabulary()
    assert all(0 < found.strength <= 1 for found in (*known.entries.values(), *known.ambiguous.values()))


def test_no_line_of_the_vocabulary_is_passed_over() -> None:
    for line in VOCABULARY.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"\[\w+\] [+-]?[\d.]+( \w+ [\d.]+)+|[\d.]+( \S+)+", line), line
            if line.startswith("["):
                assert set(line.split()[2::2]) <= set(PLUTCHIK)


def out_of_place() -> set[str]:
    """Words of the vocabulary that are found in another family than the one they are written under."""
    family, wrong = "", set()
    for line in VOCABULARY.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\[(\w+)\]", line):
            family = found[1]
        elif line[:1].isdigit():
            for entry in line.split()[1:]:
                text = entry.rstrip("?").replace("_", " ")
                found_in = named(f"you feel {text}" if entry.endswith("?") else text)
                if [(len(one.split()), where) for one, where in found_in] != [(len(text.split()), family)]:
                    wrong.add(entry)
    return wrong


def test_every_word_is_found_where_it_is_written() -> None:
    assert out_of_place() == set()


def test_every_emotion_of_the_built_in_scenarios_is_known() -> None:
    assert [one.emotion for one in read_scenarios() if family_of(one.emotion) is None] == []


def test_the_valence_of_a_scenario_does_not_contradict_its_emotion() -> None:
    signs = {"positive": 1, "neutral": 0, "negative": -1}
    wrong = [(one.id, one.valence) for one in read_scenarios()
             if (family := family_of(one.emotion)) and VALENCE[family.name] * signs[one.valence] < 0]
    assert wrong == []


@pytest.mark.parametrize(("emotion", "name"), [
    ("joy", "joy"), ("Joy", "joy"), ("furious", "anger"), ("grief-stricken", "grief"), ("very lonely", "loneliness"),
    ("over the moon", "joy"), ("ashamed", "shame")])
def test_an_emotion_may_be_named_by_any_of_its_words(emotion: str, name: str) -> None:
    family = family_of(emotion)
    assert family is not None
    assert family.name == name


@pytest.mark.parametrize("emotion", ["", "qwertz", "42", "table", "\ud800"])
def test_what_is_no_emotion_is_of_no_family(emotion: str) -> None:
    assert family_of(emotion) is None


# kinship

@given(st.sampled_from(FAMILIES), st.sampled_from(FAMILIES))
def test_kinship_is_mutual_and_largest_with_oneself(one: Family, other: Family) -> None:
    near = kinship(one, other)
    assert near == pytest.approx(kinship(other, one))
    assert 0 <= near <= (1 if one == other else RELATED + 1e-9)
    assert kinship(one, one) == 1


@pytest.mark.parametrize(("of", "near", "far"), [
    ("grief", "loneliness", "pride"), ("anger", "resentment", "grief"), ("anxiety", "fear", "joy"),
    ("pride", "joy", "disgust"), ("shame", "guilt", "anticipation")])
def test_kin_feelings_are_nearer_than_strangers(of: str, near: str, far: str) -> None:
    families = vocabulary().families
    assert kinship(families[of], families[near]) > kinship(families[of], families[far]) + 0.2


# finding

@pytest.mark.parametrize(("text", "found"), [
    ("You sound sad.", [("sad", "sadness")]), ("SO MUCH SADNESS", [("sadness", "sadness")]),
    ("u were grieving n lonely", [("grieving", "grief"), ("lonely", "loneliness")]),
    ("The clinic opens at nine.", []), ("", [])])
def test_feelings_are_found_in_any_form_of_their_words(text: str, found: list[tuple[str, str]]) -> None:
    assert named(text) == found


@pytest.mark.parametrize(("phrase", "family", "word"), [
    ("crushing blow", "disappointment", "crushing"), ("no way out", "despair", "way"),
    ("overwhelmed with worry", "anxiety", "overwhelmed"), ("overwhelmed with gratitude", "gratitude", "overwhelmed"),
    ("consumed by guilt", "guilt", "guilt"), ("over the moon", "joy", "moon"), ("breathe again", "relief", "again")])
def test_a_phrase_goes_before_the_words_in_it(phrase: str, family: str, word: str) -> None:
    assert named(f"You must be {phrase} today.") == [(phrase, family)]
    assert named(word) != [(phrase, family)]


AMBIGUOUS = ("low", "blue", "torn", "mad", "used", "small", "warm", "cross", "lost", "flat", "open")


@pytest.mark.parametrize("word", AMBIGUOUS)
def test_an_ambiguous_word_is_a_feeling_only_in_a_frame(word: str) -> None:
    assert named(f"The {word} thing there.") == []
    assert [found for found, _ in named(f"You feel so {word} there.")] == [word]


@pytest.mark.parametrize("word", sorted(vocabulary().ambiguous))
def test_no_ambiguous_word_counts_by_itself(word: str) -> None:
    if (stem(word),) not in vocabulary().entries:  # as `eased` is, because of `ease`
        assert named(word) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from(["feel", "so", "sad", "low", "at", "the", "end", "of", "your", "rope", "in", "love",
                                 "over", "moon", "you", "are", "torn", "apart", "x"]), max_size=30))
def test_mentions_never_overlap_and_come_in_order(tokens: list[str]) -> None:
    found = find_feelings(tokens)
    assert all(0 <= one.start < one.end <= len(tokens) for one in found)
    assert all(one.end <= other.start for one, other in pairwise(found))


# language

@pytest.mark.parametrize(("typed", "meant"), [
    ("I’M HERE", "i'm here"), ("“no” – yes — ok", '"no" - yes - ok'),
    ("im sad cuz u r gone", "i'm sad because you are gone"),
    ("dont u wanna talk abt it", "don't you want to talk about it"), ("thx", "thanks"), ("sadddd", "sadd"),
    ("a\u00a0b", "a b"), ("bccc bus curb thats", "bcc bus curb that's"), ("2000 years", "2000 years")])
def test_careless_typing_is_written_out(typed: str, meant: str) -> None:
    assert normalise(typed) == meant


@pytest.mark.parametrize("dash", ["—", "–"])
def test_a_dash_parts_words(dash: str) -> None:
    assert named(f"You sound sad{dash}and no wonder.") == [("sad", "sadness")]


def test_a_stretched_word_is_the_word() -> None:
    assert normalise("i'm soooo sorry") == normalise("i'm so sorry")


def test_no_more_of_a_text_is_read_than_a_reply_could_be_long() -> None:
    assert len(normalise("b " * LONGEST)) == LONGEST
    assert len(sentences("No. " * LONGEST)) == LONGEST // 4


@pytest.mark.parametrize(("text", "found"), [
    ("One... two?! Three.", ["One...", "two?!", "Three."]), ("a\nb\n\n c", ["a", "b", "c"]), ("no end", ["no end"]),
    ("Wait…what", ["Wait…", "what"]), ('"Go." He went.', ['"Go."', "He went."]), ("... !! 😢", []), ("", [])])
def test_sentences_end_with_their_marks_or_the_line(text: str, found: list[str]) -> None:
    assert sentences(text) == found


def test_words_are_those_of_any_language() -> None:
    assert words("Don't—l’été, 2nd_try 家! well-being -x-") == [
        "don't", "l’été", "2nd", "try", "家", "well-being", "x"]


# valence

def test_the_compound_valence_is_vaders() -> None:
    """The example in VADER's own documentation."""
    assert compound("VADER is smart, handsome, and funny.") == pytest.approx(0.8316)


def test_affective_words_are_told_from_plain_ones() -> None:
    assert is_affective("wonderful")
    assert is_affective("heavy")  # an appraisal that VADER does not know
    assert not is_affective("table")
    assert rating("table") == 0


# relevance

def test_common_words_say_nothing_and_rare_ones_much() -> None:
    assert information("the") == 0
    assert 0 < information("dog") < information("xylograph") <= 10.0


def test_the_content_of_a_text_is_its_telling_words() -> None:
    assert {"dog", "die", "quiet"} <= content_stems(PROMPT)
    assert not {"the", "is", "my", "and"} & content_stems(PROMPT)


def test_a_shared_word_counts_once_in_whatever_form() -> None:
    stems = content_stems(PROMPT)
    assert shared_weight(["dog"], stems) == shared_weight(["dog", "dog", "dog"], stems) > 0
    assert shared_weight(["dying"], stems) > 0
    assert shared_weight(["whale"], stems) == 0


def test_relevance_grows_with_every_telling_word_that_is_taken_up() -> None:
    scores = [relevance(PROMPT, reply) for reply in (
        "I hear you.", "Your dog.", "Your dog died.", "Your dog died in your arms.")]
    assert scores == sorted(set(scores))
    assert scores[0] == 0
    assert scores[-1] < 1


def test_a_reply_about_something_else_is_off_topic_and_a_short_one_is_not() -> None:
    else_ = "The stock market rose, and analysts expect a splendid quarter for copper and shipping."
    assert on_topic(PROMPT, else_) < 0.4
    assert on_topic(PROMPT, "I'm so sorry.") > 0.8
    assert on_topic(PROMPT, f"{else_} Your dog died in your arms.") > 0.8


@settings(deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_shares_stay_between_0_and_1_for_any_texts(prompt: str, reply: str) -> None:
    for found in (relevance(prompt, reply), on_topic(prompt, reply), copied_share(prompt, reply)):
        assert 0 <= found <= 1


# copies

def test_what_is_copied_is_told_by_words_in_runs_of_four() -> None:
    assert copied_share(PROMPT, PROMPT) == 1
    assert copied_share(PROMPT, "MY OLD DOG DIED, yesterday; in my arms!") == 1
    assert copied_share(PROMPT, "Your old dog died in the morning.") == 0
    assert copied_share(PROMPT, "He was with me, I know.") == pytest.approx(4 / 6)


def test_copies_of_the_prompt_and_of_what_was_said_are_dropped() -> None:
    said = ["My old dog died yesterday.", "That is hard.", "That is HARD!", "...", "He filled your house."]
    assert drop_copies(PROMPT, said) == ["That is hard.", "He filled your house."]


def test_a_sentence_that_only_quotes_a_few_words_is_ones_own() -> None:
    quoting = "The house is so quiet now, and it must feel as if he could walk in at any moment."
    assert drop_copies(PROMPT, [quoting]) == [quoting]


def test_a_short_sentence_of_the_prompt_is_a_copy_too() -> None:
    assert drop_copies("He died. I am furious.", ["I am furious.", "He died."]) == []
