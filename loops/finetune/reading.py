"""Readings of the fixed text by each form of a model: PyTorch's on one side, the engine's on the other.

Each is made in a process of its own and kept in a folder: `logits.npy`, then `reading.json`, so that one that is there
is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from loops.engine.chat import ChatTemplateBroken, prompt_tokens
from loops.engine.gguf_check import check_model, read_header
from loops.engine.logits import Floats
from loops.engine.model import Context, ContextSpec, OutOfMemory, load_model, open_context
from loops.engine.native import EngineFailed, library, log
from loops.engine.options import EngineOptions
from loops.engine.scratch import load_array, save_array
from loops.finetune import parity
from loops.finetune.converter import ConversionFailed
from loops.finetune.extra import CONVERTING, require
from loops.finetune.model_folder import ModelFolder
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
        reading = Reading(**{**fields, "control": {int(token): text for token, text in fields["control"].items()}})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return None if logits is None else (reading, logits)


def read_with_torch(model: ModelFolder, folder: Path, name: str, adapter: Path | None,
                    progress: Callable[[float, float], None]) -> Reading:
    """Read the fixed text with transformers, weights and sums in 32 bits on the CPU; keep the reading in folder.

    Args:
        model: checked, a folder without code and pickles, see `stage`.
        folder: takes the reading.
        name: of this form, for people.
        adapter: a LoRA adapter to put on the model, without pickles.
        progress: told how far it is.

    Raises:
        OutOfMemory: the weights do not fit into the memory that is free.
        TokenizerMismatch: the tokenizer has more tokens than the model.
        ConversionFailed: transformers cannot load the model, with its reason.
    """
    require("The parity check", *CONVERTING, *(("peft",) if adapter else ()))
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
            model.path, local_files_only=True, trust_remote_code=False)
    with _loading(model, "its weights"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            attn_implementation="eager")
    rows = loaded.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise TokenizerMismatch(f"The tokenizer of {model.path.name} has {len(tokenizer):,} tokens and the model only "
                                f"{rows:,}: it is that of another model.")
    if adapter is not None:
        with _loading(model, "the adapter"):
            loaded = import_module("peft").PeftModel.from_pretrained(loaded, adapter, local_files_only=True)
    progress(1, 3)
    tokens = {sample: list(map(int, tokenizer(text)["input_ids"])) for sample, text in parity.SAMPLES.items()}
    limit = int(getattr(loaded.config, "max_position_embeddings", 0) or parity.TOKENS)
    ids = tokens["prose"][:min(parity.TOKENS, limit)]
    with torch.inference_mode():
        logits = loaded.eval()(torch.tensor([ids])).logits[0].float().numpy()
    progress(2, 3)
    reading = Reading(
        name=name, tokens=tokens, ids=ids,
        special={"bos": _id(tokenizer.bos_token_id), "eos": _id(tokenizer.eos_token_id)},
        control=_control_of(tokenizer), template=_template_of(tokenizer), chat=_chat_of(tokenizer),
        weight_type=str(model.config.get("dtype") or model.config.get("torch_dtype") or ""))
    save(folder, reading, logits)
    progress(3, 3)
    return reading


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


def _template_of(tokenizer: Any) -> str:
    with contextlib.suppress(ValueError):  # it has none, or several of which none is the default
        return str(tokenizer.get_chat_template())
    return ""


def _chat_of(tokenizer: Any) -> list[int]:
    if not _template_of(tokenizer):
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

