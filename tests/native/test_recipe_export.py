"""What `nightpress recipe` says of a file is what another reader finds in it, name by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from gguf import GGUFReader
from typer.testing import CliRunner

from daemon.cli import recipe
from loops.engine.gguf_check import check_model
from loops.engine.levels import level_named
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.starter import STARTER_GGUF


def run(*arguments: str) -> str:
    app = typer.Typer()
    recipe.register(app)
    done = CliRunner().invoke(app, ["recipe", *arguments])
    assert done.exit_code == 0, done.exception
    return done.output


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, options: EngineOptions) -> Path:
    """The starter at Q4_K_M, but for two matrices."""
    spec = QuantizeSpec(check_model(STARTER_GGUF), level_named("Q4_K_M"), options,
                        types={"blk.0.ffn_up.weight": "Q8_0", "blk.1.ffn_up.weight": "Q3_K"})
    return quantize(spec, forecast(spec), tmp_path_factory.mktemp("mixed")).path


def types_in(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors
            if tensor.tensor_type.name not in {"F32", "F16", "BF16"}}


def test_what_is_exported_names_every_matrix_and_makes_the_file_again(
        mixed: Path, options: EngineOptions, tmp_path: Path) -> None:
    lines = [line.rsplit("=", 1) for line in run("export", str(mixed)).splitlines()]
    tensors = check_model(STARTER_GGUF).tensors
    named: dict[str, str] = {}
    for pattern, kind in lines:  # llama-quantize searches each name for each pattern, and the first that fits counts
        found, = [tensor.name for tensor in tensors if re.search(pattern, tensor.name)]
        named[found] = kind
    assert named == types_in(mixed)
    assert {named["blk.0.ffn_up.weight"], named["blk.1.ffn_up.weight"]} == {"Q8_0", "Q3_K"}
    spec = QuantizeSpec(check_model(STARTER_GGUF), level_named("Q4_K_M"), options, types=named)
    assert quantize(spec, forecast(spec), tmp_path).sha256 == mixed.stem


def test_what_is_shown_is_what_the_file_holds(mixed: Path) -> None:
    shown: dict[str, Any] = json.loads(run("show", str(mixed), "--json"))
    assert shown["types"] == types_in(mixed)
    rows = [row for row in shown["by_kind"] if row["matrix"] == "ffn_up"]
    assert {row["type"]: row["layers"] for row in rows if row["type"] in {"Q8_0", "Q3_K"}} == {"Q8_0": "0", "Q3_K": "1"}
