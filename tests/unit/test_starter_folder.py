"""The starter as a Hugging Face folder: the GGUF's own weights and tokens, in the other form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops.finetune.model_folder import read_folder
from loops.pass1.single import OutputThere
from loops.starter import STARTER_GGUF
from loops.starter.folder import unpermuted, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("safetensors", "sentencepiece", "google.protobuf"):
        pytest.importorskip(library)
    return write_folder(tmp_path_factory.mktemp("models") / "starter")


@pytest.fixture(scope="module")
def gguf() -> Any:
    from gguf import GGUFReader

    return GGUFReader(STARTER_GGUF)


def permuted(weights: Any, heads: int) -> Any:
    """What llama.cpp's converter does, as it stands there."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2).reshape(weights.shape))


def test_every_weight_is_the_ggufs_bit_by_bit(folder: Path, gguf: Any) -> None:
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    theirs = {tensor.name: np.array(tensor.data) for tensor in gguf.tensors}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
             "blk.7.attn_k.weight": "model.layers.7.self_attn.k_proj.weight",
             "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
             "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
             "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight"}
    assert len(weights) == len(theirs)
    for theirs_name, name in names.items():
        ours = weights[name]
        assert ours.dtype == np.float16
        if "attn_q" in theirs_name or "attn_k" in theirs_name:
            ours = permuted(ours, 8 if "attn_q" in theirs_name else 4)
        assert ours.astype(theirs[theirs_name].dtype).tobytes() == theirs[theirs_name].tobytes(), name


def test_undoing_the_permutation_undoes_it() -> None:
    weights = np.arange(64 * 3).reshape(64, 3)
    assert not np.array_equal(permuted(weights, 4), weights)
    assert np.array_equal(unpermuted(permuted(weights, 4), 4), weights)


def test_the_tokenizer_has_the_ggufs_tokens_and_splits_into_them(folder: Path, gguf: Any) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = gguf.fields["tokenizer.ggml.tokens"].contents()
    assert [tokenizer.id_to_piece(number) for number in range(tokenizer.vocab_size())] == tokens
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert tokenizer.encode("<|user|>")[0] == tokens.index("<|user|>")
    assert tokenizer.is_byte(tokenizer.encode("漢")[-1])
    assert tokenizer.decode(tokenizer.encode("I feel  very\nüneasy 漢 12")) == "I feel  very\nüneasy 漢 12"


def test_the_folder_is_a_model_that_others_read(folder: Path) -> None:
    model = read_folder(folder)
    assert (model.architecture, model.parameters) == ("LlamaForCausalLM", 7_082_240)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert "<|assistant|>" in settings["chat_template"]
    assert "MIT" in (folder / "README.md").read_text()


def test_a_model_that_is_there_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputThere, match="holds a model already"):
        write_folder(folder)
    (tmp_path / "file").touch()
    with pytest.raises(OutputThere, match="is a file"):
        write_folder(tmp_path / "file")
