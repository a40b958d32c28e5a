"""A loaded model and its contexts, with every resource freed on leaving the `with` block."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loops.engine.gguf_check import find_shards, read_header
from loops.engine.gguf_header import any_quantized
from loops.engine.native import EngineFailed, library, log
from loops.engine.options import EngineOptions

Tokens = NDArray[np.int32]


class ModelNotLoaded(EngineFailed):
    """The engine could not load the model."""

    exit_code = 33


class NotFinite(EngineFailed):
    """The model computes values that are not finite numbers."""

    exit_code = 34


class OutOfMemory(EngineFailed):
    """There is not enough memory for this model and context."""

    exit_code = 35


@dataclass(frozen=True)
class ContextSpec:
    """The size of a context.

    Attributes:
        sequences: sequences that it holds at once.
        cells: tokens that it holds, over all sequences.
        shared: one cache for all sequences, so that a token may belong to several of them;
            otherwise each sequence has its own part of `cells / sequences` tokens.
        outputs: most rows of logits computed at once.
    """

    sequences: int
    cells: int
    shared: bool = True
    outputs: int = 0


class Model:
    """A model in memory. Use `load_model`, which frees it."""

    def __init__(self, pointer: Any, path: Path, options: EngineOptions) -> None:
        lib = library()
        self.pointer, self.path, self.options = pointer, path, options
        self.vocab = lib.llama_model_get_vocab(pointer)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self.n_parameters: int = lib.llama_model_n_params(pointer)
        self.n_bytes: int = lib.llama_model_size(pointer)
        self.n_context: int = lib.llama_model_n_ctx_train(pointer)
        self.bos: int = lib.llama_vocab_bos(self.vocab)
        self.eos: int = lib.llama_vocab_eos(self.vocab)
        # a recurrent state cannot belong to several sequences, so their tokens cannot be shared either
        self.shares_tokens: bool = not (lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer))
        self.add_bos: bool = lib.llama_vocab_get_add_bos(self.vocab) and self.bos >= 0

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> Tokens:
        """Return the token ids of text, int32 of shape (n,).

        Args:
            text: any text.
            add_bos: put the beginning-of-sequence token in front where the model wants one.
            special: read markers such as `</s>` as control tokens, not as text.
        """
        data = text.encode()
        room = len(data) + 16
        for _ in range(2):
            tokens = np.empty(room, dtype=np.int32)
            count = library().llama_tokenize(
                self.vocab, data, len(data), tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                room, add_bos, special)
            if count >= 0:
                return tokens[:count].copy()
            room = -count
        raise EngineFailed(f"The tokenizer of {self.path.name} failed on a text of {len(data)} bytes.")

    def text_of(self, tokens: Sequence[int] | Tokens) -> str:
        """Return the text of tokens; control tokens become nothing."""
        buffer = ctypes.create_string_buffer(256)
        pieces = []
        for token in tokens:
            size = library().llama_token_to_piece(self.vocab, int(token), buffer, 256, 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = library().llama_token_to_piece(self.vocab, int(token), buffer, -size, 0, False)
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        """Tell whether token ends a turn or the text."""
        return bool(library().llama_vocab_is_eog(self.vocab, token))

    def metadata(self, key: str) -> str | None:
        """Return the metadata value of key as text, None where the file has none."""
        size = 1024
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            length = library().llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode(errors="replace")
            size = length + 1
        return None

    def token_text(self, token: int) -> str:
        """Return how the vocabulary writes token, control tokens included; '' for none."""
        if not 0 <= token < self.n_vocab:
            return ""
        return str(library().llama_vocab_get_text(self.vocab, token).decode(errors="replace"))


def _is_repacked(path: Path, options: EngineOptions) -> bool:
    """Tell whether loading copies weights, so that a memory-mapped file would be in memory twice.

    Extra buffers hold quantized weights in another order. A model that is not quantized, or whose
    layers go to a GPU, stays mapped: its pages are shared with other processes.
    """
    return options.extra_buffers and options.gpu_layers == 0 and any(
        any_quantized(read_header(shard).tensors) for shard in find_shards(path))


@contextmanager
def load_model(path: Path, options: EngineOptions,
               progress: Callable[[float], None] | None = None, *, mapped: bool = True) -> Iterator[Model]:
    """Load the GGUF at path and free it afterwards.

    Args:
        path: a file that passed the GGUF check; the first shard of a sharded model.
        options: how the engine runs.
        progress: told the loaded share, 0 to 1.
        mapped: let the file be a map of memory where that saves some; without one the weights can be written to.

    Raises:
        ModelNotLoaded: with the library's reason.
        GgufRefused: the file is none that passed.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = options.gpu_layers
    params.use_extra_bufts = options.extra_buffers
    if not mapped or _is_repacked(path, options):
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE

    def report(share: float, _user_data: object) -> bool:
        if progress is not None:
            progress(share)
        return True

    callback = lib.llama_progress_callback(report)
    params.progress_callback = callback
    log.forget()
    pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not pointer:
        raise ModelNotLoaded(f"{path.name} does not load: {log.reason('the engine gives no reason')}.")
    try:
        if lib.llama_model_has_encoder(pointer) or not lib.llama_model_has_decoder(pointer):
            raise ModelNotLoaded(f"{path.name} is no decoder-only language model: it cannot generate text by itself.")
        yield Model(pointer, path, options)
    finally:
        lib.llama_model_free(pointer)


class Context:
    """Key-value memory of a model and one reusable batch. Use `open_context`, which frees it."""

    def __init__(self, model: Model, pointer: Any, spec: ContextSpec) -> None:
        self.model, self.pointer, self.spec = model, pointer, spec
        self._memory = library().llama_get_memory(pointer)
        self._batch = library().llama_batch_init(spec.cells, 0, spec.sequences)

    def free(self) -> None:
        """Give the memory back."""
        library().llama_batch_free(self._batch)
        library().llama_free(self.pointer)

    def clear(self) -> None:
        """Forget every sequence."""
        library().llama_memory_clear(self._memory, True)

    def decode(self, tokens: Sequence[int] | Tokens, positions: Sequence[int] | Tokens,
               sequences: Sequence[Sequence[int]], outputs: Sequence[bool] | NDArray[np.bool_],
               ) -> NDArray[np.float32]:
        """Compute tokens in one batch and return the logits of those marked.

        Args:
            tokens: ids, length n, at most `spec.cells`.
            positions: place of each token in its sequences, length n.
            sequences: the sequences each token belongs to, length n.
            outputs: which tokens to return logits for, length n.

        Returns:
            float32 of shape (marked tokens, vocabulary), a view that the next call overwrites.

        Raises:
            OutOfMemory: the cache has no room.
            EngineFailed: the library's reason.
        """
        lib, batch, n = library(), self._batch, len(tokens)
        if n > self.spec.cells:  # the batch's arrays are of that size, and nothing else guards their ends
            raise OutOfMemory(f"The context of {self.spec.cells} tokens has no room for {n}.")
        batch.n_tokens = n
        ids, places = np.asarray(tokens, dtype=np.int32), np.asarray(positions, dtype=np.int32)
        marks = np.asarray(outputs, dtype=np.int8)
        np.ctypeslib.as_array(batch.token, (n,))[:] = ids
        np.ctypeslib.as_array(batch.pos, (n,))[:] = places
        np.ctypeslib.as_array(batch.logits, (n,))[:] = marks
        for index, members in enumerate(sequences):
            batch.n_seq_id[index] = len(members)
            row = batch.seq_id[index]
            for place, member in enumerate(members):
                row[place] = member
        log.forget()
        status = lib.llama_decode(self.pointer, batch)
        if status == 1:
            raise OutOfMemory(f"The context of {self.spec.cells} tokens has no room for {n} more.")
        if status != 0:
            raise EngineFailed(f"Decoding failed: {log.reason(f'status {status}')}.")
        rows = int(marks.sum())
        if rows == 0:
            return np.empty((0, self.model.n_vocab), dtype=np.float32)
        address = ctypes.cast(lib.llama_get_logits(self.pointer), ctypes.POINTER(ctypes.c_float))
        if not address:
            raise EngineFailed(f"{self.model.path.name} computes no logits: it is no model that generates text.")
        return np.ctypeslib.as_array(address, shape=(rows, self.model.n_vocab))


@contextmanager
def open_context(model: Model, spec: ContextSpec,
                 observe: Callable[[int, bool, object], bool] | None = None) -> Iterator[Context]:
    """Make a context of the given size for model and free it afterwards.

    Args:
        model: loaded.
        spec: the size.
        observe: shown every node of the graph, by address: before it is computed, when it answers whether to be shown
            it again, and after that, when it answers whether to go on.

    Raises:
        OutOfMemory: the library cannot allocate it.
    """
    lib, options = library(), model.options
    params = lib.llama_context_default_params()
    params.n_ctx = spec.cells
    params.n_batch = spec.cells
    params.n_ubatch = min(options.ubatch, spec.cells)
    params.n_seq_max = spec.sequences
    params.n_outputs_max = min(spec.outputs, params.n_ubatch)  # bounds the graph's logits buffer
    params.n_threads = params.n_threads_batch = options.thread_count
    params.kv_unified = spec.shared
    params.swa_full = True
    params.no_perf = True
    if observe is not None:  # the library holds the address only: `callback` has to live as long as the context
        callback = lib.ggml_backend_sched_eval_callback(observe)
        params.cb_eval = callback
    log.forget()
    pointer = lib.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise OutOfMemory(f"A context of {spec.cells} tokens for {model.path.name} cannot be made: "
                          f"{log.reason('not enough memory')}.")
    context = Context(model, pointer, spec)
    try:
        yield context
    finally:
        context.free()


def check_finite(model: Model) -> None:
    """Decode a few dozen tokens and refuse a model whose logits are not finite or all equal.

    Raises:
        NotFinite: with what was seen.
    """
    length = min(32, model.n_context)
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, model.n_vocab, length, dtype=np.int32)
    if model.bos >= 0:
        tokens[0] = model.bos
    with open_context(model, ContextSpec(sequences=1, cells=max(length, 32), shared=False)) as context:
        logits = context.decode(tokens, range(length), [(0,)] * length, [True] * length)
        low, high = float(logits.min()), float(logits.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotFinite(f"{model.path.name} computes values that are not finite: its weights are damaged.")
    if low == high:
        raise NotFinite(f"{model.path.name} gives every token the same logit {low:g}: its weights are empty.")
