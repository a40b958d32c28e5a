"""A file in llama.cpp's format of 2023, GGJT version 3, from a Hugging Face folder with a small Llama."""

from __future__ import annotations

import struct
from pathlib import Path


def write_ggjt(model: Path, target: Path) -> None:
    """Write the weights of a model with as many key-value heads as query heads in F32.

    The layout is read off llama.cpp's convert_llama_ggml_to_gguf.py.
    """
    import sentencepiece
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    names = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
             "lm_head.weight": "output.weight"}
    parts = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{old}.weight": f"layers.{layer}.{new}.weight" for old, new in parts.items()}
    with target.open("wb") as out:
        out.write(b"tjgg" + struct.pack("<I", 3))
        out.write(struct.pack("<7I", config.vocab_size, config.hidden_size, 32, config.num_attention_heads,
                              config.num_hidden_layers, config.hidden_size // config.num_attention_heads, 0))
        for token in range(config.vocab_size):
            text = pieces.id_to_piece(token).replace("\u2581", " ").encode()
            out.write(struct.pack("<I", len(text)) + text + struct.pack("<f", pieces.get_score(token)))
        for old, new in names.items():
            weights = tensors[old].float().numpy()
            if old.endswith(("q_proj.weight", "k_proj.weight")):  # back to the order of heads that the format has
                heads, rows = config.num_attention_heads, weights.shape[0]
                weights = weights.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)
            out.write(struct.pack("<3I", weights.ndim, len(new), 0))
            out.write(struct.pack(f"<{weights.ndim}I", *reversed(weights.shape)) + new.encode())
            out.write(bytes(-out.tell() % 32))
            out.write(weights.tobytes())
