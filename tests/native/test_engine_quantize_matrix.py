"""Levels made with an importance matrix, and with types of their own for some tensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import weights_of

from loops.engine.gguf_check import check_model
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Entry, Imatrix, ImatrixRefused
from loops.engine.levels import level_named
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import NeedsImatrix, Quantized, QuantizeSpec, forecast, quantize, tensor_type_file
from loops.starter import HELD_OUT, STARTER_GGUF

#: the folder of llama.cpp's own programs, where it is not on the search path
PROGRAMS = os.pathsep.join([os.environ.get("LLAMA_CPP", ""), os.environ.get("PATH", "")])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    with load_model(STARTER_GGUF, EngineOptions(threads=1, extra_buffers=False)) as model:
        chunks = cut_chunks(model, HELD_OUT.read_text(encoding="utf-8"), special=True, limit=4)
        return collect_imatrix(model, chunks, tmp_path_factory.mktemp("sums"))


def make(spec: QuantizeSpec, folder: Path) -> Quantized:
    expected = forecast(spec)
    made = quantize(spec, expected, folder)
    assert made.n_bytes == expected.n_bytes == made.path.stat().st_size
    assert made.tensor_types == expected.tensor_types
    return made


def spec_of(level: str, options: EngineOptions, matrix: Imatrix | None = None,
            types: Mapping[str, str] | None = None) -> QuantizeSpec:
    return QuantizeSpec(check_model(STARTER_GGUF), level_named(level), options, imatrix=matrix, types=types or {})


@pytest.mark.parametrize("level", ["IQ1_S", "IQ2_XS", "IQ3_XXS", "Q2_K_S"])
def test_with_a_matrix_every_level_comes_out_as_forecast(
        level: str, matrix: Imatrix, options: EngineOptions, blobs: Path) -> None:
    assert forecast(spec_of(level, options)).needs_imatrix
    make(spec_of(level, options, matrix), blobs)


def test_a_matrix_changes_the_weights_and_not_the_size(matrix: Imatrix, options: EngineOptions, blobs: Path) -> None:
    plain, weighed = make(spec_of("Q3_K_S", options), blobs), make(spec_of("Q3_K_S", options, matrix), blobs)
    assert plain.sha256 != weighed.sha256
    assert plain.n_bytes == weighed.n_bytes
    assert matrix.sha256 == replace(matrix, datasets=("another name",)).sha256
    changed = {**matrix.entries, "blk.0.attn_k.weight": Entry(
        matrix.entries["blk.0.attn_k.weight"].sums * np.float32(2), matrix.entries["blk.0.attn_k.weight"].counts)}
    assert matrix.sha256 != replace(matrix, entries=changed).sha256


def test_a_matrix_that_lacks_a_tensor_is_said_before_anything_is_written(
        matrix: Imatrix, options: EngineOptions, blobs: Path) -> None:
    partial = replace(matrix, entries={name: entry for name, entry in matrix.entries.items() if "blk.5" not in name})
    spec = spec_of("IQ2_XXS", options, partial)
    expected = forecast(spec)
    assert expected.unknown.startswith("blk.5.")
    with pytest.raises(NeedsImatrix, match=r"knows blk\.5.*more calibration text"):
        quantize(spec, expected, blobs)
    assert not blobs.exists()
    assert not forecast(spec_of("Q4_K_M", options, partial)).needs_imatrix


def test_a_matrix_of_another_model_is_refused(matrix: Imatrix, options: EngineOptions) -> None:
    other = replace(matrix, entries={"blk.77.attn_k.weight": next(iter(matrix.entries.values()))})
    with pytest.raises(ImatrixRefused, match=r"blk\.77"):
        forecast(spec_of("Q4_K_M", options, other))


def test_tensors_get_the_types_asked_for_and_no_others(options: EngineOptions, blobs: Path) -> None:
    wanted = {"token_embd.weight": "Q5_K", "blk.1.ffn_up.weight": "Q8_0"}
    plain, made = forecast(spec_of("Q4_K_M", options)), make(spec_of("Q4_K_M", options, types=wanted), blobs)
    assert {name: made.tensor_types[name] for name in wanted} == wanted
    assert {name: kind for name, kind in made.tensor_types.items() if name not in wanted} == {
        name: kind for name, kind in plain.tensor_types.items() if name not in wanted}


def test_a_type_that_needs_a_matrix_counts_wherever_it_stands(matrix: Imatrix, options: EngineOptions) -> None:
    assert forecast(spec_of("Q4_K_M", options, types={"blk.1.ffn_up.weight": "IQ2_S"})).needs_imatrix
    assert not forecast(spec_of("Q4_K_M", options, types={"token_embd.weight": "IQ2_S"})).needs_imatrix
    assert not forecast(spec_of("Q4_K_M", options, matrix, {"blk.1.ffn_up.weight": "IQ2_S"})).needs_imatrix


def test_llama_quantize_makes_the_same_of_both(matrix: Imatrix, options: EngineOptions, blobs: Path) -> None:
    tool = shutil.which("llama-quantize", path=PROGRAMS)
    if tool is None:
        pytest.skip("llama-quantize is not here")
    types = {"blk.0.ffn_down.weight": "Q6_K", "blk.3.attn_q.weight": "IQ3_XXS"}
    spec = spec_of("Q3_K_M", options, matrix, types)
    here, there = make(spec, blobs), quantize(replace(spec, tool=Path(tool)), forecast(spec), blobs)
    assert weights_of(here.path) == weights_of(there.path)


def test_the_file_of_types_anchors_its_names() -> None:
    assert tensor_type_file({"output.weight": "Q6_K"}) == "^output\\.weight$=Q6_K\n"
