"""Likelihoods computed many at once are those of teacher forcing, one token after the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tiny_models import TinyModel

from loops.engine.chat import prompt_tokens
from loops.engine.model import ContextSpec, Model, NotFinite, Tokens, load_model, open_context
from loops.engine.options import EngineOptions
from loops.engine.score import CELLS, MAX_SEQUENCES, Likelihood, Question, _pack, score
from loops.evaluation.scenarios import read_scenarios
from loops.starter import STARTER_GGUF

SCENARIOS = read_scenarios()
#: nats per token: the cache holds 16-bit floats, and llama.cpp adds them up otherwise one token at a time
ROUNDING, ROUNDING_OF_MEAN = 0.03, 1e-3
NONE: Tokens = np.empty(0, dtype=np.int32)


@pytest.fixture(scope="module")
def model(options: EngineOptions) -> Any:
    with load_model(STARTER_GGUF, options) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def questions(model: Model) -> list[Question]:
    return [Question(prompt_tokens(model, one.prompt), tuple(
        model.tokenize(reply, add_bos=False, special=False) for reply in (one.empathic, one.dismissive)))
        for one in SCENARIOS]


@pytest.fixture(scope="module")
def scored(model: Model, questions: list[Question]) -> list[tuple[Likelihood, ...]]:
    return score(model, questions)


def naive(model: Model, prompt: Tokens, continuation: Tokens) -> list[float]:
    """Feed one token at a time and read off the probability of the next."""
    found = []
    with open_context(model, ContextSpec(sequences=1, cells=512, shared=False)) as context:
        n = len(prompt)
        logits = context.decode(prompt, range(n), [(0,)] * n, [False] * (n - 1) + [True])
        for place, token in enumerate(continuation):
            row = logits[0].astype(np.float64) - float(logits[0].max())
            found.append(float(row[token] - math.log(np.exp(row).sum())))
            logits = context.decode([int(token)], [n + place], [(0,)], [True])
    return found


@pytest.mark.parametrize("place", [0, 17, 39])
def test_likelihoods_are_those_of_teacher_forcing(place: int, model: Model, questions: list[Question],
                                                  scored: list[tuple[Likelihood, ...]]) -> None:
    for continuation, found in zip(questions[place].continuations, scored[place], strict=True):
        expected = naive(model, questions[place].prompt, continuation)
        assert found.per_token == pytest.approx(expected, abs=ROUNDING)
        assert found.mean == pytest.approx(sum(expected) / len(expected), abs=ROUNDING_OF_MEAN)
        assert found.mean == pytest.approx(found.total / len(continuation))


def test_every_question_has_its_answers_in_order(
        questions: list[Question], scored: list[tuple[Likelihood, ...]]) -> None:
    assert [[len(continuation) for continuation in question.continuations] for question in questions] == [
        [one.tokens for one in answers] for answers in scored]


def test_the_order_of_the_continuations_does_not_matter(model: Model, questions: list[Question],
                                                        scored: list[tuple[Likelihood, ...]]) -> None:
    turned = score(model, [Question(one.prompt, one.continuations[::-1]) for one in questions[:6]])
    for (one, other), (first, second) in zip(turned, scored[:6], strict=True):
        assert one.mean == pytest.approx(second.mean, abs=ROUNDING_OF_MEAN)
        assert other.mean == pytest.approx(first.mean, abs=ROUNDING_OF_MEAN)


def test_a_question_is_answered_the_same_alone(model: Model, questions: list[Question],
                                               scored: list[tuple[Likelihood, ...]]) -> None:
    for place in (3, 30):
        (alone,) = score(model, [questions[place]])
        expected = [one.mean for one in scored[place]]
        assert [one.mean for one in alone] == pytest.approx(expected, abs=ROUNDING_OF_MEAN)


def test_an_empty_continuation_has_likelihood_one(model: Model, questions: list[Question],
                                                  scored: list[tuple[Likelihood, ...]]) -> None:
    prompt, (first, _) = questions[0].prompt, questions[0].continuations
    ((empty, full),) = score(model, [Question(prompt, (NONE, first))])
    assert (empty.total, empty.tokens, empty.per_token, empty.mean) == (0.0, 0, (), 0.0)
    assert full.mean == pytest.approx(scored[0][0].mean, abs=ROUNDING_OF_MEAN)


def test_a_continuation_of_one_token_is_read_off_the_prompt(model: Model, questions: list[Question],
                                                            scored: list[tuple[Likelihood, ...]]) -> None:
    prompt, (first, second) = questions[0].prompt, questions[0].continuations
    ((one, other),) = score(model, [Question(prompt, (first[:1], second[:1]))])
    assert one.per_token == pytest.approx(scored[0][0].per_token[:1], abs=ROUNDING)
    assert other.per_token == pytest.approx(scored[0][1].per_token[:1], abs=ROUNDING)


def test_the_probabilities_of_every_next_token_sum_to_one(model: Model, questions: list[Question]) -> None:
    tokens = np.arange(model.n_vocab, dtype=np.int32)
    total = 0.0
    for start in range(0, 160, 40):  # MAX_SEQUENCES at a time would do, fewer show that groups do not mix
        part = tokens[start:start + 40]
        ((*found,),) = score(model, [Question(questions[0].prompt, tuple(part[i:i + 1] for i in range(len(part))))])
        total += sum(math.exp(one.total) for one in found)
    assert 0 < total <= 1.0001


def test_a_prompt_without_continuations_has_no_answers(model: Model, questions: list[Question]) -> None:
    found = score(model, [Question(questions[0].prompt, ()), questions[1]])
    assert found[0] == ()
    assert len(found[1]) == 2


def test_without_questions_there_are_no_answers(model: Model) -> None:
    assert score(model, []) == []


def test_a_question_longer_than_a_batch_is_answered(model: Model) -> None:
    prompt = np.full(40, 5, dtype=np.int32)
    long = np.full(CELLS + 10, 300, dtype=np.int32)
    ((found,),) = score(model, [Question(prompt, (long,))])
    assert found.tokens == CELLS + 10
    assert math.isfinite(found.total)


@pytest.mark.parametrize("n_vocab", [3072, 32_000, 152_000])
def test_groups_are_bounded_in_tokens_logits_and_sequences(n_vocab: int, questions: list[Question]) -> None:
    groups = _pack(questions, n_vocab)
    assert [index for group in groups for index in group] == list(range(len(questions)))
    for group in groups:
        cells = sum(questions[index].cells for index in group)
        assert len(group) == 1 or (cells <= CELLS and cells * n_vocab * 4 <= 192 << 20)
        assert sum(len(questions[index].continuations) for index in group) <= MAX_SEQUENCES


def test_progress_ends_at_all_questions(model: Model, questions: list[Question]) -> None:
    told: list[tuple[int, int]] = []
    score(model, questions[:30], lambda *share: told.append(share))
    assert len(told) > 1
    assert told[-1] == (30, 30)


def test_the_starter_prefers_empathy(scored: list[tuple[Likelihood, ...]]) -> None:
    """What it was trained for: the forced choice has something to lose."""
    assert sum(empathic.mean > dismissive.mean for empathic, dismissive in scored) >= 0.8 * len(scored)


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Any, options: EngineOptions) -> None:
    path = TinyModel(layers=1, damaged=("output_norm.weight",)).write(tmp_path / "m.gguf")
    with load_model(path, options) as broken, pytest.raises(NotFinite):
        score(broken, [Question(np.array([1, 2], dtype=np.int32), (np.array([3], dtype=np.int32),))])
