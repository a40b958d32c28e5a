"""Recipes through the real command line: by size, in a run, shown and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration_data.catalogue import Catalogue
from calibration_data.text import write
from loops.engine.gguf_check import check_gguf
from loops.starter import STARTER_GGUF
from state.check import violations

STARTER = str(STARTER_GGUF)
#: the recipe of about Q3_K_L's size that is tried where Q3_K_L is rejected
REJECT = ("--levels", "Q4_K_M,Q3_K_L", "--strategy", "refine", "--max-kld", "0.006", "--text-windows", "16")


@pytest.fixture
def notes(nightpress: Any) -> Path:
    """A short calibration text, so that little is measured."""
    path = Path(nightpress.base / "notes.txt")
    path.write_text(write(Catalogue().load("tone_analysis")[:14]), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_best_file_of_a_size_is_made_shown_and_exported(nightpress: Any, notes: Path) -> None:
    made, = json.loads(nightpress("quantize", STARTER, "--target-bpw", "4.2", "--calibration", str(notes),
                                  "--json").stdout)
    file = Path(made["path"])
    assert file.name == "starter-4.200bpw.gguf"
    assert file.stat().st_size == made["bytes"] <= 4.2 * 7_082_240 / 8
    measured = {one["name"]: one["kld"] for one in made["tried"] if one["kld"] is not None}
    assert made["kld"] == min(measured.values())
    assert len(measured) == 2
    shown = json.loads(nightpress("recipe", "show", str(file), "--json").stdout)
    header = check_gguf(file)
    assert shown["types"] == {tensor.name: tensor.ggml_type for tensor in header.tensors if tensor.ggml_type != "F32"}
    assert len(set(shown["types"].values())) > 2
    exported = nightpress("recipe", "export", str(file), "-o", "types.txt").stdout
    assert f"{len(shown['types'])} matrices" in exported
    assert (nightpress.base / "types.txt").read_text().splitlines()[0].startswith("^")


@pytest.mark.slow
def test_a_run_refines_between_the_level_that_passed_and_the_one_that_did_not(nightpress: Any, notes: Path) -> None:
    found = json.loads(nightpress("run", "--evaluation-prompts", "30", "--max-prompts", "60", *REJECT, "--calibration",
                                  str(notes), "--accept-inconclusive", "--seeds", "0", "--json").stdout)
    rows = {row["level"]: row for row in found["levels"]}
    recipe = next(row for name, row in rows.items() if name.startswith("RECIPE-"))
    assert rows["Q3_K_L"]["state"] == "rejected"
    assert recipe["bytes"] <= rows["Q3_K_L"]["bytes"]
    assert (recipe["measurements"]["kl_divergence"]["value"] < rows["Q3_K_L"]["measurements"]["kl_divergence"]["value"])
    assert found["run"]["chosen_level"] == recipe["level"]
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []
    shown = json.loads(nightpress("recipe", "show", str(found["run"]["id"]), "--json").stdout)
    assert shown["types"] == {name: kind for name, kind in recipe["tensor_types"].items() if kind != "F32"}


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (("quantize", STARTER, "--target-size", "1MB"), 79, "smallest recipe"),
    (("quantize", STARTER, "--target-size", "1GB"), 79, "unquantized"),
    (("quantize", STARTER, "--target-size", "big"), 65, "no size"),
    (("quantize", STARTER, "--target-size", "3MB", "--level", "Q4_K_M"), 2, "one of"),
    (("recipe", "show", STARTER), 84, "nothing that is quantized"),
    (("recipe", "show", "none.gguf"), 20, "none.gguf")])
def test_what_cannot_be_done_is_a_sentence(arguments: tuple[str, ...], status: int, said: str, nightpress: Any) -> None:
    refused = nightpress(*arguments, status=status)
    assert said in refused.stderr
