"""The six metrics reward a reply that understands, and nothing that only looks like one."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loops.evaluation import metrics
from loops.evaluation.metrics import (
    METRICS,
    evaluate,
    identity,
    length_fit,
    overall,
    preference,
    repetition,
    response_fluency,
)
from loops.evaluation.scenarios import VALENCES, Scenario

LOSS = Scenario("loss", "My old dog died yesterday in my arms. He was with me for fourteen years, and the house is so "
                "quiet now.", "grief", "negative", 0.9, "x", "y")
NEWS = Scenario("news", "I got the promotion today! After six years of night shifts they made me head nurse, and I "
                "can't stop grinning.", "pride", "positive", 0.8, "x", "y")
TRIFLE = Scenario("trifle", "My flatmate ate my yoghurt again, the one with my name on it. It is a small thing and it "
                  "bothers me.", "frustration", "negative", 0.3, "x", "y")
THEFT = Scenario("theft", "My boss took my design, put his own name on it and presented it to the board. I am furious.",
                 "anger", "negative", 0.9, "x", "y")
SITUATIONS = (LOSS, NEWS, TRIFLE, THEFT)
SAD = Scenario("sad", "My dog died. I am so sad, I want to cry.", "sadness", "negative", 0.8, "x", "y")

REPLY = "I am so sorry that you lost your dog. That must hurt a lot. Do you want to tell me about him?"
WARM = "How wonderful, I am so happy for you! Congratulations!"
SORRY = "That is so sad. I am sorry for your loss, and I grieve with you."
#: of REPLY's tone and length, about somebody else's trouble
ELSEWHERE = ("I'm so sorry, drifting in that storm with broken engines must have been awful for the sailors. "
             "Nobody could hear their radio, and the captain had lost the charts.")
WORDLESS = ("", " \n\t ", "\u00a0\u2003", "😢😢", "❤️🙏🏽👨‍👩‍👧", "...!?", "— * _ —", "()[]{}<>", string.punctuation)
REPEATED = "You must be heartbroken without him. "


def scored(name: str, scenario: Scenario, reply: str) -> float:
    return evaluate(scenario, reply, ended=True)[name]


# the range, for whatever a broken model may write

@settings(deadline=None)
@given(st.sampled_from(SITUATIONS), st.text(max_size=300), st.one_of(st.none(), st.floats(-1e6, 1)), st.booleans())
def test_every_metric_lies_between_0_and_1_for_any_text(
        scenario: Scenario, reply: str, likelihood: float | None, ended: bool) -> None:
    scores = evaluate(scenario, reply, likelihood, ended=ended)
    assert tuple(scores) == METRICS
    assert all(0 <= score <= 1 for score in scores.values()), scores


@settings(deadline=None)
@given(st.text(max_size=100), st.text(max_size=20), st.sampled_from(VALENCES), st.floats(0, 1), st.text(max_size=100))
def test_every_metric_lies_between_0_and_1_for_any_scenario(
        prompt: str, emotion: str, valence: str, intensity: float, reply: str) -> None:
    scores = evaluate(Scenario("any", prompt, emotion, valence, intensity, "x", "y"), reply)
    assert all(0 <= score <= 1 for score in scores.values()), scores


WORDS = ("I", "you", "sad", "so", "not", "must", "be", "dog", "furious", "like", "a wave", "of", "grief", "?", ".", "!")


@settings(deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
def test_every_metric_lies_between_0_and_1_for_any_order_of_telling_words(reply: str) -> None:
    scores = evaluate(LOSS, reply)
    assert all(0 <= score <= 1 for score in scores.values()), scores


@settings(deadline=None)
@given(st.sampled_from(SITUATIONS), st.text(max_size=200))
def test_the_same_reply_always_has_the_same_scores(scenario: Scenario, reply: str) -> None:
    assert evaluate(scenario, reply) == evaluate(scenario, reply)


@pytest.mark.parametrize("scenario", SITUATIONS, ids=lambda one: one.id)
@pytest.mark.parametrize("reply", WORDLESS)
def test_a_reply_without_words_scores_nothing(scenario: Scenario, reply: str) -> None:
    assert set(evaluate(scenario, reply, 0.0, ended=True).values()) == {0}


# what looks like understanding

def test_saying_one_sentence_over_and_over_leaves_hardly_any_fluency() -> None:
    assert scored("response_fluency", LOSS, REPEATED * 20) < 0.1 * scored("response_fluency", LOSS, REPEATED)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "response_fluency"])
def test_saying_one_sentence_over_and_over_earns_no_more_than_saying_it_once(name: str) -> None:
    assert scored(name, LOSS, REPEATED * 20) <= scored(name, LOSS, REPEATED) + 1e-9


@pytest.mark.parametrize("scenario", [LOSS, NEWS, TRIFLE], ids=lambda one: one.id)
@pytest.mark.parametrize("name", [name for name in METRICS if name != "response_fluency"])
def test_a_copy_of_the_prompt_is_nothing_but_fluent(name: str, scenario: Scenario) -> None:
    assert scored(name, scenario, scenario.prompt) == 0


@pytest.mark.parametrize("name", ["emotional_match", "empathy", "emotional_intensity", "response_fluency"])
@pytest.mark.parametrize("cut", ["I am so", "You must be", "That sounds so"])
def test_a_reply_cut_after_three_words_names_nothing_shows_nothing_and_is_not_fluent(name: str, cut: str) -> None:
    assert evaluate(LOSS, cut)[name] <= 0.25
    assert evaluate(LOSS, cut)[name] < 0.5 * evaluate(LOSS, REPLY)[name]


@pytest.mark.parametrize("name", ["emotional_match", "empathy", "emotional_intensity", "sentiment_accuracy"])
def test_a_copied_prompt_does_not_beat_a_reply_that_recognises_it(name: str) -> None:
    mimicry = scored(name, SAD, "My dog died. I am so sad, I want to cry.")
    assert mimicry < scored(name, SAD, "You must be so sad without your dog.")


@pytest.mark.parametrize("name", ["emotional_match", "emotional_intensity"])
def test_mimicry_with_a_word_put_in_does_not_beat_a_reply_that_recognises(name: str) -> None:
    mimicry = scored(name, SAD, "My dog died too, I am so sad, I want to cry.")
    assert mimicry < scored(name, SAD, "You must be so sad without your dog.")


@pytest.mark.parametrize(("scenario", "copy"), [(SAD, "My dog died."), (THEFT, "I am furious."), (THEFT, THEFT.prompt)])
def test_a_short_sentence_of_the_prompt_earns_nothing_either(scenario: Scenario, copy: str) -> None:
    assert scored("emotional_match", scenario, copy) < 0.2


# recognition

@pytest.mark.parametrize(("scenario", "right", "wrong"), [
    (LOSS, "heartbroken", "jealous"), (LOSS, "bereft", "proud"), (NEWS, "proud", "ashamed"),
    (TRIFLE, "annoyed", "grateful"), (THEFT, "furious", "relieved")])
def test_naming_the_right_feeling_beats_naming_a_wrong_one(scenario: Scenario, right: str, wrong: str) -> None:
    one, other = (scored("emotional_match", scenario, f"I hear how {word} you are.") for word in (right, wrong))
    assert one > other + 0.2


def test_a_feeling_nearby_counts_for_something_but_less_than_the_very_one() -> None:
    very, near, far = (scored("emotional_match", LOSS, f"I hear how {word} you are.")
                       for word in ("grief-stricken", "lonely", "proud"))
    assert very > near > far


MINIMISED = ("There is no reason to be sad.", "You should not be sad about a dog.", "Don't be sad.",
             "At least you are not the only one who is sad.")


@pytest.mark.parametrize("reply", MINIMISED)
@pytest.mark.parametrize("name", ["emotional_match", "emotional_intensity", "sentiment_accuracy"])
def test_a_feeling_that_is_talked_down_does_not_count_as_recognised(name: str, reply: str) -> None:
    assert scored(name, LOSS, reply) < 0.3 * scored(name, LOSS, "You must be sad about your dog.")


@pytest.mark.parametrize(("denied", "named"), [
    ("You are not sad in this house.", "You are so sad in this house."),
    ("You don't seem heartbroken to me.", "You do seem heartbroken to me."),
    ("This never made you devastated.", "This surely made you devastated.")])
@pytest.mark.parametrize("name", ["emotional_match", "emotional_intensity"])
def test_a_feeling_that_is_denied_does_not_count_as_named(name: str, denied: str, named: str) -> None:
    assert scored(name, LOSS, denied) < scored(name, LOSS, named) - 0.15


def test_taking_up_what_was_told_beats_what_would_fit_anything() -> None:
    taken = "You must be heartbroken. Fourteen years with your dog, and now a quiet house."
    anything = "You must be heartbroken. That is a lot, and these are difficult things to bear."
    assert scored("emotional_match", LOSS, taken) > scored("emotional_match", LOSS, anything) + 0.05


@pytest.mark.parametrize("name", ["emotional_match", "empathy", "emotional_intensity", "sentiment_accuracy"])
def test_a_reply_to_this_beats_a_reply_to_something_else(name: str) -> None:
    assert scored(name, LOSS, REPLY) > scored(name, LOSS, ELSEWHERE)


def test_understanding_beats_advising_in_every_metric_but_fluency() -> None:
    advice = "You should get a new dog soon. Try to keep busy and take long walks. Have you considered a puppy?"
    good, bad = evaluate(LOSS, REPLY, ended=True), evaluate(LOSS, advice, ended=True)
    assert all(good[name] > bad[name] for name in METRICS if name not in {"response_fluency", "metaphor_usage"})


def test_an_emotion_that_the_vocabulary_does_not_know_can_still_be_scored() -> None:
    unknown = Scenario("unknown", LOSS.prompt, "qwertz", "negative", 0.9, "x", "y")
    assert 0 < scored("emotional_match", unknown, REPLY) < scored("emotional_match", LOSS, REPLY)


# intensity

STRONG, MILD = "You must be absolutely furious about this!", "You sound slightly annoyed about this."


def test_a_strong_recognition_fits_a_strong_feeling_better_than_a_mild_one() -> None:
    assert scored("emotional_intensity", THEFT, STRONG) > scored("emotional_intensity", THEFT, MILD) + 0.1


def test_a_mild_recognition_fits_a_mild_feeling_better_than_a_strong_one() -> None:
    assert scored("emotional_intensity", TRIFLE, MILD) > scored("emotional_intensity", TRIFLE, STRONG) + 0.1


# sentiment

def test_warmth_fits_good_news_better_than_sympathy() -> None:
    assert scored("sentiment_accuracy", NEWS, WARM) > scored("sentiment_accuracy", NEWS, SORRY) + 0.05


def test_sympathy_fits_bad_news_better_than_cheer() -> None:
    assert scored("sentiment_accuracy", LOSS, SORRY) > scored("sentiment_accuracy", LOSS, WARM) + 0.05


ANGRY = "That makes me furious, what a disgusting thing to do."


def test_anger_shared_with_somebody_angry_is_no_error() -> None:
    assert scored("sentiment_accuracy", THEFT, ANGRY) > scored("sentiment_accuracy", THEFT, WARM)


def test_anger_fits_somebody_angry_better_than_somebody_sad_about_the_same() -> None:
    sad = Scenario("sad", THEFT.prompt, "sadness", "negative", 0.9, "x", "y")
    assert scored("sentiment_accuracy", THEFT, ANGRY) > scored("sentiment_accuracy", sad, ANGRY)


MIXED = Scenario("mixed", LOSS.prompt, "nostalgia", "neutral", 0.5, "x", "y")


@pytest.mark.parametrize("reply", [WARM, SORRY])
def test_something_mixed_takes_sympathy_and_warmth(reply: str) -> None:
    assert scored("sentiment_accuracy", MIXED, reply) > 0.5


@pytest.mark.parametrize("reply", [WARM, SORRY])
def test_hostility_fits_something_mixed_less_than_sympathy_or_warmth(reply: str) -> None:
    hostile = "I hate this and it annoys me, how disgusting."
    assert scored("sentiment_accuracy", MIXED, reply) > scored("sentiment_accuracy", MIXED, hostile)


# fluency

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


def test_without_a_model_to_ask_likelihood_takes_nothing_away() -> None:
    assert response_fluency(REPLY, None, ended=True) == response_fluency(REPLY, 0.0, ended=True)


@pytest.mark.parametrize(("count", "fit"), [(0, 0), (3, 0.5), (6, 1), (160, 1), (240, 0.5), (320, 0), (1000, 0)])
def test_a_reply_is_neither_curt_nor_rambling(count: int, fit: float) -> None:
    assert length_fit(count) == pytest.approx(fit)


# all together

def test_without_weights_overall_is_the_mean_of_the_six() -> None:
    scores = {name: number / 10 for number, name in enumerate(METRICS)}
    assert overall(scores) == pytest.approx(sum(scores.values()) / 6)


def test_a_metric_without_weight_does_not_move_overall() -> None:
    low, high = (dict.fromkeys(METRICS, 0.5) | {"metaphor_usage": value} for value in (0.0, 1.0))
    assert overall(low, {"metaphor_usage": 0}) == overall(high, {"metaphor_usage": 0}) == 0.5
    assert overall(low) < overall(high)


def test_weights_move_overall_towards_what_they_stress() -> None:
    scores = dict.fromkeys(METRICS, 0.0) | {"empathy": 1.0}
    assert overall(scores, {"empathy": 5}) == pytest.approx(5 / 10)
    assert overall(scores, dict.fromkeys(METRICS, 7.0)) == pytest.approx(overall(scores))


#: what only training uses
TRAINING = ("train_emotions.py", "train_empathy.py", "labelled.py", "data/emotion_words.txt", "data/situations.txt")


def identity_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(metrics, "__file__", str(folder / "metrics.py"))
    return identity.__wrapped__()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with code and weights, as the metrics have them."""
    (tmp_path / "data").mkdir()
    for name in ("metrics.py", "data/weights.json", "data/weights.npz", "data/words.toml", "data/words.txt",
                 "data/scenarios.jsonl", *TRAINING):
        (tmp_path / name).write_text("one")
    return tmp_path


@pytest.mark.parametrize("name", ["metrics.py", "data/weights.json", "data/weights.npz", "data/words.toml",
                                  "data/words.txt"])
def test_scores_are_not_reused_when_code_or_weights_change(
        code: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = identity_in(code, monkeypatch)
    assert identity_in(code, monkeypatch) == before
    (code / name).write_text("two")
    assert identity_in(code, monkeypatch) != before


def test_scores_are_reused_when_only_scenarios_change(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity_in(code, monkeypatch)
    (code / "data" / "scenarios.jsonl").write_text("two")
    assert identity_in(code, monkeypatch) == before


@pytest.mark.parametrize("name", [*TRAINING, "train_another.py"])
def test_scores_are_reused_when_only_training_changes(code: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = identity_in(code, monkeypatch)
    (code / name).write_text("two")
    assert identity_in(code, monkeypatch) == before


def opened_while_scoring() -> set[Path]:
    """Every file in the folder of the metrics that a process of its own opens or imports to score a reply."""
    folder = Path(metrics.__file__).parent
    program = f"""
import sys
opened = set()
sys.addaudithook(lambda event, arguments: opened.add(str(arguments[0])) if event == "open" else None)
from loops.evaluation.metrics import evaluate
from loops.evaluation.scenarios import Scenario
evaluate(Scenario("a", {LOSS.prompt!r}, "grief", "negative", 0.9, "x", "y"), {REPLY!r})
opened.update(module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None))
print(*opened, sep="\\n")"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120,
                          cwd=Path(__file__).parents[2])
    found = {Path(line) for line in done.stdout.splitlines() if Path(line).is_relative_to(folder)}
    return {path for path in found if "__pycache__" not in path.parts}


def test_all_that_is_opened_to_score_a_reply_is_part_of_the_identity() -> None:
    opened = opened_while_scoring()
    assert {"metrics.py", "emotions.npz", "feelings.txt", "figurative.json"} <= {path.name for path in opened}
    assert opened <= set(metrics._scoring_files(Path(metrics.__file__).parent))


def install(site: Path, library: str, version: str) -> None:
    """Put into a folder what Python's own record of an installed library begins with."""
    record = site / f"{library}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")


@pytest.mark.parametrize(("library", "decides"), [("vaderSentiment", True), ("snowballstemmer", True),
                                                  ("numpy", False)])
def test_scores_are_not_reused_with_another_version_of_a_library_that_decides_them(
        code: Path, monkeypatch: pytest.MonkeyPatch, library: str, decides: bool) -> None:
    before = identity_in(code, monkeypatch)
    install(code / "site", library, "99.0")
    monkeypatch.setattr(sys, "path", [str(code / "site"), *sys.path])
    assert (identity_in(code, monkeypatch) != before) is decides


def test_the_identity_is_16_hex_digits() -> None:
    assert len(identity()) == 16
    assert set(identity()) <= set("0123456789abcdef")


@given(st.floats(allow_nan=False))
def test_the_preference_is_a_probability(margin: float) -> None:
    assert 0 <= preference(margin) <= 1
    assert preference(margin) == pytest.approx(1 - preference(-margin))


def test_without_a_margin_nothing_is_preferred() -> None:
    assert preference(0) == 0.5
    assert preference(2) == pytest.approx(0.8808, abs=1e-4)
