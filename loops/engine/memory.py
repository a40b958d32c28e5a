"""What memory a model takes once a context is open: asked of the engine, which plans everything and allocates little.

Cache and compute buffers are what llama.cpp itself would allocate (`no_alloc` of llama_model_params, by which its own
`common/fit.cpp` decides what fits), so layers with a sliding window, recurrent layers and compressed caches are counted
as the engine has them. What a process takes besides is measured on this very process. The sum was between 4 % below and
2 % above what processes really took (benchmarks/README.md, "Levels").
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from loops.engine.gguf_check import CheckedModel
from loops.engine.model import ModelNotLoaded, OutOfMemory
from loops.engine.native import EngineFailed, library, log

DEFAULT_CELLS = 8192  #: context to plan for where nobody asks for another; less where the model was trained for less
UBATCH = 512  #: tokens computed at once, as by default in llama.cpp and here
TAKEN = 0.25  #: share of another machine's memory that its system and other programs are taken to use
MIB = 1 << 20

_CACHE = re.compile(r"^llama_(?:kv_cache|memory_recurrent)\S*: +size = +([\d.]+) MiB \(", re.MULTILINE)
_BUFFER = re.compile(r"(?:compute|output|state) buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class Room:
    """The memory of a machine, in bytes.

    Attributes:
        total: that it has.
        free: that other programs leave.
    """

    total: int
    free: int

    def fits(self, needed: int) -> str:
        """Return `yes` where so much is free, `tight` where the machine has it, but not free, else `no`."""
        return "yes" if needed <= self.free else "tight" if needed <= self.total else "no"


def room_of(total: int) -> Room:
    """Return the memory of a machine that is not this one, of which a quarter is taken to be in use."""
    return Room(total, round(total * (1 - TAKEN)))


@dataclass(frozen=True)
class ContextMemory:
    """What one sequence of a model takes besides the file of its weights, in bytes.

    Attributes:
        cells: tokens of context.
        cache: keys and values of all layers in F16, each layer keeping every token, and the state of recurrent layers.
        window_cache: the same where layers with a sliding window keep no more than it, as llama-server has them.
        compute: buffers of the computation.
        process: resident bytes of a process that has the engine and the model's vocabulary in memory, but no weights.
    """

    cells: int
    cache: int
    window_cache: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        """Bytes to be added to those of the weights."""
        return self.cache + self.compute + self.process


def trained_cells(metadata: Mapping[str, object], architecture: str) -> int:
    """Return the context that a model was trained for, 0 where it does not say."""
    trained = metadata.get(f"{architecture}.context_length")
    return trained if isinstance(trained, int) and trained > 0 else 0


def _sum(pattern: re.Pattern[str], text: str) -> int:
    return round(sum(float(match[1]) for match in pattern.finditer(text)) * MIB)


def _plan(pointer: object, name: str, cells: int, *, full: bool) -> str:
    """Return what the engine logs while it plans a context."""
    lib = library()
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_outputs_max = cells, 1, 1
    params.n_batch = params.n_ubatch = min(UBATCH, cells)
    params.swa_full, params.no_perf = full, True
    log.forget()
    with log.capture() as lines:
        context = lib.llama_init_from_model(pointer, params)
    if not context:
        raise OutOfMemory(f"A context of {cells:,} tokens for {name} cannot be planned: "
                          f"{log.reason('the engine gives no reason')}.")
    lib.llama_free(context)
    return "".join(lines)


def plan_memory(model: CheckedModel, cells: int) -> ContextMemory:
    """Return what a context of `cells` tokens takes; the weights are not read.

    It does not depend on the type of the weights, so it holds for every level of the model.

    Raises:
        ModelNotLoaded: with the library's reason.
        OutOfMemory: the engine refuses such a context.
        EngineFailed: the engine does not tell what it would allocate.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, lib.LLAMA_LOAD_MODE_NONE, 0
    log.forget()
    pointer = lib.llama_model_load_from_file(os.fsencode(model.path), params)
    if not pointer:
        raise ModelNotLoaded(f"{model.path.name} does not load: {log.reason('the engine gives no reason')}.")
    try:
        whole, window = (_plan(pointer, model.path.name, cells, full=full) for full in (True, False))
        process = psutil.Process().memory_info().rss
    finally:
        lib.llama_model_free(pointer)
    compute = _sum(_BUFFER, whole)
    if not compute:
        raise EngineFailed("The engine does not tell what memory it would take: install the version of "
                           "llama-cpp-python that Nightpress asks for.")
    return ContextMemory(cells, _sum(_CACHE, whole), _sum(_CACHE, window), compute, process)
