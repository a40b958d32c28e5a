"""Many replies at once are the replies one would get one by one, and the smoke test believes only words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TinyModel

from loops.engine.chat import prompt_tokens
from loops.engine.generate import (
    CACHE_BYTES,
    Reply,
    Sampling,
    batch_size,
    cache_bytes_per_token,
    common_prefix,
    generate,
    measure_speed,
)
from loops.engine.model import ContextSpec, Model, NotFinite, OutOfMemory, Tokens, load_model, open_context
from loops.engine.options import EngineOptions
from loops.engine.smoke import SmokeFailed, smoke
from loops.evaluation.scenarios import read_scenarios
from loops.starter import STARTER_GGUF
from state.faults import NightpressError
from state.files import sha256_file

SCENARIOS = read_scenarios()[:20]
SHORT = Sampling(max_tokens=24)


@pytest.fixture(scope="module")
def model(options: EngineOptions) -> Any:
    with load_model(STARTER_GGUF, options) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[Tokens]:
    return [prompt_tokens(model, scenario.prompt) for scenario in SCENARIOS]


@pytest.fixture(scope="module")
def together(model: Model, prompts: list[Tokens]) -> list[Reply]:
    return generate(model, prompts)


def naive(model: Model, prompt: Tokens, count: int) -> list[int]:
    """Greedy, the whole text computed anew for every token."""
    text = [int(token) for token in prompt]
    with open_context(model, ContextSpec(sequences=1, cells=512, shared=False)) as context:
        for _ in range(count):
            context.clear()
            n = len(text)
            logits = context.decode(text, range(n), [(0,)] * n, [False] * (n - 1) + [True])
            text.append(int(logits[0].argmax()))
    return text[len(prompt):]


def test_replies_together_are_those_of_one_by_one(model: Model, prompts: list[Tokens], together: list[Reply]) -> None:
    """Sums in another order may rarely choose another word; the beginnings agree always."""
    alone = [generate(model, [prompt])[0] for prompt in prompts]
    assert [reply.tokens[:8] for reply in together] == [reply.tokens[:8] for reply in alone]
    assert sum(one == other for one, other in zip(together, alone, strict=True)) >= 0.9 * len(prompts)


def test_a_greedy_reply_takes_the_most_probable_token_each_time(model: Model, prompts: list[Tokens],
                                                               together: list[Reply]) -> None:
    assert naive(model, prompts[0], 6) == list(together[0].tokens[:6])


def test_replies_do_not_depend_on_the_size_of_the_batch(model: Model, prompts: list[Tokens],
                                                        together: list[Reply]) -> None:
    few = generate(model, prompts, Sampling(batch=3))
    assert sum(one == other for one, other in zip(together, few, strict=True)) >= 0.9 * len(prompts)


def test_the_starter_ends_its_turns_and_says_words(together: list[Reply]) -> None:
    assert sum(reply.ended for reply in together) >= 18
    assert all(len(reply.text.split()) >= 5 for reply in together)
    assert not any("<|" in reply.text or "</s>" in reply.text for reply in together)


def test_the_token_that_ends_the_turn_is_no_part_of_the_reply(model: Model, together: list[Reply]) -> None:
    assert not any(model.is_end(token) for reply in together for token in reply.tokens)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_no_reply_is_longer_than_asked_for(limit: int, model: Model, prompts: list[Tokens],
                                           together: list[Reply]) -> None:
    cut = generate(model, prompts, Sampling(max_tokens=limit))
    assert [reply.tokens for reply in cut] == [reply.tokens[:limit] for reply in together]
    assert not any(reply.ended for reply in cut)


def test_the_tokens_that_all_prompts_share_change_nothing(model: Model, prompts: list[Tokens]) -> None:
    """A prompt with another beginning takes the sharing away from all the others."""
    shared = generate(model, prompts[:6], SHORT)
    other = np.concatenate([[7], prompts[7]]).astype(np.int32)
    assert common_prefix(prompts[:6]) > 2
    assert common_prefix([*prompts[:6], other]) == 0
    assert generate(model, [*prompts[:6], other], SHORT)[:6] == shared


def test_equal_prompts_have_equal_replies(model: Model, prompts: list[Tokens]) -> None:
    first, *others = generate(model, [prompts[0]] * 5, SHORT)
    assert others == [first] * 4


def test_a_prompt_of_one_token_has_a_reply(model: Model, prompts: list[Tokens]) -> None:
    assert len(generate(model, [prompts[0][:1], prompts[1]], SHORT)) == 2


def test_without_prompts_there_are_no_replies(model: Model) -> None:
    assert generate(model, []) == []


def test_a_seed_fixes_every_reply_and_another_seed_changes_some(model: Model, prompts: list[Tokens]) -> None:
    warm = Sampling(temperature=1.5, seed=1, max_tokens=16)
    first = generate(model, prompts[:5], warm)
    assert generate(model, prompts[:5], warm) == first
    assert generate(model, prompts[:5], Sampling(temperature=1.5, seed=2, max_tokens=16)) != first


def test_the_same_prompt_twice_is_sampled_twice(model: Model, prompts: list[Tokens]) -> None:
    replies = generate(model, [prompts[0]] * 4, Sampling(temperature=1.5, seed=1, max_tokens=16))
    assert len({reply.tokens for reply in replies}) > 1


def test_a_narrow_top_p_leaves_only_the_most_probable_token(model: Model, prompts: list[Tokens]) -> None:
    narrow = Sampling(temperature=1.0, top_p=1e-6, max_tokens=16)
    assert generate(model, prompts[:4], narrow) == generate(model, prompts[:4], Sampling(max_tokens=16))


def test_progress_counts_up_to_no_more_than_announced(model: Model, prompts: list[Tokens]) -> None:
    told: list[tuple[int, int]] = []
    generate(model, prompts[:4], Sampling(max_tokens=8, batch=2), lambda *share: told.append(share))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {32}
    assert told[-1][0] <= 32


def test_the_cache_of_a_batch_stays_within_its_budget(model: Model) -> None:
    per_token = cache_bytes_per_token(model)
    assert per_token == 8 * 2 * 4 * 32 * 2  # layers, keys and values, heads of them, their length, 16 bits
    for longest in (10, 1000, 100_000):
        size = batch_size(model, longest, Sampling())
        assert size == 1 or size * (longest + 96) * per_token <= CACHE_BYTES
    assert batch_size(model, 10, Sampling()) == 32
    assert batch_size(model, 10, Sampling(batch=500)) == 64
    assert batch_size(model, 10**9, Sampling()) == 1


def test_more_tokens_than_a_context_holds_are_refused_before_memory_is_touched(model: Model) -> None:
    with (open_context(model, ContextSpec(sequences=1, cells=256, shared=False)) as context,
          pytest.raises(OutOfMemory, match="256 tokens has no room for 257")):
        context.decode([1] * 257, range(257), [(0,)] * 257, [False] * 257)


def test_a_cache_that_is_full_is_an_error_with_a_sentence(model: Model) -> None:
    with open_context(model, ContextSpec(sequences=1, cells=256, shared=False)) as context:
        context.decode([1] * 256, range(256), [(0,)] * 256, [False] * 256)
        with pytest.raises(OutOfMemory, match="no room for 1 more"):
            context.decode([1], [256], [(0,)], [True])


def test_the_speed_is_a_rate(model: Model) -> None:
    assert 1 < measure_speed(model, tokens=4, repeats=2) < 1e6


def test_the_smoke_test_passes_a_sound_level(pressed: Any, options: EngineOptions) -> None:
    made = pressed("Q4_K_M")
    answer = smoke(made.path, options, made.sha256)
    assert answer["prompt"]
    assert len(answer["reply"].split()) > 3


def test_the_smoke_test_refuses_another_file_than_was_measured(pressed: Any, options: EngineOptions) -> None:
    with pytest.raises(SmokeFailed, match="sha256 differs"):
        smoke(pressed("Q4_K_M").path, options, "0" * 64)


def test_the_smoke_test_refuses_a_file_that_was_damaged_before_it_was_measured(pressed: Any, tmp_path: Path,
                                                                               options: EngineOptions) -> None:
    path = Path(shutil.copy(pressed("Q4_K_M").path, tmp_path / "m.gguf"))
    path.chmod(0o644)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 4096)
    with pytest.raises(NightpressError, match="cut off"):
        smoke(path, options, sha256_file(path))


def test_the_smoke_test_refuses_weights_that_are_no_numbers(tmp_path: Path, options: EngineOptions) -> None:
    path = TinyModel(layers=1, damaged=("output_norm.weight",)).write(tmp_path / "m.gguf")
    with pytest.raises(NotFinite):
        smoke(path, options, sha256_file(path))


def test_the_smoke_test_refuses_a_reply_without_words(tmp_path: Path, options: EngineOptions) -> None:
    """A model whose every next token is the end of its turn."""
    path = TinyModel(layers=1, template="{{ eos_token }}", untied=True, always=2).write(tmp_path / "m.gguf")
    with pytest.raises(SmokeFailed, match="answers '' to a simple sentence"):
        smoke(path, options, sha256_file(path))
