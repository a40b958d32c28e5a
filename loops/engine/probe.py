"""Find out whether this CPU survives the engine's extra buffers.

On CPUs with AMX every batch of more than one token on a quantized model crashes with them on
(llama.cpp issue 20824). There is nothing to catch, so the probe is a job of its own: if the worker
dies, the answer is no.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loops.engine.gguf_check import check_model
from loops.engine.levels import level_named
from loops.engine.model import ContextSpec, load_model, open_context
from loops.engine.native import EngineFailed
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.starter import STARTER_GGUF
from state.faults import failpoint

#: one level for each family of kernels that repacks weights
PROBED = ("Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "IQ4_NL")
TOKENS = 32


def probe_extra_buffers(folder: Path) -> dict[str, Any]:
    """Quantize the starter and decode 32 tokens with extra buffers on; return what was tried.

    Raises:
        EngineFailed: the results with and without extra buffers differ by more than rounding.
    """
    model = check_model(STARTER_GGUF)
    largest = 0.0
    for name in PROBED:
        failpoint("probe.level")
        spec = QuantizeSpec(model, level_named(name), EngineOptions(extra_buffers=False))
        made = quantize(spec, forecast(spec), folder)
        with_buffers, without = (_logits(made.path, on) for on in (True, False))
        difference = float(np.abs(with_buffers - without).mean() / np.abs(without).mean())
        largest = max(largest, difference)
        made.path.unlink(missing_ok=True)
        if not difference < 0.25:
            raise EngineFailed(f"With extra buffers {name} computes something else (off by {difference:.0%}).")
    return {"levels": list(PROBED), "largest_difference": largest}


def _logits(path: Path, extra_buffers: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    with (load_model(path, EngineOptions(extra_buffers=extra_buffers)) as model,
          open_context(model, ContextSpec(sequences=1, cells=256, shared=False)) as context):
        tokens = np.arange(TOKENS, dtype=np.int32) * 37 % model.n_vocab
        return context.decode(tokens, range(TOKENS), [(0,)] * TOKENS, [True] * TOKENS).copy()
