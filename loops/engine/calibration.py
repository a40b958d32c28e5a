"""Calibration text as a model reads it: through its own chat template, and what its vocabulary makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration_data.catalogue import Catalogue
from calibration_data.render import render as render_samples
from calibration_data.text import TEXT, Sample
from loops.engine import chat
from loops.engine.gguf_check import check_model
from loops.engine.model import Model, ModelNotLoaded
from loops.engine.native import library, log
from loops.engine.options import EngineOptions
from loops.engine.windows import WINDOW

#: Chunks of 512 tokens below which more text may help. Of Llama-3-8B at Q2_K, matrices of 10 thousand to 10 million
#: tokens do equally well, and one of a thousand worse by 2 % (llama.cpp, tools/perplexity/README.md).
ENOUGH_CHUNKS = 20
LEAST_CHUNKS = 2  #: what llama.cpp and `imatrix.cut_chunks` ask for


@dataclass(frozen=True)
class Rendered:
    """Samples as a model reads them.

    Attributes:
        texts: of each sample, with control tokens written out where a template was used, else a blank line after it.
        plain: how many conversations among them are plain text with the names of the roles, for want of a template
            that takes them.
    """

    texts: tuple[str, ...]
    plain: int


def render_for(model: Model, samples: Sequence[Sample]) -> Rendered:
    """Return samples in the format of the model's own chat template, complete, not open for a reply.

    A sample that the template refuses becomes plain text, and all that follow where the template takes too long or too
    much memory. Without a template all are plain.
    """
    source = model.metadata("tokenizer.chat_template")
    bos, eos = model.token_text(model.bos), model.token_text(model.eos)

    def through(messages: Sequence[Mapping[str, str]]) -> str:
        return chat.render(source or "", messages, bos=bos, eos=eos, reply=False)

    texts: list[str] = []
    plain, usable = 0, bool(source)
    for sample in samples:
        spoken, refused = sample.turns[0].role != TEXT, not usable
        if spoken and usable:
            try:
                texts += render_samples([sample], through)
            except chat.ChatTemplateBroken as problem:
                usable, refused = not isinstance(problem.__cause__, TimeoutError | MemoryError), True
        if not spoken or refused:
            texts += [f"{text}\n\n" for text in render_samples([sample])]
            plain += spoken
    return Rendered(tuple(texts), plain)


def joined(model: Model, texts: Sequence[str]) -> str:
    """Return texts as one, to be tokenized with control tokens parsed and a beginning of sequence put in front."""
    whole = "".join(texts)
    return whole.removeprefix(model.token_text(model.bos)) if model.add_bos else whole


def calibration_text(model: Model, samples: Sequence[Sample]) -> str:
    """Return samples as the one text to calibrate a model with: control tokens in it are to be parsed.

    Conversations begin and end as the model's template has them, see `render_for`; passages stay as they are. The
    very first beginning of sequence is left out where the tokenizer puts one there.

    Args:
        model: in whose format; its vocabulary will do.
        samples: in the order in which they are to be read.
    """
    return joined(model, render_for(model, samples).texts)


@contextmanager
def load_vocabulary(path: Path) -> Iterator[Model]:
    """Load the vocabulary and the metadata of the GGUF at path, no weights, and free them afterwards.

    The model can tokenize and tell its metadata, and nothing else.

    Raises:
        ModelNotLoaded: with the library's reason.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    log.forget()
    pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not pointer:
        raise ModelNotLoaded(f"The vocabulary of {path.name} does not load: "
                             f"{log.reason('the engine gives no reason')}.")
    try:
        yield Model(pointer, path, EngineOptions())
    finally:
        lib.llama_model_free(pointer)


@dataclass(frozen=True)
class TokenCount:
    """What a model's vocabulary makes of a text.

    Attributes:
        tokens: of all samples together.
        chunks: whole pieces of 512 tokens, which is what a matrix is collected from.
        distinct: different tokens.
        share: of the vocabulary that these are, 0 to 1.
        plain: samples that the model's chat template does not take, see `Rendered`.
    """

    tokens: int
    chunks: int
    distinct: int
    share: float
    plain: int


def count_tokens(model: Model, samples: Sequence[Sample]) -> TokenCount:
    """Count what calibrating a model with samples would read; its vocabulary will do."""
    rendered = render_for(model, samples)
    tokens = model.tokenize(joined(model, rendered.texts), add_bos=True, special=True)
    distinct = len(np.unique(tokens))
    return TokenCount(len(tokens), len(tokens) // WINDOW, distinct, distinct / model.n_vocab, rendered.plain)


def count_sources(path: Path, folder: Path, sources: Sequence[str]) -> dict[str, Any]:
    """Count the tokens of calibration texts for the model at path; return them by source, and its vocabulary.

    Args:
        path: of the model.
        folder: of the user's domains.
        sources: names of domains, or paths of files.

    Raises:
        UnknownDomain, CalibrationRefused: a text cannot be used.
        ModelNotLoaded, GgufRefused: the model cannot be used.
    """
    catalogue = Catalogue(folder)
    with load_vocabulary(check_model(path).path) as model:
        counted = {source: asdict(count_tokens(model, catalogue.open(source)[1])) for source in sources}
        return {"model": path.name, "vocabulary": model.n_vocab, "least_chunks": LEAST_CHUNKS,
                "enough_chunks": ENOUGH_CHUNKS, "chat_template": bool(model.metadata("tokenizer.chat_template")),
                "counts": counted}
