"""What the tests of the control socket share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def place(isolated: Path) -> Path:
    """Where the socket goes; the folder does not exist yet."""
    return Path(os.environ["XDG_RUNTIME_DIR"]) / "nightpress" / "control.sock"


@pytest.fixture
def stage() -> Any:
    """An application to attack."""
    from hostile_clients import Stage

    return Stage()


@pytest.fixture
def serve(place: Path, stage: Any) -> Iterator[Any]:
    """Start a listener within bounds; it must end in time."""
    from hostile_clients import serving

    with serving(place, stage) as start:
        yield start
