"""Perplexity and KL divergence of a model against its unquantized original.

The procedure is llama-perplexity's (tools/perplexity/perplexity.cpp): the text is cut into
windows of 512 tokens, the beginning-of-sequence token replaces the first of each, and the
predictions of the second half are scored. Unlike it, windows run many per decode, and the
original's log-probabilities are kept as 32-bit floats: a model against itself has divergence 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loops.engine.logits import Floats, kl_divergence, log_rest, log_softmax
from loops.engine.model import Context, ContextSpec, Model, NotFinite, Tokens, open_context
from loops.engine.options import physical_cores
from loops.engine.scratch import load_array, save_array
from loops.engine.windows import FIRST_SCORED, ROWS, WINDOW, Windows
from state.faults import failpoint

Progress = Callable[[int, int], None]

SLICE_ROWS = 32  #: rows turned into log-probabilities at once by one thread
PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def _decode_windows(context: Context, windows: Tokens) -> Floats:
    """Return the logits of the scored half, float32 of shape (windows * ROWS, vocabulary)."""
    count = len(windows)
    context.clear()
    mark = np.zeros(WINDOW, dtype=np.bool_)
    mark[FIRST_SCORED:WINDOW - 1] = True
    members = [(sequence,) for sequence in range(count) for _ in range(WINDOW)]
    return context.decode(windows.ravel(), np.tile(np.arange(WINDOW, dtype=np.int32), count), members,
                          np.tile(mark, count))


def _rows(total: int) -> list[slice]:
    return [slice(start, min(start + SLICE_ROWS, total)) for start in range(0, total, SLICE_ROWS)]


class BaselineStore:
    """The original's log-probabilities on disk, one file per group, read through memory maps.

    All of them are kept while they fit into budget_bytes. Beyond it, each row keeps its `top`
    most probable tokens and the probability of the rest in one lump; by the log-sum inequality
    the divergence so computed is a lower bound, and how far off it is gets measured on the
    first group, which is always kept whole.
    """

    def __init__(self, folder: Path, windows: Windows, n_vocab: int, budget_bytes: int) -> None:
        self.folder, self.windows, self.n_vocab = folder, windows, n_vocab
        full = windows.scored * n_vocab * 4
        self.top = 0 if full <= budget_bytes else max(64, min(n_vocab // 2, budget_bytes // (windows.scored * 8)))
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def n_bytes(self) -> int:
        """Bytes that the finished store takes on disk."""
        if not self.top:
            return self.windows.scored * self.n_vocab * 4
        first = len(self.windows.group(0)) * ROWS
        return self.windows.scored * (self.top * 8 + 4) + first * self.n_vocab * 4

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05d}.npy"

    def has(self, index: int) -> bool:
        """Tell whether group index is complete, each of its files readable."""
        rows = len(self.windows.group(index)) * ROWS
        shapes = {"scalars": (rows, 2)}
        if not self.top or index == 0:
            shapes["full"] = (rows, self.n_vocab)
        if self.top:
            shapes |= {"ids": (rows, self.top), "best": (rows, self.top + 1)}
        found = {kind: load_array(self._file(kind, index), mapped=True) for kind in shapes}
        return all(array is not None and array.shape == shapes[kind] for kind, array in found.items())

    def write(self, index: int, logits: Floats, targets: Tokens) -> None:
        """Keep one group.

        Args:
            index: of the group.
            logits: of the original, shape (rows, vocabulary).
            targets: the tokens that really came, shape (rows,).
        """
        rows = len(logits)
        whole = not self.top or index == 0
        full = np.empty((rows, self.n_vocab) if whole else (0, self.n_vocab), dtype=np.float32)
        ids = np.empty((rows, self.top), dtype=np.int32)
        best = np.empty((rows, self.top + 1), dtype=np.float32)
        scalars = np.empty((rows, 2), dtype=np.float64)  # log-probability of the target, most probable token

        def fill(part: slice) -> None:
            values = log_softmax(logits[part])
            if whole:
                full[part] = values
            scalars[part, 0] = np.take_along_axis(values, targets[part, None].astype(np.int64), 1)[:, 0]
            scalars[part, 1] = values.argmax(axis=1)
            if self.top:
                chosen = np.argpartition(values, -self.top, axis=1)[:, -self.top:]
                ids[part] = chosen
                best[part, :-1] = np.take_along_axis(values, chosen, 1)
                best[part, -1] = log_rest(best[part, :-1])

        _in_threads(fill, rows)
        if not np.isfinite(scalars).all():
            raise NotFinite("The unquantized model computes values that are not finite: its weights are damaged.")
        if whole:
            save_array(self._file("full", index), full)
        if self.top:
            save_array(self._file("ids", index), ids)
            save_array(self._file("best", index), best)
        save_array(self._file("scalars", index), scalars)

    def perplexity(self) -> dict[str, float]:
        """Return the original's perplexity, its standard error and the number of scored tokens."""
        nll = -np.concatenate([np.load(self._file("scalars", index))[:, 0] for index in range(self.windows.groups)])
        mean, error = _mean_and_error(nll)
        ppl = _perplexity(mean)
        return {"ppl": ppl, "ppl_error": ppl * error, "tokens": float(len(nll))}

    def compare(self, index: int, logits: Floats, targets: Tokens) -> NDArray[np.float64]:
        """Compare a model's logits of group index to the original's.

        Returns:
            float64 of shape (rows, 6): negative log-likelihood of the target under the model and under
            the original, KL divergence, change of the target's probability, 1 where the most probable
            token is the same, and the truncated divergence where both could be computed (else NaN).
        """
        scalars = np.load(self._file("scalars", index))
        full = load_array(self._file("full", index), mapped=True)
        ids = load_array(self._file("ids", index), mapped=True)
        best = load_array(self._file("best", index), mapped=True)
        result = np.full((len(logits), 6), np.nan)

        def fill(part: slice) -> None:
            values = log_softmax(logits[part])
            target = np.take_along_axis(values, targets[part, None].astype(np.int64), 1)[:, 0].astype(np.float64)
            result[part, 0], result[part, 1] = -target, -scalars[part, 0]
            result[part, 3] = np.exp(target) - np.exp(scalars[part, 0])
            result[part, 4] = values.argmax(axis=1) == scalars[part, 1]
            if ids is not None and best is not None:
                base = best[part]
                mine = np.take_along_axis(values, ids[part].astype(np.int64), 1)
                joined = np.concatenate([mine, log_rest(mine)[:, None]], axis=1)
                result[part, 5] = kl_divergence(base, joined)
            result[part, 2] = kl_divergence(full[part], values) if full is not None else result[part, 5]

        _in_threads(fill, len(logits))
        if not np.isfinite(result[:, :5]).all():
            raise NotFinite("The model computes values that are not finite: its weights are damaged.")
        return result


def _in_threads(fill: Callable[[slice], None], rows: int) -> None:
    with ThreadPoolExecutor(physical_cores()) as pool:
        for done in [pool.submit(fill, part) for part in _rows(rows)]:
            done.result()


def _targets(windows: Tokens) -> Tokens:
    return windows[:, FIRST_SCORED + 1:].ravel()


def _logits_of_groups(model: Model, windows: Windows, wanted: list[int]) -> Iterator[tuple[int, Floats, Tokens]]:
    if not wanted:
        return
    size = min(windows.per_decode, len(windows.tokens))
    with open_context(model, ContextSpec(sequences=size, cells=size * WINDOW, shared=False)) as context:
        for index in wanted:
            group = windows.group(index)
            yield index, _decode_windows(context, group), _targets(group)


def measure_baseline(model: Model, store: BaselineStore, progress: Progress | None = None) -> None:
    """Compute the original's log-probabilities, group by group, skipping groups already kept.

    Raises:
        NotFinite: the original is damaged.
    """
    windows = store.windows
    missing = [index for index in range(windows.groups) if not store.has(index)]
    for count, (index, logits, targets) in enumerate(_logits_of_groups(model, windows, missing), 1):
        store.write(index, logits, targets)
        failpoint("baseline.group")
        if progress is not None:
            progress(windows.groups - len(missing) + count, windows.groups)


@dataclass(frozen=True)
class Divergence:
    """What llama-perplexity prints with --kl-divergence; errors are standard errors of the mean.

    Perplexities are of the model (`ppl`) and of the original (`ppl_base`). Divergences are in
    nats per token. Delta p is the change of the probability of the token that really came.

    Attributes:
        tokens: scored predictions.
        kld_truncation: how much the stored truncation lowers the mean divergence, measured on the
            first group; 0 when nothing was truncated.
    """

    tokens: int
    ppl: float
    ppl_error: float
    ppl_base: float
    ppl_base_error: float
    ln_ppl_ratio: float
    ln_ppl_ratio_error: float
    ppl_ratio: float
    ppl_ratio_error: float
    ppl_difference: float
    ppl_difference_error: float
    ln_ppl_correlation: float
    kld: float
    kld_error: float
    kld_median: float
    kld_max: float
    kld_min: float
    kld_percentiles: dict[str, float]
    kld_truncation: float
    delta_p: float
    delta_p_error: float
    delta_p_median: float
    delta_p_max: float
    delta_p_min: float
    delta_p_percentiles: dict[str, float]
    delta_p_rms: float
    delta_p_rms_error: float
    same_top: float
    same_top_error: float

    def as_json(self) -> dict[str, object]:
        """Return a dict that json can write."""
        return asdict(self)


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(max(1, n - 1)))


def _perplexity(nll: float) -> float:
    """Return the perplexity of a mean negative log-likelihood.

    Raises:
        NotFinite: it is too large for a number.
    """
    if nll > 700:
        raise NotFinite(f"The model gives the text e^-{nll:.0f} per token: its weights are damaged.")
    return math.exp(nll)


def summarise(rows: NDArray[np.float64]) -> Divergence:
    """Reduce the rows of `BaselineStore.compare` to statistics.

    The formulas are those of kl_divergence() in tools/perplexity/perplexity.cpp; errors of products
    and ratios are propagated to first order.
    """
    nll, nll_base, kld, delta_p = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]
    n = len(rows)
    ln_ppl, ln_error = _mean_and_error(nll)
    ln_base, ln_base_error = _mean_and_error(nll_base)
    covariance = float(((nll * nll_base).mean() - ln_ppl * ln_base) / max(1, n - 1))
    ratio_variance = ln_error ** 2 + ln_base_error ** 2 - 2 * covariance
    ratio_error = math.sqrt(max(0.0, ratio_variance))
    ppl, base = _perplexity(ln_ppl), _perplexity(ln_base)
    difference_variance = ((ppl * ln_error) ** 2 + (base * ln_base_error) ** 2 - 2 * ppl * base * covariance)
    mean_kld, kld_error = _mean_and_error(kld)
    mean_dp, dp_error = _mean_and_error(delta_p)
    square, square_error = _mean_and_error(delta_p ** 2)
    rms = math.sqrt(square)
    same = float(rows[:, 4].mean())
    gap = (rows[:, 2] - rows[:, 5])[np.isfinite(rows[:, 5])]

    def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
        return {f"{p:g}": float(np.percentile(values, p)) for p in PERCENTILES}

    return Divergence(
        tokens=n, ppl=ppl, ppl_error=ppl * ln_error, ppl_base=base, ppl_base_error=base * ln_base_error,
        ln_ppl_ratio=ln_ppl - ln_base, ln_ppl_ratio_error=ratio_error,
        ppl_ratio=math.exp(ln_ppl - ln_base), ppl_ratio_error=math.exp(ln_ppl - ln_base) * ratio_error,
        ppl_difference=ppl - base, ppl_difference_error=math.sqrt(max(0.0, difference_variance)),
        ln_ppl_correlation=covariance / (ln_error * ln_base_error) if ln_error and ln_base_error else 1.0,
        kld=mean_kld, kld_error=kld_error, kld_median=float(np.median(kld)), kld_max=float(kld.max()),
        kld_min=float(kld.min()), kld_percentiles=percentiles(kld),
        kld_truncation=float(gap.max(initial=0.0) and gap[gap != 0].mean()) if len(gap) else 0.0,
        delta_p=mean_dp, delta_p_error=dp_error, delta_p_median=float(np.median(delta_p)),
        delta_p_max=float(delta_p.max()), delta_p_min=float(delta_p.min()), delta_p_percentiles=percentiles(delta_p),
        delta_p_rms=rms, delta_p_rms_error=0.5 * square_error / rms if rms else 0.0,
        same_top=same, same_top_error=math.sqrt(same * (1 - same) / max(1, n - 1)))


def measure_divergence(model: Model, store: BaselineStore, folder: Path,
                       progress: Progress | None = None) -> Divergence:
    """Measure model against the original whose log-probabilities store holds.

    Each group is checkpointed in folder; groups found there are not computed again, and the
    statistics come out the same to the last digit.

    Args:
        model: a quantization of the original, or the original itself.
        store: complete.
        folder: for checkpoints; named by a fingerprint of everything that matters.
        progress: told groups done and groups in all.

    Raises:
        NotFinite: the model is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    windows = store.windows
    files = [folder / f"group-{index:05d}.npy" for index in range(windows.groups)]
    missing = [index for index, file in enumerate(files) if load_array(file) is None]
    for count, (index, logits, targets) in enumerate(_logits_of_groups(model, windows, missing), 1):
        save_array(files[index], store.compare(index, logits, targets))
        failpoint("divergence.group")
        if progress is not None:
            progress(windows.groups - len(missing) + count, windows.groups)
    return summarise(np.concatenate([np.load(file) for file in files]))
