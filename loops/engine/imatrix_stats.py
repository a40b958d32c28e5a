"""Which weight matrices and layers matter most to a text, and what of the model the text never reached.

The figures are those of `llama-imatrix --show-statistics` (compute_statistics() in tools/imatrix/imatrix.cpp),
computed in 64-bit floats instead of 32-bit ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from loops.engine.gguf_header import TensorInfo
from loops.engine.imatrix_file import Entry, Imatrix

ACTIVE = 1e-5  #: a column whose mean square is not above this counts as inactive, as in llama.cpp

_LAYER = re.compile(r"blk\.(\d+)\.")
#: matrices of a layer that llama.cpp never quantizes (tensor_allows_quantization() in src/llama-quant.cpp)
_NEVER_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|ssm_conv1d|shortconv\.conv|"
    r"indexer\.[kq]_proj|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.|attn_rel_b")


@dataclass(frozen=True)
class TensorStatistics:
    """How the activations that met one weight matrix were spread. Experts never seen are left out.

    Attributes:
        name: of the weight matrix.
        layer: its number, None outside the layers.
        total: sum over the columns of the mean square activation.
        share: of the sum of `total` over all matrices, 0 to 1.
        mean: of the mean squares; `smallest`, `largest` and `deviation` are of the same numbers.
        active: share of columns whose mean square is above `ACTIVE`.
        columns: how many there are.
        entropy: of the columns' shares in `total`, in bits; log2 of `columns` when all matter alike.
        evenness: `entropy` in units of that most, 0 to 1.
        outliers: share of columns more than one standard deviation above the mean.
        likeness: cosine of the sums with those of the same matrix one layer before, None without one.
        experts: how many matrices are counted separately, 1 for a plain one.
        experts_seen: how many of them met anything.
        tokens: rows added up, over all experts.
    """

    name: str
    layer: int | None
    total: float
    share: float
    mean: float
    smallest: float
    largest: float
    deviation: float
    active: float
    columns: int
    entropy: float
    evenness: float
    outliers: float
    likeness: float | None
    experts: int
    experts_seen: int
    tokens: int

    def as_json(self) -> dict[str, object]:
        """Return a dict that json can write."""
        return asdict(self)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer: the sum over its matrices of `total`, its share of all layers', and the columns' mean outliers."""

    layer: int
    total: float
    share: float
    outliers: float

    def as_json(self) -> dict[str, object]:
        """Return a dict that json can write."""
        return asdict(self)


@dataclass(frozen=True)
class Coverage:
    """What of the model's matrices an importance matrix knows.

    Attributes:
        tensors: matrices in the layers that quantizing changes.
        missing: those of them that met nothing, in the model's order.
        missing_experts: where only some experts met something, the numbers of the others.
        experts: experts in all matrices that stack them and met something.
    """

    tensors: int
    missing: tuple[str, ...]
    missing_experts: Mapping[str, tuple[int, ...]]
    experts: int

    @property
    def is_complete(self) -> bool:
        """Whether every matrix and every expert met something."""
        return not self.missing and not self.missing_experts

    def __str__(self) -> str:
        if self.is_complete:
            return f"All {self.tensors} matrices were seen."
        said = []
        if self.missing:
            said.append(f"{len(self.missing)} of {self.tensors} matrices were never seen, {self.missing[0]} among them")
        if self.missing_experts:
            gone = sum(map(len, self.missing_experts.values()))
            name, numbers = next(iter(self.missing_experts.items()))
            said.append(f"{gone} of {self.experts} experts were never seen, number {numbers[0]} of {name} among them")
        return "; ".join(said) + ": give more text."


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to, None outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _likeness(imatrix: Imatrix, name: str, entry: Entry) -> float | None:
    layer = layer_of(name)
    before = imatrix.entries.get(_LAYER.sub(f"blk.{layer - 1}.", name, count=1)) if layer else None
    if before is None or len(before.sums) != len(entry.sums):
        return None
    mine, other = entry.sums.astype(np.float64), before.sums.astype(np.float64)
    length = float(np.linalg.norm(mine) * np.linalg.norm(other))
    return float(mine @ other) / length if length else None


def _seen_means(entry: Entry) -> NDArray[np.float64]:
    seen = entry.counts > 0
    rows = entry.sums.reshape(len(entry.counts), -1)[seen].astype(np.float64)
    means: NDArray[np.float64] = (rows / entry.counts[seen, None]).ravel()
    return means


def _statistics(imatrix: Imatrix, name: str, means: NDArray[np.float64], everything: float) -> TensorStatistics:
    entry, total = imatrix.entries[name], float(means.sum())
    parts = means[means > 0] / total if total else np.empty(0)
    entropy = float(-(parts * np.log2(parts)).sum())
    deviation = float(means.std())
    return TensorStatistics(
        name=name, layer=layer_of(name), total=total, share=total / everything if everything else 0.0,
        mean=float(means.mean()), smallest=float(means.min()), largest=float(means.max()), deviation=deviation,
        active=float((means > ACTIVE).mean()), columns=len(means), entropy=entropy,
        evenness=entropy / float(np.log2(len(means))) if len(means) > 1 else 1.0,
        outliers=float((means > means.mean() + deviation).mean()) if deviation else 0.0,
        likeness=_likeness(imatrix, name, entry), experts=len(entry.counts),
        experts_seen=int((entry.counts > 0).sum()), tokens=int(entry.counts.sum()))


def tensor_statistics(imatrix: Imatrix) -> list[TensorStatistics]:
    """Return the statistics of every matrix that met something, those that matter most first."""
    means = {name: _seen_means(entry) for name, entry in imatrix.entries.items() if entry.counts.any()}
    everything = float(sum(values.sum() for values in means.values()))
    found = [_statistics(imatrix, name, values, everything) for name, values in means.items()]
    return sorted(found, key=lambda one: (-one.total, one.name))


def layer_statistics(tensors: Iterable[TensorStatistics]) -> list[LayerStatistics]:
    """Sum the statistics of tensors up by layer, those that matter most first."""
    layers: dict[int, list[TensorStatistics]] = {}
    for one in tensors:
        if one.layer is not None:
            layers.setdefault(one.layer, []).append(one)
    everything = sum(one.total for members in layers.values() for one in members)
    found = []
    for layer, members in layers.items():
        total, columns = sum(one.total for one in members), sum(one.columns for one in members)
        found.append(LayerStatistics(layer, total, total / everything if everything else 0.0,
                                     sum(one.outliers * one.columns for one in members) / columns))
    return sorted(found, key=lambda one: (-one.total, one.layer))


def coverage(imatrix: Imatrix, tensors: Iterable[TensorInfo]) -> Coverage:
    """Tell which of a model's matrices and experts an importance matrix knows nothing of.

    Counted are the matrices inside the layers that llama.cpp would quantize: it quantizes the token
    embedding and the output without an importance matrix.
    """
    wanted = [tensor for tensor in tensors
              if layer_of(tensor.name) is not None and len(tensor.shape) > 1 and tensor.name.endswith("weight")
              and not _NEVER_QUANTIZED.search(tensor.name)]
    missing: list[str] = []
    missing_experts: dict[str, tuple[int, ...]] = {}
    experts = 0
    for tensor in wanted:
        entry = imatrix.entries.get(tensor.name)
        if entry is None or not entry.counts.any():
            missing.append(tensor.name)
            continue
        if len(entry.counts) > 1:
            experts += len(entry.counts)
            if unseen := tuple(int(number) for number in np.flatnonzero(entry.counts == 0)):
                missing_experts[tensor.name] = unseen
    return Coverage(len(wanted), tuple(missing), missing_experts, experts)
