"""Promises 1, 8 and 12: a level that cannot be finished costs its own result, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel

from loops.engine.gguf_check import check_gguf, check_model
from loops.engine.levels import level_named
from loops.engine.model import NotFinite
from loops.engine.options import EngineOptions
from loops.engine.quantize import Forecast, QuantizeSpec, ToolFailed, forecast, quantize, tool_identity
from state.faults import NightpressError
from state.files import DiskFull

OPERATION = Path(__file__).resolve().parents[1] / "fakes" / "quantize_operation.py"
REAL_TOOL = os.environ.get("NIGHTPRESS_TEST_LLAMA_QUANTIZE") or shutil.which("llama-quantize")
BYTES = 7_000_000  #: less than Q8_0 of the starter takes


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def child(model: Path, folder: Path, *how: str, fail_at: str = "") -> subprocess.CompletedProcess[str]:
    fault = {"NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": fail_at} if fail_at else {}
    return subprocess.run([sys.executable, str(OPERATION), str(model), "Q8_0", str(folder), *how], text=True,
                          capture_output=True, timeout=60, check=False, env={**os.environ, **fault})


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("point", ["quantize.written", "quantize.verified", "quantize.renamed"])
def test_killed_at_any_point_no_file_under_its_name_is_incomplete(point: str, starter: Path, blobs: Path) -> None:
    done = child(starter, blobs, fail_at=f"{point}:kill")
    assert done.returncode == -9
    finished = list(blobs.glob("*.gguf"))
    assert len(finished) == (point == "quantize.renamed")
    for path in finished:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        check_gguf(path)
    again = told(child(starter, blobs))
    assert check_gguf(blobs / f"{again['sha256']}.gguf").tensors


def test_what_a_killed_process_leaves_is_known_as_an_orphan(starter: Path, blobs: Path) -> None:
    from state.blobs import BlobStore

    child(starter, blobs, fail_at="quantize.written:kill")
    store = BlobStore(blobs, 10**9)
    assert len(store.orphans()) == 1
    store.clean_incoming()
    assert leftovers(blobs) == []


@pytest.mark.parametrize("point", ["quantize.written", "quantize.verified", "quantize.renamed"])
def test_a_full_disk_at_any_point_is_a_sentence_and_leaves_nothing_unfinished(
        point: str, starter: Path, blobs: Path, options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantizeSpec(check_model(starter), level_named("Q8_0"), options)
    expected = forecast(spec)
    monkeypatch.setenv("NIGHTPRESS_TESTING", "1")
    monkeypatch.setenv("NIGHTPRESS_FAILPOINT", f"{point}:raise:ENOSPC")
    with pytest.raises(DiskFull, match="is full; free some space"):
        quantize(spec, expected, blobs)
    assert [path for path in leftovers(blobs) if len(path.stem) != 64] == []
    assert len(leftovers(blobs)) == (point == "quantize.renamed")


@pytest.mark.parametrize("limit", [0, 1, 100_000, BYTES])
def test_a_write_that_fails_in_native_code_is_a_sentence_and_leaves_nothing(limit: int, starter: Path,
                                                                          blobs: Path) -> None:
    found = told(child(starter, blobs, f"limit={limit}"))
    assert found["kind"] in {"EngineFailed", "DiskFull"}
    assert found["message"].startswith("Quantizing to Q8_0 failed: ") or "full" in found["message"]
    assert found["left"] == []


def test_a_disk_too_small_is_seen_before_anything_is_written(starter: Path, blobs: Path) -> None:
    done = child(starter, blobs, "small=4")
    if done.returncode == 77:
        pytest.skip("mounting a file system is not allowed here")
    found = told(done)
    assert found["kind"] == "DiskFull"
    assert re.match(r"Q8_0 needs 7\.\d MB in .*, and only 4\.\d MB are free\.", found["message"])
    assert found["left"] == []


def test_a_disk_that_fills_up_while_writing_is_a_sentence_and_leaves_nothing(starter: Path, blobs: Path) -> None:
    done = child(starter, blobs, "small=4", "blind")
    if done.returncode == 77:
        pytest.skip("mounting a file system is not allowed here")
    found = told(done)
    assert found["kind"] == "DiskFull"
    assert "filled up while writing Q8_0" in found["message"]
    assert found["left"] == []


def test_a_folder_that_cannot_be_made_is_a_sentence(starter: Path, tmp_path: Path, options: EngineOptions) -> None:
    (tmp_path / "file").write_text("in the way")
    spec = QuantizeSpec(check_model(starter), level_named("Q8_0"), options)
    with pytest.raises(NightpressError, match="cannot be written"):
        quantize(spec, forecast(spec), tmp_path / "file" / "blobs")


# --- an external llama-quantize ---

TOOL = """#!{python}
import pathlib, shutil, sys
*options, source, target, level, threads = sys.argv[1:]
pathlib.Path({told!r}).write_text("\\n".join(sys.argv[1:]))
print("[   1/   2]  token_embd.weight - [256, 3072, 1, 1], type = f16, converting to q8_0", flush=True)
print("[   2/   2]  blk.0.attn_q.weight - [256, 256, 1, 1], type = f16, converting to q8_0", flush=True)
{body}
"""


def tool(folder: Path, body: str) -> Path:
    path = folder / "fake-quantize"
    path.write_text(TOOL.format(python=sys.executable, told=str(folder / "arguments"), body=body))
    path.chmod(0o755)
    return path


def with_tool(starter: Path, path: Path, options: EngineOptions) -> tuple[QuantizeSpec, Forecast]:
    spec = QuantizeSpec(check_model(starter), level_named("Q8_0"), options, tool=path)
    return spec, forecast(spec)


def test_an_external_tool_gives_the_level(starter: Path, tmp_path: Path, blobs: Path, pressed: Any,
                                          options: EngineOptions) -> None:
    made = pressed("Q8_0")
    told_shares: list[float] = []
    spec, expected = with_tool(starter, tool(tmp_path, f"shutil.copy({str(made.path)!r}, target)"), options)
    found = quantize(spec, expected, blobs, told_shares.append)
    assert found.sha256 == made.sha256
    assert leftovers(blobs) == [found.path]
    assert told_shares == sorted(told_shares)
    assert told_shares[-1] > 0.1
    source, target, level, threads = (tmp_path / "arguments").read_text().split("\n")
    assert (source, level, threads) == (str(starter), "Q8_0", "1")
    assert Path(target).parent == blobs / "incoming"


FAILURES = {
    "says why and fails": ("print('no such level'); sys.exit(3)", "ended with status 3: no such level"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "ended with status -9"),
    "writes half and fails": ("open(target, 'wb').write(b'GGUF' * 9); sys.exit(1)", "ended with status 1"),
    "writes nothing": ("pass", "wrote no file"),
    "writes garbage": ("open(target, 'wb').write(b'hello' * 99)", "GGUF"),
    "writes another model": ("shutil.copy(OTHER, target)", "came out with 12 tensors instead of"),
    "writes another level": ("shutil.copy(source, target)", "of another level"),
    "cuts the file off": ("open(target, 'wb').write(open(GOOD, 'rb').read()[:-99999])", "cut off"),
}


@pytest.mark.parametrize(("body", "why"), FAILURES.values(), ids=FAILURES.keys())
def test_a_tool_that_fails_costs_the_level_and_leaves_nothing(body: str, why: str, starter: Path, tmp_path: Path,
                                                              blobs: Path, pressed: Any,
                                                              options: EngineOptions) -> None:
    other = TinyModel(layers=1, untied=True, vocabulary=512).write(tmp_path / "other.gguf")
    body = body.replace("OTHER", repr(str(other))).replace("GOOD", repr(str(pressed("Q8_0").path)))
    spec, expected = with_tool(starter, tool(tmp_path, body), options)
    with pytest.raises(NightpressError, match=why):
        quantize(spec, expected, blobs)
    assert leftovers(blobs) == []


def test_a_tool_whose_file_computes_no_numbers_costs_the_level(tmp_path: Path, blobs: Path,
                                                              options: EngineOptions) -> None:
    """Promise 3: the file is sound as a GGUF; only evaluating it shows the damage."""
    sound = TinyModel(layers=1, vocabulary=512).write(tmp_path / "sound.gguf")
    broken = TinyModel(layers=1, vocabulary=512, damaged=("output_norm.weight",)).write(tmp_path / "broken.gguf")
    spec = QuantizeSpec(check_model(sound), level_named("F16"), options,
                        tool=tool(tmp_path, f"shutil.copy({str(broken)!r}, target)"))
    with pytest.raises(NotFinite, match="not finite"):
        quantize(spec, forecast(spec), blobs)
    assert leftovers(blobs) == []


def test_a_tool_that_is_missing_or_no_program_is_a_sentence(starter: Path, tmp_path: Path, blobs: Path,
                                                            options: EngineOptions) -> None:
    plain = tmp_path / "plain"
    plain.write_text("hello")
    for path in (tmp_path / "none", plain, tmp_path):
        spec, expected = with_tool(starter, path, options)
        with pytest.raises(ToolFailed, match=r"does not start: .*--quant-tool"):
            quantize(spec, expected, blobs)


def test_a_tool_is_known_by_its_content(tmp_path: Path) -> None:
    one = tool(tmp_path, "pass")
    first = tool_identity(one)
    moved = Path(shutil.copy(one, tmp_path / "moved"))
    assert tool_identity(moved) == first
    assert tool_identity(tool(tmp_path, "pass # newer")) != first
    assert tool_identity(None) is None
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ToolFailed, match=r"cannot be read: .*--quant-tool"):
            tool_identity(path)


@pytest.mark.skipif(REAL_TOOL is None, reason="no llama-quantize; name one in NIGHTPRESS_TEST_LLAMA_QUANTIZE")
@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M"])
def test_the_real_tool_gives_the_same_weights(level: str, starter: Path, blobs: Path, pressed: Any,
                                              options: EngineOptions) -> None:
    from tiny_models import weights_of

    assert REAL_TOOL is not None
    spec = QuantizeSpec(check_model(starter), level_named(level), options, tool=Path(REAL_TOOL))
    found = quantize(spec, forecast(spec), blobs)
    assert weights_of(found.path) == weights_of(pressed(level).path)


