"""Logits and log-probabilities: rows of one number per token of the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities of rows of logits, float32 of the same shape (rows, vocabulary)."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def log_rest(kept: Floats) -> Floats:
    """Return the log of the probability that rows of log-probabilities leave out, shape (rows,)."""
    rest = 1.0 - np.exp(kept.astype(np.float64)).sum(axis=1)
    logs: Floats = np.log(np.maximum(rest, 1e-12)).astype(np.float32)
    return logs


def kl_divergence(base: Floats, other: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence D(base || other) in nats of rows of log-probabilities."""
    terms: NDArray[np.float64] = (np.exp(base) * (base - other)).sum(axis=1, dtype=np.float64)
    return terms
