"""The importance matrix is llama-imatrix's, comes to the same bits however often it is interrupted, and is of use."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_models import TinyModel, weights_of
from tiny_recurrent import write_mamba

import loops.engine.imatrix as module
from loops.engine import tensors
from loops.engine.gguf_check import check_model
from loops.engine.imatrix import CalibrationTooShort, NativeImatrix, collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Imatrix, check_fits, merge_imatrices, read_imatrix, write_imatrix
from loops.engine.imatrix_stats import coverage, tensor_statistics
from loops.engine.levels import level_named
from loops.engine.model import NotFinite, load_model
from loops.engine.native import EngineFailed, library
from loops.engine.options import EngineOptions
from loops.engine.windows import WINDOW, Windows
from loops.starter import HELD_OUT, STARTER_GGUF

EXPERTS, USED = 8, 2
CHUNKS = 6  #: of each test: a group of four, and one that is not full
#: the folder of llama.cpp's own programs, where it is not on the search path
PROGRAMS = os.pathsep.join([os.environ.get("LLAMA_CPP", ""), os.environ.get("PATH", "")])


@dataclass(frozen=True)
class TinyExperts(TinyModel):
    """A model whose layers have eight experts each: two are used for every token, and four are never seen."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, shape in super().shapes().items():
            if name.endswith(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")):
                found[name.replace(".weight", "_exps.weight")] = (EXPERTS, *shape)
                found[re.sub(r"ffn_\w+", "ffn_gate_inp", name)] = (EXPERTS, self.width)
            else:
                found[name] = shape
        return found

    def write(self, path: Path) -> Path:
        super().write(path)
        for tensor in GGUFReader(path, "r+").tensors:
            if "ffn_gate_inp" in tensor.name:
                # of a row and its negative one is always above zero, so the rows of zeros never are among the best
                tensor.data[1], tensor.data[3] = -tensor.data[0], -tensor.data[2]
                tensor.data[4:] = 0
        return path

    def _describe(self, writer: GGUFWriter) -> None:
        super()._describe(writer)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(USED)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "starter": lambda _path: STARTER_GGUF,
    "untied": TinyModel(width=192, heads=6, untied=True, vocabulary=512, seed=1).write,
    "no-bos": TinyModel(width=256, layers=1, dtype="BF16", add_bos=False, vocabulary=512, seed=2).write,
    "experts": TinyExperts(width=128, feed_forward=256, vocabulary=512, seed=3).write,
    "mamba": write_mamba,
}


@dataclass(frozen=True)
class Workshop:
    """A place for the models and matrices that several tests look at; each is made once."""

    folder: Path
    options: EngineOptions
    text: Path

    def model(self, name: str) -> Path:
        path = self.folder / f"{name}.gguf"
        return path if path.exists() else MAKERS[name](path)

    def ours(self, name: str, per_decode: int = 4) -> Imatrix:
        made = self.collect(name, self.folder / f"{name}-{per_decode}-checkpoint", per_decode=per_decode)
        return replace(made, datasets=(str(self.text),))

    def collect(self, name: str, folder: Path, *, per_decode: int = 4, options: EngineOptions | None = None,
                chunks: int = CHUNKS, progress: Any = None) -> Imatrix:
        with load_model(self.model(name), options or self.options) as model:
            cut = cut_chunks(model, self.text.read_text(encoding="utf-8"), limit=chunks)
            return collect_imatrix(model, Windows(cut.tokens, per_decode), folder, progress=progress)

    def theirs(self, name: str, *, per_decode: int = 4, form: str = "gguf", chunks: int = CHUNKS) -> Path:
        path = self.folder / f"{name}-{per_decode}-{chunks}-theirs.{form}"
        if not path.exists():
            run("llama-imatrix", "-m", self.model(name), "-f", self.text, "-o", path, "--output-format", form,
                "--chunks", chunks, "-c", WINDOW, "-b", per_decode * WINDOW, "-t", 1, "--no-ppl")
        return path


def run(program: str, *arguments: object) -> str:
    found = shutil.which(program, path=PROGRAMS)
    if found is None:
        pytest.skip(f"{program} is not on the search path, nor in the folder that LLAMA_CPP names")
    done = subprocess.run([found, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, options: EngineOptions) -> Workshop:
    folder = tmp_path_factory.mktemp("imatrix")
    text = folder / "text.txt"
    text.write_text(re.sub(r"</?s>|<\|\w+\|>\n?", "", HELD_OUT.read_text(encoding="utf-8")), encoding="utf-8")
    return Workshop(folder, options, text)


def bits(matrix: Imatrix) -> dict[str, tuple[bytes, bytes]]:
    return {name: (entry.sums.tobytes(), entry.counts.tobytes()) for name, entry in matrix.entries.items()}


def assert_close(mine: Imatrix, other: Imatrix, tolerance: float = 1e-4) -> None:
    assert mine.entries.keys() == other.entries.keys()
    for name, entry in mine.entries.items():
        assert entry.counts.tolist() == other.entries[name].counts.tolist(), name
        np.testing.assert_allclose(entry.sums, other.entries[name].sums, rtol=tolerance, err_msg=name,
                                   atol=tolerance * 1e-3 * float(entry.sums.max()))


@pytest.mark.parametrize(("name", "per_decode"), [*((name, 4) for name in MAKERS), ("untied", 1), ("experts", 1)])
def test_the_values_are_those_of_llama_imatrix(name: str, per_decode: int, workshop: Workshop) -> None:
    theirs = read_imatrix(workshop.theirs(name, per_decode=per_decode))
    mine = workshop.ours(name, per_decode)
    assert_close(mine, theirs)
    assert (mine.chunks, mine.chunk_size, mine.datasets) == (theirs.chunks, theirs.chunk_size, theirs.datasets)


def test_a_last_group_of_three_counts_as_in_llama_imatrix(workshop: Workshop, tmp_path: Path) -> None:
    """Three windows do not divide the engine's 512 tokens at once; both leave out the remainder of six rows."""
    mine = workshop.collect("experts", tmp_path, chunks=7)
    assert_close(mine, read_imatrix(workshop.theirs("experts", chunks=7)))
    assert mine.entries["blk.1.attn_q.weight"].counts.tolist() == [7 * WINDOW - 6]
    assert int(mine.entries["blk.1.ffn_up_exps.weight"].counts.sum()) == 7 * WINDOW * USED


def test_the_first_layer_met_the_normalized_embeddings(workshop: Workshop) -> None:
    """Worked out from the weights alone, without the engine and without llama-imatrix."""
    with load_model(workshop.model("untied"), workshop.options) as model:
        tokens = cut_chunks(model, workshop.text.read_text(encoding="utf-8"), limit=CHUNKS).tokens
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(workshop.model("untied")).tensors}
    rows = tensors["token_embd.weight"][tokens.ravel()].astype(np.float64)
    expected = (rows ** 2 / ((rows ** 2).mean(axis=1, keepdims=True) + 1e-5)).sum(axis=0)
    found = workshop.ours("untied").entries
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight"].sums, expected, rtol=1e-3)
        assert found[f"blk.0.{name}.weight"].counts.tolist() == [CHUNKS * WINDOW]


@pytest.mark.parametrize("name", ["untied", "experts"])
def test_windows_per_decode_and_threads_change_nothing_but_noise(name: str, workshop: Workshop, tmp_path: Path) -> None:
    four = workshop.ours(name)
    for per_decode in (1, 2):
        assert_close(workshop.collect(name, tmp_path / str(per_decode), per_decode=per_decode), four)
    two = replace(workshop.options, threads=2)
    assert_close(workshop.collect(name, tmp_path / "threads", options=two), four)


def test_experts_are_counted_separately_and_those_never_seen_are_named(workshop: Workshop) -> None:
    matrix, model = workshop.ours("experts"), check_model(workshop.model("experts"))
    check_fits(matrix, model.tensors, "mine", "experts.gguf")
    for name, entry in matrix.entries.items():
        if "_exps" in name:
            assert int(entry.counts.sum()) == CHUNKS * WINDOW * USED, name
            sums = entry.sums.reshape(EXPERTS, -1)
            assert ((sums > 0).all(axis=1) == (entry.counts > 0)).all()
            assert not sums[4:].any()
    found = coverage(matrix, model.tensors)
    assert (found.missing, found.tensors) == ((), 2 * 7)
    assert found.missing_experts == {f"blk.{layer}.ffn_{kind}_exps.weight": (4, 5, 6, 7)
                                     for layer in (0, 1) for kind in ("gate", "up", "down")}


@pytest.mark.parametrize("name", ["starter", "untied", "mamba"])
def test_a_plain_model_is_covered_whole(name: str, workshop: Workshop) -> None:
    assert coverage(workshop.ours(name), check_model(workshop.model(name)).tensors).is_complete


COLLECT = """
import sys
from pathlib import Path
from loops.engine.windows import Windows
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import write_imatrix
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
model, text, folder = map(Path, sys.argv[1:])
with load_model(model, EngineOptions(threads=1, extra_buffers=False)) as loaded:
    chunks = cut_chunks(loaded, text.read_text(encoding="utf-8"), limit=6)
    done = []
    made = collect_imatrix(loaded, Windows(chunks.tokens, 2), folder, progress=lambda *told: done.append(told))
    write_imatrix(folder / "result.gguf", made)
print(*done)
"""


def collect_in_child(workshop: Workshop, name: str, folder: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": fault}
    return subprocess.run([sys.executable, "-c", COLLECT, str(workshop.model(name)), str(workshop.text), str(folder)],
                          capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_killed_after_every_group_it_comes_to_the_same_bits(workshop: Workshop, tmp_path: Path) -> None:
    for _ in range(3):
        assert collect_in_child(workshop, "experts", tmp_path, "imatrix.group:kill").returncode == -signal.SIGKILL
    done = collect_in_child(workshop, "experts", tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr  # the last one had only to read
    whole = workshop.collect("experts", tmp_path / "at once", per_decode=2)
    assert bits(read_imatrix(tmp_path / "result.gguf")) == bits(whole)


@pytest.mark.parametrize("fault", ["files.written@2:kill", "imatrix.group@2:kill"])
def test_killed_around_a_checkpoint_it_goes_on_from_a_whole_one(fault: str, workshop: Workshop, tmp_path: Path) -> None:
    assert collect_in_child(workshop, "experts", tmp_path, fault).returncode == -signal.SIGKILL
    done = collect_in_child(workshop, "experts", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("(6, 6)" if fault.startswith("imatrix") else "(4, 6) (6, 6)")
    whole = workshop.collect("experts", tmp_path / "at once", per_decode=2)
    assert bits(read_imatrix(tmp_path / "result.gguf")) == bits(whole)


def test_a_checkpoint_of_another_text_or_a_damaged_one_is_not_continued(workshop: Workshop, tmp_path: Path) -> None:
    expected = bits(workshop.ours("untied"))
    other = workshop.collect("untied", tmp_path / "other", per_decode=1)
    file = tmp_path / "sums.gguf"
    for content in ((tmp_path / "other" / "sums.gguf").read_bytes(), b"GGUF", b"", b"nonsense" * 99):
        file.write_bytes(content)
        assert bits(workshop.collect("untied", tmp_path)) == expected
    told: list[tuple[int, int]] = []
    assert bits(workshop.collect("untied", tmp_path, progress=lambda *both: told.append(both))) == expected
    assert told == []  # all was there
    assert_close(other, workshop.ours("untied"))


def test_what_goes_wrong_inside_the_engine_comes_out_at_once_and_keeps_the_groups_before(
        workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, observe, calls, asked = module.add_squares, module.Collector.observe, 0, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 35:  # 32 are the first group's
            raise KeyboardInterrupt
        add(*arguments)

    def counted(self: module.Collector, address: int, ask: bool, user_data: object) -> bool:
        nonlocal asked
        asked += ask and self.problem is not None
        return observe(self, address, ask, user_data)

    monkeypatch.setattr(module, "add_squares", interrupted)
    monkeypatch.setattr(module.Collector, "observe", counted)
    with pytest.raises(KeyboardInterrupt):
        workshop.collect("untied", tmp_path)
    assert calls == 36
    assert asked == 1  # of the 512 tokens left the engine computed one node
    monkeypatch.undo()
    assert read_imatrix(tmp_path / "sums.gguf").chunks == 4
    assert bits(workshop.collect("untied", tmp_path)) == bits(workshop.ours("untied"))


def test_a_model_that_computes_no_numbers_is_refused_with_the_place(
        tmp_path: Path, workshop: Workshop, options: EngineOptions) -> None:
    path = TinyModel(layers=1, vocabulary=512, damaged=("blk.0.ffn_norm.weight",)).write(tmp_path / "m.gguf")
    with load_model(path, options) as model:
        chunks = cut_chunks(model, workshop.text.read_text(encoding="utf-8"), limit=2)
        with pytest.raises(NotFinite, match=r"they flow into blk\.0\.ffn_\w+\.weight"):
            collect_imatrix(model, chunks, tmp_path / "checkpoint")


def test_too_little_text_is_refused_before_anything_starts(options: EngineOptions) -> None:
    with load_model(STARTER_GGUF, options) as model:
        with pytest.raises(CalibrationTooShort, match="at least 1024; give more text") as caught:
            cut_chunks(model, "A short text. " * 20)
        with pytest.raises(CalibrationTooShort, match=r"has \d tokens"):
            cut_chunks(model, "")
        assert cut_chunks(model, "Long. " * 2000).tokens[:, 0].tolist()[:2] == [model.bos] * 2
    assert caught.value.exit_code == 76


@pytest.mark.parametrize("name", ["untied", "experts"])
def test_an_input_on_another_device_is_copied_and_counts_the_same(
        name: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, real, copied = bits(workshop.ours(name)), tensors.ggml(), []

    def read(*arguments: Any) -> None:
        copied.append(arguments)
        real.read(*arguments)

    monkeypatch.setattr(tensors, "ggml", lambda: replace(real, is_host=lambda _buffer: False, read=read))
    assert bits(workshop.collect(name, tmp_path)) == expected
    assert copied


def test_an_engine_with_another_layout_of_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = [("type", ctypes.c_int), ("more", ctypes.c_void_p), *tensors.Tensor._fields_[1:]]

    monkeypatch.setattr(tensors, "Tensor", Shifted)
    with pytest.raises(EngineFailed, match="lays its tensors out in another way"):
        tensors.ggml.__wrapped__()


def quantize_here(model: Path, target: Path, level: str, matrix: Imatrix | None) -> int:
    params = library().llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, level_named(level).ftype
    if matrix is not None:
        native = NativeImatrix(matrix)
        params.imatrix = ctypes.cast(native.array, type(params.imatrix))
    return int(library().llama_model_quantize(os.fsencode(model), os.fsencode(target), ctypes.byref(params)))


@pytest.mark.parametrize(("name", "level"), [("no-bos", "Q2_K_S"), ("experts", "IQ4_NL")])
def test_a_matrix_quantizes_in_process_as_llama_quantize_does_with_its_file(
        name: str, level: str, workshop: Workshop, tmp_path: Path) -> None:
    model, matrix, here = workshop.model(name), workshop.ours(name), tmp_path / "here.gguf"
    assert quantize_here(model, here, level, matrix) == 0
    write_imatrix(tmp_path / "matrix.gguf", matrix)
    said = run("llama-quantize", "--imatrix", tmp_path / "matrix.gguf", model, tmp_path / "there.gguf", level, 1)
    assert f"loaded {len(matrix.entries)} importance matrix entries" in said
    assert f"computed on {CHUNKS} chunks" in said
    assert weights_of(here) == weights_of(tmp_path / "there.gguf")


def test_the_engine_takes_a_matrix_into_account_and_refuses_two_bits_without(
        workshop: Workshop, tmp_path: Path) -> None:
    model, made, without = workshop.model("no-bos"), tmp_path / "with.gguf", tmp_path / "without.gguf"
    assert quantize_here(model, without, "Q2_K_S", None) != 0
    assert quantize_here(model, without, "Q4_0", None) == 0
    assert quantize_here(model, made, "Q4_0", workshop.ours("no-bos")) == 0
    assert weights_of(made) != weights_of(without)


def test_merged_matrices_are_those_of_llama_imatrix_to_the_byte(workshop: Workshop, tmp_path: Path) -> None:
    parts = [workshop.ours("experts"), workshop.ours("experts", 1)]
    files = [tmp_path / "0.gguf", tmp_path / "1.gguf"]
    for file, part in zip(files, parts, strict=True):
        write_imatrix(file, part)
    run("llama-imatrix", "-m", workshop.model("experts"), "--in-file", files[0], "--in-file", files[1],
        "-o", tmp_path / "theirs.gguf")
    write_imatrix(tmp_path / "ours.gguf", merge_imatrices(parts))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_older_form_holds_the_same_means(workshop: Workshop) -> None:
    old = read_imatrix(workshop.theirs("untied", form="dat"))
    assert (old.chunks, old.chunk_size, old.datasets) == (CHUNKS, WINDOW, (str(workshop.text),))
    assert_close(workshop.ours("untied"), old)


def shown_statistics(file: Path) -> dict[str, list[float]]:
    """What llama-imatrix shows of each tensor."""
    rows = {}
    for line in run("llama-imatrix", "-m", STARTER_GGUF, "--in-file", file, "--show-statistics", "-lv", 4).splitlines():
        cells = line.split()[-13:]
        if len(cells) == 13 and cells[0].isdecimal():
            rows[f"blk.{cells[0]}.{cells[1]}.weight"] = [float(cell.rstrip("%")) for cell in cells[2:]]
    return rows


def test_the_statistics_are_those_that_llama_imatrix_shows(workshop: Workshop, tmp_path: Path, poll: Any) -> None:
    matrix = workshop.ours("starter")
    write_imatrix(tmp_path / "m.gguf", matrix)
    found = tensor_statistics(matrix)

    def all_rows() -> dict[str, list[float]] | None:  # some runs of llama-imatrix lose the end of what they print
        rows = shown_statistics(tmp_path / "m.gguf")
        return rows if len(rows) >= len(found) else None

    rows = poll(all_rows, deadline_s=60, what="all that llama-imatrix shows")
    assert {one.name for one in found} == rows.keys()
    for one in found:
        mine = [one.total, one.smallest, one.largest, one.mean, one.deviation, 100 * one.active, one.columns,
                one.entropy, 100 * one.evenness, 100 * one.outliers, one.likeness or 0]
        assert rows[one.name] == pytest.approx(mine, rel=1e-3, abs=0.006), one.name
