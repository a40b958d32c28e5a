"""Replies to many prompts at once: one context, one decode a step for all of them.

A decode reads every weight once, whatever the number of sequences, so twenty-five replies
together cost little more than one. The tokens that all prompts begin with are computed once
and belong to every sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loops.engine.logits import Floats, log_softmax
from loops.engine.model import ContextSpec, Model, Tokens, open_context

CACHE_BYTES = 768 << 20  #: most key-value memory of one batch


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most probable one.

    Attributes:
        temperature: divides the logits.
        top_p: keep the most probable tokens that together reach this probability.
        seed: with the prompt's number it fixes the reply.
        max_tokens: replies are cut here.
        batch: most replies decoded together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 96
    batch: int = 32


@dataclass(frozen=True)
class Reply:
    """One generated reply.

    Attributes:
        text: without control tokens, stripped.
        tokens: generated ids, without the one that ended the turn.
        ended: the model ended its turn; otherwise it was cut at the limit.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool


def cache_bytes_per_token(model: Model) -> int:
    """Return the bytes of 16-bit keys and values that one token takes over all layers."""
    arch = model.metadata("general.architecture") or ""

    def number(key: str, otherwise: int) -> int:
        value = model.metadata(f"{arch}.{key}")
        return int(value) if value is not None and value.isdigit() else otherwise

    layers, width = number("block_count", 32), number("embedding_length", 4096)
    heads = number("attention.head_count", 32)
    kv_heads = number("attention.head_count_kv", heads)
    head = number("attention.key_length", width // max(1, heads))
    return layers * kv_heads * (head + number("attention.value_length", head)) * 2


def batch_size(model: Model, longest_prompt: int, sampling: Sampling) -> int:
    """Return how many replies fit into one context; depends on nothing but the model and the prompts."""
    tokens = longest_prompt + sampling.max_tokens
    return max(1, min(sampling.batch, 64, CACHE_BYTES // max(1, cache_bytes_per_token(model) * tokens)))


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """Return how many leading tokens all prompts share, leaving at least one to each."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    stacked = np.stack([prompt[:shortest] for prompt in prompts])
    same = (stacked == stacked[0]).all(axis=0)
    return int(shortest if same.all() else same.argmin())


def _choose(logits: Floats, sampling: Sampling, generators: Sequence[np.random.Generator]) -> list[int]:
    if sampling.temperature <= 0:
        return [int(token) for token in logits.argmax(axis=1)]
    chosen = []
    for row, rng in zip(np.exp(log_softmax(logits / sampling.temperature)).astype(np.float64), generators, strict=True):
        order = np.argsort(-row, kind="stable")
        cumulative = np.cumsum(row[order])
        kept = order[:int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1]
        chosen.append(int(rng.choice(kept, p=row[kept] / row[kept].sum())))
    return chosen


def generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling = Sampling(),
             progress: Callable[[int, int], None] | None = None) -> list[Reply]:
    """Reply to every prompt.

    Args:
        model: any.
        prompts: token ids of each, ready for the reply.
        sampling: how to choose tokens; the same spec gives the same replies.
        progress: told tokens generated and the most there can be.

    Raises:
        OutOfMemory: not even one prompt fits.
    """
    if not prompts:
        return []
    size = batch_size(model, max(len(prompt) for prompt in prompts), sampling)
    replies: list[Reply] = []
    for start in range(0, len(prompts), size):
        replies += _generate_batch(model, prompts[start:start + size], sampling, start,
                                   lambda made: progress(made, len(prompts) * sampling.max_tokens)
                                   if progress is not None else None, start * sampling.max_tokens)
    return replies


def _generate_batch(model: Model, prompts: Sequence[Tokens], sampling: Sampling, first: int,
                    progress: Callable[[int], None], made: int) -> list[Reply]:
    shared = common_prefix(prompts) if model.shares_tokens else 0
    everyone = tuple(range(len(prompts)))
    cells = shared + sum(len(prompt) - shared for prompt in prompts) + len(prompts) * sampling.max_tokens
    tokens, positions = list(prompts[0][:shared]), list(range(shared))
    members: list[tuple[int, ...]] = [everyone] * shared
    outputs = [False] * shared
    for sequence, prompt in enumerate(prompts):
        tokens += list(prompt[shared:])
        positions += range(shared, len(prompt))
        members += [(sequence,)] * (len(prompt) - shared)
        outputs += [False] * (len(prompt) - shared - 1) + [True]
    generators = [np.random.default_rng([sampling.seed, first + index]) for index in everyone]
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    with open_context(model, ContextSpec(sequences=len(prompts), cells=-(-cells // 256) * 256)) as context:
        active = list(everyone)
        logits = context.decode(tokens, positions, members, outputs)
        for step in range(sampling.max_tokens):
            chosen = dict(zip(active, _choose(logits, sampling, [generators[i] for i in active]), strict=True))
            for sequence, token in chosen.items():
                if model.is_end(token):
                    ended[sequence] = True
                else:
                    written[sequence].append(token)
            active = [sequence for sequence in active if not ended[sequence]]
            if not active or step == sampling.max_tokens - 1:
                break
            logits = context.decode(
                [chosen[sequence] for sequence in active],
                [len(prompts[sequence]) + len(written[sequence]) - 1 for sequence in active],
                [(sequence,) for sequence in active], [True] * len(active))
            progress(made + sum(map(len, written)))
    return [Reply(model.text_of(ids).strip(), tuple(ids), done) for ids, done in zip(written, ended, strict=True)]


def measure_speed(model: Model, tokens: int = 48, repeats: int = 3) -> float:
    """Return tokens per second of one sequence decoded alone, the median of several stretches of it.

    This is what a person chatting with the model sees; it depends on what else the machine does.
    """
    rates, warm_up = [], 8
    cells = -(-(warm_up + tokens * repeats) // 256) * 256
    with open_context(model, ContextSpec(sequences=1, cells=cells, shared=False)) as context:
        token = max(model.bos, 0)
        context.decode([token] * warm_up, range(warm_up), [(0,)] * warm_up, [False] * (warm_up - 1) + [True])
        for stretch in range(repeats):
            started = time.monotonic()
            for position in range(warm_up + stretch * tokens, warm_up + (stretch + 1) * tokens):
                context.decode([token], [position], [(0,)], [True])
            rates.append(tokens / max(1e-9, time.monotonic() - started))
    return float(np.median(rates))
