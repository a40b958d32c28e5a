"""Importance matrices come back from disk as they were, and what cannot be one is refused in a sentence."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf_files import ARRAY, F32, GGML_F16, STRING, U32, FakeGguf, Tensor, Value, array, scalar, text, tiny_llama

from loops.engine.gguf_header import ModelMissing, NotAFile, TensorInfo
from loops.engine.imatrix import add_by_expert, add_plain, add_squares
from loops.engine.imatrix_file import (
    Entry,
    Imatrix,
    ImatrixRefused,
    check_fits,
    merge_imatrices,
    read_imatrix,
    write_imatrix,
)
from loops.engine.imatrix_stats import coverage, layer_statistics, tensor_statistics

PLAIN, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"


def entry(sums: list[float], counts: list[int]) -> Entry:
    return Entry(np.array(sums, dtype=np.float32), np.array(counts, dtype=np.int64))


def small() -> Imatrix:
    return Imatrix({PLAIN: entry([1, 2.5, 0, 1e-30], [1024]), EXPERTS: entry([4, 8, 0, 0, 3, 6], [2, 0, 3])},
                   ("one.txt", "zwölf.txt"), 2, 512)


def plain(matrix: Imatrix) -> tuple[object, ...]:
    """All of a matrix, as it can be compared."""
    entries = {name: (one.sums.tolist(), one.counts.tolist()) for name, one in matrix.entries.items()}
    return matrix.datasets, matrix.chunks, matrix.chunk_size, entries


def dat(entries: dict[str, tuple[int, list[float]]], chunks: int | None = 3, dataset: bytes = b"old.txt") -> bytes:
    """A file of llama-imatrix's older form."""
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += struct.pack(f"<{len(values)}f", *values)
    return out if chunks is None else out + struct.pack("<ii", chunks, len(dataset)) + dataset


def floats(*values: float) -> bytes:
    raw = struct.pack(f"<{len(values)}f", *values)
    return raw + bytes(-len(raw) % 32)


def gguf() -> FakeGguf:
    """A sound matrix of one entry with two columns, to be spoilt; its data are zeros."""
    fake = FakeGguf().put("general.type", STRING, "imatrix")
    fake.keys["imatrix.datasets"] = array(STRING, ["a.txt"])
    fake.put("imatrix.chunk_count", U32, 2).put("imatrix.chunk_size", U32, 512)
    fake.tensors = [Tensor(f"{PLAIN}.in_sum2", (2,)), Tensor(f"{PLAIN}.counts", (1,))]
    return fake


def with_data(fake: FakeGguf, *data: bytes) -> bytes:
    whole = fake.to_bytes()
    return whole[:len(whole) - sum(map(len, data))] + b"".join(data)


def refused(folder: Path, content: bytes) -> str:
    path = folder / "spoilt"
    path.write_bytes(content)
    with pytest.raises(ImatrixRefused) as caught:
        read_imatrix(path)
    message = str(caught.value)
    assert caught.value.exit_code == 8
    assert message.startswith(f"{path} is no usable importance matrix: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message.partition("matrix: ")[2]


def test_a_matrix_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", small())
    assert plain(read_imatrix(tmp_path / "m.gguf")) == plain(small())


def test_the_file_is_laid_out_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", small())
    reader = GGUFReader(tmp_path / "m.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {"general.type": "imatrix", "imatrix.datasets": ["one.txt", "zwölf.txt"],
                      "imatrix.chunk_count": 2, "imatrix.chunk_size": 512}
    found = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.ravel().tolist())
             for tensor in reader.tensors}
    assert found == {
        f"{PLAIN}.in_sum2": ("F32", [4], [1, 2.5, 0, float(np.float32(1e-30))]),
        f"{PLAIN}.counts": ("F32", [1], [1024]),
        f"{EXPERTS}.in_sum2": ("F32", [2, 3], [4, 8, 0, 0, 3, 6]), f"{EXPERTS}.counts": ("F32", [1, 3], [2, 0, 3])}


def test_weights_are_means_and_one_for_an_expert_never_seen() -> None:
    assert small().entries[EXPERTS].weights().tolist() == [2, 4, 1, 1, 1, 2]
    assert small().entries[PLAIN].weights().dtype == np.float32


def test_the_older_form_is_read_in_units_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    path.write_bytes(dat({PLAIN: (3, [3, 6]), EXPERTS: (2, [1, 2, 3, 4])}))
    found = read_imatrix(path)
    expected = Imatrix({PLAIN: entry([3 * 512, 6 * 512], [3 * 512]),
                        EXPERTS: entry([512, 1024, 1536, 2048], [1024])}, ("old.txt",), 3, 512)
    assert plain(found) == plain(expected)
    assert found.entries[PLAIN].weights().tolist() == [1, 2]
    assert read_imatrix(path, legacy_chunk=256).entries[PLAIN].counts.tolist() == [768]


def test_the_oldest_form_ends_after_its_sums(tmp_path: Path) -> None:
    path = tmp_path / "oldest.dat"
    path.write_bytes(dat({PLAIN: (7, [7, 14])}, chunks=None))
    found = read_imatrix(path)
    assert (found.chunks, found.datasets) == (7, ())


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = with_data(gguf(), floats(1, 2), floats(1024))
    (tmp_path / "whole").write_bytes(whole)
    assert read_imatrix(tmp_path / "whole").entries[PLAIN].sums.tolist() == [1, 2]
    data_ends = len(whole) - 28  # the last tensor has 4 bytes; its padding may be missing
    for length in range(data_ends):
        refused(tmp_path, whole[:length])
    old = dat({PLAIN: (3, [3, 6]), EXPERTS: (2, [1, 2, 3, 4])})
    ends = len(dat({PLAIN: (3, [3, 6]), EXPERTS: (2, [1, 2, 3, 4])}, chunks=None))
    for length in range(len(old)):
        if length != ends:
            refused(tmp_path, old[:length])


def spoilt(change: Callable[[FakeGguf], object]) -> bytes:
    fake = gguf()
    change(fake)
    return with_data(fake, floats(1, 2), floats(1024))


NO_NUMBERS = {
    "NaN": (floats(1, math.nan), floats(4), "the sums of blk.0.attn_q.weight are not all finite numbers"),
    "infinite": (floats(math.inf, 1), floats(4), "the sums of blk.0.attn_q.weight are not all finite numbers"),
    "negative": (floats(1, -1e-9), floats(4), "the sums of blk.0.attn_q.weight are not all positive"),
    "count NaN": (floats(1, 2), floats(math.nan), "the counts of blk.0.attn_q.weight are not all finite numbers"),
    "count negative": (floats(1, 2), floats(-1), "the counts of blk.0.attn_q.weight are not all positive"),
    "no data": (floats(0, 0), floats(0), "it holds no data"),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_numbers_that_no_sum_and_no_count_can_be_are_refused(case: str, tmp_path: Path) -> None:
    sums, counts, reason = NO_NUMBERS[case]
    assert refused(tmp_path, with_data(gguf(), sums, counts)) == f"{reason}."


UNKNOWN = "it is neither a GGUF nor an older file of llama-imatrix"
NO_MATRIX = {
    "a model": (lambda: tiny_llama().to_bytes(), "it is a GGUF of type model, not of type imatrix"),
    "an adapter": (lambda: spoilt(lambda fake: fake.put("general.type", STRING, "adapter")),
                   "it is a GGUF of type adapter, not of type imatrix"),
    "no size": (lambda: spoilt(lambda fake: fake.keys.pop("imatrix.chunk_size")),
                "imatrix.chunk_size is missing, not UINT32"),
    "a count of another type": (lambda: spoilt(lambda fake: fake.put("imatrix.chunk_count", F32, 2)),
                                "imatrix.chunk_count is FLOAT32, not UINT32"),
    "a lone tensor": (lambda: spoilt(lambda fake: fake.swap(f"{PLAIN}.counts", name="x.counts")),
                      f"{PLAIN}.in_sum2 is there, but not {PLAIN}.counts"),
    "half floats": (lambda: spoilt(lambda fake: fake.swap(f"{PLAIN}.in_sum2", kind=GGML_F16)),
                    f"{PLAIN}.in_sum2 is F16, not F32"),
    "odd counts": (lambda: with_data(gguf().swap(f"{PLAIN}.counts", shape=(1, 3)), floats(1, 2), floats(1, 1, 1)),
                   f"{PLAIN} has 2 sums for 3 counts"),
    "no tensors": (lambda: with_data(_without_tensors()), "it holds no data"),
    "text": (lambda: b"Once upon a time there was a miller.", UNKNOWN),
    "nothing": (lambda: b"", UNKNOWN),
    "zeros": (lambda: bytes(400), UNKNOWN),
    "bytes for a name": (lambda: dat({"a\x07b": (1, [1])}), UNKNOWN),
    "old, NaN": (lambda: dat({PLAIN: (1, [math.nan])}), f"the sums of {PLAIN} are not all finite numbers"),
    "old, negative": (lambda: dat({PLAIN: (1, [-1])}), f"the sums of {PLAIN} are not all positive"),
    "old, no chunks": (lambda: dat({PLAIN: (0, [1])}), f"{PLAIN} has 1 sums of 0 chunks"),
    "old, no sums": (lambda: dat({PLAIN: (4, [])}), f"{PLAIN} has 0 sums of 4 chunks"),
    "old, negative end": (lambda: dat({PLAIN: (1, [1])}, chunks=-1),
                          "it claims -1 chunks of a text whose name has 7 bytes"),
}


def _without_tensors() -> FakeGguf:
    fake = gguf()
    fake.tensors = []
    return fake


@pytest.mark.parametrize("case", NO_MATRIX)
def test_what_is_no_matrix_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    content, reason = NO_MATRIX[case]
    assert refused(tmp_path, content()) == f"{reason}."


def test_a_claim_of_more_sums_than_bytes_allocates_nothing(tmp_path: Path) -> None:
    content = struct.pack("<ii", 1, 5) + b"blk.0" + struct.pack("<ii", 1, 2**31 - 1) + bytes(8)
    assert refused(tmp_path, content) == "it was cut off."


def test_what_is_not_there_or_no_file_is_said_as_of_any_model(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing):
        read_imatrix(tmp_path / "nowhere.gguf")
    with pytest.raises(NotAFile):
        read_imatrix(tmp_path)


def test_many_datasets_are_counted(tmp_path: Path) -> None:
    fake = gguf()
    fake.keys["imatrix.datasets"] = Value(ARRAY, struct.pack("<IQ", STRING, 65) + text("a") * 65)
    (tmp_path / "m").write_bytes(with_data(fake, floats(1, 2), floats(4)))
    assert read_imatrix(tmp_path / "m").datasets == ("65 texts",)
    assert scalar(STRING, "a").raw == text("a")


def test_merging_adds_sums_and_counts(tmp_path: Path) -> None:
    more = Imatrix({PLAIN: entry([1, 1, 1, 1], [512]), "blk.2.attn_q.weight": entry([5], [512])}, ("three",), 1, 512)
    merged = merge_imatrices([small(), more])
    assert merged.entries[PLAIN].sums.tolist() == [2, 3.5, 1, 1]
    assert merged.entries[PLAIN].counts.tolist() == [1536]
    assert merged.entries["blk.2.attn_q.weight"].sums.tolist() == [5]
    assert merged.entries[EXPERTS].counts.tolist() == [2, 0, 3]
    assert (merged.datasets, merged.chunks, merged.chunk_size) == (("one.txt", "zwölf.txt", "three"), 3, 512)
    assert small().entries[PLAIN].sums.tolist()[0] == 1  # the parts stay as they were


@pytest.mark.parametrize("reverse", [False, True])
def test_one_count_for_all_experts_counts_for_each(reverse: bool) -> None:
    old = Imatrix({EXPERTS: entry([1, 1, 1, 1, 1, 1], [512])}, (), 1, 512)
    merged = merge_imatrices([old, small()] if reverse else [small(), old])
    assert merged.entries[EXPERTS].counts.tolist() == [514, 512, 515]
    assert merged.entries[EXPERTS].sums.tolist() == [5, 9, 1, 1, 4, 7]


@pytest.mark.parametrize("other", [entry([1, 2], [4]), entry([1] * 8, [4])])
def test_matrices_of_two_models_are_not_merged(other: Entry) -> None:
    with pytest.raises(ImatrixRefused, match=r"^Importance matrix 2 of 2 is of another model .* not 4 and 1\.$"):
        merge_imatrices([small(), Imatrix({PLAIN: other}, (), 1, 512)])
    with pytest.raises(ImatrixRefused, match="4 counts"):
        merge_imatrices([small(), Imatrix({EXPERTS: entry([1] * 6, [1] * 4)}, (), 1, 512)])


def tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "F16", shape, 0, 0)


MODEL = (tensor("token_embd.weight", 4, 99), tensor(PLAIN, 4, 8), tensor("blk.0.attn_norm.weight", 4),
         tensor(EXPERTS, 2, 16, 3), tensor("blk.1.ffn_gate_inp.weight", 4, 3), tensor("output.weight", 4, 99))


def test_a_matrix_fits_its_model_whole_or_in_part() -> None:
    check_fits(small(), MODEL, "mine", "m.gguf")
    check_fits(Imatrix({EXPERTS: entry([1] * 6, [9])}, (), 1, 512), MODEL, "mine", "m.gguf")


@pytest.mark.parametrize(("name", "wrong", "said"), [
    ("blk.7.attn_q.weight", entry([1] * 4, [1]), "it has blk.7.attn_q.weight, and m.gguf has not"),
    (PLAIN, entry([1] * 5, [1]), "its blk.0.attn_q.weight has 5 sums and 1 counts, which do not fit the 4 columns"),
    (EXPERTS, entry([1] * 4, [1, 1]), "which do not fit the 2 columns of 3 matrices in m.gguf"),
    (EXPERTS, entry([1] * 6, [1, 1]), "has 6 sums and 2 counts")])
def test_a_matrix_of_another_model_is_refused(name: str, wrong: Entry, said: str) -> None:
    with pytest.raises(ImatrixRefused, match=said) as caught:
        check_fits(Imatrix({name: wrong}, (), 1, 512), MODEL, "mine.gguf", "m.gguf")
    assert str(caught.value).startswith("mine.gguf is of another model: ")


def test_coverage_names_the_matrices_and_experts_never_seen() -> None:
    found = coverage(small(), (*MODEL, tensor("blk.1.attn_v.weight", 4, 8)))
    assert (found.tensors, found.missing, found.experts) == (3, ("blk.1.attn_v.weight",), 3)
    assert found.missing_experts == {EXPERTS: (1,)}
    assert not found.is_complete
    assert str(found) == ("1 of 3 matrices were never seen, blk.1.attn_v.weight among them; "
                          f"1 of 3 experts were never seen, number 1 of {EXPERTS} among them: give more text.")
    whole = coverage(Imatrix({PLAIN: small().entries[PLAIN]}, (), 1, 512), MODEL[:3])
    assert whole.is_complete
    assert str(whole) == "All 1 matrices were seen."
    empty = Imatrix({PLAIN: entry([0] * 4, [0]), EXPERTS: entry([0] * 6, [0] * 3)}, (), 1, 512)
    assert coverage(empty, MODEL).missing == (PLAIN, EXPERTS)


def test_statistics_are_those_worked_out_by_hand() -> None:
    before, name = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
    matrix = Imatrix({before: entry([2, 0, 0, 2], [2]), name: entry([12, 4, 0, 0], [4]),
                      EXPERTS: entry([4, 8, 9, 9, 3, 6], [2, 0, 3])}, (), 1, 512)
    first, second, third = tensor_statistics(matrix)
    assert (first.name, first.total, first.columns, first.experts, first.experts_seen) == (EXPERTS, 9, 4, 3, 2)
    assert (second.name, third.name) == (name, before)
    assert (second.layer, second.total, second.mean, second.smallest, second.largest) == (1, 4, 1, 0, 3)
    assert second.share == pytest.approx(4 / 15)
    assert second.deviation == pytest.approx(math.sqrt(1.5))
    assert (second.active, second.outliers, second.tokens) == (0.5, 0.25, 4)
    assert second.entropy == pytest.approx(-0.75 * math.log2(0.75) + 0.5)
    assert second.evenness == pytest.approx(second.entropy / 2)
    assert second.likeness == pytest.approx(24 / math.sqrt(8 * 160))
    assert (third.likeness, third.entropy, third.evenness) == (None, 1, 0.5)
    layers = layer_statistics([first, second, third])
    assert [(one.layer, one.total) for one in layers] == [(1, 13), (0, 2)]
    assert layers[0].share == pytest.approx(13 / 15)


def test_statistics_of_a_text_that_left_everything_at_zero_are_numbers() -> None:
    (found,) = tensor_statistics(Imatrix({PLAIN: entry([0, 0], [5])}, (), 1, 512))
    assert all(math.isfinite(value) for value in found.as_json().values() if isinstance(value, float))
    assert (found.total, found.share, found.entropy) == (0, 0, 0)


def test_squares_are_added_row_by_row_to_the_last_bit() -> None:
    rng = np.random.default_rng(5)
    for n, width in ((1, 3), (700, 64), (5, 40_000)):
        rows = rng.normal(0, 3, (n, 2 * width)).astype(np.float32)[:, ::2]
        total = rng.random(width, dtype=np.float32)
        expected = total.copy()
        for row in rows:
            expected += row * row
        add_squares(total, rows)
        assert total.tobytes() == expected.tobytes()


@pytest.mark.parametrize("per_token", [1, 2])
def test_each_expert_gets_the_rows_chosen_for_it_to_the_last_bit(per_token: int) -> None:
    rng = np.random.default_rng(6)
    fed = rng.normal(0, 3, (1, 40, per_token, 5)).astype(np.float32)
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(40)]).astype(np.int32)[None, None]  # of five
    found = entry([0.5] * 25, [7] * 5)
    expected, counts = found.sums.copy().reshape(5, 5), found.counts.copy()
    for slot in range(2):
        for token in range(40):
            row = fed[0, token, slot % per_token]
            expected[chosen[0, 0, token, slot]] += row * row
            counts[chosen[0, 0, token, slot]] += 1
    add_by_expert(found, fed, chosen)
    assert found.sums.tobytes() == expected.tobytes()
    assert found.counts.tolist() == counts.tolist()
    assert counts[4] == 7


@pytest.mark.parametrize("stacked", [(1, 1), (1, 2), (2, 3)])
def test_a_flat_matrix_takes_a_stacked_input_and_a_stacked_one_its_own_part(stacked: tuple[int, int]) -> None:
    fed = np.random.default_rng(7).normal(0, 3, (2, 6, 3, 4)).astype(np.float32)
    matrices = stacked[0] * stacked[1]
    found = entry([0] * (4 * matrices), [0])
    expected = np.zeros((matrices, 4), dtype=np.float32)
    for third in range(2):
        for second in range(6):
            for row in fed[third, second]:
                expected[third % stacked[0] * stacked[1] + second % stacked[1]] += row * row
    add_plain(found, fed, stacked)
    assert found.sums.tobytes() == expected.tobytes()
    assert found.counts.tolist() == [36 // matrices]
