"""The rules that the metadata and the tensors of a model have to keep before native code sees them.

llama.cpp checks the structure of a file but trusts much of its metadata: a wrong number there ends the
process with an assertion, or only shows at the first decode. So the ranges that its source asserts
(`llama-model.cpp`, `llama-vocab.cpp`, `llama-model-loader.cpp`) are checked here first. A rule fires
only on keys and tensors that exist, so that architectures nobody thought of here pass; whether the engine
knows the architecture it says itself, without harm.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loops.engine.gguf_format import MAX_KEY_BYTES, Window, open_regular
from loops.engine.gguf_header import ArraySummary, GgufHeader, GgufRefused, TensorInfo, refusal

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_WIDTH = 1 << 20
MAX_TOKENS = 1 << 19  # twice the largest known vocabulary; bounds the search for duplicates
_FLOATS = frozenset({"F32", "F16", "BF16"})
_INTEGERS = frozenset({"UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"})
_NOT_A_MODEL = {"imatrix": "an importance matrix", "adapter": "a LoRA adapter", "vocab": "only a vocabulary",
                "mmproj": "the image or sound projector of one", "controlvector": "a control vector"}
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.([0-9]+)\.")
_ATTENTION = re.compile(r"(?:enc\.|dec\.)?blk\.[0-9]+\.attn_(?:q|qkv)\.weight")
_MULTIPLIED = re.compile(
    r"(?:token_embd|output|blk\.[0-9]+\.(?:attn_(?:q|k|v|qkv|output)|ffn_(?:gate|up|down)(?:_exps)?))\.weight")
_ADDED = re.compile(r".*_norm\.weight|.*\.bias|rope_freqs\.weight")
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-F]{2})>")
_TOKEN_TYPE_BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE
_FORMATS = {"UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i",
            "UINT64": "Q", "INT64": "q", "FLOAT32": "f", "FLOAT64": "d", "BOOL": "B"}


@dataclass(frozen=True)
class _Subject:
    """What the rules look at: the metadata of the first file and the tensors of all."""

    header: GgufHeader
    tensors: tuple[TensorInfo, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    def key(self, name: str) -> str:
        return f"{self.header.architecture}.{name}"

    def refuse(self, reason: str) -> GgufRefused:
        return refusal(self.header.path, reason)

    def integer(self, key: str, low: int, high: int) -> int | None:
        """The integer under `key`, in range; None where there is no such key."""
        kind = self.header.value_types.get(key)
        if kind is None:
            return None
        value = self.header.metadata[key]
        if kind not in _INTEGERS or not isinstance(value, int):
            raise self.refuse(f"{key} is {kind}, not an integer")
        if not low <= value <= high:
            raise self.refuse(f"{key} is {value}; it must be from {low} to {high}")
        return value

    def required(self, key: str, low: int, high: int) -> int:
        value = self.integer(key, low, high)
        if value is None:
            raise self.refuse(f"{key} is missing")
        return value

    def per_block(self, key: str, low: int, high: int, n_blocks: int) -> tuple[int, ...] | None:
        """The integers under `key`, one per block; a single one stands for all."""
        kind = self.header.value_types.get(key, "")
        if not kind.startswith("ARRAY"):
            value = self.integer(key, low, high)
            return None if value is None else (value,) * n_blocks
        summary = self.header.metadata[key]
        if kind[6:-1] not in _INTEGERS:
            raise self.refuse(f"{key} is {kind}, not integers")
        values = summary if isinstance(summary, tuple) else ()
        length = summary.length if isinstance(summary, ArraySummary) else len(values)
        if length != n_blocks:
            raise self.refuse(f"{key} has {length} entries for {n_blocks} blocks")
        if isinstance(summary, ArraySummary):
            values = _numbers(self.header.path, summary)
        for index, value in enumerate(values):
            if not low <= value <= high:
                raise self.refuse(f"{key}[{index}] is {value}; it must be from {low} to {high}")
        return tuple(values)


def _numbers(path: Path, array: ArraySummary) -> tuple[int, ...]:
    """Read a summarised array again; the caller has bounded its length."""
    with open_regular(path) as descriptor:
        raw = Window(descriptor, path, array.offset).take(array.n_bytes, "an array")
    return struct.unpack(f"<{array.length}{_FORMATS[array.element_type]}", raw)


def _texts(path: Path, value: object) -> Iterator[bytes]:
    """The strings of an array, kept or summarised."""
    if isinstance(value, tuple):
        yield from (str(text).encode() for text in value)
    elif isinstance(value, ArraySummary):
        with open_regular(path) as descriptor:
            window = Window(descriptor, path, value.offset)
            yield from window.strings(value.length, MAX_KEY_BYTES, "a token")


def _check_kind(subject: _Subject) -> None:
    header = subject.header
    kind = header.metadata.get("general.type", "model")
    if isinstance(kind, str) and kind in _NOT_A_MODEL:
        raise subject.refuse(f"it is not a language model but {_NOT_A_MODEL[kind]} (general.type is {kind})")
    if header.architecture == "clip":
        raise subject.refuse(f"it is not a language model but {_NOT_A_MODEL['mmproj']}")
    if not header.architecture:
        raise subject.refuse("general.architecture is missing")
    if not re.fullmatch(r"[a-z0-9._-]{1,64}", header.architecture):
        raise subject.refuse(f"general.architecture is {header.architecture[:64]!a}")
    if not subject.tensors:
        raise subject.refuse("it holds no tensors, so it is only a vocabulary")


def _check_blocks(subject: _Subject) -> int:
    """Check the number of blocks against the tensors, and return it."""
    key = subject.key("block_count")
    n_blocks = subject.required(key, 1, MAX_BLOCKS)
    n_decoder = subject.integer(subject.key("decoder_block_count"), 1, MAX_BLOCKS) or 0
    n_extra = subject.integer(subject.key("nextn_predict_layers"), 0, n_blocks) or 0
    present: set[int] = set()
    for tensor in subject.tensors:
        match = _BLOCK.match(tensor.name)
        if match:
            present.add(int(match[1]))
            if int(match[1]) >= max(n_blocks, n_decoder):
                raise subject.refuse(f"tensor {tensor.name} lies beyond {key}, which is {n_blocks}")
    # where heads are listed per block, a block may be empty (deci); prediction blocks may be left out
    listed = subject.header.value_types.get(subject.key("attention.head_count"), "").startswith("ARRAY")
    missing = set(range(n_blocks - n_extra)) - present
    if missing and present and not listed:
        raise subject.refuse(f"{key} is {n_blocks}, but no tensor of block {min(missing)} is in the file")
    return n_blocks


def _check_widths(subject: _Subject, n_blocks: int) -> None:
    width = subject.required(subject.key("embedding_length"), 1, MAX_WIDTH)
    subject.required(subject.key("context_length"), 1, 2**31 - 1)
    embedding = subject.by_name.get("token_embd.weight")
    if embedding and subject.key("features_length") not in subject.header.metadata:
        if embedding.shape[0] != width:
            raise subject.refuse(f"{subject.key('embedding_length')} is {width}, "
                                 f"but token_embd.weight has rows of {embedding.shape[0]}")
        subject.integer(subject.key("vocab_size"), 1, MAX_WIDTH << 4)
    subject.per_block(subject.key("feed_forward_length"), 0, MAX_WIDTH << 4, n_blocks)

    heads = subject.per_block(subject.key("attention.head_count"), 0, 65_536, n_blocks)
    groups = subject.per_block(subject.key("attention.head_count_kv"), 0, 65_536, n_blocks)
    attends = next((tensor.name for tensor in subject.tensors if _ATTENTION.fullmatch(tensor.name)), None)
    if attends and not (heads and max(heads)):
        what = "missing" if heads is None else "0"
        raise subject.refuse(f"{subject.key('attention.head_count')} is {what}, but there is {attends}")
    for block, (head, group) in enumerate(zip(heads or (), groups or (), strict=False)):
        if head and group and head % group:
            raise subject.refuse(f"{subject.key('attention.head_count')} is {head} in block {block}, which "
                                 f"{subject.key('attention.head_count_kv')} = {group} does not divide")
    key_length = subject.integer(subject.key("attention.key_length"), 1, 65_536)
    subject.integer(subject.key("attention.value_length"), 1, 65_536)
    if not heads or not heads[0]:
        return
    if key_length is None and len(set(heads)) == 1 and width % heads[0]:
        raise subject.refuse(f"{subject.key('attention.head_count')} = {heads[0]} does not divide "
                             f"{subject.key('embedding_length')} = {width}")
    rotated = subject.integer(subject.key("rope.dimension_count"), 0, key_length or max(1, width // heads[0]))
    if rotated and rotated % 2:
        raise subject.refuse(f"{subject.key('rope.dimension_count')} is {rotated}, which is odd")


def _check_experts(subject: _Subject, n_blocks: int) -> None:
    n_experts = subject.integer(subject.key("expert_count"), 0, MAX_EXPERTS) or 0
    if n_experts <= 1 and subject.header.architecture.startswith("hunyuan"):
        return  # llama.cpp reads one expert as none there
    used_key = subject.key("expert_used_count")
    used = subject.per_block(used_key, 0, MAX_EXPERTS, n_blocks) or (0,)
    if not min(1, n_experts) <= max(used) <= n_experts:
        raise subject.refuse(f"{used_key} is {max(used)} of {subject.key('expert_count')} = {n_experts}")
    groups = subject.integer(subject.key("expert_group_count"), 0, max(0, n_experts - 1)) or 0
    if groups > 1:
        if n_experts % groups:
            raise subject.refuse(f"{subject.key('expert_group_count')} = {groups} does not divide "
                                 f"{subject.key('expert_count')} = {n_experts}")
        subject.required(subject.key("expert_group_used_count"), 1, groups - 1)


def _check_floats(subject: _Subject) -> None:
    """Every number of the architecture must be finite; some must be positive or small."""
    header = subject.header
    for key, kind in header.value_types.items():
        if not key.startswith(header.architecture + "."):
            continue
        value = header.metadata[key]
        if isinstance(value, float) and not math.isfinite(value):
            raise subject.refuse(f"{key} is {value}")
        if key.endswith("epsilon"):
            if not isinstance(value, float):
                raise subject.refuse(f"{key} is {kind}, not a float")
            if not 0 < value < 1:
                raise subject.refuse(f"{key} is {value:g}; it must be between 0 and 1")
        elif key.endswith(("rope.freq_base", "rope.freq_base_swa")):
            if not isinstance(value, float):
                raise subject.refuse(f"{key} is {kind}, not a float")
            if value <= 0:
                raise subject.refuse(f"{key} is {value:g}; it must be above 0")
    scaling = header.metadata.get(subject.key("rope.scaling.type"), "none")
    if scaling not in _ROPE_SCALINGS:
        raise subject.refuse(f"{subject.key('rope.scaling.type')} is {str(scaling)[:64]!a}, "
                             f"not one of {', '.join(_ROPE_SCALINGS)}")


def _check_types(subject: _Subject) -> None:
    """The element-wise operators of ggml abort on types they were not written for."""
    for tensor in subject.tensors:
        if _ADDED.fullmatch(tensor.name) and len(tensor.shape) == 1 and tensor.ggml_type != "F32":
            raise subject.refuse(f"tensor {tensor.name} is {tensor.ggml_type}; it must be F32")
        if _MULTIPLIED.fullmatch(tensor.name) and tensor.ggml_type in {"I8", "I16", "I32", "I64", "F64"}:
            raise subject.refuse(f"tensor {tensor.name} is {tensor.ggml_type}, which no matrix can be")


def _length_of(subject: _Subject, key: str, element_types: frozenset[str]) -> int | None:
    kind = subject.header.value_types.get(key)
    if kind is None:
        return None
    value = subject.header.metadata[key]
    if kind[6:-1] not in element_types:
        raise subject.refuse(f"{key} is {kind}, not an array of {' or '.join(sorted(element_types))}")
    return value.length if isinstance(value, ArraySummary) else len(value) if isinstance(value, tuple) else 0


def _check_vocabulary(subject: _Subject) -> None:
    header, key = subject.header, "tokenizer.ggml.tokens"
    embedding = subject.by_name.get("token_embd.weight")
    n_tokens = _length_of(subject, key, frozenset({"STRING"}))
    if n_tokens is None:
        n_named = subject.integer(subject.key("vocab_size"), 1, MAX_WIDTH << 4)
        if n_named and embedding and n_named != embedding.shape[-1]:
            raise subject.refuse(f"{subject.key('vocab_size')} is {n_named}, "
                                 f"but token_embd.weight has {embedding.shape[-1]} rows")
        return
    if not 1 <= n_tokens <= MAX_TOKENS:
        raise subject.refuse(f"{key} has {n_tokens} tokens; 1 to {MAX_TOKENS} are allowed")
    if embedding and math.prod(embedding.shape[1:]) != n_tokens:
        raise subject.refuse(f"{key} has {n_tokens} tokens, but token_embd.weight has "
                             f"{math.prod(embedding.shape[1:])} rows")
    for name, kinds in (("scores", frozenset({"FLOAT32", "INT32"})), ("token_type", frozenset({"INT32"}))):
        length = _length_of(subject, f"tokenizer.ggml.{name}", kinds)
        if length not in {None, n_tokens}:
            raise subject.refuse(f"tokenizer.ggml.{name} has {length} entries for {n_tokens} tokens")
    for special in ("bos", "eos"):
        subject.integer(f"tokenizer.ggml.{special}_token_id", 0, n_tokens - 1)

    if header.metadata.get("tokenizer.ggml.model") == "llama":
        _check_byte_tokens(subject)
    _check_distinct(subject, key)


def _check_distinct(subject: _Subject, key: str) -> None:
    """llama.cpp asserts that no token occurs twice; empty ones it names by their place."""
    path, value = subject.header.path, subject.header.metadata[key]
    hashes: set[int] = set()  # not the texts: half a million of them need not fit in 64 MB
    for index, text in enumerate(_texts(path, value)):
        if not text:
            continue
        if hash(text) in hashes:
            first = next(place for place, other in enumerate(_texts(path, value)) if other == text)
            if first < index:  # else two texts of one hash
                raise subject.refuse(f"{key} has the token {text[:64]!r} twice, at {first} and {index}")
        hashes.add(hash(text))


def _check_byte_tokens(subject: _Subject) -> None:
    """A SentencePiece vocabulary falls back to 256 byte tokens; llama.cpp ends the process on a gap.

    It throws where one is not found while it tokenizes, and where a token typed as a byte is not
    written like one and too short. Both leave its C interface as an exception that nobody catches.
    """
    path, metadata = subject.header.path, subject.header.metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type")
    numbers = _numbers(path, types) if isinstance(types, ArraySummary) else types
    found: set[bytes] = set()
    for index, text in enumerate(_texts(path, tokens)):
        if len(text) == 6 and _BYTE_TOKEN.fullmatch(text):
            found.add(text)
        elif len(text) < 3 and text and isinstance(numbers, tuple) and numbers[index] == _TOKEN_TYPE_BYTE:
            raise subject.refuse(f"tokenizer.ggml.token_type says that token {index} is a byte, "
                                 f"but it is {text[:64]!r}")
    if 0 < len(found) < 256:
        missing = next(byte for byte in range(256) if b"<0x%02X>" % byte not in found)
        raise subject.refuse(f"tokenizer.ggml.tokens has {len(found)} of 256 byte tokens; "
                             f"<0x{missing:02X}> is missing")


def check_rules(header: GgufHeader, tensors: tuple[TensorInfo, ...]) -> None:
    """Check the metadata of a model's first file together with the tensors of all its files.

    Raises:
        GgufRefused: naming the key or the tensor.
    """
    subject = _Subject(header, tensors)
    _check_kind(subject)
    n_blocks = _check_blocks(subject)
    _check_widths(subject, n_blocks)
    _check_experts(subject, n_blocks)
    _check_floats(subject)
    _check_types(subject)
    _check_vocabulary(subject)
