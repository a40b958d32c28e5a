"""The user service under a real systemd: started, reloaded, restarted, given up, watched, stopped.

Each test has a `systemd --user` of its own, in a mount namespace (where it believes that systemd
booted the machine) and a control group that takes everything with it at the end. That needs root and
a writable cgroup v2; elsewhere the tests are skipped. `PROGRAMS` names what is started.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon import units
from daemon.units import Kind, Outcome, Seal

STAND_IN = Path(__file__).resolve().parents[1] / "fakes" / "notifying_daemon.py"
#: the folder of the program: it starts only if the path comes through unharmed
NASTY = "a b%n ${HOME} it's \"q\" \\x ü"
STARTS_WITHIN_S = 30.0
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Program:
    """A daemon to start: its command, and how its status begins once it is up and once it has reloaded."""

    name: str
    command: tuple[str, ...]
    status: str
    status_after_reload: str


PROGRAMS = [Program("stand-in", (sys.executable, str(STAND_IN)), "up", "reloaded"),
            Program("nightpressd", (str(Path(sys.executable).with_name("nightpressd")),), "", "")]

BOOTED = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && mount -t cgroup2 none /sys/fs/cgroup &&
exec "$0" --user --unit=paths.target --log-target=console --log-level=info
"""
_count = itertools.count()
#: the fixture `poll`: predicate, deadline in seconds, what is waited for
Poll = Callable[[Callable[[], object], float, str], object]


def cgroup_of(pid: str = "self") -> Path | None:
    """The folder of a process's control group in the v2 hierarchy, None without one."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    found = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    own = [line[3:] for line in Path("/proc", pid, "cgroup").read_text(encoding="utf-8").splitlines()
           if line.startswith("0::")]
    return found[0] / own[0].lstrip("/") if found and own else None


class UserManager:
    """A running `systemd --user`."""

    def __init__(self, process: subprocess.Popen[bytes], program: Program, folder: Path) -> None:
        self.process = process
        self.program = program
        self.path = folder / NASTY / "nightpressd"
        self.path.parent.mkdir()
        self.path.write_text(f'#!/bin/sh\nexec {shlex.join(program.command)}\n', encoding="utf-8")
        self.path.chmod(0o755)

    def systemctl(self, *words: str, status: int | None = 0) -> str:
        done = subprocess.run(["nsenter", f"--target={self.process.pid}", "--mount", "systemctl", "--user", *words],
                              capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert status is None or done.returncode == status, (words, done.stdout, done.stderr, self.show())
        return done.stdout

    def show(self) -> dict[str, str]:
        lines = self.systemctl("show", "nightpress.service", status=None).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def install(self, **changes: str) -> None:
        """Install the real unit; changes go into a drop-in, as a person would make them."""
        assert units.install(Kind.USER, self.path) is Outcome.INSTALLED
        drop_in = units.where(Kind.USER).with_suffix(".service.d") / "test.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("\n".join(["[Service]", *(f"{key}={value}" for key, value in changes.items())]) + "\n")
        self.systemctl("daemon-reload")

    def start(self) -> dict[str, str]:
        self.systemctl("start", "nightpress.service")
        shown = self.show()
        assert shown["ActiveState"] == "active", shown
        return shown


def processes(shown: dict[str, str]) -> set[str]:
    """The ids of the service's processes."""
    group = cgroup_of(shown["MainPID"])
    assert group is not None
    return set((group / "cgroup.procs").read_text(encoding="utf-8").split())


@contextlib.contextmanager
def own_cgroup(poll: Poll) -> Iterator[Path]:
    """Yield a fresh control group; on leaving, whatever is in it is killed and it is removed."""
    here = cgroup_of()
    if here is None:
        pytest.skip("there is no cgroup v2")
    group = here / f"nightpress-test-{os.getpid()}-{next(_count)}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        yield group
    finally:
        (group / "cgroup.kill").write_text("1")
        poll(lambda: "populated 0" in (group / "cgroup.events").read_text(), DEADLINE_S, "an empty control group")
        for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        group.rmdir()


def answers(manager: UserManager, log: Path) -> UserManager:
    """Return the manager once it answers; skip, with its last words, when it cannot run here."""
    deadline = time.monotonic() + STARTS_WITHIN_S
    while "Version=" not in manager.systemctl("show", status=None):
        if manager.process.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"systemd --user cannot run here: {log.read_text(errors='replace')[-500:]}")
        threading.Event().wait(0.05)
    return manager


@pytest.fixture(params=PROGRAMS, ids=lambda program: program.name)
def manager(request: pytest.FixtureRequest, isolated: Path, poll: Poll) -> Iterator[UserManager]:
    binary = shutil.which("systemd", path=f"{os.environ['PATH']}:/usr/lib/systemd:/lib/systemd")
    if binary is None or any(shutil.which(name) is None for name in ("unshare", "nsenter", "systemctl")):
        pytest.skip("systemd, unshare or nsenter is not installed")
    if os.geteuid() != 0:
        pytest.skip("only root can give systemd a mount namespace and a control group")
    log = isolated / "systemd.log"
    with own_cgroup(poll) as group, log.open("wb") as stream:
        join = 'echo $$ > "$0"/cgroup.procs && exec unshare --mount --cgroup -- sh -c "$1" "$2"'
        with subprocess.Popen(["sh", "-c", join, str(group), BOOTED, binary], stdin=subprocess.DEVNULL,
                              stdout=stream, stderr=stream) as process:
            try:
                yield answers(UserManager(process, request.param, isolated), log)
            finally:
                process.kill()


def test_it_starts_and_says_what_it_does(manager: UserManager) -> None:
    manager.install()
    manager.systemctl("enable", "--now", "nightpress.service")
    shown = manager.show()
    assert shown["ActiveState"] == "active"
    assert shown["StatusText"].startswith(manager.program.status)
    assert manager.program.command[-1].encode() in Path("/proc", shown["MainPID"], "cmdline").read_bytes()

    found = units.status(Kind.USER)
    assert (found.installed, found.seal, found.enabled, found.active) == (True, Seal.UNCHANGED, "enabled", "active")
    assert (found.detail, found.main_pid) == (shown["StatusText"], int(shown["MainPID"]))
    assert (found.restarts, found.note) == (0, None)


def test_it_reads_its_settings_again(manager: UserManager, poll: Poll) -> None:
    manager.install()
    before = manager.start()
    manager.systemctl("reload", "nightpress.service")
    poll(lambda: manager.show()["StatusText"].startswith(manager.program.status_after_reload), DEADLINE_S, "the reload")
    after = manager.show()
    assert (after["ActiveState"], after["MainPID"]) == ("active", before["MainPID"])


def test_a_killed_daemon_comes_back_without_its_old_worker(manager: UserManager, poll: Poll) -> None:
    manager.install(RestartSec="100ms")
    before = manager.start()
    group = processes(before)
    assert before["MainPID"] in group
    manager.systemctl("kill", "--kill-whom=main", "--signal=KILL", "nightpress.service")
    poll(lambda: manager.show()["NRestarts"] == "1" and manager.show()["ActiveState"] == "active", DEADLINE_S,
         "the restart")
    assert not group & processes(manager.show())


def test_wrong_settings_end_it_for_good(manager: UserManager, poll: Poll) -> None:
    (Path(os.environ["NIGHTPRESS_CONFIG_DIR"]) / "nightpress.toml").write_text("no_such_setting = 1\n")
    manager.install(RestartSec="100ms")
    manager.systemctl("start", "nightpress.service", status=1)
    poll(lambda: manager.show()["ActiveState"] == "failed", DEADLINE_S, "the failure")
    shown = manager.show()
    assert (shown["Result"], shown["ExecMainStatus"], shown["NRestarts"]) == ("exit-code", "78", "0")
    found = units.status(Kind.USER)
    assert found.active == "failed"
    assert found.detail is not None
    assert "exit-code" in found.detail


def test_a_daemon_that_hangs_is_killed(manager: UserManager, poll: Poll) -> None:
    manager.install(WatchdogSec="3", Restart="no")
    manager.start()
    manager.systemctl("kill", "--kill-whom=main", "--signal=STOP", "nightpress.service")
    poll(lambda: manager.show()["ActiveState"] == "failed", DEADLINE_S, "the watchdog")
    assert manager.show()["Result"] == "watchdog"


def test_a_daemon_that_works_is_not_killed_by_the_watchdog(manager: UserManager, poll: Poll) -> None:
    manager.install(WatchdogSec="3", Restart="no")
    manager.start()
    until = time.monotonic() + 4
    poll(lambda: manager.show()["ActiveState"] != "active" or time.monotonic() > until, DEADLINE_S, "four seconds")
    assert manager.show()["ActiveState"] == "active"


def test_stopping_leaves_no_process_behind(manager: UserManager, poll: Poll) -> None:
    manager.install()
    group = processes(manager.start())
    manager.systemctl("stop", "nightpress.service")
    shown = manager.show()
    assert (shown["ActiveState"], shown["Result"]) == ("inactive", "success")
    assert not any(Path("/proc", pid).exists() for pid in group)


def test_after_uninstalling_the_printed_commands_stop_it(manager: UserManager) -> None:
    from daemon.cli.service import after_install, after_uninstall

    manager.install()
    for step in after_install(Kind.USER, Outcome.INSTALLED, account_exists=True):
        words = shlex.split(step, comments=True)
        if words[:2] == ["systemctl", "--user"]:
            manager.systemctl(*words[2:])
    assert units.status(Kind.USER).active == "active"
    assert units.uninstall(Kind.USER) is Outcome.REMOVED
    for step in after_uninstall(Kind.USER):
        manager.systemctl(*shlex.split(step)[2:])
    found = units.status(Kind.USER)
    assert (found.installed, found.active, found.enabled) == (False, "inactive", None)
    assert [path for path in units.where(Kind.USER).parent.rglob("*") if path.is_symlink()] == []
