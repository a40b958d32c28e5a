"""EQ-Bench is asked and scored as its author published it; an answer is read as it was meant, or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from eq_bench_questions import EMOTIONS, FIELDS, PROMPT, REFERENCE, SCORES
from hypothesis import given
from hypothesis import strategies as st

from loops.evaluation.eq_bench import (
    Answer,
    EqBenchRefused,
    Question,
    parse_answer,
    read_questions,
    request,
    score_answer,
    summarise,
)

QUESTION = Question("7", PROMPT, EMOTIONS, SCORES)


def said(*scores: object, form: str = "{}: {}") -> str:
    return "\n".join(form.format(emotion, score) for emotion, score in zip(EMOTIONS, scores, strict=True))


def revised(first: str, second: str) -> str:
    return f"First pass scores:\n{first}\n\nCritique: Calm: 9 was too much.\n\nRevised scores:\n{second}\n"


def write(folder: Path, content: Any) -> Path:
    file = folder / "questions.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def changed(**changes: Any) -> dict[str, Any]:
    reference = {name: changes.get(name, value) for name, value in REFERENCE.items()}
    return {"7": {"prompt": changes.get("prompt", PROMPT), "reference_answer_fullscale": reference}}


def test_questions_come_in_the_order_of_the_file_with_numbers_that_were_texts(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path, {"7": FIELDS, "1": {**FIELDS, "reference_answer": {"ignored": True}}}))
    assert found == (QUESTION, Question("1", PROMPT, EMOTIONS, QUESTION.reference))


BAD = {
    "not JSON": ("{'7': 1}", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ([FIELDS], "is not a JSON object from ids to questions"),
    "nothing": ({}, "holds no questions"),
    "an id twice": ('{"7": 1, "7": 2}', "says '7' twice"),
    "a text for a question": ({"7": "?"}, "question '7', is not a JSON object"),
    "no prompt": ({"7": {**FIELDS, "prompt": " "}}, "question '7', has no 'prompt'"),
    "version 1": ({"7": {"prompt": PROMPT, "reference_answer": {}}}, "this is not version 2"),
    "no emotion": (changed(emotion3=None), "has no 'emotion3'"),
    "one emotion twice": (changed(emotion3="proud"), "names the same emotion twice"),
    "a word as score": (changed(emotion2_score="some"), "emotion2_score 'some': a number from 0 to 10"),
    "off the scale": (changed(emotion2_score=11), "emotion2_score '11'"),
    "truth as number": (changed(emotion2_score=True), "emotion2_score 'True'"),
    "not a number": (changed(emotion2_score=float("nan")), "emotion2_score 'nan'"),
    "huge": (json.dumps(changed(emotion2_score=0)).replace('"emotion2_score": 0', f'"emotion2_score": {"9" * 400}'),
             "a number from 0 to 10"),
    "half a character": (changed(prompt="\ud83d"), "half a character in 'prompt'"),
}


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_with_the_question_and_the_reason(content: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(EqBenchRefused, match=r"^(/|questions\.json)") as refused:
        read_questions(write(tmp_path, content))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EqBenchRefused, match="cannot be read"):
        read_questions(tmp_path / "none.json")


def test_nothing_is_revised_unless_asked_for() -> None:
    plain = request(QUESTION)
    assert "ritique" not in plain
    assert "evised" not in plain
    assert "First pass" not in plain
    assert plain.startswith(PROMPT[:PROMPT.index(" Then critique")])
    assert plain.endswith("Self-conscious: <score>\n\n\n[End of answer]" + PROMPT.partition("[End of answer]")[2]
                          + "\nYour answer:\n")
    assert request(QUESTION, revise=True) == PROMPT


def test_a_prompt_of_another_make_is_sent_whole() -> None:
    assert request(Question("1", "How is Ben?", EMOTIONS, (1, 1, 1, 1))) == "How is Ben?\nYour answer:\n"


FORMS = ["{}: {}", "{}:{}", "{} : {}", "**{}**: {}", "**{}:** {}", "- {}: **{}**", "* `{}` = {}", '"{}": {},',
         "{}: <{}>", "{}: {}/10", "{}: {} / 10.", "{}: {} out of 10", "{}: {} - he shows it", "| {} | {} |",
         "1. {}: {}.", "{}:\n{}", "{}: {}, as I see it", "Of course he is {}: {}!"]


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_read_however_they_are_dressed(form: str) -> None:
    expected = (7.0, 0.0, 10.0, 2.5)
    answer = parse_answer("Sure, here are my scores (5 stars: 3).\n" + said(7, 0, 10, 2.5, form=form), QUESTION)
    assert answer == Answer(expected)
    assert parse_answer(said(7, 0, 10, 2.5, form=form).lower(), QUESTION) == answer
    assert parse_answer(said(7, 0, 10, 2.5, form=form).upper(), QUESTION) == answer


@pytest.mark.parametrize("score", ["", "high", "<score>", "-3", "11", "70", "700", "7-8", "7 – 8", "7 to 8", "7 or 8",
                                   "70%", "7/5", "7/100", "7 out of 5", "7,5", "7.5.1", "perhaps 7"])
def test_what_would_be_a_guess_is_not_read(score: str) -> None:
    assert parse_answer(said(7, score, 0, 8), QUESTION) is None


def test_an_answer_without_one_of_the_emotions_is_not_read() -> None:
    assert parse_answer("Proud: 7\nAshamed: 2\nCalm: 0", QUESTION) is None
    assert parse_answer("", QUESTION) is None


def test_four_zeros_are_no_answer() -> None:
    assert parse_answer(said(0, 0, 0, 0), QUESTION) is None


def test_a_name_inside_another_word_is_not_that_emotion() -> None:
    assert parse_answer(said(7, 2, 1, 8).replace("Ashamed", "Unashamed"), QUESTION) is None
    assert parse_answer(said(7, 2, 1, 8).replace("Calm", "Half-calm"), QUESTION) is None


def test_the_last_score_of_an_emotion_counts() -> None:
    assert parse_answer(said(1, 1, 1, 1) + "\nNo:\n" + said(7, 2, 0, 8), QUESTION) == Answer(QUESTION.reference)


@pytest.mark.parametrize("change", [
    (), ("scores:", "scores"), ("First pass scores:", ""), ("First pass scores:", "**First-pass:**"),
    ("Revised scores:", "## Revised"), ("Revised scores:", "revised scores:"), ("Revised scores:", "2. Revised Scores"),
    ("Critique:", "**Critique**"), ("Critique:", "")])
def test_both_passes_are_read_under_headings_whole_or_partial(change: tuple[str, str]) -> None:
    reply = revised(said(1, 2, 3, 4), said(5, 6, 7, 8))
    if change == ("Critique:", ""):
        reply = reply.replace("Critique: Calm: 9 was too much.", "")
    elif change:
        reply = reply.replace(*change)
    assert parse_answer(reply, QUESTION, revise=True) == Answer((1, 2, 3, 4), (5, 6, 7, 8))


def test_one_readable_pass_is_kept_without_the_other() -> None:
    first, second = said(1, 2, 3, 4), said(5, 6, 7, 8)
    assert parse_answer(revised(first, "no"), QUESTION, revise=True) == Answer((1, 2, 3, 4))
    assert parse_answer(revised("no", second), QUESTION, revise=True) == Answer(None, (5, 6, 7, 8))
    assert parse_answer(revised("no", "no"), QUESTION, revise=True) is None


def test_the_text_of_a_dialogue_is_never_a_score() -> None:
    assert parse_answer(PROMPT, QUESTION) is None
    assert parse_answer(PROMPT, QUESTION, revise=True) is None


@given(st.text(alphabet="Proud:Calm 17/.-\n*<>|RevisedFirst pass scores", max_size=300), st.booleans())
def test_any_reply_is_read_or_not_but_never_breaks(reply: str, revise: bool) -> None:
    answer = parse_answer(reply, QUESTION, revise=revise)
    for scores in (answer.first, answer.revised) if answer else ():
        assert scores is None or (len(scores) == 4 and all(0 <= score <= 10 for score in scores))


@given(st.tuples(*[st.integers(0, 100).map(lambda tenths: tenths / 10)] * 4))
def test_what_is_said_is_what_is_read(scores: tuple[float, ...]) -> None:
    assert parse_answer(said(*scores), QUESTION) == (Answer(scores) if any(scores) else None)


def test_the_score_of_an_item_is_the_published_formula() -> None:
    assert score_answer(QUESTION, (7, 2, 0, 8)) == 10
    near, far = 6.5 / (1 + math.exp(-1.2 * (1 - 4))), 6.5 / (1 + math.exp(-1.2 * (5 - 4)))
    assert score_answer(QUESTION, (6, 7, 6, 8)) == pytest.approx(10 - 0.7477 * (near + far + 6))
    assert near == pytest.approx(0.1728, abs=1e-4)


def test_the_score_of_an_item_is_not_clipped() -> None:
    worst = Question("1", "?", EMOTIONS, (0, 10, 0, 10))
    assert score_answer(worst, (10, 0, 10, 0)) == pytest.approx(-19.908)


def test_scores_and_emotions_of_different_number_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        score_answer(QUESTION, (1, 2, 3))


def test_the_score_leaves_out_what_cannot_be_read_and_the_pairs_count_it_as_nothing() -> None:
    bad = score_answer(QUESTION, (0, 10, 10, 0))
    found = summarise([QUESTION] * 3, [said(7, 2, 0, 8), "I cannot.", said(0, 10, 10, 0)])
    assert found.score == pytest.approx(10 * (10 + bad) / 2)
    assert found.scores == (10, None, pytest.approx(bad))
    assert bad < 0
    assert found.paired == (1, 0, 0)
    assert (found.n, found.n_parsed, found.first_pass, found.revised) == (3, 2, found.score, None)


def test_a_run_with_too_few_readable_answers_is_not_valid() -> None:
    for readable, valid in ((4, False), (5, True), (6, True)):
        replies = [said(7, 2, 0, 8)] * readable + ["no"] * (6 - readable)
        assert summarise([QUESTION] * 6, replies).valid is valid, readable


def test_nothing_readable_scores_nothing() -> None:
    found = summarise([QUESTION], ["no"], revise=True)
    assert (found.score, found.valid, found.paired, found.n_parsed) == (0, False, (0,), 0)


def test_the_revised_scores_count_when_they_are_no_worse() -> None:
    good, poor = said(7, 2, 0, 8), said(1, 2, 0, 8)
    better = summarise([QUESTION], [revised(poor, good)], revise=True)
    assert (better.score, better.revised) == (100, 100)
    assert better.first_pass < 100
    worse = summarise([QUESTION], [revised(good, poor)], revise=True)
    assert worse.score == worse.first_pass == 100
    assert worse.scores == (10,)


def test_a_better_revision_that_is_rarely_readable_does_not_count() -> None:
    good, poor = said(7, 2, 0, 8), said(1, 2, 0, 8)
    for unreadable, counts in ((1, True), (2, False)):
        replies = [revised(poor, "no")] * unreadable + [revised(poor, good)] * (20 - unreadable)
        found = summarise([QUESTION] * 20, replies, revise=True)
        assert (found.score == 100) is counts
        assert found.n_parsed == (20 - unreadable if counts else 20)


def test_replies_of_another_number_than_the_questions_are_a_mistake() -> None:
    for questions, replies in (([QUESTION], []), ([], [])):
        with pytest.raises(ValueError, match="give no score"):
            summarise(questions, replies)
