"""Promise 6, its other half: what the check lets through does not kill the engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loops.engine.gguf_check import check_model
from state.faults import NightpressError

FAKES = Path(__file__).resolve().parents[1] / "fakes"
_spec = importlib.util.spec_from_file_location("gguf_files", FAKES / "gguf_files.py")
assert _spec
assert _spec.loader
g = importlib.util.module_from_spec(_spec)
sys.modules["gguf_files"] = g
_spec.loader.exec_module(g)

WANTED = 300
QUANTIZE_EVERY = 12


def accepted_flips(file, count):
    raw = g.STARTER.read_bytes()
    accepted = []
    for position, value in g.flips(4 * count, seed=61):
        with file.open("r+b") as handle:
            handle.seek(position)
            handle.write(bytes([value]))
        try:
            check_model(file)
            accepted.append((position, value))
        except NightpressError:
            pass
        with file.open("r+b") as handle:
            handle.seek(position)
            handle.write(raw[position:position + 1])
    return accepted[:count]


@pytest.mark.slow
def test_no_accepted_flip_kills_the_engine(tmp_path):
    file, listed = tmp_path / "flipped.gguf", tmp_path / "flips.json"
    file.write_bytes(g.STARTER.read_bytes())
    accepted = accepted_flips(file, WANTED)
    listed.write_text(json.dumps(accepted))
    crashes, came, first = [], [], 0
    while first < len(accepted):
        file.write_bytes(g.STARTER.read_bytes())
        child = subprocess.run(
            [sys.executable, str(FAKES / "flip_loader.py"), str(file), str(listed), str(first),
             str(len(accepted)), str(QUANTIZE_EVERY)], capture_output=True, text=True, timeout=120)
        lines = [line.split(maxsplit=2) for line in child.stdout.splitlines()]
        came += [line[2] for line in lines if line[0] == "end"]
        if child.returncode == 0:
            break
        assert child.returncode < 0, child.stderr  # a Python error in the loader is a fault of the test
        first = int(lines[-1][1])
        crashes.append((accepted[first], child.returncode, child.stderr[-200:]))
        first += 1
    assert len(accepted) == WANTED
    assert crashes == []
    assert len(came) == WANTED
    assert sum(one.startswith("decoded 0") for one in came) > WANTED // 2
