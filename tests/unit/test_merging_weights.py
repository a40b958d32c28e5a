"""Merged weights against peft's own, and every adapter that does not fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loops.finetune import lora, merging
from loops.finetune.lora import AdapterMismatch, AdapterUnmergeable, BaseQuantized
from loops.finetune.model_folder import read_adapter, read_folder, read_safetensors
from loops.finetune.parity import TokenizerMismatch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY, WIDTH = 96, 32


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # one library of the extra uses what another deprecates, and peft explains itself
        warnings.simplefilter("ignore")
        yield


def make_base(folder: Path, *, tied: bool = False, bias: bool = False, dtype: str = "float32", shard: str = "1GB") -> Path:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied, attention_bias=bias))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def make_gpt2(folder: Path) -> Path:
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 2, rows: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"],
                                                            **options}))
    for name, weights in adapted.named_parameters():
        if weights.requires_grad:
            with torch.no_grad():
                weights.add_(torch.randn_like(weights) * 0.1)
        del name
    adapted.save_pretrained(folder)
    return folder


def merged(base: Path, adapters: list[tuple[Path, float]], folder: Path) -> dict[str, Any]:
    """Return the tensors of a merge of ours."""
    from safetensors.torch import load_file

    model, parts = read_folder(base), [lora.read_lora(read_adapter(path), weight) for path, weight in adapters]
    lora.check_full_precision(model)
    plan = lora.plan_merge(model, parts)
    folder.mkdir()
    seen: list[float] = []
    merging.write_weights(model, parts, plan, folder, lambda done, total: seen.append(done / total))
    merging.write_rest(model, plan, folder, None)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    found: dict[str, Any] = {}
    for file in read_folder(folder).safetensors:
        found |= load_file(file)
    return found


def by_peft(base: Path, adapter: Path, rows: int = 0) -> dict[str, Any]:
    """Return the tensors of a merge of peft's, in 32 bits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    found = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return dict(found)


def same(ours: dict[str, Any], theirs: dict[str, Any], dtype: Any = None) -> int:
    """Compare; return how many tensors there are."""
    for name, tensor in ours.items():
        expected = theirs[name].to(dtype) if dtype else theirs[name]
        assert torch.allclose(tensor.float(), expected.float(), rtol=2e-6 if dtype is None else 0.008, atol=2e-7), name
    return len(ours)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("options", [
    {"target_modules": SEVEN},
    {"target_modules": SEVEN, "use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {
        "layers.1.self_attn.q_proj": 40}},
    {"target_modules": SEVEN, "use_dora": True},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
], ids=["plain", "patterns and rslora", "dora", "embedding", "modules_to_save", "bias"])
def test_what_peft_merges_comes_out_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", bias="bias" in options)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    ours, before = merged(base, [(adapter, 1.0)], tmp_path / "ours"), by_peft(base, adapter)
    assert same(ours, before) == len(before)
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_base_that_stores_inputs_first_comes_out_the_same(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    ours = merged(base, [(adapter, 1.0)], tmp_path / "ours")
    assert same(ours, by_peft(base, adapter)) > 20


def test_shards_stay_shards_and_are_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", shard="20KB")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=SEVEN)
    assert len(read_folder(base).safetensors) == 3
    ours, exact = merged(base, [(adapter, 1.0)], tmp_path / "ours"), by_peft(base, adapter)
    for name, tensor in ours.items():
        assert tensor.dtype is torch.bfloat16
        assert (tensor == exact[name].to(torch.bfloat16)).float().mean() > 0.999, name
    assert [file.name for file in read_folder(tmp_path / "ours").safetensors] == [
        file.name for file in read_folder(base).safetensors]


def test_several_adapters_of_any_rank_add_up_by_their_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_adapter(base, tmp_path / "one", seed=2, target_modules=SEVEN)
    two = make_adapter(base, tmp_path / "two", seed=3, r=7, use_rslora=True, target_modules=["q_proj", "o_proj"])
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    first, second = by_peft(base, one), by_peft(base, two)
    ours = merged(base, [(one, 0.7), (two, -1.5)], tmp_path / "ours")
    expected = {name: weights + 0.7 * (first[name] - weights) - 1.5 * (second[name] - weights)
                for name, weights in before.items()}
    assert same(ours, {name: tensor for name, tensor in expected.items()}) == len(before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(ours[name], first[name], atol=1e-3)


def test_added_tokens_come_with_their_embeddings(tmp_path: Path) -> None:
    for tied in (False, True):
        base = make_base(tmp_path / f"base-{tied}", tied=tied)
        adapter = make_adapter(base, tmp_path / f"adapter-{tied}", rows=VOCABULARY + 5, modules_to_save=[
            "embed_tokens", "lm_head"], **({"ensure_weight_tying": True} if tied else {}))
        ours = merged(base, [(adapter, 1.0)], tmp_path / f"ours-{tied}")
        assert ours["model.embed_tokens.weight"].shape == (VOCABULARY + 5, WIDTH)
        assert json.loads((tmp_path / f"ours-{tied}" / "config.json").read_text())["vocab_size"] == VOCABULARY + 5
        same(ours, by_peft(base, adapter, VOCABULARY + 5))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"ours-{tied}", dtype=torch.float32)
        assert loaded.lm_head.weight.shape == (VOCABULARY + 5, WIDTH)


def refused(error: type[Exception], match: str, base: Path, adapter: Path, weight: float = 1.0) -> None:
    folder = base.parent / "refused"
    with pytest.raises(error, match=match):
        merged(base, [(adapter, weight)], folder)
    assert not folder.exists() or not list(folder.glob("*.safetensors"))


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    other = make_gpt2(tmp_path / "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter")
    refused(AdapterMismatch, "q_proj.weight, which the base does not have", other, adapter)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    refused(AdapterMismatch, r"q_proj it makes \[31, 32\], and the base has \[32, 32\]", base, adapter)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    refused(AdapterMismatch, "incomplete", base, adapter)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    refused(AdapterMismatch, "not finite", base, adapter)
    save_file({**tensors, name: tensors[name] * 1e9}, file)
    half = make_base(tmp_path / "half", dtype="float16")
    refused(AdapterMismatch, "that F16 cannot hold", half, adapter)


def edit(adapter: Path, **fields: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return adapter


def test_what_is_no_sum_is_refused_by_name(tmp_path: Path) -> None:
    base, tied = make_base(tmp_path / "base"), make_base(tmp_path / "tied", tied=True)
    refused(AdapterUnmergeable, "one end only", tied, make_adapter(tied, tmp_path / "1", target_modules=["embed_tokens"]))
    refused(AdapterUnmergeable, "one matrix for input and output", tied,
            make_adapter(tied, tmp_path / "2", target_modules=["lm_head"]))
    refused(AdapterUnmergeable, "one end only", tied, make_adapter(tied, tmp_path / "3", modules_to_save=["lm_head"]))
    refused(AdapterUnmergeable, "DoRA, which is no sum", base, make_adapter(base, tmp_path / "4", use_dora=True), 0.5)
    refused(AdapterUnmergeable, "lm_head.weight, which is no sum", base,
            make_adapter(base, tmp_path / "5", modules_to_save=["lm_head"]), 0.5)
    plain = make_adapter(base, tmp_path / "6")
    refused(AdapterUnmergeable, "trainable_token_indices", base, edit(plain, trainable_token_indices=[1, 2]))
    edit(plain, trainable_token_indices=None)
    refused(AdapterUnmergeable, "pissa", base, edit(plain, init_lora_weights="pissa"))
    edit(plain, init_lora_weights=True)
    refused(AdapterMismatch, "rank is 4, 4 and 8", base, edit(plain, r=8))
    refused(AdapterMismatch, "no numbers", base, edit(plain, r=4, lora_alpha="many"))
    refused(AdapterMismatch, "is no pattern", base, edit(plain, lora_alpha=4, alpha_pattern={"(": 4}))


def test_a_quantized_base_is_refused_with_what_to_pull_instead(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for name, method, said in (("unsloth/Tiny-1B-bnb-4bit", "bitsandbytes", "nightpress pull unsloth/Tiny-1B`"),
                               ("Some/Tiny-1B-GPTQ-Int4", "gptq", "nightpress pull Some/Tiny-1B`"),
                               ("Tiny-1B-AWQ", "awq", "was made from, Tiny-1B ")):
        (base / "config.json").write_text(json.dumps({
            **config, "_name_or_path": name, "quantization_config": {"quant_method": method}}))
        with pytest.raises(BaseQuantized, match=said) as caught:
            lora.check_full_precision(read_folder(base))
        assert method in str(caught.value)
    (base / "config.json").write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    with pytest.raises(BaseQuantized, match="stored as F8_E4M3"):
        lora.check_full_precision(read_folder(base))


def test_an_adapter_that_names_another_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "Tiny-1B")
    adapter = make_adapter(base, tmp_path / "adapter")
    lora.check_named_base(read_adapter(adapter), read_folder(base))
    lora.check_named_base(read_adapter(edit(adapter, base_model_name_or_path="owner/tiny-1b")), read_folder(base))
    with pytest.raises(AdapterMismatch, match="owner/Tiny-2B.*--any-base"):
        lora.check_named_base(read_adapter(edit(adapter, base_model_name_or_path="owner/Tiny-2B")), read_folder(base))


def test_an_interrupted_merge_keeps_whole_shards(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shard="20KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    model, part = read_folder(base), lora.read_lora(read_adapter(adapter))
    plan = lora.plan_merge(model, [part])
    folder = tmp_path / "ours"
    folder.mkdir()

    def stop(done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.write_weights(model, [part], plan, folder, stop)
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert 0 < len(kept) < len(model.safetensors)
    merging.write_weights(model, [part], plan, folder, lambda _done, _total: None)
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}.items()
    for file in read_folder_files(folder):
        read_safetensors(file)
    assert not list(folder.glob("*.part"))


def read_folder_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_the_tokenizer_of_an_adapter_must_be_the_bases(tmp_path: Path) -> None:
    from hf_model import make_model

    from loops.finetune.tokenizer_fit import choose

    base = make_model(tmp_path / "base")
    own = transformers.AutoTokenizer.from_pretrained(base)
    adapter = tmp_path / "adapter"
    assert choose(read_folder(base), [base], 0) == (None, "", ())
    own.chat_template = "{{ messages }}"
    own.save_pretrained(adapter)
    assert choose(read_folder(base), [adapter], 0)[:2] == (None, "{{ messages }}")
    own.add_tokens(["<|new|>"])
    own.save_pretrained(adapter)
    with pytest.raises(TokenizerMismatch, match="holds no embeddings"):
        choose(read_folder(base), [adapter], 0)
    assert choose(read_folder(base), [adapter], len(own))[0] == adapter
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=shuffled(own))
    other.save_pretrained(adapter)
    with pytest.raises(TokenizerMismatch, match="is not that of base"):
        choose(read_folder(base), [adapter], 0)


def shuffled(tokenizer: Any) -> Any:
    import tokenizers

    words = sorted(tokenizer.get_vocab(), key=lambda token: token[::-1])
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({word: number for number, word in enumerate(words)},
                                                            unk_token=words[0]))
