"""Metrics of many rows with their intervals, and differences between models.

All are ratios of sums over rows, or functions of such sums, so one seeded bootstrap over rows serves them all
(percentile interval of 95 %, Efron and Tibshirani 1993, chapter 13): corpus BLEU and perplexity are computed anew from
the sums of every resample, and two models are compared on the same resamples.

Limits: a percentile interval over a dozen rows is too narrow; intervals are not corrected for the number of metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loops.answers import overlap

RESAMPLES = 2000
CONFIDENCE = 0.95
LARGEST = 700.0  #: nats per token, beyond which a perplexity is no number

_SCORES = {name: 1 + at for at, name in enumerate(overlap.METRICS)}
_BLEU = slice(1 + len(_SCORES), 11 + len(_SCORES))
_NLL, _TOKENS, _FORESEEN, _ANSWER_TOKENS, _SIMILARITY, _COMPARED = range(_BLEU.stop, _BLEU.stop + 6)
WIDTH = _COMPARED + 1

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A metric over some rows.

    Attributes:
        value: of all rows.
        low: lower bound of its 95 % interval; None for a single row.
        high: upper bound.
        n: rows that it is about.
        higher_is_better: or lower is.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What a model did with one row.

    Attributes:
        nll: negative log-likelihood of the reference, in nats.
        tokens: of the reference.
        foreseen: of them, those that were the most probable.
        overlap: of the reply with the reference; None for a text, which has no reply.
        similarity: of their meanings, -1 to 1; None where it was not measured.
    """

    nll: float
    tokens: int
    foreseen: int
    overlap: overlap.Overlap | None = None
    similarity: float | None = None

    def row(self) -> list[float]:
        """Return what of it is added up, of length `WIDTH`."""
        if self.overlap is None:
            return [0.0] * _NLL + [self.nll, self.tokens, 0.0, 0.0, 0.0, 0.0]
        return [1.0, *(self.overlap.scores[name] for name in _SCORES), *self.overlap.bleu, self.nll, self.tokens,
                self.foreseen, self.tokens, self.similarity or 0.0, float(self.similarity is not None)]


@dataclass(frozen=True)
class _Form:
    """How a metric is made of sums: its function, the column that counts its rows, its direction."""

    of: Callable[[Sums], NDArray[np.float64]]
    counted: int
    higher_is_better: bool = True


def _ratio(over: int, under: int) -> Callable[[Sums], NDArray[np.float64]]:
    def of(sums: Sums) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            found: NDArray[np.float64] = sums[:, over] / sums[:, under]
        return found

    return of


def _perplexity(sums: Sums) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.exp(np.minimum(_ratio(_NLL, _TOKENS)(sums), LARGEST))
    return found


#: by name, in the order in which they are shown
FORMS: Mapping[str, _Form] = {
    "loss": _Form(_ratio(_NLL, _TOKENS), _TOKENS, higher_is_better=False),
    "perplexity": _Form(_perplexity, _TOKENS, higher_is_better=False),
    "token_accuracy": _Form(_ratio(_FORESEEN, _ANSWER_TOKENS), _ANSWER_TOKENS),
    **{name: _Form(_ratio(at, 0), 0) for name, at in _SCORES.items() if name != "bleu"},
    "bleu": _Form(lambda sums: np.where(sums[:, 0] > 0, overlap.bleu_of(sums[:, _BLEU]), np.nan), 0),
    "sentence_bleu": _Form(_ratio(_SCORES["bleu"], 0), 0),
    "semantic_similarity": _Form(_ratio(_SIMILARITY, _COMPARED), _COMPARED),
}


def _table(rows: Sequence[Measured]) -> NDArray[np.float64]:
    return np.asarray([row.row() for row in rows], dtype=np.float64).reshape(len(rows), WIDTH)


def _resampled(tables: Sequence[NDArray[np.float64]], seed: int) -> Iterator[list[Sums]]:
    """Yield the sums of resamples of the same rows of every table, some hundred at a time."""
    n = len(tables[0])
    rng = np.random.default_rng(seed)
    step = max(1, min(RESAMPLES, (16 << 20) // (8 * n)))
    for start in range(0, RESAMPLES, step):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(step, RESAMPLES - start)).astype(np.float64)
        yield [times @ table for table in tables]


def _interval(values: NDArray[np.float64], value: float) -> tuple[float, float]:
    """Return the percentile interval, which never leaves the value itself outside."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return min(value, float(low)), max(value, float(high))


def summarise(rows: Sequence[Measured], *, seed: int = 0) -> dict[str, Metric]:
    """Return every metric that the rows have, by name; none for no rows."""
    if not rows:
        return {}
    table = _table(rows)
    total = table.sum(axis=0, keepdims=True)
    sums = np.concatenate([found for (found,) in _resampled([table], seed)]) if len(rows) > 1 else None
    metrics = {}
    for name, form in FORMS.items():
        n = int((table[:, form.counted] > 0).sum())
        if not n:
            continue
        value = float(form.of(total)[0])
        low, high = _interval(form.of(sums), value) if sums is not None and n > 1 else (None, None)
        metrics[name] = Metric(value, low, high, n, form.higher_is_better)
    return metrics


@dataclass(frozen=True)
class Difference:
    """How far a second model is from a first, on the rows that both have.

    Attributes:
        value: second less first.
        low: lower bound of its 95 % interval; None for a single row.
        high: upper bound.
        n: rows.
        clear: the interval leaves 0 out.
        better: `first`, `second`, or empty where it is not clear.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clear: bool
    better: str

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def differ(first: Sequence[Measured], second: Sequence[Measured], *, seed: int = 0) -> dict[str, Difference]:
    """Return the paired difference of every metric that both have.

    Args:
        first: rows of one model.
        second: the same rows of another, in the same order.
        seed: of the resamples.
    """
    if not first or len(first) != len(second):
        return {}
    tables = [_table(rows) for rows in (first, second)]
    totals = [table.sum(axis=0, keepdims=True) for table in tables]
    drawn = list(_resampled(tables, seed)) if len(first) > 1 else []
    sums = [np.concatenate([found[side] for found in drawn]) for side in (0, 1)] if drawn else None
    differences = {}
    for name, form in FORMS.items():
        n = int(((tables[0][:, form.counted] > 0) & (tables[1][:, form.counted] > 0)).sum())
        if not n:
            continue
        value = float(form.of(totals[1])[0] - form.of(totals[0])[0])
        low, high = (_interval(form.of(sums[1]) - form.of(sums[0]), value) if sums is not None and n > 1
                     else (None, None))
        clear = low is not None and high is not None and (low > 0 or high < 0)
        ahead = "second" if (value > 0) == form.higher_is_better else "first"
        differences[name] = Difference(value, low, high, n, clear, ahead if clear else "")
    return differences
