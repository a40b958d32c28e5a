"""The starter as a Hugging Face folder, made from the GGUF that ships: what fine-tuning starts from.

Every weight is the GGUF's, bit by bit, and the tokenizer splits any text into the same tokens, so that the folder
converts back into the same model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loops.finetune.extra import require
from loops.pass1.single import OutputThere
from loops.starter import STARTER_GGUF
from loops.starter.train import ROLES, tokenizer_config
from state.files import explained, make_folder, write_atomic

WEIGHTS = "model.safetensors"
#: names of a layer's tensors in llama.cpp and in transformers
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}
#: types of pieces in SentencePiece's own model; the GGUF has 3, control, for all of the special ones
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def write_folder(target: Path) -> Path:
    """Write the starter as a Hugging Face folder and return the folder; the weights come last, whole or not at all.

    Raises:
        OutputThere: the folder holds a model already, or is a file.
        TrainExtraMissing: a library is missing.
        DiskFull, StateUnwritable: as the disk says.
    """
    require("Writing the starter as a Hugging Face folder", "safetensors", "sentencepiece", "google.protobuf")
    from gguf import GGUFReader
    from safetensors.numpy import save

    with explained(target):
        if target.exists() and not target.is_dir():
            raise OutputThere(f"{target} is a file; name a folder.")
        if (target / WEIGHTS).exists():
            raise OutputThere(f"{target} holds a model already; name another folder.")
        make_folder(target.absolute(), 0o755)
    reader = GGUFReader(STARTER_GGUF)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        name, weights = _place(tensor.name), np.array(tensor.data)
        for part, heads in (("attn_q.", "head_count"), ("attn_k.", "head_count_kv")):
            if part in tensor.name:
                weights = unpermuted(weights, int(facts[f"llama.attention.{heads}"]))
        tensors[name] = _half(name, weights)
    config = _config(facts, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    settings = {**tokenizer_config(), "model_max_length": config["max_position_embeddings"],
                "chat_template": facts["tokenizer.chat_template"]}
    with explained(target):
        for file, document in (("config.json", config), ("tokenizer_config.json", settings), (
                "generation_config.json", {"bos_token_id": config["bos_token_id"],
                                           "eos_token_id": config["eos_token_id"]})):
            write_atomic(target / file, (json.dumps(document, indent=2) + "\n").encode(), mode=0o644)
        write_atomic(target / "tokenizer.model", _tokenizer(facts), mode=0o644)
        shutil.copyfile(STARTER_GGUF.with_name("MODEL_CARD.md"), target / "README.md")
        write_atomic(target / WEIGHTS, save(tensors, {"format": "pt"}), mode=0o644)
    return target


def _place(name: str) -> str:
    """Return the name that transformers has for a tensor of llama.cpp's."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def unpermuted(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo what llama.cpp's converter does to the rows of queries and keys (`LlamaModel.permute`).

    It interleaves the two halves of each head, as its rotary embedding turns neighbours where transformers' turns
    halves.

    Args:
        weights: (rows, columns).
        heads: that the rows belong to.
    """
    rows = weights.shape[0]
    apart: NDArray[Any] = weights.reshape(heads, rows // heads // 2, 2, *weights.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(apart.reshape(weights.shape))


def _half(name: str, weights: NDArray[Any]) -> NDArray[np.float16]:
    """Return weights in F16.

    Raises:
        ValueError: that would change one; the model that ships has none such.
    """
    half: NDArray[np.float16] = weights.astype(np.float16)
    if not np.array_equal(half.astype(weights.dtype), weights):
        raise ValueError(f"{name} does not fit into F16")
    return half


def _config(facts: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"], "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"], "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.attention.key_length"],
        "max_position_embeddings": facts["llama.context_length"],
        # a float32 in the GGUF: as many digits as it has
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"], "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": tied}


def _tokenizer(facts: Mapping[str, Any]) -> bytes:
    """Return a SentencePiece model of the tokens, as `train.train_tokenizer` made the original's."""
    sentencepiece: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model = sentencepiece.ModelProto()
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    special = {"<unk>": _UNKNOWN, "<s>": _CONTROL, "</s>": _CONTROL, **dict.fromkeys(ROLES, _USER_DEFINED)}
    for token, score, kind in zip(tokens, facts["tokenizer.ggml.scores"], kinds, strict=True):
        of_kind = special.get(token) if kind == _CONTROL else kind
        model.pieces.add(piece=token, type=of_kind or kind, score=0.0 if kind == _CONTROL else score)
    train, normal = model.trainer_spec, model.normalizer_spec
    train.model_type, train.vocab_size = sentencepiece.TrainerSpec.BPE, len(tokens)
    train.byte_fallback, train.split_digits, train.hard_vocab_limit = True, True, False
    train.unk_id, train.bos_id, train.eos_id, train.pad_id = 0, 1, 2, -1
    train.character_coverage = 1.0
    train.user_defined_symbols.extend(ROLES)
    normal.name, normal.add_dummy_prefix, normal.remove_extra_whitespaces = "identity", False, False
    normal.escape_whitespaces = True
    return bytes(model.SerializeToString())
