"""Whole models with random weights, of any shape, that the engine loads: what no real model has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray

from loops.starter import STARTER_GGUF

FTYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}


@dataclass(frozen=True)
class TinyModel:
    """A llama to be made.

    Attributes:
        width: of the embedding; rows of 192 fit no block of 256.
        layers: how many blocks.
        heads: of attention; width must be a multiple.
        feed_forward: 0 for three times the width.
        untied: an output matrix of its own.
        dtype: of the matrices: F32, F16 or BF16.
        vocabulary: tokens; the starter's first ones, then invented words.
        seed: of the weights.
        scale: of the output's weights; large ones make logits that overflow.
        damaged: tensors in which one weight is not a number; of a vector, all.
        always: the only token with weights in the output matrix; -1 for no such. Needs `untied`.
        template: chat template; None leaves it out.
        add_bos: the tokenizer puts a beginning-of-sequence token in front.
        metadata: further texts.
    """

    width: int = 256
    layers: int = 2
    heads: int = 4
    feed_forward: int = 0
    untied: bool = False
    dtype: str = "F16"
    vocabulary: int = 3072
    seed: int = 0
    scale: float = 1.0
    damaged: tuple[str, ...] = ()
    always: int = -1
    template: str | None = None
    add_bos: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in numpy's order."""
        width, inner = self.width, self.feed_forward or 3 * self.width
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocabulary, width)}
        for block in range(self.layers):
            found |= {f"blk.{block}.{name}.weight": shape for name, shape in {
                "attn_norm": (width,), "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
                "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (inner, width),
                "ffn_up": (inner, width), "ffn_down": (width, inner)}.items()}
        found["output_norm.weight"] = (width,)
        if self.untied:
            found["output.weight"] = (self.vocabulary, width)
        return found

    def write(self, path: Path) -> Path:
        """Write the model to path and return it."""
        writer = GGUFWriter(path, "llama")
        self._describe(writer)
        tokens, scores, kinds = _vocabulary(self.vocabulary)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_space_prefix(False)
        if self.template is not None:
            writer.add_chat_template(self.template)
        rng = np.random.default_rng(self.seed)
        for name, shape in self.shapes().items():
            if len(shape) == 1:
                writer.add_tensor(name, np.full(shape, np.nan if name in self.damaged else 1, dtype=np.float32))
                continue
            weights = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
            if name.startswith("output"):
                weights *= self.scale
            if name == "output.weight" and self.always >= 0:
                weights[:] = 0
                weights[self.always] = 1  # its logit is the sum of the hidden state, all others are 0
            if name in self.damaged:
                weights[0, 0] = np.nan
            kind = GGMLQuantizationType[self.dtype]
            if self.dtype == "BF16":
                writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, weights.astype(np.float16 if self.dtype == "F16" else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _describe(self, writer: GGUFWriter) -> None:
        writer.add_name("Tiny")
        writer.add_file_type(FTYPES[self.dtype])
        writer.add_block_count(self.layers)
        writer.add_context_length(1024)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.feed_forward or 3 * self.width)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(self.width // self.heads)
        writer.add_vocab_size(self.vocabulary)
        for key, value in self.metadata.items():
            writer.add_string(key, value)


@functools.cache
def _starter_vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    reader = GGUFReader(STARTER_GGUF)

    def part(name: str) -> list[NDArray[np.generic]]:
        found = reader.fields[f"tokenizer.ggml.{name}"]
        return [found.parts[index] for index in found.data]

    return ([bytes(word) for word in part("tokens")], [float(score[0]) for score in part("scores")],
            [int(kind[0]) for kind in part("token_type")])


def _vocabulary(size: int) -> tuple[list[bytes], list[float], list[int]]:
    tokens, scores, kinds = _starter_vocabulary()
    more = range(len(tokens), size)
    return ([*tokens, *(f"\u2581w{index}".encode() for index in more)][:size],
            [*scores, *(-1e4 - index for index in more)][:size], [*kinds, *(1 for _ in more)][:size])


def weights_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return the type and the raw bytes of every tensor of a GGUF."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}
