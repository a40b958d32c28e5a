"""A Hugging Face folder with a small Llama of random weights, and adapters for it."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any


def make_model(folder: Path, heads: int = 2) -> Path:
    """Write a model with the starter's kind of tokenizer, whose replies are random but whose logits are far apart.

    Args:
        folder: takes the model.
        heads: for keys and values, of four for queries.
    """
    import torch
    import transformers

    from loops.starter import train

    serialized = train.train_tokenizer(random.Random(3), dialogues=600)
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_proto=serialized).vocab_size()
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(serialized)
    (folder / "tokenizer_config.json").write_text(json.dumps(train.tokenizer_config()), encoding="utf-8")
    return folder


def make_adapter(base: Path, folder: Path, merged: Path) -> None:
    """Write a LoRA adapter of random weights, and the model that it makes when it is merged."""
    import peft
    import torch
    import transformers

    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():  # one library of the extra uses what another deprecates
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    adapted.save_pretrained(folder)
    adapted.merge_and_unload().to(torch.bfloat16).save_pretrained(merged)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / name, merged / name)


def change_tensor(folder: Path, name: str, change: Any) -> None:
    """Replace one tensor of a folder's weights by what `change` makes of it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
