"""A recurrent model is measured like any other: nothing of its state is shared between sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_recurrent import write_mamba

from loops.engine.chat import prompt_tokens
from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.generate import Sampling, generate, measure_speed
from loops.engine.gguf_check import check_model
from loops.engine.levels import level_named
from loops.engine.model import Model, check_finite, load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.engine.score import Question, score
from loops.engine.windows import cut_windows
from loops.starter import HELD_OUT

PROMPTS = ("My dog died.", "I got promoted at work today.", "My sister came to visit me from far away.")


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba(tmp_path_factory.mktemp("mamba") / "mamba.gguf")


@pytest.fixture(scope="module")
def model(mamba: Path, options: EngineOptions) -> Iterator[Model]:
    with load_model(mamba, options) as loaded:
        yield loaded


def test_replies_together_are_those_of_one_at_a_time(model: Model) -> None:
    prompts, sampling = [prompt_tokens(model, prompt) for prompt in PROMPTS], Sampling(max_tokens=12)
    together = generate(model, prompts, sampling)
    assert [reply.tokens for reply in together] == [generate(model, [one], sampling)[0].tokens for one in prompts]


def test_likelihoods_of_two_continuations_are_those_of_each_alone(model: Model) -> None:
    replies = tuple(model.tokenize(text, add_bos=False, special=False) for text in ("I am so sorry.", "It is fine."))
    prompts = [prompt_tokens(model, prompt) for prompt in PROMPTS]
    for prompt, found in zip(prompts, score(model, [Question(one, replies) for one in prompts]), strict=True):
        alone = [score(model, [Question(prompt, (reply,))])[0][0].total for reply in replies]
        assert [one.total for one in found] == pytest.approx(alone, rel=1e-5)


def test_divergence_from_itself_is_nothing_and_from_a_level_something(
        model: Model, mamba: Path, tmp_path: Path, options: EngineOptions) -> None:
    windows = cut_windows(model, HELD_OUT.read_text(encoding="utf-8"), special=True, limit=4)
    store = BaselineStore(tmp_path / "store", windows, model.n_vocab, 1 << 30)
    measure_baseline(model, store)
    assert measure_divergence(model, store, tmp_path / "self").kld == 0
    spec = QuantizeSpec(check_model(mamba), level_named("Q4_K_M"), options)
    expected = forecast(spec)
    made = quantize(spec, expected, tmp_path / "blobs")
    assert made.n_bytes == expected.n_bytes
    with load_model(made.path, options) as level:
        assert measure_divergence(level, store, tmp_path / "level").kld > 0.001


def test_it_is_finite_and_its_speed_is_measured(model: Model) -> None:
    check_finite(model)
    assert measure_speed(model, tokens=8) > 0
