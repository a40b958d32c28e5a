"""What several tests of conversion share: llama.cpp's converter, from the package index once."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.converter_source import find_converter
from loops.finetune.converter import ConverterMissing


@pytest.fixture(scope="session")
def converter_home(isolated_session: None, request: pytest.FixtureRequest) -> Path:
    """A state folder with llama.cpp's converter, fetched once and kept between runs of the tests."""
    assert request.config.cache is not None
    home = request.config.cache.mkdir("converter")
    try:
        find_converter(None, home, pause=lambda _seconds: None)
    except ConverterMissing as problem:
        pytest.skip(str(problem))
    return Path(home)


@pytest.fixture(scope="session")
def scripts(converter_home: Path) -> Path:
    """The folder of the converter itself."""
    return find_converter(None, converter_home).folder
