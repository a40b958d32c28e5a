"""GGUF files made by hand, so that a test can lie in any field; and real ones cut into shards."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

from loops.engine.gguf_check import GgufHeader, read_header

STARTER = Path(__file__).resolve().parents[2] / "loops" / "starter" / "starter-f16.gguf"
U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
_CODES = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}
GGML_F32, GGML_F16, GGML_Q4_K, GGML_Q8_0, GGML_I32 = 0, 1, 12, 8, 26
_BLOCKS = {GGML_F32: (1, 4), GGML_F16: (1, 2), GGML_Q4_K: (256, 144), GGML_Q8_0: (32, 34), GGML_I32: (1, 4)}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class Value:
    """A metadata value: the number of its type, and its bytes as they stand in the file."""

    kind: int
    raw: bytes


def scalar(kind: int, value: float | str) -> Value:
    if kind == STRING:
        return Value(kind, text(str(value)))
    return Value(kind, struct.pack("<" + _CODES[kind], value))


def array(kind: int, values: list, length: int | None = None) -> Value:
    head = struct.pack("<IQ", kind, len(values) if length is None else length)
    return Value(ARRAY, head + b"".join(scalar(kind, value).raw for value in values))


@dataclass(frozen=True)
class Tensor:
    """A tensor record; `offset` None means the right one."""

    name: str | bytes
    shape: tuple[int, ...]
    kind: int = GGML_F32
    offset: int | None = None
    n_dims: int | None = None

    def n_bytes(self) -> int:
        block, size = _BLOCKS.get(self.kind, (1, 4))
        n = 1
        for length in self.shape:
            n *= length
        return n // block * size


@dataclass
class FakeGguf:
    """A GGUF whose every field can be set; by default a sound llama of two blocks."""

    keys: dict[str | bytes, Value] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    extra_keys: bytes = b""
    alignment: int = 32
    byte_order: str = "<"
    max_data_bytes: int = 1 << 20  # a tensor that claims more gets no more

    def put(self, key: str, kind: int, value: float | str) -> FakeGguf:
        self.keys[key] = scalar(kind, value)
        return self

    def swap(self, name: str, /, **changes: object) -> FakeGguf:
        self.tensors = [replace(one, **changes) if one.name == name else one for one in self.tensors]
        return self

    def header_bytes(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        out = [self.magic, struct.pack(self.byte_order + "IQQ", self.version, n_tensors, n_keys)]
        out += [text(key) + struct.pack("<I", value.kind) + value.raw for key, value in self.keys.items()]
        out.append(self.extra_keys)
        offset = 0
        for tensor in self.tensors:
            n_dims = len(tensor.shape) if tensor.n_dims is None else tensor.n_dims
            at = offset if tensor.offset is None else tensor.offset
            shape = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            out.append(text(tensor.name) + struct.pack("<I", n_dims) + shape
                       + struct.pack("<IQ", tensor.kind, at % 2**64))
            offset += -(-tensor.n_bytes() // self.alignment) * self.alignment
        return b"".join(out)

    def to_bytes(self) -> bytes:
        head = self.header_bytes()
        data = sum(-(-tensor.n_bytes() // self.alignment) * self.alignment for tensor in self.tensors)
        return head + bytes(-len(head) % self.alignment) + bytes(min(data, self.max_data_bytes))

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path


def tiny_llama(n_blocks: int = 2, width: int = 32, vocabulary: int = 300) -> FakeGguf:
    """A sound little llama: it passes the check, though its weights are zero."""
    fake = FakeGguf()
    fake.put("general.architecture", STRING, "llama").put("general.name", STRING, "Tiny")
    for key, value in (("block_count", n_blocks), ("context_length", 64), ("embedding_length", width),
                       ("feed_forward_length", 64), ("attention.head_count", 4),
                       ("attention.head_count_kv", 2), ("rope.dimension_count", width // 4)):
        fake.put(f"llama.{key}", U32, value)
    fake.put("llama.attention.layer_norm_rms_epsilon", F32, 1e-5).put("llama.rope.freq_base", F32, 10000.0)
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [f"w{index}" for index in range(vocabulary - len(words))]
    fake.put("tokenizer.ggml.model", STRING, "llama")
    fake.keys["tokenizer.ggml.tokens"] = array(STRING, words)
    fake.keys["tokenizer.ggml.scores"] = array(F32, [0.0] * vocabulary)
    fake.keys["tokenizer.ggml.token_type"] = array(I32, [2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259))
    fake.put("tokenizer.ggml.bos_token_id", U32, 1).put("tokenizer.ggml.eos_token_id", U32, 2)
    fake.tensors = [Tensor("token_embd.weight", (width, vocabulary), GGML_F16)]
    for block in range(n_blocks):
        shapes = (("attn_norm", (width,), GGML_F32), ("attn_q", (width, width), GGML_F16),
                  ("attn_k", (width, width // 2), GGML_F16), ("attn_v", (width, width // 2), GGML_F16),
                  ("attn_output", (width, width), GGML_F16), ("ffn_norm", (width,), GGML_F32),
                  ("ffn_gate", (width, 64), GGML_F16), ("ffn_up", (width, 64), GGML_F16),
                  ("ffn_down", (64, width), GGML_F16))
        fake.tensors += [Tensor(f"blk.{block}.{name}.weight", shape, kind) for name, shape, kind in shapes]
    fake.tensors.append(Tensor("output_norm.weight", (width,), GGML_F32))
    return fake


def split(source: Path, folder: Path, count: int) -> list[Path]:
    """Cut a GGUF into shards as llama-gguf-split does: all metadata in the first, split keys in each."""
    header: GgufHeader = read_header(source)
    raw = source.read_bytes()
    keys = raw[24:24 + header.metadata_n_bytes]
    numbers = _type_numbers()
    shards = []
    for place in range(count):
        own = header.tensors[place * len(header.tensors) // count:(place + 1) * len(header.tensors) // count]
        marks = FakeGguf().put("split.no", U16, place).put("split.count", U16, count)
        marks.put("split.tensors.count", I32, len(header.tensors))
        split_keys = b"".join(text(key) + struct.pack("<I", value.kind) + value.raw
                              for key, value in marks.keys.items())
        n_keys = 3 + (len(header.metadata) if place == 0 else 0)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(own), n_keys) + (keys if place == 0 else b"") + split_keys
        data = b""
        for tensor in own:
            head += (text(tensor.name) + struct.pack("<I", len(tensor.shape))
                     + struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
                     + struct.pack("<IQ", numbers[tensor.ggml_type], len(data)))
            start = header.data_offset + tensor.offset
            data += raw[start:start + tensor.n_bytes] + bytes(-tensor.n_bytes % 32)
        shard = folder / f"{source.stem}-{place + 1:05d}-of-{count:05d}.gguf"
        shard.write_bytes(head + bytes(-len(head) % 32) + data)
        shards.append(shard)
    return shards


def _type_numbers() -> dict[str, int]:
    from gguf.constants import GGMLQuantizationType

    return {kind.name: int(kind) for kind in GGMLQuantizationType}


def flips(count: int, seed: int, source: Path = STARTER) -> list[tuple[int, int]]:
    """Seeded single-byte changes before the weights: (position, new byte), never the old byte.

    Half of them are drawn from the fields that are not part of the long vocabulary arrays,
    which otherwise would take nearly all.
    """
    header = read_header(source)
    raw = source.read_bytes()[:header.data_offset]
    first = raw.index(b"tokenizer.ggml.tokens")
    last = raw.index(b"tokenizer.ggml.bos_token_id")
    rng = random.Random(seed)
    chosen = []
    for index in range(count):
        position = rng.randrange(len(raw))
        while index % 2 and first + 40 < position < last:
            position = rng.randrange(len(raw))
        flipped = raw[position] ^ (1 << rng.randrange(8)) if index % 3 else rng.randrange(256)
        chosen.append((position, flipped if flipped != raw[position] else flipped ^ 0xFF))
    return chosen
