"""Collect an importance matrix: what flows into every weight matrix while the model reads a text.

The procedure is llama-imatrix's (tools/imatrix/imatrix.cpp): the text is cut into chunks of 512 tokens, the
beginning-of-sequence token replaces the first of each, and for every weight matrix the squares of its input are
added up per column, row after row in 32-bit floats. The same additions in the same order give the same bits.

The engine calls back before each node of its graph and, where asked to, after it. The input is then read where
it lies, see `loops.engine.tensors`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loops.engine.imatrix_file import Counts, Entry, Imatrix, ImatrixRefused, Sums, read_imatrix, write_imatrix
from loops.engine.model import Context, ContextSpec, Model, NotFinite, open_context
from loops.engine.native import library
from loops.engine.tensors import F32, Tensor, ggml, values
from loops.engine.windows import WINDOW, Windows, tokens_in_windows
from state.faults import NightpressError, failpoint

Progress = Callable[[int, int], None]
_Key = tuple[int | None, int | None]

OUTPUTS = ("output.weight", "token_embd.weight")  #: the second multiplies only where it is the output as well
MIN_ROWS = 16  #: llama-imatrix passes over smaller multiplications, unless they are of experts
WORK_BYTES = 1 << 17  #: squares held at once: they should stay in the processor's cache


class CalibrationTooShort(NightpressError):
    """The calibration text is too short for an importance matrix; give more text."""

    exit_code = 76


def add_squares(total: Sums, rows: NDArray[np.float32]) -> None:
    """Add the squares of rows, float32 of shape (n, columns), to total, one row after the other."""
    step = max(1, WORK_BYTES // (4 * len(total)))
    work = np.empty((min(step, len(rows)) + 1, len(total)), dtype=np.float32)
    for start in range(0, len(rows), step):
        part = rows[start:start + step]
        used = work[:len(part) + 1]
        used[0] = total
        np.multiply(part, part, out=used[1:])
        np.add.reduce(used, axis=0, out=total)  # along the slow axis numpy adds row by row


def _weight_name(name: bytes) -> str:
    """Return the name of a weight without what a device puts around it: `CUDA0#blk.0.attn_k.weight#0`."""
    text = name.decode(errors="replace")
    return text.split("#")[1] if "#" in text else text


@dataclass
class _Recent:
    """The last input added up, because several matrices of a layer read the same one.

    Attributes:
        key: addresses of the input, and of the experts chosen for it.
        names: matrices that it was added to.
        before: sums of the first of them before.
        after: and after.
        counts: rows that came to each expert.
    """

    key: _Key
    names: set[str]
    before: Sums
    after: Sums
    counts: Counts


@dataclass
class Collector:
    """Adds up what flows into the weights while the engine computes; `observe` is the engine's callback.

    Attributes:
        entries: what was added up so far.
        problem: what stopped it; an exception cannot pass through the engine.
        with_output: look at the output matrix too.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    problem: BaseException | None = None
    with_output: bool = False
    _recent: _Recent | None = None

    def observe(self, address: int, ask: bool, _user_data: object) -> bool:
        """Answer whether a node is wanted; add up the input of one that was computed, and let the engine go on."""
        if self.problem is not None:
            return ask  # the engine stops where a node is wanted and the answer to it is False
        try:
            if ask:
                node = Tensor.from_address(address)
                return self._wants(node) and not self._shares(node)
            self._add(Tensor.from_address(address))
        except BaseException as problem:  # noqa: BLE001 - raised again by `check`
            self.problem = problem
            return False
        return True

    def check(self) -> None:
        """Raise what went wrong inside the engine."""
        if self.problem is not None:
            raise self.problem

    def _wants(self, node: Tensor) -> bool:
        if node.op == ggml().mul_mat_id:
            return True
        if node.op != ggml().mul_mat:
            return False
        fed = Tensor.from_address(node.src[1])
        name = _weight_name(Tensor.from_address(node.src[0]).name)
        return (fed.ne[1] >= MIN_ROWS and fed.type == F32
                and (name.startswith("blk.") or (self.with_output and name in OUTPUTS)))

    def _entry(self, node: Tensor) -> tuple[str, Entry, _Key]:
        """Return name and sums of the weights that node multiplies with, and what identifies its input."""
        by_expert = node.op == ggml().mul_mat_id
        weights = Tensor.from_address(node.src[0])
        name, matrices = _weight_name(weights.name), weights.ne[2] * weights.ne[3]
        if name not in self.entries:
            self.entries[name] = Entry(np.zeros(weights.ne[0] * matrices, dtype=np.float32),
                                       np.zeros(matrices if by_expert else 1, dtype=np.int64))
        return name, self.entries[name], (node.src[1], node.src[2] if by_expert else None)

    def _shares(self, node: Tensor) -> bool:
        """Add an input that was just added for another matrix, if it is the same; the engine need not stop for it."""
        name, entry, key = self._entry(node)
        recent = self._recent
        if (recent is None or recent.key != key or name in recent.names or len(recent.counts) != len(entry.counts)
                or not np.array_equal(recent.before, entry.sums)):
            return False
        entry.sums[:] = recent.after
        entry.counts[:] += recent.counts
        recent.names.add(name)
        return True

    def _add(self, node: Tensor) -> None:
        name, entry, key = self._entry(node)
        before, had = entry.sums.copy(), entry.counts.copy()
        if node.op == ggml().mul_mat_id:
            add_by_expert(entry, values(node.src[1], np.float32), values(node.src[2], np.int32))
        else:
            stacked = Tensor.from_address(node.src[0]).ne[3:1:-1]
            add_plain(entry, values(node.src[1], np.float32), (stacked[0], stacked[1]))
        if not np.isfinite(entry.sums).all():
            raise NotFinite(f"The model computes values that are not finite: they flow into {name}.")
        self._recent = _Recent(key, {name}, before, entry.sums.copy(), entry.counts - had)


def add_plain(entry: Entry, fed: NDArray[np.float32], stacked: tuple[int, int]) -> None:
    """Add an input of shape (n3, n2, rows, columns); it may meet several matrices in turn."""
    outer, inner = stacked
    sums = entry.sums.reshape(outer * inner, -1)
    for third in range(fed.shape[0]):
        for second in range(fed.shape[1]):
            add_squares(sums[(third % outer) * inner + second % inner], fed[third, second])
    entry.counts[:] += fed.shape[0] * fed.shape[1] * fed.shape[2] // (outer * inner)


def add_by_expert(entry: Entry, fed: NDArray[np.float32], chosen: NDArray[np.int32]) -> None:
    """Add each row to the experts chosen for it.

    Args:
        entry: of a matrix per expert.
        fed: shape (1, tokens, slots or 1, columns); with one row per token it goes to all its experts.
        chosen: numbers of the experts, shape (1, 1, tokens, slots).
    """
    sums = entry.sums.reshape(len(entry.counts), -1)
    rows = np.broadcast_to(fed[0], (*chosen.shape[2:], fed.shape[3])).transpose(1, 0, 2)
    slots = chosen[0, 0].T  # llama-imatrix takes all tokens' first expert before their second
    for expert in np.unique(slots):
        members = np.nonzero(slots == expert)
        add_squares(sums[expert], rows[members])
        entry.counts[expert] += len(members[0])


def cut_chunks(model: Model, text: str, *, special: bool = False, limit: int = 0) -> Windows:
    """Tokenize a calibration text and cut it into chunks of 512 tokens.

    Args:
        model: whose vocabulary to use.
        text: at least 1,024 tokens long, as llama.cpp demands too.
        special: read control-token markers in the text as control tokens.
        limit: most chunks to keep; 0 keeps all.

    Raises:
        CalibrationTooShort: saying how much there is and how much is needed.
    """
    chunks, count = tokens_in_windows(model, text, special=special, limit=limit, outputs=WINDOW)
    if count < 2 * WINDOW:
        raise CalibrationTooShort(f"The calibration text has {count} tokens, and an importance matrix needs at least "
                                  f"{2 * WINDOW}; give more text.")
    return chunks


def _compute(context: Context, chunks: NDArray[np.int32]) -> None:
    """Run chunks, shape (n, 512), through the model, every token an output: else the last layer skips most."""
    count = len(chunks)
    context.clear()
    context.decode(chunks.ravel(), np.tile(np.arange(WINDOW, dtype=np.int32), count),
                   [(sequence,) for sequence in range(count) for _ in range(WINDOW)],
                   np.ones(count * WINDOW, dtype=np.bool_))


def _source(model: Model, chunks: Windows, *, with_output: bool) -> str:
    """Name what a checkpoint was made from, as far as it is known here."""
    digest = hashlib.sha256(chunks.tokens.tobytes())
    digest.update(repr((chunks.per_decode, model.n_vocab, model.n_parameters, model.n_bytes, model.options)).encode())
    digest.update(b"with output" if with_output else b"")
    return digest.hexdigest()


def _resume(file: Path, source: str) -> Imatrix:
    """Return what the checkpoint in file holds, nothing where it is missing, damaged or of something else."""
    try:
        found = read_imatrix(file)
    except NightpressError:
        return Imatrix({}, (source,), 0, WINDOW)
    return found if found.datasets == (source,) else Imatrix({}, (source,), 0, WINDOW)


def collect_imatrix(model: Model, chunks: Windows, folder: Path, *, datasets: Sequence[str] = (),
                    with_output: bool = False, progress: Progress | None = None) -> Imatrix:
    """Collect the importance matrix of model from chunks, `chunks.per_decode` of them at once.

    The sums are checkpointed after each group of chunks. A run that was ended at any point goes on from
    there and comes to the same bits. Two settings of `per_decode` differ by float noise, and where three
    chunks are computed together, by the 6 rows that remain of them when the engine takes 512 at once: they
    are left out, as by llama-imatrix (`MIN_ROWS`). Held in memory, besides the model and a context of
    `512 * per_decode` tokens, are 4 bytes per column of every matrix (per expert): 5 MB for a plain
    model of 7 billion weights.

    Args:
        model: best the unquantized original.
        chunks: the text, see `cut_chunks`.
        folder: for the checkpoint; named by a fingerprint of everything that matters.
        datasets: names of the texts, to be kept in the result.
        with_output: also of the output matrix, as llama-imatrix with `--process-output`; unlike there, also where
            it is the matrix of the embeddings.
        progress: told chunks done and chunks in all.

    Raises:
        NotFinite: the model is damaged.
        OutOfMemory: the context cannot be made.
        DiskFull: the last checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, total = folder / "sums.gguf", len(chunks.tokens)
    done = _resume(file, _source(model, chunks, with_output=with_output))
    collector = Collector(dict(done.entries), with_output=with_output)
    if done.chunks < total:
        ggml()  # before the engine could call back
        size = min(chunks.per_decode, total)
        with open_context(model, ContextSpec(size, size * WINDOW, shared=False), collector.observe) as context:
            for index in range(done.chunks // chunks.per_decode, chunks.groups):
                group = chunks.group(index)
                _compute(context, group)
                collector.check()
                done = replace(done, entries=collector.entries, chunks=done.chunks + len(group))
                write_imatrix(file, done)
                failpoint("imatrix.group")
                if progress is not None:
                    progress(done.chunks, total)
    if not collector.entries:
        raise ImatrixRefused(f"{model.path.name} has no weight matrices that an importance matrix could describe.")
    return replace(done, datasets=tuple(datasets))


class NativeImatrix:
    """An importance matrix as `llama_model_quantize_params.imatrix` takes it; keep it alive during the call."""

    def __init__(self, imatrix: Imatrix) -> None:
        lib = library()
        self._kept = [(name.encode(), entry.weights()) for name, entry in imatrix.entries.items()]
        self.array = (lib.llama_model_imatrix_data * (len(self._kept) + 1))()  # the last one, all zero, ends it
        for slot, (name, weights) in zip(self.array, self._kept, strict=False):
            slot.name, slot.size = name, len(weights)
            slot.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
