"""What the tests of the control socket share, and those that ask a provider."""

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


@pytest.fixture
def server() -> Iterator[Any]:
    """A provider of large models on this machine."""
    import provider_server

    with provider_server.serving() as provider:
        yield provider


@pytest.fixture(params=["anthropic", "openai"])
def order(request: pytest.FixtureRequest, server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What to write for calibration, from each provider in turn."""
    from author import order_from

    return order_from(request.param, server, monkeypatch)
