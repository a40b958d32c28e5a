"""Makes Llama models of any size with random weights, for benchmarks that need a size and no sense.

Vocabulary and chat template are the starter's, so that the built-in scenarios can be used. Weights
are normal with a spread of 0.02, as before training, stored in F16 and written tensor by tensor:
making a model takes no more memory than its largest tensor.

    python benchmarks/random_model.py MODEL.gguf --size 1B
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np

from loops.starter import STARTER_GGUF

SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """The size of a Llama.

    Attributes:
        width: of the residual stream.
        feed_forward: width inside the feed-forward part.
        layers: how many.
        heads: of attention, each `width / heads` wide.
        kv_heads: of keys and values.
    """

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "60M": Shape(768, 2048, 9, 12, 4),
    "300M": Shape(1024, 4096, 20, 16, 4),
    "1B": Shape(2048, 8192, 16, 32, 8),
}


def _tensors(shape: Shape, vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    kv_width = shape.width // shape.heads * shape.kv_heads
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (vocabulary, shape.width))]
    for layer in range(shape.layers):
        for name, size in (
                ("attn_norm", (shape.width,)), ("attn_q", (shape.width, shape.width)),
                ("attn_k", (kv_width, shape.width)), ("attn_v", (kv_width, shape.width)),
                ("attn_output", (shape.width, shape.width)), ("ffn_norm", (shape.width,)),
                ("ffn_gate", (shape.feed_forward, shape.width)),
                ("ffn_up", (shape.feed_forward, shape.width)),
                ("ffn_down", (shape.width, shape.feed_forward))):
            tensors.append((f"blk.{layer}.{name}.weight", size))
    return [*tensors, ("output_norm.weight", (shape.width,)), ("output.weight", (vocabulary, shape.width))]


def _copy_vocabulary(writer: gguf.GGUFWriter, size: int) -> int:
    """Copy the starter's tokenizer, with unused tokens added up to size; return how many there are."""
    fields = gguf.GGUFReader(STARTER_GGUF).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    more = [f"<unused{number}>" for number in range(max(0, size - len(tokens)))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + more)
    writer.add_token_scores([*fields["tokenizer.ggml.scores"].contents(), *([-1000.0] * len(more))])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    writer.add_token_types([*kinds, *([gguf.TokenType.UNUSED] * len(more))])
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"].contents())
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"].contents())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(fields["tokenizer.chat_template"].contents())
    return len(tokens) + len(more)


def make_model(path: Path, size: str, vocabulary: int = 0) -> int:
    """Write a model of one of `SHAPES` to path; return its number of parameters.

    Args:
        path: overwritten.
        size: a key of `SHAPES`.
        vocabulary: tokens to fill the starter's vocabulary up to.
    """
    shape = SHAPES[size]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"Random {size}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    n_tokens = _copy_vocabulary(writer, vocabulary)
    writer.add_vocab_size(n_tokens)
    tensors = _tensors(shape, n_tokens)
    for name, dimensions in tensors:
        kind = np.dtype(np.float32 if len(dimensions) == 1 else np.float16)
        writer.add_tensor_info(name, dimensions, kind, int(np.prod(dimensions)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for _name, dimensions in tensors:
        if len(dimensions) == 1:
            writer.write_tensor_data(np.ones(dimensions, dtype=np.float32))
        else:
            weights = rng.standard_normal(dimensions, dtype=np.float32)
            writer.write_tensor_data((weights * SPREAD).astype(np.float16))
    writer.close()
    return int(sum(np.prod(dimensions) for _name, dimensions in tensors))


@contextmanager
def model_for_a_while(folder: Path | None, size: str, vocabulary: int = 0, *,
                      keep: bool = False) -> Iterator[Path]:
    """Give the path of a model of that size, and delete it afterwards.

    Args:
        folder: where to make it; None for the system's temporary folder.
        size: a key of `SHAPES`.
        vocabulary: see `make_model`.
        keep: leave the model in folder; one left there earlier is used again.
    """
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=folder) as scratch:
        name = f"random-{size}-{vocabulary}.gguf" if vocabulary else f"random-{size}.gguf"
        path = folder / name if keep and folder is not None else Path(scratch) / name
        if not path.exists():
            print(f"Making a {size} model with random weights in {path.parent} ...", flush=True)
            unfinished = path.with_suffix(".part")
            make_model(unfinished, size, vocabulary)
            unfinished.rename(path)
        yield path


def add_model_options(parser: argparse.ArgumentParser, size: str) -> None:
    """Add the options that say which model to make and where."""
    parser.add_argument("--size", choices=SHAPES, default=size, help=f"of the model made (default {size})")
    parser.add_argument("--folder", type=Path, help="where to make it (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true",
                        help="leave it in --folder, and use it again next time")


def main() -> int:
    """Make one model, to keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="to write; without it nothing is done")
    parser.add_argument("--size", choices=SHAPES, default="1B")
    parser.add_argument("--vocabulary", type=int, default=0,
                        help="fill the vocabulary up to this many tokens")
    arguments = parser.parse_args()
    if arguments.path is None:
        print("Give a path to make a model; the other benchmarks make theirs on their own.")
        return 0
    parameters = make_model(arguments.path, arguments.size, arguments.vocabulary)
    print(f"{arguments.path}: {parameters:,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
