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
def running(isolated: Path, poll: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A service in this process whose jobs are held until they are ended."""
    from control_service import Running

    from daemon.errors import Interrupted
    from state.ledger import RunSpec, RunState

    def press(ledger: Any, _settings: Any, plan: Any, _show: Any, grip: Any, **more: Any) -> int:
        run = ledger.start_run(RunSpec(plan.name, plan.model, "0" * 64, 9, plan.as_json(), plan.name, "b1"))
        more["opened"](run)
        grip.ending.wait(120)
        ledger.end_run(run, RunState.INTERRUPTED, reason=grip.reason)
        raise Interrupted(grip.reason)

    monkeypatch.setattr("daemon.runner.press", press)
    one = Running(isolated)
    try:
        poll(lambda: one.listener.alive, 60, "the service's answers")
        yield one
    finally:
        one.close()


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
