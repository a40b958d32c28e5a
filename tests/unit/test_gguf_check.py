"""Promise 6: a hostile GGUF is refused before native code, with the reason, in under 1 s and 64 MB."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loops.engine import gguf_check as check
from state.faults import NightpressError

_spec = importlib.util.spec_from_file_location(
    "gguf_files", Path(__file__).resolve().parents[1] / "fakes" / "gguf_files.py")
assert _spec
assert _spec.loader
g = importlib.util.module_from_spec(_spec)
sys.modules["gguf_files"] = g
_spec.loader.exec_module(g)

STARTER_BYTES = g.STARTER.read_bytes()


def meta(key, kind, value):
    return lambda fake: fake.put(key, kind, value)


def tensor(name, /, **changes):
    return lambda fake: fake.swap(name, **changes)


def attribute(**changes):
    def apply(fake):
        for name, value in changes.items():
            setattr(fake, name, value)
    return apply


def without(key):
    return lambda fake: fake.keys.pop(key)


def key_value(key, kind, raw):
    return lambda fake: fake.keys.update({key: g.Value(kind, raw)})


def arr(key, kind, values, length=None):
    return lambda fake: fake.keys.update({key: g.array(kind, values, length)})


def words(change):
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    names += [f"w{i}" for i in range(41)]
    change(names)
    return arr("tokenizer.ggml.tokens", g.STRING, names)


Q = struct.Struct("<Q").pack
HOSTILE = {
    # the structure
    "version 1": (attribute(version=1), "version 1"),
    "version 4": (attribute(version=4), "version 4"),
    "big-endian": (attribute(byte_order=">"), "big-endian"),
    "2^63 tensors": (attribute(n_tensors=2**63), "claims 9223372036854775808 tensors"),
    "2^64-1 keys": (attribute(n_keys=2**64 - 1), "claims 18446744073709551615 keys"),
    "more keys than there are": (attribute(n_keys=40), "the name of key 18 claims"),
    "key longer than the file": (attribute(n_keys=99, extra_keys=Q(2**62)), "4611686018427387904 bytes"),
    "key of 100 kB": (attribute(n_keys=17, extra_keys=g.text("k" * 100_000)), "100000 bytes long"),
    "key twice": (lambda f: (f.put("a.a", 4, 1), attribute(
        n_keys=len(f.keys) + 1, extra_keys=g.text("a.a") + struct.pack("<II", 4, 1))(f)), "a.a occurs twice"),
    "key not UTF-8": (lambda f: f.keys.update({b"\xff\xfe": g.scalar(4, 1)}), "not UTF-8"),
    "key with NUL": (lambda f: f.keys.update({"a\0b": g.scalar(4, 1)}), "not printable"),
    "empty key": (lambda f: f.keys.update({"": g.scalar(4, 1)}), "is empty"),
    "unknown value type": (key_value("x.y", 13, b"\0" * 8), "x.y has the unknown value type 13"),
    "array of arrays": (key_value("x.y", 9, struct.pack("<IQ", 9, 1)), "x.y is an array of arrays"),
    "array of 2^60 numbers": (arr("x.y", g.U64, [], 2**60), "x.y claims 1152921504606846976 items"),
    "array of 2^61 strings": (arr("x.y", g.STRING, [], 2**61), "x.y claims 2305843009213693952 items"),
    "string past the end": (key_value("x.y", 8, Q(2**40)), "x.y claims 1099511627776 bytes"),
    "string in an array past the end": (key_value("x.y", 9, struct.pack("<IQQ", 8, 1, 2**50)), "array x.y"),
    "string length that overflows": (key_value("x.y", 9, struct.pack("<IQQ", 8, 1, 2**64 - 8)), "array x.y"),
    "alignment 3": (meta("general.alignment", g.U32, 3), "general.alignment is 3"),
    "alignment 0": (meta("general.alignment", g.U32, 0), "general.alignment is 0"),
    "alignment 2^31": (meta("general.alignment", g.U32, 2**31), "general.alignment is 2147483648"),
    "alignment as text": (meta("general.alignment", g.STRING, "32"), "general.alignment is STRING"),
    "no dimensions": (tensor("output_norm.weight", n_dims=0), "output_norm.weight has 0 dimensions"),
    "2^32-1 dimensions": (tensor("output_norm.weight", n_dims=2**32 - 1), "4294967295 dimensions"),
    "a dimension of 0": (tensor("output_norm.weight", shape=(0,)), "output_norm.weight has the impossible"),
    "a product beyond 64 bits": (tensor("blk.0.attn_q.weight", shape=(2**33, 2**33)), "blk.0.attn_q.weight"),
    "unknown tensor type": (tensor("blk.0.attn_q.weight", kind=255), "blk.0.attn_q.weight has type 255"),
    "removed tensor type": (tensor("blk.0.attn_q.weight", kind=4), "blk.0.attn_q.weight has type 4"),
    "row that blocks do not divide": (tensor("blk.0.attn_q.weight", kind=12), "blk.0.attn_q.weight has rows"),
    "overlapping tensors": (tensor("blk.0.attn_q.weight", offset=0), "blk.0.attn_q.weight has offset 0"),
    "offset 2^64-32": (tensor("blk.0.attn_q.weight", offset=2**64 - 32), "blk.0.attn_q.weight has offset"),
    "tensor name of 64 bytes": (tensor("output_norm.weight", name="n" * 64), "64 bytes long"),
    "tensor twice": (tensor("output_norm.weight", name="blk.0.attn_norm.weight"), "attn_norm.weight occurs"),
    "tensor name with NUL": (tensor("output_norm.weight", name=b"a\0b"), "not printable"),
    "norm in half precision": (tensor("output_norm.weight", kind=1), "output_norm.weight is F16"),
    "matrix of integers": (tensor("blk.1.attn_q.weight", kind=26), "blk.1.attn_q.weight is I32"),
    # the metadata
    "no architecture": (without("general.architecture"), "general.architecture is missing"),
    "architecture as number": (meta("general.architecture", g.U32, 1), "general.architecture is UINT32"),
    "architecture as path": (meta("general.architecture", g.STRING, "../x"), "general.architecture is"),
    "imatrix": (meta("general.type", g.STRING, "imatrix"), "importance matrix"),
    "LoRA adapter": (meta("general.type", g.STRING, "adapter"), "LoRA adapter"),
    "projector": (meta("general.type", g.STRING, "mmproj"), "projector"),
    "vocabulary only": (attribute(tensors=[]), "no tensors"),
    "no blocks": (meta("llama.block_count", g.U32, 0), "llama.block_count is 0"),
    "2^32-1 blocks": (meta("llama.block_count", g.U32, 2**32 - 1), "llama.block_count is 4294967295"),
    "a block too many": (meta("llama.block_count", g.U32, 3), "no tensor of block 2"),
    "a block too few": (meta("llama.block_count", g.U32, 1), "blk.1.attn_norm.weight lies beyond"),
    "blocks as text": (meta("llama.block_count", g.STRING, "2"), "llama.block_count is STRING"),
    "no width": (without("llama.embedding_length"), "llama.embedding_length is missing"),
    "another width": (meta("llama.embedding_length", g.U32, 64), "rows of 32"),
    "no heads": (meta("llama.attention.head_count", g.U32, 0), "llama.attention.head_count is 0"),
    "heads that do not divide": (meta("llama.attention.head_count", g.U32, 6), "does not divide"),
    "heads for another depth": (arr("llama.attention.head_count", g.U32, [4, 4, 4]), "3 entries for 2"),
    "three groups for four heads": (meta("llama.attention.head_count_kv", g.U32, 3), "head_count_kv = 3"),
    "epsilon NaN": (meta("llama.attention.layer_norm_rms_epsilon", g.F32, math.nan), "epsilon is nan"),
    "epsilon 0": (meta("llama.attention.layer_norm_rms_epsilon", g.F32, 0.0), "epsilon is 0"),
    "context 0": (meta("llama.context_length", g.U32, 0), "llama.context_length is 0"),
    "rope base infinite": (meta("llama.rope.freq_base", g.F32, math.inf), "llama.rope.freq_base is inf"),
    "rope wider than a head": (meta("llama.rope.dimension_count", g.U32, 16), "rope.dimension_count is 16"),
    "odd rope": (meta("llama.rope.dimension_count", g.U32, 7), "odd"),
    "unknown rope scaling": (meta("llama.rope.scaling.type", g.STRING, "zzz"), "llama.rope.scaling.type"),
    "experts used of none": (meta("llama.expert_used_count", g.U32, 2), "llama.expert_used_count is 2"),
    "experts of which none is used": (meta("llama.expert_count", g.U32, 8), "llama.expert_used_count is 0"),
    "10^6 experts": (meta("llama.expert_count", g.U32, 10**6), "llama.expert_count is 1000000"),
    "feed-forward as float": (meta("llama.feed_forward_length", g.F32, 64.0), "FLOAT32, not an integer"),
    "tokens as numbers": (arr("tokenizer.ggml.tokens", g.U32, [1] * 300), "tokens is ARRAY[UINT32]"),
    "fewer tokens than rows": (arr("tokenizer.ggml.tokens", g.STRING, ["a"]), "has 1 tokens"),
    "scores too short": (arr("tokenizer.ggml.scores", g.F32, [0.0]), "tokenizer.ggml.scores has 1 entries"),
    "bos beyond the vocabulary": (meta("tokenizer.ggml.bos_token_id", g.U32, 300), "bos_token_id is 300"),
    "a token twice": (words(lambda names: names.__setitem__(290, "w3")), "b'w3' twice, at 262 and 290"),
    "a byte token missing": (words(lambda names: names.__setitem__(13, "zzz")), "<0x0A> is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_file_is_refused_with_its_reason(tmp_path, case):
    change, reason = HOSTILE[case]
    fake = g.tiny_llama()
    change(fake)
    path = fake.write(tmp_path / "hostile.gguf")
    started = time.process_time()
    with pytest.raises(check.GgufRefused) as refused:
        check.check_model(path)
    assert time.process_time() - started < 5
    assert reason in refused.value.reason
    assert str(path) in str(refused.value)


LOOKALIKES = {
    "safetensors": (Q(64) + b'{"__metadata__":{}}' + bytes(64), "safetensors"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "ggjt": (b"tjgg" + bytes(60), "old GGML"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "gzip"),
    "empty": (b"", "empty"),
    "three bytes": (b"GGU", "starts with"),
    "interrupted": (bytes(64), "interrupted quantization"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_what_is_not_a_gguf_is_named(tmp_path, case):
    content, word = LOOKALIKES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(check.NotGguf, match=word):
        check.check_model(path)


def test_a_cut_file_says_how_much_is_missing(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(STARTER_BYTES[:-1000])
    with pytest.raises(check.GgufTruncated, match="1000 bytes are missing"):
        check.check_model(path)


@pytest.mark.parametrize("length", [4, 10, 23, 24, 60, 500, 30_000, 66_000, 70_000])
def test_a_file_cut_in_its_header_is_refused(tmp_path, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(STARTER_BYTES[:length])
    with pytest.raises(check.GgufRefused):
        check.check_model(path)


def test_missing_file_folder_pipe_and_device_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, error in ((tmp_path / "none.gguf", check.ModelMissing), (tmp_path, check.NotAFile),
                        (tmp_path / "pipe", check.NotAFile), (Path("/dev/zero"), check.NotAFile),
                        (Path("a\0b"), check.ModelMissing), (tmp_path / ("n" * 300), check.ModelUnreadable)):
        with pytest.raises(error):
            check.check_model(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = g.tiny_llama().write(tmp_path / "model.gguf")
    path.chmod(0)
    with pytest.raises(check.ModelUnreadable, match="permission denied"):
        check.check_model(path)


def test_every_refusal_has_its_own_exit_code():
    errors = (check.ModelMissing, check.NotAFile, check.NotGguf, check.GgufRefused, check.GgufTruncated,
              check.ShardMissing, check.ModelUnreadable)
    assert [error.exit_code for error in errors] == list(range(20, 27))
    assert all(str(error()) for error in errors)


def test_500_flipped_bytes_are_refused_or_read_and_never_anything_else(tmp_path):
    path = tmp_path / "flipped.gguf"
    path.write_bytes(STARTER_BYTES)
    refused = 0
    for position, value in g.flips(500, seed=6):
        with path.open("r+b") as handle:
            handle.seek(position)
            handle.write(bytes([value]))
        started = time.process_time()
        try:
            check.check_model(path)
        except NightpressError:
            refused += 1
        assert time.process_time() - started < 5
        with path.open("r+b") as handle:
            handle.seek(position)
            handle.write(STARTER_BYTES[position:position + 1])
    assert refused > 200


def _bulky() -> dict[str, tuple[bytes, str]]:
    """Headers that are sound as far as they go, but as costly to read as a header may be."""
    texts = g.tiny_llama()
    for index in range(30):
        texts.put(f"x.text{index}", g.STRING, "t" * 1_000_000)
    vocabulary = g.tiny_llama()
    n = (1 << 19) + 1
    vocabulary.keys["tokenizer.ggml.tokens"] = g.Value(g.ARRAY, struct.pack("<IQ", g.STRING, n) + b"".join(
        g.text(str(i)) for i in range(n)))
    strings = g.tiny_llama()
    n = (1 << 21) - 300
    strings.keys["x.y"] = g.Value(g.ARRAY, struct.pack("<IQ", g.STRING, n) + bytes(8 * n))
    full = g.tiny_llama(vocabulary=1 << 19)
    full.max_data_bytes = 64 << 20
    records = g.tiny_llama()
    records.tensors = [g.Tensor(f"t{i}", (8,)) for i in range(65_536)]
    keys = g.tiny_llama()
    keys.keys |= {f"k{i}": g.scalar(g.U32, 1) for i in range(65_000)}
    records.max_data_bytes = 4 << 20
    return {"texts": (texts.to_bytes(), "passed"), "vocabulary": (vocabulary.to_bytes(), "524289 tokens"),
            "strings": (strings.to_bytes(), "passed"), "full": (full.to_bytes(), "passed"),
            "records": (records.to_bytes(), "passed"), "keys": (keys.to_bytes(), "passed")}


MEASURE = """
import json, resource, sys, time
from pathlib import Path
from loops.engine.gguf_check import check_model
from loops.engine.gguf_format import tensor_types
from state.faults import NightpressError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

tensor_types()
before, started, outcome = peak(), time.process_time(), "passed"
try:
    check_model(Path(sys.argv[1]))
except NightpressError as refused:
    outcome = str(refused)
print(json.dumps([time.process_time() - started, peak() - before, outcome]))
"""


def test_the_costliest_headers_take_little_time_and_under_64_mb(tmp_path):
    path = tmp_path / "bulky.gguf"
    most = 0
    for name, (content, reason) in _bulky().items():
        path.write_bytes(content)
        # by way of a shell, because a process starts out with the peak memory of the one that made it
        run = subprocess.run(["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", MEASURE, str(path)],
                             capture_output=True, text=True, check=True)
        seconds, n_bytes, outcome = json.loads(run.stdout)
        assert reason in outcome, name
        assert seconds < 5, name
        assert n_bytes < 64 << 20, name
        most = max(most, n_bytes)
    assert most > 1 << 20  # else nothing was measured


def test_the_starter_passes_and_is_described():
    model = check.check_model(g.STARTER)
    header = model.header
    assert (header.architecture, header.version, header.file_type) == ("llama", 3, 1)
    assert model.n_parameters == 7_082_240
    assert 16 < header.bits_per_weight < 16.1
    assert header.dominant_type == "F16"
    assert not model.is_quantized
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], check.ArraySummary)
    assert model.file_bytes == g.STARTER.stat().st_size


def test_shards_pass_together_whichever_is_given(tmp_path):
    shards = g.split(g.STARTER, tmp_path, 3)
    whole = check.check_model(g.STARTER)
    for shard in shards:
        model = check.check_model(shard)
        assert model.path == shards[0]
        assert model.shards == tuple(shards)
        assert {t.name: t.n_bytes for t in model.tensors} == {t.name: t.n_bytes for t in whole.tensors}


def test_a_missing_shard_is_named(tmp_path):
    shards = g.split(g.STARTER, tmp_path, 3)
    shards[1].unlink()
    with pytest.raises(check.ShardMissing, match="00002-of-00003"):
        check.check_model(shards[0])


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    shards = g.split(g.STARTER, tmp_path, 3)
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(check.GgufRefused, match=r"split\.no is 2"):
        check.check_model(shards[0])


def test_a_shard_under_another_name_is_refused(tmp_path):
    shards = g.split(g.STARTER, tmp_path, 2)
    other = shards[0].rename(tmp_path / "model.gguf")
    with pytest.raises(check.GgufRefused, match="shard 1 of 2"):
        check.check_model(other)


def test_a_quantized_file_passes_and_is_known_as_quantized(tmp_path):
    fake = g.tiny_llama()
    for one in list(fake.tensors):
        if len(one.shape) == 2:
            fake.swap(one.name, kind=g.GGML_Q8_0)
    header = check.check_gguf(fake.write(tmp_path / "q8.gguf"))
    assert header.is_quantized
    assert header.dominant_type == "Q8_0"


def test_an_architecture_nobody_thought_of_passes(tmp_path):
    fake = g.tiny_llama()
    fake.keys = {str(key).replace("llama.", "brandnew."): value for key, value in fake.keys.items()}
    fake.put("general.architecture", g.STRING, "brandnew")
    assert check.check_gguf(fake.write(tmp_path / "new.gguf")).architecture == "brandnew"


def test_checking_changes_nothing(tmp_path):
    path = g.tiny_llama().write(tmp_path / "model.gguf")
    before = path.stat()
    check.check_model(path)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size, stat.S_IMODE(before.st_mode)) == (
        after.st_mtime_ns, after.st_size, stat.S_IMODE(after.st_mode))
