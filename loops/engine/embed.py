"""Vectors of texts, by an embedding model in the engine, or by any other as the mean over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from loops.engine.model import Context, ContextSpec, Model, OutOfMemory
from loops.engine.native import EngineFailed, library, log

MOST_TOKENS = 2048  #: of a text that are read

Vectors = NDArray[np.float32]


def embed(model: Model, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Vectors:
    """Return a vector of length 1 for each text, shape (texts, width); of zeros for a text without tokens.

    The model says how it pools; one that does not, as those that generate text, is averaged over the tokens. Of a long
    text the first `MOST_TOKENS` tokens are read, fewer where the model was made for fewer.

    Raises:
        OutOfMemory, EngineFailed: as they say; EngineFailed too for a model that makes no vectors, a reranker.
    """
    lib = library()
    arch = model.metadata("general.architecture") or ""
    limit = min(MOST_TOKENS, model.n_context)
    tokens = [model.tokenize(text, add_bos=True, special=False)[:limit] if text.strip() else () for text in texts]
    cells = max(32, *map(len, tokens))
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = cells  # one batch: attention may look both ways
    params.n_seq_max, params.embeddings, params.no_perf = 1, True, True
    params.n_threads = params.n_threads_batch = model.options.thread_count
    if model.metadata(f"{arch}.pooling_type") is None:
        params.pooling_type = lib.LLAMA_POOLING_TYPE_MEAN
    log.forget()
    pointer = lib.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise OutOfMemory(f"A context of {cells} tokens for {model.path.name} cannot be made: "
                          f"{log.reason('not enough memory')}.")
    context = Context(model, pointer, ContextSpec(1, cells))
    width = int(lib.llama_model_n_embd_out(model.pointer))
    found = np.zeros((len(texts), width), dtype=np.float32)
    try:
        if lib.llama_pooling_type(pointer) == lib.LLAMA_POOLING_TYPE_RANK:
            raise EngineFailed(f"{model.path.name} is a reranker: it makes no vectors.")
        for at, ids in enumerate(tokens):
            if len(ids):
                n = len(ids)
                context.clear()
                context.decode(ids, range(n), [(0,)] * n, [False] * n)
                address = lib.llama_get_embeddings_seq(pointer, 0)
                if not address:
                    raise EngineFailed(f"{model.path.name} makes no vectors of texts.")
                vector = np.ctypeslib.as_array(address, shape=(width,))
                found[at] = vector / max(float(np.linalg.norm(vector)), 1e-12)
            if progress is not None:
                progress(at + 1, len(texts))
    finally:
        context.free()
    return found
