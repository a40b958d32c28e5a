"""Readings of the fixed text by each form of a model: PyTorch's on one side, the engine's on the other.

Each is made in a process of its own and kept in a folder: `logits.npy`, then `reading.json`, so that one that is there
is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loops.engine.chat import ChatTemplateBroken, prompt_tokens
from loops.engine.gguf_check import check_model, read_header
from loops.engine.logits import Floats
from loops.engine.model import Context, ContextSpec, OutOfMemory, load_model, open_context
from loops.engine.native import EngineFailed, library, log
from loops.engine.options import EngineOptions
from loops.engine.scratch import load_array, save_array
from loops.finetune import parity, tokenizer_fit
from loops.finetune.converter import ConversionFailed
from loops.finetune.extra import CONVERTING, require
from loops.finetune.model_folder import ModelFolder, read_safetensors, weight_types
from loops.finetune.parity import Reading, TokenizerMismatch
from state.files import explained, write_atomic

_CONTROL = 8  #: LLAMA_TOKEN_ATTR_CONTROL
_UNKNOWN = 1  #: LLAMA_TOKEN_ATTR_UNKNOWN
SPARE_BYTES = 1 << 30  #: memory that PyTorch and the computation take beside the weights


def save(folder: Path, reading: Reading, logits: Floats) -> None:
    """Keep a reading in folder; it appears whole."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_array(folder / "logits.npy", logits)
        write_atomic(folder / "reading.json", json.dumps(asdict(reading)).encode())


def load(folder: Path) -> tuple[Reading, Floats] | None:
    """Return the reading in folder, its logits as a memory map; None where there is none."""
    logits = load_array(folder / "logits.npy", mapped=True)
    try:
        fields = json.loads((folder / "reading.json").read_text(encoding="utf-8"))
        reading = Reading(**{**fields, "control": {int(token): text for token, text in fields["control"].items()},
                             "rounding": tuple(fields["rounding"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return None if logits is None else (reading, logits)


def read_with_torch(model: ModelFolder, folder: Path, name: str, adapters: Sequence[tuple[Path, float]],
                    progress: Callable[[float, float], None], tokenizer_folder: Path | None = None) -> Reading:
    """Read the fixed text with transformers, weights and sums in 32 bits on the CPU; keep the reading in folder.

    Args:
        model: checked, a folder without code and pickles, see `stage`.
        folder: takes the reading.
        name: of this form, for people.
        adapters: LoRA adapters to put on the model, without pickles, each with its weight.
        progress: told how far it is.
        tokenizer_folder: whose tokenizer to use; None for the model's own.

    Raises:
        OutOfMemory: the weights do not fit into the memory that is free.
        TokenizerMismatch: the tokenizer is that of another model, see `tokenizer_fit`.
        ConversionFailed: transformers cannot load the model, with its reason, or weights are missing.
    """
    require("The parity check", *CONVERTING, *(("peft",) if adapters else ()))
    import psutil

    needed = 4 * model.parameters + SPARE_BYTES
    if needed > psutil.virtual_memory().available:
        raise OutOfMemory(f"The parity check computes {model.path.name} in 32 bits and needs "
                          f"{needed / 1e9:,.1f} GB of memory; close other programs, check it on a larger machine, or "
                          "leave the check out with --no-parity.")
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(folder / "cache"),
                       "TOKENIZERS_PARALLELISM": "false"})
    torch, transformers = import_module("torch"), import_module("transformers")  # untyped, and only in the extra
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    progress(0, 3)
    with _loading(model, "its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer_folder or model.path, local_files_only=True, trust_remote_code=False)
    with _loading(model, "its weights"):
        loaded, said = transformers.AutoModelForCausalLM.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            attn_implementation="eager", output_loading_info=True)
    missing = sorted(said["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ConversionFailed(f"The weights of {model.path.name} lack {missing[0]}"
                               f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which "
                               f"{model.architecture} has; download them again.")
    if adapters:
        with _loading(model, "the adapter"):
            loaded = _with_adapters(loaded, adapters)
    rows = loaded.get_input_embeddings().weight.shape[0]
    tokenizer_fit.check_ids(model, tokenizer, rows)
    progress(1, 3)
    tokens = {sample: list(map(int, tokenizer(text)["input_ids"])) for sample, text in parity.SAMPLES.items()}
    limit = int(getattr(loaded.config, "max_position_embeddings", 0) or parity.TOKENS)
    ids = tokens["prose"][:min(parity.TOKENS, limit)]
    if not ids:
        raise TokenizerMismatch(f"The tokenizer of {model.path.name} makes no tokens of English text.")
    loaded.eval()

    def compute(chosen: Sequence[int]) -> Floats:
        with torch.inference_mode():
            found: Floats = loaded(torch.tensor([list(chosen)])).logits[0].float().numpy()
        return found

    logits = compute(ids)
    tokenizer_fit.check_loss(model, tokenizer(tokenizer_fit.TALK)["input_ids"][:limit], compute)
    progress(2, 3)
    types = weight_types(model)
    rounding: tuple[float, ...] = ()
    if "BF16" in types and np.isfinite(logits).all():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # no copy of all weights is kept
            rounded = compute(ids)
        if np.isfinite(rounded).all():
            found = parity.compare("rounding", logits, rounded, parity.Bounds(math.inf, math.inf, math.inf))
            rounding = (found.mean_kl, found.max_kl, found.max_difference)
    reading = Reading(
        name=name, tokens=tokens, ids=ids,
        special={"bos": _id(tokenizer.bos_token_id), "eos": _id(tokenizer.eos_token_id)},
        control=_control_of(tokenizer), template=tokenizer_fit.template_of(tokenizer), chat=_chat_of(tokenizer),
        weight_type=max(types, key=types.__getitem__, default=""), rounding=rounding)
    save(folder, reading, logits)
    progress(3, 3)
    return reading


def _with_adapters(loaded: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Return a model with adapters on it, unmerged, each counting by its weight."""
    grown = max((tensor.shape[0] for path, _weight in adapters
                 for name, tensor in read_safetensors(path / "adapter_model.safetensors").items()
                 if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"))),
                default=0)
    if grown > loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(grown, mean_resizing=False)
    peft = import_module("peft")
    names = [f"adapter{number}" for number in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what would be missing is looked for in `lora.plan_merge`
        whole = peft.PeftModel.from_pretrained(loaded, adapters[0][0], adapter_name=names[0], local_files_only=True)
        for (path, _weight), name in list(zip(adapters, names, strict=True))[1:]:
            whole.load_adapter(path, adapter_name=name, local_files_only=True)
    if len(names) > 1:
        whole.base_model.set_adapter(names)
    for module in whole.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for (_path, weight), name in zip(adapters, names, strict=True):
                if name in scaling:
                    scaling[name] *= weight
    return whole


@contextlib.contextmanager
def _loading(model: ModelFolder, part: str) -> Iterator[None]:
    """Turn whatever transformers raises into a sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as problem:  # libraries raise anything on files that they do not understand
        if "can't allocate memory" in str(problem):
            raise OutOfMemory("The parity check ran out of memory; leave it out with --no-parity, or use a larger "
                              "machine.") from problem
        raise ConversionFailed(f"transformers cannot load {part} of {model.path.name}: "
                               f"{' '.join(str(problem).split())[:200] or type(problem).__name__}") from problem


def _id(token: Any) -> int:
    return -1 if token is None else int(token)


def _control_of(tokenizer: Any) -> dict[int, str]:
    special = {int(token): added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special | {int(token): str(tokenizer.convert_ids_to_tokens(token)) for token in tokenizer.all_special_ids}


def _chat_of(tokenizer: Any) -> list[int]:
    if not tokenizer_fit.template_of(tokenizer):
        return []
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": parity.QUESTION}], tokenize=False,
                                             add_generation_prompt=True)
    except Exception:  # noqa: BLE001 - a template from a stranger raises anything; without it nothing is compared
        return []
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


def read_with_engine(path: Path, reference: Reading, options: EngineOptions, name: str,
                     adapter: Path | None = None) -> tuple[Reading, Floats]:
    """Read the fixed text with llama.cpp: the samples with its tokenizer, the logits for the reference's tokens.

    Args:
        path: a GGUF.
        reference: says which tokens.
        options: how the engine runs.
        name: of this form, for people.
        adapter: a GGUF with a LoRA adapter.

    Raises:
        GgufRefused, ModelNotLoaded, EngineFailed: as they say.
    """
    checked = check_model(path)
    weight_type = checked.dominant_type
    with load_model(path, options) as model:
        tokens = {sample: model.tokenize(text, add_bos=True, special=True).tolist()
                  for sample, text in parity.SAMPLES.items()}
        template = model.metadata("tokenizer.chat_template") or ""
        try:
            chat = prompt_tokens(model, parity.QUESTION).tolist() if template else []
        except ChatTemplateBroken:
            chat = []
        ids = list(reference.ids)
        if max(ids) >= model.n_vocab:
            raise TokenizerMismatch(f"{name} has {model.n_vocab:,} tokens, and the tokenizer gives {max(ids):,}.")
        n = len(ids)
        with (open_context(model, ContextSpec(1, n, shared=False, outputs=n)) as context, _adapted(context, adapter)):
            logits = context.decode(ids, range(n), [(0,)] * n, [True] * n).copy()
        control = {token: model.token_text(token) for token in reference.control
                   if token < model.n_vocab and library().llama_vocab_get_attr(model.vocab, token) & (
                       _CONTROL | _UNKNOWN)}
        reading = Reading(name=name, tokens=tokens, ids=ids, special={"bos": model.bos, "eos": model.eos},
                          control=control, template=template, chat=chat, weight_type=weight_type)
    return reading, logits


@contextlib.contextmanager
def _adapted(context: Context, adapter: Path | None) -> Iterator[None]:
    """Put an adapter on a context while the block runs.

    Raises:
        EngineFailed: the engine refuses it, with its reason.
    """
    if adapter is None:
        yield
        return
    read_header(adapter)  # before native code sees it
    lib = library()
    log.forget()
    pointer = lib.llama_adapter_lora_init(context.model.pointer, os.fsencode(adapter))
    if not pointer:
        raise EngineFailed(f"{adapter.name} does not fit the model: {log.reason('the engine gives no reason')}.")
    adapters = (lib.llama_adapter_lora_p_ctypes * 1)(pointer)
    scales = (ctypes.c_float * 1)(1.0)
    try:
        if lib.llama_set_adapters_lora(context.pointer, adapters, 1, scales) != 0:
            raise EngineFailed(f"{adapter.name} cannot be put on the model: "
                               f"{log.reason('the engine gives no reason')}.")
        yield
    finally:
        lib.llama_set_adapters_lora(context.pointer, None, 0, None)
        lib.llama_adapter_lora_free(pointer)

