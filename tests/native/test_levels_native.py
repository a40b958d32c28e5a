"""The list of levels: sizes to the byte, memory as the engine and a real process have it, and what the ledger adds."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import typer
from gguf import GGUFWriter
from tiny_models import TinyModel
from tiny_recurrent import write_mamba
from typer.testing import CliRunner
from worker_driver import run_job

from daemon.cli import engine
from loops.engine.gguf_check import check_model
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.ladders import FULL, IQ, KNEES, STARTER
from loops.engine.levels import level_named
from loops.engine.memory import plan_memory
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.events import Failed, Finished
from loops.starter import HELD_OUT, STARTER_GGUF
from state.files import sha256_file
from state.ledger import Ledger, LevelState, MeasurementRow, RunSpec

MANY = 1 << 40
#: a process that loads a model, fills a context and tells its resident bytes
OCCUPY = """
import sys, numpy, psutil
from pathlib import Path
from loops.engine.model import ContextSpec, load_model, open_context
from loops.engine.options import EngineOptions
cells = int(sys.argv[2])
with (load_model(Path(sys.argv[1]), EngineOptions(threads=1, extra_buffers=False)) as model,
      open_context(model, ContextSpec(1, cells, shared=False, outputs=1)) as context):
    for start in range(0, cells, 512):
        context.decode([5] * 512, range(start, start + 512), [(0,)] * 512, numpy.arange(512) == 511)
    print(psutil.Process().memory_info().rss)
"""


def surveyed(model: Path, **asked: Any) -> dict[str, Any]:
    (told,) = run_job({"job": "levels", "model": str(model), "survey": {
        "room": {"total": MANY, "free": MANY}, **asked}}).of(Finished)
    return dict(told.result)


@pytest.fixture(scope="module")
def starters() -> dict[str, Any]:
    return surveyed(STARTER_GGUF, task="code")


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["level"]: row for row in found["levels"]}


def test_every_level_that_can_be_written_is_listed_the_smallest_first(starters: dict[str, Any]) -> None:
    rows = starters["levels"]
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert {row["level"] for row in rows} == {*FULL, "F32", "F16", "BF16"}
    assert [row["level"] for row in rows if not row["quantized"]] == ["BF16", "F16", "F32"]


def test_the_full_ladder_has_the_order_that_is_measured_here(starters: dict[str, Any]) -> None:
    bits = [rows_of(starters)[name]["bits_per_weight"] for name in FULL]
    # with a matrix, as the ladder was measured, some levels come out a little smaller or larger
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(bits))
    assert set(STARTER) == set(FULL)


@pytest.mark.parametrize("name", ["Q4_K_M", "IQ3_XXS"])
def test_a_listed_size_is_the_size_of_the_file(name: str, starters: dict[str, Any], tmp_path: Path,
                                               options: EngineOptions) -> None:
    row = rows_of(starters)[name]
    matrix = None
    if row["needs_imatrix"]:
        with load_model(STARTER_GGUF, options) as model:
            chunks = cut_chunks(model, HELD_OUT.read_text(encoding="utf-8"), special=True, limit=2)
            matrix = collect_imatrix(model, chunks, tmp_path / "sums")
    spec = QuantizeSpec(check_model(STARTER_GGUF), level_named(name), options, imatrix=matrix)
    assert quantize(spec, forecast(spec), tmp_path).n_bytes == row["bytes"]


def test_the_levels_that_need_a_matrix_are_marked(starters: dict[str, Any]) -> None:
    assert {row["level"] for row in starters["levels"] if row["needs_imatrix"]} == {
        "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS"}


def test_the_cache_is_keys_and_values_of_every_layer_in_two_bytes() -> None:
    layers, heads, width = 8, 4, 32
    for cells in (512, 4096):
        found = plan_memory(check_model(STARTER_GGUF), cells)
        assert found.cache == found.window_cache == 2 * layers * heads * width * 2 * cells


def test_a_recurrent_model_takes_no_more_for_a_longer_context(tmp_path: Path) -> None:
    model = check_model(write_mamba(tmp_path / "m.gguf"))
    short, long = plan_memory(model, 512), plan_memory(model, 65_536)
    assert 0 < short.cache == long.cache < 1 << 20


@pytest.mark.parametrize(("vocabulary", "cells"), [(0, 2048), (60_000, 1024)])
def test_the_estimate_is_what_a_process_takes(vocabulary: int, cells: int, tmp_path: Path) -> None:
    """By benchmarks/levels.py within 5 %; libraries of other systems may take more."""
    path = TinyModel(vocabulary=vocabulary, layers=4).write(tmp_path / "m.gguf") if vocabulary else STARTER_GGUF
    context = surveyed(path, cells=cells, ladder="F16")
    taken = int(subprocess.run([sys.executable, "-c", OCCUPY, str(path), str(cells)], check=True, capture_output=True,
                               text=True).stdout)
    assert context["levels"][0]["memory"] == pytest.approx(taken, rel=0.15)
    assert path.stat().st_size + context["context"]["cache"] < taken


def test_memory_is_compared_with_the_machine_that_is_asked_about() -> None:
    whole = rows_of(surveyed(STARTER_GGUF, ladder="Q8_0,Q2_K"))
    middle = (whole["Q8_0"]["memory"] + whole["Q2_K"]["memory"]) // 2
    fits = {name: [rows_of(surveyed(STARTER_GGUF, ladder="Q8_0,Q2_K", room=room))[name]["fits"] for room in (
        {"total": MANY, "free": middle}, {"total": middle, "free": middle})] for name in whole}
    assert fits == {"Q2_K": ["yes", "yes"], "Q8_0": ["tight", "no"]}


def test_a_longer_context_takes_more_and_one_beyond_the_training_is_told() -> None:
    short, long = (surveyed(STARTER_GGUF, cells=cells, ladder="Q8_0") for cells in (512, 8192))
    assert short["notes"] == []
    assert "1,024 tokens" in long["notes"][0]
    assert long["levels"][0]["memory"] > short["levels"][0]["memory"] + 20_000_000
    assert surveyed(STARTER_GGUF, ladder="Q8_0")["context"]["cells"] == 1024


def write_gemma(path: Path, window: int) -> Path:
    """Write a tiny Gemma 2, every second layer of which looks back over a window only."""
    width, layers, vocabulary, rng = 64, 4, 320, np.random.default_rng(0)
    writer = GGUFWriter(path, "gemma2")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)),
                           *(f"w{number}".encode() for number in range(vocabulary - 259))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocabulary - 259)])
    writer.add_tensor("token_embd.weight", rng.normal(size=(vocabulary, width)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for block in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{block}.{name}.weight", rng.normal(size=(width, width)).astype(np.float16))
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_sliding_window_would_save_is_told(tmp_path: Path) -> None:
    found = surveyed(write_gemma(tmp_path / "m.gguf", 256), cells=8192, ladder="Q8_0")
    context = found["context"]
    assert context["cache"] == 2 * 4 * 64 * 2 * 8192
    assert context["window_cache"] < 0.6 * context["cache"]
    assert "llama-server" in " ".join(found["notes"])


@pytest.mark.parametrize(("asked", "kind"), [({"ladder": "kneez"}, "UnknownLevel"), ({"ladder": ","}, "UnknownLevel"),
                                             ({"task": "poems"}, "UnknownTask")])
def test_an_unknown_ladder_or_task_is_refused_with_those_there_are(asked: dict[str, Any], kind: str) -> None:
    ended = run_job({"job": "levels", "model": str(STARTER_GGUF), "survey": {"room": {"total": 1}, **asked}})
    (told,) = ended.of(Failed)
    assert told.kind == kind
    assert ended.status == {"UnknownLevel": 32, "UnknownTask": 77}[kind]
    assert any(name in told.message for name in ("knees", "chat, code, commands"))


# --- the command ---

def levels(*arguments: str) -> str:
    app = typer.Typer()
    engine.register(app)
    done = CliRunner().invoke(app, ["levels", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_the_table_names_size_memory_and_use_and_this_machine() -> None:
    printed = levels("--ladder", "knees", "--context", "512")
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert set(KNEES) <= set(lines)
    assert "Q2_K" not in lines
    assert "4,508,576" in lines["Q4_K_M"]
    assert "original knees" in lines["Q4_K_M"]
    assert "usual choice for chat" in lines["Q4_K_M"]
    assert "needed" in lines["IQ2_M"]
    assert "512 tokens" in printed
    assert f"has {psutil.virtual_memory().total / 1e9:,.2f} GB" in printed


def test_another_machine_and_a_task_give_a_recommendation_with_its_reason() -> None:
    found = json.loads(levels("--ram", "16GB", "--for", "code", "--ladder", "iq", "--json"))
    assert found["room"] == {"total": 16_000_000_000, "free": 12_000_000_000}
    assert {row["level"] for row in found["levels"]} == set(IQ)
    assert found["recommendation"]["level"] == "IQ4_NL"
    assert "Expect mistakes" in found["recommendation"]["reason"]
    assert "a quarter is taken to be in use" in levels("--ram", "16GB", "--ladder", "Q8_0")


@pytest.fixture
def pressed_before(isolated: Path, tmp_path: Path) -> Callable[..., Path]:
    """Record a run of a copy of the starter, as `nightpress run` would, and return the copy."""
    model = tmp_path / "m.gguf"
    model.write_bytes(STARTER_GGUF.read_bytes())

    def record(*, simulated: bool = False, **states: tuple[LevelState, float]) -> Path:
        with Ledger.open(isolated / "state", "a test") as ledger:
            run = ledger.start_run(RunSpec("m", str(model), sha256_file(model), 9, {}, "plan", "engine", simulated))
            ledger.remember_hash(model, sha256_file(model))
            ledger.record_measurements(run, "", [MeasurementRow("perplexity", math.e)])
            for ordinal, (level, (state, kld)) in enumerate(states.items()):
                ledger.plan_level(run, level, ordinal, 100)
                ledger.update_level(run, level, LevelState.WORKING)
                ledger.record_measurements(run, level, [MeasurementRow("kl_divergence", kld)])
                ledger.update_level(run, level, state, bytes=100 + ordinal)
        return model

    return record


def test_what_runs_of_this_very_model_measured_decides(pressed_before: Callable[..., Path]) -> None:
    model = pressed_before(Q4_K_M=(LevelState.FAILED, 0.02), IQ3_S=(LevelState.PASSED, 0.03))
    found = json.loads(levels(str(model), "--for", "chat", "--json"))
    assert rows_of(found)["IQ3_S"]["measured"] == {
        "run": 1, "kld": 0.03, "share": 0.03, "n_bytes": 101, "state": "passed"}
    assert found["recommendation"]["level"] == "IQ3_S"
    assert "run 1" in found["recommendation"]["reason"]
    assert found["knees_measured"] == ["Q4_K_M"]
    assert "0.03000 (run 1)" in levels(str(model))


def test_newer_runs_replace_older_ones_and_simulated_ones_count_for_nothing(
        pressed_before: Callable[..., Path]) -> None:
    pressed_before(Q6_K=(LevelState.PASSED, 0.5), Q8_0=(LevelState.PASSED, 0.4))
    pressed_before(Q6_K=(LevelState.PASSED, 0.001))
    model = pressed_before(simulated=True, Q6_K=(LevelState.PASSED, 0.9))
    found = json.loads(levels(str(model), "--ladder", "Q8_0,Q6_K", "--json"))
    assert {row["level"]: (row["measured"]["run"], row["measured"]["kld"]) for row in found["levels"]} == {
        "Q6_K": (2, 0.001), "Q8_0": (1, 0.4)}


def test_runs_of_another_model_count_for_nothing(pressed_before: Callable[..., Path], isolated: Path) -> None:
    other = pressed_before(Q6_K=(LevelState.PASSED, 0.5)).with_name("other.gguf")
    other.write_bytes(STARTER_GGUF.read_bytes()[:-1] + b"\0")
    with Ledger.open(isolated / "state", "a test") as ledger:
        ledger.remember_hash(other, sha256_file(other))
    for path in (other, STARTER_GGUF):
        assert "measured" not in json.loads(levels(str(path), "--ladder", "Q6_K", "--json"))["levels"][0]
