"""What every test stands on: temporary folders for all paths, the starter model, polling."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from loops.starter import STARTER_GGUF

#: what a service manager hands to the daemon; unset, so that the folders below decide
SERVICE_MANAGER = ("STATE_DIRECTORY", "CONFIGURATION_DIRECTORY", "RUNTIME_DIRECTORY", "CACHE_DIRECTORY",
                   "LOGS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
#: endings of the names under which secrets lie in an environment
SECRETS = ("_API_KEY", "_TOKEN", "_SECRET")

T = TypeVar("T")


class Poll(Protocol):
    """The type of the fixture `poll`; what it promises stands at `poll_until`."""

    def __call__(self, predicate: Callable[[], T], deadline_s: float = 10.0,
                 what: str = "the condition") -> T: ...


def poll_until(predicate: Callable[[], T], deadline_s: float = 10.0, what: str = "the condition") -> T:
    """Return the predicate's first true answer; fail, naming what was waited for, at the deadline."""
    end = time.monotonic() + deadline_s
    while not (answer := predicate()):
        if time.monotonic() >= end:
            pytest.fail(f"{what} did not come true within {deadline_s:g} s; last answer: {answer!r}")
        threading.Event().wait(0.02)
    return answer


@pytest.fixture
def poll() -> Poll:
    """Wait without sleeping: `poll(lambda: path.exists(), deadline_s=5, what="the file")`."""
    return poll_until


@pytest.fixture(scope="session")
def starter() -> Path:
    """The starter model in F16, where the package keeps it; read it, never write to it."""
    return STARTER_GGUF


def isolate(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point every path at folders below base; return the runtime folder, which the caller removes.

    The runtime folder has a short name of its own, because the path of a Unix socket
    must fit in about 100 bytes. No setting and no secret of the caller's environment
    reaches a test or its child processes.
    """
    for name in list(os.environ):
        if name.startswith("NIGHTPRESS_") or name.endswith(SECRETS) or name in SERVICE_MANAGER:
            monkeypatch.delenv(name)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for name, folder in {
        "HOME": "home", "XDG_STATE_HOME": "xdg-state", "XDG_CONFIG_HOME": "xdg-config",
        "XDG_CACHE_HOME": "xdg-cache", "XDG_DATA_HOME": "xdg-data",
        "NIGHTPRESS_STATE_DIR": "state", "NIGHTPRESS_DEPLOY_DIR": "deploy", "NIGHTPRESS_CONFIG_DIR": "config",
    }.items():
        (base / folder).mkdir()
        monkeypatch.setenv(name, str(base / folder))
    runtime = Path(tempfile.mkdtemp(prefix="np-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return runtime


@pytest.fixture(scope="session", autouse=True)
def isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for fixtures that live longer than one test."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        runtime = isolate(tmp_path_factory.mktemp("session"), monkeypatch)
        yield
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Send every path a test could touch to a folder of the test's own; return that folder."""
    base = tmp_path_factory.mktemp("isolated")
    runtime = isolate(base, monkeypatch)
    yield base
    shutil.rmtree(runtime, ignore_errors=True)
