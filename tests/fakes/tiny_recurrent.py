"""A tiny Mamba with random weights: a model whose state, unlike a cache, cannot be shared or cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from loops.starter import STARTER_GGUF

LAYERS, WIDTH, INNER, STATE, CONV, RANK = 2, 256, 512, 16, 4, 16


def write_mamba(path: Path) -> Path:
    """Write the model, with the starter's vocabulary, to path and return it."""
    writer = GGUFWriter(path, "mamba")
    writer.add_name("Tiny Mamba")
    writer.add_file_type(1)
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    fields = GGUFReader(STARTER_GGUF).fields
    writer.add_tokenizer_model("llama")
    tokens = fields["tokenizer.ggml.tokens"]
    writer.add_token_list([bytes(tokens.parts[index]) for index in tokens.data])
    for name, add in (("scores", writer.add_token_scores), ("token_type", writer.add_token_types)):
        found = fields[f"tokenizer.ggml.{name}"]
        add([found.parts[index][0].item() for index in found.data])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)

    def matrix(name: str, *shape: int, kind: type[np.floating] = np.float16) -> None:
        writer.add_tensor(name, rng.normal(0, shape[-1] ** -0.5, shape).astype(kind))

    matrix("token_embd.weight", len(tokens.data), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for block in range(LAYERS):
        name = f"blk.{block}."
        writer.add_tensor(f"{name}attn_norm.weight", np.ones(WIDTH, np.float32))
        matrix(f"{name}ssm_in.weight", 2 * INNER, WIDTH)
        matrix(f"{name}ssm_conv1d.weight", INNER, CONV, kind=np.float32)
        writer.add_tensor(f"{name}ssm_conv1d.bias", np.zeros(INNER, np.float32))
        matrix(f"{name}ssm_x.weight", RANK + 2 * STATE, INNER)
        matrix(f"{name}ssm_dt.weight", INNER, RANK, kind=np.float32)
        writer.add_tensor(f"{name}ssm_dt.bias", np.zeros(INNER, np.float32))
        writer.add_tensor(f"{name}ssm_a", -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (INNER, 1)))
        writer.add_tensor(f"{name}ssm_d", np.ones(INNER, np.float32))
        matrix(f"{name}ssm_out.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
