"""The metrics fall when a reply gets worse, and stay in their range whatever the reply."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops.evaluation.metrics import (
    compound,
    length_fit,
    preference,
    repetition,
    response_fluency,
    sentiment_accuracy,
    words,
)
from loops.evaluation.scenarios import VALENCES, Scenario, read_scenarios

REPLY = "I am so sorry that you lost your dog. That must hurt a lot. Do you want to tell me about him?"
WORDLESS = ("", " \n", "...", "?!", "😀", "— * _ —")


def scenario(valence: str) -> Scenario:
    return Scenario("a", "p", "e", valence, 0.5, "yes", "no")


@given(st.sampled_from(VALENCES), st.text(max_size=200))
def test_sentiment_accuracy_lies_between_0_and_1(valence: str, reply: str) -> None:
    assert 0 <= sentiment_accuracy(scenario(valence), reply) <= 1


@given(st.text(max_size=200), st.floats(-1e6, 1), st.booleans())
def test_fluency_lies_between_0_and_1(reply: str, likelihood: float, ended: bool) -> None:
    assert 0 <= response_fluency(reply, likelihood, ended=ended) <= 1


@given(st.text(max_size=200))
def test_repetition_lies_between_0_and_1(text: str) -> None:
    assert 0 <= repetition(text) <= 1


@pytest.mark.parametrize("reply", WORDLESS)
def test_a_reply_without_words_scores_nothing(reply: str) -> None:
    assert [sentiment_accuracy(scenario(valence), reply) for valence in VALENCES] == [0, 0, 0]
    assert response_fluency(reply, 0.0, ended=True) == 0


def test_a_cheerful_reply_to_something_sad_fits_less_than_one_that_says_it_is_hard() -> None:
    sad = scenario("negative")
    assert sentiment_accuracy(sad, "That is wonderful news! I am so happy for you!") < 0.3
    assert sentiment_accuracy(sad, REPLY) > 0.6


def test_comfort_around_the_hard_part_is_no_error() -> None:
    sad, hard = scenario("negative"), "That must hurt terribly."
    assert sentiment_accuracy(sad, f"{hard} You are strong and loved, and I am glad you told me.") == pytest.approx(
        sentiment_accuracy(sad, hard))


def test_a_gloomy_reply_to_something_good_fits_less_than_a_glad_one() -> None:
    glad = scenario("positive")
    assert sentiment_accuracy(glad, "How wonderful, congratulations!") > 0.8
    assert sentiment_accuracy(glad, "That is terrible, I hate it.") < 0.2


def test_strong_feelings_do_not_fit_something_neutral() -> None:
    calm = scenario("neutral")
    assert sentiment_accuracy(calm, "The train leaves at six.") == 1
    assert sentiment_accuracy(calm, "I love it, wonderful, great!") < 0.6
    assert sentiment_accuracy(calm, "I hate it, terrible, awful!") < 0.6


def test_on_the_built_in_scenarios_empathy_fits_better_than_dismissal() -> None:
    """VADER reads words, not meaning: it is right in 30 of 40, and on average."""
    every = read_scenarios()
    empathic = [sentiment_accuracy(one, one.empathic) for one in every]
    dismissive = [sentiment_accuracy(one, one.dismissive) for one in every]
    better = sum(mine > other for mine, other in zip(empathic, dismissive, strict=True))
    assert fmean(empathic) > fmean(dismissive) + 0.1
    assert better >= 0.6 * len(every)


def test_the_compound_valence_is_vaders() -> None:
    """The example in VADER's own documentation."""
    assert compound("VADER is smart, handsome, and funny.") == pytest.approx(0.8316)


def test_repeating_oneself_lowers_fluency() -> None:
    once = response_fluency(REPLY, -1.0, ended=True)
    assert response_fluency(f"{REPLY} {REPLY}", -1.0, ended=True) < 0.6 * once
    assert response_fluency("so so " * 30 + ".", -1.0, ended=True) < 0.1 * once


def test_repetition_counts_trigrams_that_came_before() -> None:
    assert repetition("a b c d e") == 0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("a b") == 0


def test_a_reply_cut_off_in_mid_sentence_is_half_as_fluent() -> None:
    cut = REPLY.removesuffix(" about him?")
    assert response_fluency(cut, -1.0, ended=False) == pytest.approx(response_fluency(cut, -1.0, ended=True) / 2)


@pytest.mark.parametrize("end", [".", "!", "?", "…", '."', ".”", "!)", ".\n", ".**"])
def test_a_limit_at_the_end_of_a_sentence_cuts_nothing_off(end: str) -> None:
    reply = "You can take all the time you need" + end
    assert response_fluency(reply, -1.0, ended=False) == response_fluency(reply, -1.0, ended=True)


def test_improbable_text_is_less_fluent() -> None:
    scores = [response_fluency(REPLY, likelihood, ended=True) for likelihood in (0.0, -1.0, -3.0, -8.0)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1
    assert scores[3] < 0.02


@pytest.mark.parametrize(("count", "fit"), [(0, 0), (3, 0.5), (6, 1), (160, 1), (240, 0.5), (320, 0), (1000, 0)])
def test_a_reply_is_neither_curt_nor_rambling(count: int, fit: float) -> None:
    assert length_fit(count) == pytest.approx(fit)


def test_words_are_those_of_any_language() -> None:
    assert words("Don't—l’été, 2nd_try 家!") == ["don't", "l’été", "2nd", "try", "家"]


@given(st.floats(allow_nan=False))
def test_the_preference_is_a_probability(margin: float) -> None:
    assert 0 <= preference(margin) <= 1
    assert preference(margin) == pytest.approx(1 - preference(-margin))


def test_without_a_margin_nothing_is_preferred() -> None:
    assert preference(0) == 0.5
    assert preference(2) == pytest.approx(0.8808, abs=1e-4)
