"""What every test stands on: temporary folders for all paths, the starter model, polling."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, settings

from loops.starter import STARTER_GGUF

# timings are not tests: beside other work an example may take any time
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# a job in the background ignores Ctrl-C, and so would what it starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: what a service manager hands to the daemon; unset, so that the folders below decide
SERVICE_MANAGER = ("STATE_DIRECTORY", "CONFIGURATION_DIRECTORY", "RUNTIME_DIRECTORY", "CACHE_DIRECTORY",
                   "LOGS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
#: beginnings of the names by which we and the libraries of jobs are set
OURS = ("NIGHTPRESS_", "HF_", "TRANSFORMERS_")
#: endings of the names under which secrets lie in an environment
SECRETS = ("_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD")

#: Threads of what a test computes, 0 for all: beside other tests each more would only keep those waiting
THREADS = (max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
           if "PYTEST_XDIST_WORKER_COUNT" in os.environ else 0)
if THREADS:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of torch, here and in the processes of tests

#: by how much longer than on an idle machine a test waits before it gives up: a deadline may never fail by load alone
PATIENCE = 5

T = TypeVar("T")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let a process that has run out of tests take over some of another's: the long ones lie together."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let processes that run tests side by side begin with the long ones, so that none is left with one at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "system" not in item.path.parts))


class Poll(Protocol):
    """The type of the fixture `poll`; what it promises stands at `poll_until`."""

    def __call__(self, predicate: Callable[[], T], deadline_s: float = 10.0,
                 what: str = "the condition") -> T: ...


def poll_until(predicate: Callable[[], T], deadline_s: float = 10.0, what: str = "the condition") -> T:
    """Return the predicate's first true answer; fail, naming what was waited for, well after the deadline."""
    end = time.monotonic() + PATIENCE * deadline_s
    while not (answer := predicate()):
        if time.monotonic() >= end:
            pytest.fail(f"{what} did not come true within {PATIENCE * deadline_s:g} s; last answer: {answer!r}")
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
    reaches a test or its child processes; nor does what a job that ran in this process set for its libraries.
    """
    for name in list(os.environ):
        if name.startswith(OURS) or name.endswith(SECRETS) or name in SERVICE_MANAGER:
            monkeypatch.delenv(name)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if THREADS:
        monkeypatch.setenv("NIGHTPRESS_THREADS", str(THREADS))
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


class Nightpress:
    """The real command line in a process of its own, on the state folder of the test."""

    #: a run of seconds: few windows, few scenarios, two levels
    QUICK = ("--text-windows", "4", "--evaluation-prompts", "4", "--max-prompts", "6", "--levels", "Q8_0,Q4_K_M")

    def __init__(self, base: Path, engine: Path) -> None:
        self.base, self.state, self.deploy = base, base / "state", base / "deploy"
        self.state.mkdir(exist_ok=True)
        self.places = {"NIGHTPRESS_STATE_DIR": str(self.state), "NIGHTPRESS_DEPLOY_DIR": str(self.deploy)}
        shutil.copy(engine, self.state / "engine.json")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command; the caller waits for it."""
        program = Path(sys.executable).with_name("nightpress")
        return subprocess.Popen([str(program), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd=self.base,
                                env={**os.environ, **self.places, **environment})

    def __call__(self, *arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; it must exit with status and must not print a traceback."""
        with self.start(*arguments, **environment) as process:
            out, err = process.communicate(timeout=300)
        assert "Traceback" not in out + err, err
        assert process.returncode == status, f"{arguments} exited with {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def run(self, *arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Press the starter quickly."""
        return self("run", *self.QUICK, *arguments, status=status, **environment)


@pytest.fixture(scope="session")
def engine_probe(isolated_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the real probe found on this CPU, once for all tests of this process."""
    from daemon.engine import FILE, probe

    folder = tmp_path_factory.mktemp("engine")
    probe(folder)
    return folder / FILE


@pytest.fixture(scope="session")
def new_nightpress(engine_probe: Path) -> Callable[[Path], Nightpress]:
    """Make a command line on another folder."""
    return lambda base: Nightpress(base, engine_probe)


@pytest.fixture
def nightpress(isolated: Path, engine_probe: Path) -> Nightpress:
    """The command line, isolated."""
    return Nightpress(isolated, engine_probe)
