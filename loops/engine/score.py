"""Log-likelihoods of given continuations, many prompts per decode, each prompt computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loops.engine.logits import Floats, log_softmax
from loops.engine.model import Context, ContextSpec, Model, NotFinite, Tokens, open_context

CELLS = 2048  #: tokens computed together
MAX_SEQUENCES = 48
LOGITS_BYTES = 192 << 20


@dataclass(frozen=True)
class Question:
    """A prompt and the continuations to compare after it, as token ids."""

    prompt: Tokens
    continuations: tuple[Tokens, ...]

    @property
    def cells(self) -> int:
        """Tokens that it takes in a context."""
        return len(self.prompt) + sum(len(continuation) for continuation in self.continuations)


@dataclass(frozen=True)
class Likelihood:
    """How probable a model finds a continuation.

    Attributes:
        total: natural log of its probability given the prompt.
        tokens: its length.
        per_token: log-probability of each token.
        foreseen: how many of its tokens are the most probable one at their place; of equals the first.
    """

    total: float
    tokens: int
    per_token: tuple[float, ...]
    foreseen: int = 0

    @property
    def mean(self) -> float:
        """Log-probability per token, in nats; 0 for an empty continuation."""
        return self.total / self.tokens if self.tokens else 0.0


def _pack(questions: Sequence[Question], n_vocab: int) -> list[list[int]]:
    """Group questions, in order, so that each group fits into one context."""
    most_rows = max(64, LOGITS_BYTES // (4 * n_vocab))
    groups: list[list[int]] = []
    cells = sequences = 0
    for index, question in enumerate(questions):
        needs, members = question.cells, max(1, len(question.continuations))
        if not groups or cells + needs > min(CELLS, most_rows) or sequences + members > MAX_SEQUENCES:
            groups.append([])
            cells = sequences = 0
        groups[-1].append(index)
        cells, sequences = cells + needs, sequences + members
    return groups


def score(model: Model, questions: Sequence[Question],
          progress: Callable[[int, int], None] | None = None) -> list[tuple[Likelihood, ...]]:
    """Return the likelihood of every continuation of every question, in order.

    Args:
        model: any.
        questions: prompts of at least one token.
        progress: told questions done and questions in all.

    Raises:
        NotFinite: the model is damaged.
    """
    results: list[tuple[Likelihood, ...]] = []
    if not questions:
        return results
    if not model.shares_tokens:
        return _score_apart(model, questions, progress)
    groups = _pack(questions, model.n_vocab)
    cells = max(sum(questions[index].cells for index in group) for group in groups)
    sequences = max(sum(max(1, len(questions[index].continuations)) for index in group) for group in groups)
    with open_context(model, ContextSpec(sequences=sequences, cells=-(-cells // 256) * 256)) as context:
        for group in groups:
            results += _score_group(context, [questions[index] for index in group])
            if progress is not None:
                progress(len(results), len(questions))
    return results


def _score_apart(model: Model, questions: Sequence[Question],
                 progress: Callable[[int, int], None] | None) -> list[tuple[Likelihood, ...]]:
    """Score every continuation with a prompt of its own, as a recurrent model needs it, one per decode."""
    cells = max(len(question.prompt) + max(map(len, question.continuations), default=0) for question in questions)
    results = []
    with open_context(model, ContextSpec(sequences=1, cells=-(-cells // 256) * 256, shared=False)) as context:
        for done, question in enumerate(questions, 1):
            results.append(tuple(
                _score_group(context, [Question(question.prompt, (continuation,))])[0][0]
                for continuation in question.continuations))
            if progress is not None:
                progress(done, len(questions))
    return results


def _score_group(context: Context, questions: Sequence[Question]) -> list[tuple[Likelihood, ...]]:
    """Score questions in one decode; a prompt's tokens belong to all its continuations."""
    tokens: list[int] = []
    positions: list[int] = []
    members: list[tuple[int, ...]] = []
    outputs: list[bool] = []
    sequence = row = 0
    rows: list[list[list[int]]] = []  # of every continuation, the rows of logits that predict its tokens

    def add(ids: Tokens, start: int, owners: tuple[int, ...], marks: Sequence[bool]) -> None:
        tokens.extend(int(token) for token in ids)
        positions.extend(range(start, start + len(ids)))
        members.extend([owners] * len(ids))
        outputs.extend(marks)

    for question in questions:
        owners = tuple(range(sequence, sequence + max(1, len(question.continuations))))
        sequence += len(owners)
        length = len(question.prompt)
        add(question.prompt, 0, owners, [False] * (length - 1) + [True])
        after_prompt, row = row, row + 1
        rows.append([])
        for owner, continuation in zip(owners, question.continuations, strict=False):
            fed = continuation[:-1]
            add(fed, length, (owner,), [True] * len(fed))
            rows[-1].append([after_prompt, *range(row, row + len(fed))][:len(continuation)])
            row += len(fed)
    context.clear()
    logits = context.decode(tokens, positions, members, outputs)
    return [tuple(_likelihood(logits[place], continuation)
                  for place, continuation in zip(places, question.continuations, strict=True))
            for places, question in zip(rows, questions, strict=True)]


def _likelihood(logits: Floats, targets: Tokens) -> Likelihood:
    if not len(targets):
        return Likelihood(0.0, 0, ())
    values = np.take_along_axis(log_softmax(logits), targets[:, None].astype(np.int64), 1)[:, 0]
    if not np.isfinite(values).all():
        raise NotFinite("The model computes values that are not finite: its weights are damaged.")
    each = tuple(float(value) for value in values.astype(np.float64))
    return Likelihood(sum(each), len(each), each, int((logits.argmax(axis=1) == targets).sum()))
