"""What the tests of native code share: options that run on every CPU, and levels of the starter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

#: Threads that spin while others compute make tests beside each other twenty times slower. To be set before
#: the engine loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from loops.engine.gguf_check import check_model
from loops.engine.levels import level_named
from loops.engine.options import EngineOptions
from loops.engine.quantize import Quantized, QuantizeSpec, forecast, quantize
from loops.starter import STARTER_GGUF

#: extra buffers kill the process on CPUs with AMX; see `loops.engine.probe`
OPTIONS = EngineOptions(threads=1, extra_buffers=False)

Press = Callable[[str], Quantized]


@pytest.fixture(scope="session")
def options() -> EngineOptions:
    return OPTIONS


@pytest.fixture(scope="session")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Press:
    """Return a level of the starter by name, made once."""
    folder, made = tmp_path_factory.mktemp("levels"), dict[str, Quantized]()
    model = check_model(STARTER_GGUF)

    def press(name: str) -> Quantized:
        if name not in made:
            spec = QuantizeSpec(model, level_named(name), OPTIONS)
            made[name] = quantize(spec, forecast(spec), folder)
        return made[name]

    return press


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """A blob store that does not exist yet."""
    return tmp_path / "state" / "blobs"
