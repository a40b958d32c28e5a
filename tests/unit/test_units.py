"""The files that make the daemon a service: what they contain, and whose changes they respect."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from daemon import units
from daemon.cli import service
from daemon.units import Kind, Outcome, Seal, ServiceUnsupported, UnitChanged
from state.files import StateUnwritable

FILES = Path(__file__).resolve().parents[2] / "systemd"
PROGRAM = Path("/usr/bin/true")
MOST_EXPOSURE = 1.5
#: systemd before 254 does not know them, and says so; the units explain why they are there
NEWER = re.compile(r"Unknown key( name)? '(RestartSteps|RestartMaxDelaySec)'")

analyzed = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False,
                          errors="surrogateescape", timeout=60,
                          env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"})


def complaints(unit: Path) -> list[str]:
    said = analyze("--man=no", "verify", str(unit)).stderr.splitlines()
    return [line for line in said if unit.name in line and not NEWER.search(line)]


def directives(name: str) -> dict[str, list[str]]:
    """What a unit sets: the values of every directive, in order."""
    found: dict[str, list[str]] = {}
    for line in (FILES / name).read_text(encoding="utf-8").splitlines():
        key, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def written(kind: Kind, program: Path, folder: Path) -> Path:
    path = folder / units.UNIT
    path.write_bytes(units.render(kind, program))
    return path


@analyzed
def test_the_system_service_is_little_exposed(tmp_path: Path) -> None:
    said = analyze("security", "--offline=true", str(written(Kind.SYSTEM, PROGRAM, tmp_path)))
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert exposure, said.stdout + said.stderr
    assert float(exposure[1]) < MOST_EXPOSURE


@analyzed
@pytest.mark.parametrize("kind", [Kind.SYSTEM, Kind.USER])
def test_systemd_has_nothing_to_complain_about(kind: Kind, tmp_path: Path) -> None:
    assert complaints(written(kind, PROGRAM, tmp_path)) == []


def test_the_system_service_sees_the_whole_machine() -> None:
    found = directives("nightpress.service")
    assert found["ProtectProc"] == ["default"]
    assert found["ProcSubset"] == ["all"]
    assert found["ProtectHome"] == ["read-only"]
    assert {"PrivateNetwork", "PrivatePIDs", "InaccessiblePaths", "TemporaryFileSystem", "RootDirectory",
            "IPAddressDeny", "DynamicUser"}.isdisjoint(found)
    assert found["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6"]


def test_the_system_service_finds_the_gpus_and_the_terminals() -> None:
    found = directives("nightpress.service")
    bound = " ".join(found["BindPaths"]).split()
    assert {f"-/dev/nvidia{number}" for number in range(16)} < set(bound)
    assert {"-/dev/nvidiactl", "-/dev/nvidia-uvm", "-/dev/nvidia-caps", "-/dev/kfd", "-/dev/dri"} < set(bound)
    assert all(path.startswith("-/dev/") for path in bound)  # without the dash, a machine without it could not start
    assert found["DeviceAllow"] == ["char-nvidia* rw", "char-kfd rw", "char-drm rw"]
    assert "-/dev/tty1" in " ".join(found["BindReadOnlyPaths"]).split()


@analyzed
def test_the_worker_may_demote_itself() -> None:
    """The filter, as systemd works it out, keeps the calls that lower a priority."""
    allowed, denied = directives("nightpress.service")["SystemCallFilter"]
    assert denied.startswith("~")

    def calls(names: Sequence[str]) -> set[str]:
        lines = analyze("syscall-filter", *names).stdout.splitlines()
        words = {line.strip() for line in lines if line.startswith(" ") and not line.strip().startswith("#")}
        groups = sorted(word for word in words if word.startswith("@"))
        return (words - set(groups)) | (calls(groups) if groups else set())

    left = calls(allowed.split()) - calls(denied.removeprefix("~").split())
    assert {"setpriority", "ioprio_set", "sched_setscheduler", "sched_setaffinity", "sched_setattr", "prctl", "kill",
            "mmap", "madvise", "execve"} <= left
    assert {"setuid", "chroot", "init_module", "clock_settime"}.isdisjoint(left)


@pytest.mark.parametrize("name", ["nightpress.service", "nightpress-user.service"])
def test_a_daemon_that_cannot_work_is_not_started_again(name: str) -> None:
    from daemon.errors import SettingsWrong
    from daemon.listening import SocketBusy, SocketRefused
    from state.lock import StateBusy

    found = directives(name)
    assert found["Restart"] == ["on-failure"]
    hopeless = (SettingsWrong, StateBusy, SocketBusy, SocketRefused)
    assert found["RestartPreventExitStatus"] == [" ".join(str(error.exit_code) for error in hopeless)]
    assert found["OOMPolicy"] == ["continue"]


@pytest.mark.parametrize("name", ["nightpress.service", "nightpress-user.service"])
def test_the_daemon_itself_is_never_starved(name: str) -> None:
    """In an idle group it would be seconds late to stop its worker."""
    found = directives(name)
    assert found["CPUWeight"] == ["20"]
    assert found["IOSchedulingClass"] == ["best-effort"]
    assert "CPUSchedulingPolicy" not in found


def test_the_user_service_asks_for_nothing_that_needs_root() -> None:
    found = directives("nightpress-user.service")
    assert found["WantedBy"] == ["default.target"]
    sandbox = ("Private", "Protect", "Restrict", "Capability", "Ambient", "SystemCall", "Device", "NoNew", "Bind",
               "ReadOnly", "ReadWrite", "Memory")
    assert [key for key in found if key.startswith(sandbox) and key != "RestrictPreventExitStatus"] == []
    assert {"User", "Group", "StateDirectory"}.isdisjoint(found)


NASTY = ["with space", "per%cent %n", "dollar$HOME ${X}", "it's", 'dou"ble', "back\\slash \\x41", "ünï☃",
         "semi;colon #hash", "new\nline", "bytes\udcff", "-dash", "@at +plus !bang :colon", "trailing "]


@analyzed
@pytest.mark.parametrize("name", NASTY)
def test_any_path_reaches_systemd_unharmed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    program = folder / "nightpressd"
    unit = written(Kind.USER, program, tmp_path)
    if "/bin/sh" not in unit.read_text(encoding="utf-8"):  # systemd looks at the program, not at its arguments
        assert any("not executable" in line and str(program) in line for line in complaints(unit))
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert complaints(unit) == []


def test_a_path_that_is_not_absolute_is_refused() -> None:
    with pytest.raises(ValueError, match="not absolute"):
        units.render(Kind.USER, Path("nightpressd"))


@pytest.mark.parametrize("name", [*(name for name in NASTY if name.isprintable()), "a<b>&amp;]]>"])
def test_any_path_reaches_launchd_unharmed(name: str) -> None:
    program, home = Path("/opt") / name / "nightpressd", Path("/Volumes") / name
    agent = plistlib.loads(units.render(Kind.LAUNCHD, program, home=home))
    assert agent["ProgramArguments"] == [str(program)]
    assert agent["StandardOutPath"] == agent["StandardErrorPath"] == f"{home}/Library/Logs/nightpress.log"
    assert "@" not in json.dumps({key: value for key, value in agent.items()
                                  if key not in ("ProgramArguments", "StandardOutPath", "StandardErrorPath")})


@pytest.mark.parametrize("name", ["new\x01line", "bytes\udcff"])
def test_a_path_that_launchd_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ServiceUnsupported, match="control characters"):
        units.render(Kind.LAUNCHD, Path("/opt") / name, home=Path("/Volumes"))


def test_the_agent_is_quiet_and_comes_back_after_a_failure() -> None:
    agent = plistlib.loads(units.render(Kind.LAUNCHD, PROGRAM, home=Path("/Volumes/x")))
    assert agent["Label"] == units.LABEL
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["RunAtLoad"] is agent["LowPriorityIO"] is True
    assert agent["ProcessType"] == "Background"
    assert "EnvironmentVariables" not in agent  # no place for secrets: anyone may read the file


@pytest.mark.parametrize("kind", list(Kind))
def test_a_changed_file_is_kept(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "unit"
    assert units.install(kind, PROGRAM, path=path) is Outcome.INSTALLED
    assert path.stat().st_mode & 0o777 == 0o644
    assert units.install(kind, PROGRAM, path=path) is Outcome.ALREADY_INSTALLED
    changed = path.read_bytes() + b"\n"
    assert units.examine(changed) is Seal.CHANGED
    path.write_bytes(changed)
    for attempt in (lambda: units.install(kind, PROGRAM, path=path), lambda: units.uninstall(kind, path=path)):
        with pytest.raises(UnitChanged, match=r"changed by hand.*--force"):
            attempt()
        assert path.read_bytes() == changed
    assert units.install(kind, PROGRAM, path=path, force=True) is Outcome.REPLACED
    assert path.read_bytes() == units.render(kind, PROGRAM)


@pytest.mark.parametrize("kind", list(Kind))
def test_an_older_version_of_ours_gives_way(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_bytes(units.render(kind, Path("/opt/old/nightpressd")))
    assert units.install(kind, PROGRAM, path=path) is Outcome.REPLACED
    assert path.read_bytes() == units.render(kind, PROGRAM)
    assert units.uninstall(kind, path=path) is Outcome.REMOVED
    assert list(tmp_path.iterdir()) == []
    assert units.uninstall(kind, path=path) is Outcome.ALREADY_REMOVED


@pytest.mark.parametrize("content", [b"", b"[Service]\nExecStart=/bin/true\n", b"# nightpress-sha256 0\n",
                                     (FILES / "nightpress.service").read_bytes()])
def test_a_file_that_is_not_ours_is_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "unit"
    path.write_bytes(content)
    for attempt in (lambda: units.install(Kind.USER, PROGRAM, path=path),
                    lambda: units.uninstall(Kind.USER, path=path)):
        with pytest.raises(UnitChanged, match="not written by Nightpress"):
            attempt()
    assert path.read_bytes() == content


@pytest.mark.parametrize("target", ["/dev/null", "nowhere", "ours"])
def test_a_link_is_not_ours_to_replace(target: str, tmp_path: Path) -> None:
    """`systemctl mask` links the name to /dev/null; people link to files that they keep elsewhere."""
    (tmp_path / "ours").write_bytes(units.render(Kind.USER, Path("/opt/old/nightpressd")))
    path = tmp_path / "unit"
    path.symlink_to(target)
    for attempt in (lambda: units.install(Kind.USER, PROGRAM, path=path),
                    lambda: units.uninstall(Kind.USER, path=path)):
        with pytest.raises(UnitChanged):
            attempt()
    assert path.is_symlink()
    assert units.install(Kind.USER, PROGRAM, path=path, force=True) is Outcome.REPLACED
    assert not path.is_symlink()


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnitChanged, match="is a folder"):
        units.install(Kind.USER, PROGRAM, path=tmp_path, force=True)
    assert units.status(Kind.USER, path=tmp_path).note


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnwritable, match="file"):
        units.install(Kind.USER, PROGRAM, path=tmp_path / "file" / "unit")


def test_macos_has_an_agent_only() -> None:
    assert units.platform_kind(system=False, platform="darwin") is Kind.LAUNCHD
    assert units.platform_kind(system=True, platform="linux") is Kind.SYSTEM
    with pytest.raises(ServiceUnsupported, match="--system"):
        units.platform_kind(system=True, platform="darwin")


def test_a_closed_folder_on_the_way_is_found(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    program = closed / "bin" / "nightpressd"
    program.parent.mkdir(parents=True)
    tmp_path.chmod(0o755)
    closed.chmod(0o700)
    assert units.closed_folder(program) in (closed, *closed.parents)
    assert units.closed_folder(program) is not None


class Stand:
    """A stand-in for a service manager's client on a PATH of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))

    def says(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.folder / name).chmod(0o755)


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path / "bin", monkeypatch)


def test_status_reads_what_systemctl_says(stand: Stand, tmp_path: Path) -> None:
    path = written(Kind.USER, PROGRAM, tmp_path)
    stand.says("systemctl", """[ "$1 $2" = "--user show" ] || exit 9
        printf 'UnitFileState=enabled\\nActiveState=active\\nStatusText=idle=no, 3 queued\\nMainPID=42\\nNRestarts=0\\n'
        printf 'Result=success\\nNeedDaemonReload=yes\\n'""")
    found = units.status(Kind.USER, path=path)
    assert (found.installed, found.seal, found.enabled, found.active) == (True, Seal.UNCHANGED, "enabled", "active")
    assert (found.detail, found.main_pid, found.restarts) == ("idle=no, 3 queued", 42, 0)
    assert found.note is not None
    assert "daemon-reload" in found.note


def test_status_reads_what_launchctl_says(stand: Stand, tmp_path: Path) -> None:
    stand.says("launchctl", """printf 'gui/501/io.nightpress.daemon = {\\n\\tstate = running\\n\\tpid = 77\\n'
        printf '\\tlast exit code = 0\\n\\tspawn = {\\n\\t\\tstate = other\\n\\t}\\n}\\n'""")
    found = units.status(Kind.LAUNCHD, path=tmp_path / "none")
    assert (found.installed, found.seal, found.active, found.main_pid) == (False, None, "running", 77)
    assert found.detail == "last exit code 0"


@pytest.mark.parametrize(("script", "note"), [
    (None, "has no systemctl"), ("echo no bus >&2; echo more >&2; exit 1", "no bus"), ("exit 4", "exit status 4"),
    ("read -r line < waits", "did not answer")])
def test_status_bears_a_manager_that_does_not_answer(
        script: str | None, note: str, stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "ANSWER_WITHIN_S", 0.3 if script and "waits" in script else 30.0)
    os.mkfifo(tmp_path / "waits")
    monkeypatch.chdir(tmp_path)
    if script is not None:
        stand.says("systemctl", script)
    found = units.status(Kind.SYSTEM, path=tmp_path / "none")
    assert not found.installed
    assert found.active is None
    assert found.note is not None
    assert note in found.note


app = typer.Typer()
service.register(app)
app.callback()(lambda: None)


def command(*words: str) -> Result:
    return CliRunner().invoke(app, ["service", *words], catch_exceptions=True)


def test_the_command_installs_shows_and_uninstalls(stand: Stand, tmp_path: Path) -> None:
    stand.says("systemctl", "echo ActiveState=inactive; echo called >> $0.log")
    program = tmp_path / "nightpressd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = command("install", "--user", "--program", str(program))
    assert done.exit_code == 0, done.output
    assert str(units.where(Kind.USER)) in done.output
    for step in ("daemon-reload", "enable --now", "enable-linger", "journalctl --user"):
        assert step in done.output
    assert units.where(Kind.USER).read_bytes() == units.render(Kind.USER, program)
    assert "Already installed" in command("install", "--user", "--program", str(program)).output
    assert not (stand.folder / "systemctl.log").exists()  # installing calls no service manager

    shown = json.loads(command("status", "--user", "--json").output)
    assert (shown["installed"], shown["seal"], shown["active"]) == (True, "unchanged", "inactive")
    assert "installed  yes\n" in command("status", "--user").output

    assert "Would remove" in command("uninstall", "--user", "--dry-run").output
    assert units.where(Kind.USER).exists()
    assert "disable --now" in command("uninstall", "--user").output
    assert not units.where(Kind.USER).exists()
    assert command("uninstall", "--user").output.startswith("Not installed")


def test_a_dry_run_prints_the_file_and_writes_nothing(stand: Stand) -> None:
    done = command("install", "--system", "--dry-run", "--program", "/opt/a b/nightpressd")
    assert done.exit_code == 0
    assert done.stdout_bytes == units.render(Kind.SYSTEM, Path("/opt/a b/nightpressd"))
    command("install", "--user", "--dry-run", "--program", "/opt/a b/nightpressd")
    assert not units.where(Kind.USER).exists()


def test_a_program_that_is_not_there_is_refused(stand: Stand, tmp_path: Path) -> None:
    stand.says("systemctl", "")
    done = command("install", "--user", "--program", str(tmp_path / "none"))
    assert done.exit_code == 2
    assert not units.where(Kind.USER).exists()


def test_a_machine_without_the_manager_is_told_so(stand: Stand) -> None:
    done = command("install", "--user", "--program", "/bin/sh")
    assert isinstance(done.exception, ServiceUnsupported)
    assert not units.where(Kind.USER).exists()


def test_the_account_is_asked_for_only_where_it_is_missing() -> None:
    asked = service.after_install(Kind.SYSTEM, Outcome.INSTALLED, account_exists=False)
    assert asked[0].startswith("useradd --system")
    assert not any("useradd" in step for step in
                   service.after_install(Kind.SYSTEM, Outcome.INSTALLED, account_exists=True))
    assert any("restart" in step for step in
               service.after_install(Kind.USER, Outcome.REPLACED, account_exists=True))
    agent = service.after_install(Kind.LAUNCHD, Outcome.REPLACED, account_exists=True)
    assert [step.split()[1] for step in agent[:2]] == ["bootout", "bootstrap"]
