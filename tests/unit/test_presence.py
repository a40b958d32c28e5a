"""Whoever is at the machine is seen: in a desktop session, at a terminal, at the keyboard of a Mac."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, HeaderFields, MessageType, new_error, new_method_call, new_method_return, new_signal
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.wrappers import unwrap_msg
from traces import SetClock

from daemon.clock import SystemClock
from daemon.presence import (
    AWAY_S,
    HidSensor,
    LogindSensor,
    Session,
    TerminalSensor,
    hid_idle_s,
    last_used,
    presence_sensors,
)
from daemon.watchdog import Limits, Reading

Poll = Callable[..., Any]
LIMITS = Limits(presence_away_s=300.0)
DESKTOP = Session("2", "ada", "wayland", "user", ":0", active=True, closing=False, locked=False, idle=False,
                  idle_since_s=0.0)


# --- which session decides ---


@pytest.mark.parametrize(("session", "expected"), [
    (DESKTOP, (0.0, "session 2 of ada (wayland, :0) says it is in use")),
    (replace(DESKTOP, idle=True, idle_since_s=900.0), (100.0, "session 2 of ada (wayland, :0) says it is idle")),
    (replace(DESKTOP, idle=True, idle_since_s=1500.0), (0.0, "session 2 of ada (wayland, :0) says it is idle")),
    (replace(DESKTOP, locked=True), (AWAY_S, "session 2 of ada (wayland, :0) is locked")),
    (replace(DESKTOP, active=False), (AWAY_S, "session 2 of ada (wayland, :0) is not in front")),
    (replace(DESKTOP, kind="tty"), None),
    (replace(DESKTOP, kind_of_user="greeter"), None),
    (replace(DESKTOP, kind_of_user="user-early", place=""), (0.0, "session 2 of ada (wayland) says it is in use")),
    (replace(DESKTOP, closing=True), None)])
def test_a_session_tells_when_it_was_used(session: Session, expected: tuple[float, str] | None) -> None:
    assert last_used([session], now_s=1000.0) == expected


def test_the_session_used_last_decides() -> None:
    sessions = [replace(DESKTOP, locked=True), replace(DESKTOP, user="bob", idle=True, idle_since_s=990.0),
                replace(DESKTOP, user="eve", idle=True, idle_since_s=500.0)]
    assert last_used(sessions, 1000.0) == (10.0, "session 2 of bob (wayland, :0) says it is idle")
    assert last_used([], 1000.0) is None


# --- logind ---


class FakeLogind:
    """logind's answers on a bus of the test's own. Sessions are properties by object path."""

    def __init__(self, address: str) -> None:
        self.sessions: dict[str, dict[str, tuple[str, object]]] = {}
        self.gone: list[str] = []  #: listed, but ended when asked
        self.refused: list[str] = []
        self.silent = False
        self.lists = 0  #: how often the sessions were listed
        self.connection: DBusConnection = open_dbus_connection(address)
        self._ask_bus("RequestName", "su", ("org.freedesktop.login1", 0))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _ask_bus(self, method: str, signature: str, body: tuple[object, ...]) -> None:
        bus = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
        unwrap_msg(self.connection.send_and_get_reply(new_method_call(bus, method, signature, body), timeout=30))

    def _serve(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError):
                question = self.connection.receive(timeout=0.1)
                if question.header.message_type is MessageType.method_call and not self.silent:
                    self.connection.send(self._answer(question))

    def _answer(self, question: Any) -> Any:
        fields = question.header.fields
        path = fields[HeaderFields.path]
        if fields[HeaderFields.member] == "ListSessions":
            self.lists += 1
            rows = [(path[-1], 1000, "ada", "seat0", path) for path in (*self.sessions, *self.gone, *self.refused)]
            return new_method_return(question, "a(susso)", (rows,))
        assert question.body == ("org.freedesktop.login1.Session",)
        if path in self.gone:
            return new_error(question, "org.freedesktop.DBus.Error.UnknownObject")
        if path in self.refused:
            return new_error(question, "org.freedesktop.DBus.Error.AccessDenied")
        return new_method_return(question, "a{sv}", (self.sessions[path],))

    def add(self, **changed: tuple[str, object]) -> None:
        path = f"/org/freedesktop/login1/session/_3{len(self.sessions)}"
        self.sessions[path] = {
            "Id": ("s", "7"), "Name": ("s", "ada"), "Type": ("s", "x11"), "Class": ("s", "user"),
            "Display": ("s", ":1"), "TTY": ("s", "tty2"), "RemoteHost": ("s", ""), "Remote": ("b", False),
            "Active": ("b", True), "State": ("s", "active"), "LockedHint": ("b", False), "IdleHint": ("b", False),
            "IdleSinceHintMonotonic": ("t", 0), **changed}

    def change(self, **changed: tuple[str, object]) -> None:
        """Change the session added last, and tell so, as logind does."""
        path = list(self.sessions)[-1]
        self.sessions[path] |= changed
        at = DBusAddress(path, interface="org.freedesktop.DBus.Properties")
        self.connection.send(new_signal(at, "PropertiesChanged", "sa{sv}as",
                                        ("org.freedesktop.login1.Session", changed, [])))

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self.connection.close()


@contextlib.contextmanager
def a_bus() -> Iterator[str]:
    """A message bus of the test's own; its address."""
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.skip("dbus-daemon is not installed")
    folder = Path(os.environ["XDG_RUNTIME_DIR"])
    (folder / "bus").unlink(missing_ok=True)
    (folder / "bus.conf").write_text(f"""<busconfig><type>session</type><listen>unix:path={folder}/bus</listen>
        <policy context="default"><allow user="*"/><allow own="*"/><allow send_type="method_call"/>
        <allow send_type="signal"/><allow send_requested_reply="true"/><allow receive_sender="*"/>
        </policy></busconfig>""")
    with subprocess.Popen([program, f"--config-file={folder}/bus.conf", "--nofork", "--print-address"],
                          stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip().partition(",guid=")[0]
        finally:
            process.kill()


@pytest.fixture
def bus(isolated: Path) -> Iterator[str]:
    with a_bus() as address:
        yield address


@pytest.fixture
def logind(bus: str) -> Iterator[FakeLogind]:
    with contextlib.closing(FakeLogind(bus)) as service:
        yield service


@pytest.fixture
def sensor(bus: str) -> Iterator[LogindSensor]:
    with contextlib.closing(LogindSensor(LIMITS, bus)) as made:
        yield made


def test_sessions_are_read_from_the_bus(logind: FakeLogind, sensor: LogindSensor) -> None:
    moment = SystemClock().now()
    since_us = int((moment.monotonic_s - 40) * 1e6)
    logind.add(Class=("s", "greeter"))
    logind.add(IdleHint=("b", True), IdleSinceHintMonotonic=("t", since_us))
    logind.add(LockedHint=("b", True))
    logind.gone.append("/org/freedesktop/login1/session/_99")
    reading, = sensor.read(moment)
    assert reading.value == pytest.approx(40, abs=0.001)
    assert (reading.limit, reading.unit, reading.above, reading.part) == (300.0, "s", False, "desktop")
    assert reading.detail == "session 7 of ada (x11, :1) says it is idle"
    logind.add(Remote=("b", True), RemoteHost=("s", "10.0.0.9"), Name=("s", "bob"))
    assert sensor.read(moment)[0].value == reading.value  # logind told of no change
    later = replace(moment, monotonic_s=moment.monotonic_s + sensor.REFRESH_S)
    assert sensor.read(later)[0].detail == "session 7 of bob (x11, 10.0.0.9) says it is in use"


def test_a_change_is_seen_at_once_and_without_one_nothing_is_asked(
        logind: FakeLogind, sensor: LogindSensor, poll: Poll) -> None:
    moment = SystemClock().now()
    logind.add(LockedHint=("b", True))
    for _ in range(5):
        assert sensor.read(moment)[0].value == AWAY_S
    assert logind.lists == 1
    logind.change(LockedHint=("b", False))
    poll(lambda: sensor.read(moment)[0].value == 0.0, 30, "the change")
    assert (sensor.read(moment)[0].value, logind.lists) == (0.0, 2)


def test_without_a_desktop_the_terminals_are_left_to_decide(logind: FakeLogind, sensor: LogindSensor) -> None:
    logind.add(Type=("s", "tty"))
    assert sensor.read(SystemClock().now())[0].absent == "nobody is logged in to a desktop"


def test_without_a_bus_or_without_logind_the_sensor_is_absent(bus: str, tmp_path: Path) -> None:
    nobody, nothing = LogindSensor(LIMITS, bus), LogindSensor(LIMITS, f"unix:path={tmp_path}/none")
    moment = SetClock().now()
    for sensor, why in (nobody, "org.freedesktop.DBus.Error.NameHasNoOwner"), (nothing, "No such file or directory"):
        assert sensor.read(moment)[0].absent == f"there is no logind ({why})"
        sensor.close()


def test_a_session_that_may_not_be_seen_is_unknown(logind: FakeLogind, sensor: LogindSensor) -> None:
    logind.refused.append("/org/freedesktop/login1/session/_99")
    with pytest.raises(Exception, match="AccessDenied"):
        sensor.read(SystemClock().now())


def test_a_logind_that_falls_silent_is_unknown_until_it_answers_again(
        logind: FakeLogind, sensor: LogindSensor, monkeypatch: pytest.MonkeyPatch) -> None:
    logind.add()
    assert sensor.read(SetClock().now())[0].value == 0.0
    monkeypatch.setattr("daemon.presence.TIMEOUT_S", 0.2)
    logind.silent = True
    later = replace(SystemClock().now(), monotonic_s=1e9)
    with pytest.raises(TimeoutError):
        sensor.read(later)
    logind.silent = False
    monkeypatch.undo()
    assert sensor.read(later)[0].value == 0.0


def test_a_logind_that_answered_and_is_gone_is_unknown_and_not_absent(
        logind: FakeLogind, sensor: LogindSensor) -> None:
    logind.add()
    sensor.read(SystemClock().now())
    logind.close()
    for _ in range(2):
        with pytest.raises(Exception, match=r"NameHasNoOwner|NoReply"):
            sensor.read(replace(SystemClock().now(), monotonic_s=1e9))


def test_a_bus_that_starts_anew_is_joined_again(isolated: Path) -> None:
    moment, sensor = SystemClock().now(), None
    for _ in range(2):
        with a_bus() as address:
            logind = FakeLogind(address)
            logind.add()
            if sensor is None:
                sensor = LogindSensor(LIMITS, address)
            else:
                with pytest.raises(OSError, match=r"reset|Broken pipe"):
                    sensor.read(moment)
            assert sensor.read(moment)[0].value == 0.0
            logind.close()
    sensor.close()


# --- terminals ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like /dev, without terminals."""
    (tmp_path / "pts").mkdir()
    (tmp_path / "pts" / "ptmx").touch()
    (tmp_path / "ttyS0").touch()
    return tmp_path


class Typist:
    """Terminals that are files, and somebody who types at a time of the wall clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, SetClock()
        self.sensor = TerminalSensor(LIMITS, folder)

    def type_at(self, name: str, ago_s: float = 0.0) -> None:
        (self.folder / name).touch()
        time_s = self.clock.wall.timestamp() - ago_s
        os.utime(self.folder / name, (time_s, time_s))

    def read(self, after_s: float = 1.0) -> Reading:
        return self.sensor.read(self.clock.pass_s(after_s))[0]


def test_the_terminal_used_last_decides(folder: Path) -> None:
    typist = Typist(folder)
    typist.type_at("tty1", ago_s=5000)
    typist.type_at("pts/0", ago_s=700)
    typist.type_at("pts/1", ago_s=900)
    reading = typist.read(0)
    assert (reading.value, reading.limit, reading.unit, reading.above) == (700, 300.0, "s", False)
    assert (reading.part, Path(reading.detail)) == ("terminals", folder / "pts" / "0")
    typist.type_at("pts/1")
    assert (typist.read(2).value, Path(typist.read(3).detail)) == (0, folder / "pts" / "1")
    assert typist.read(5).value == 8


def test_after_the_first_look_the_wall_clock_does_not_matter(folder: Path) -> None:
    typist = Typist(folder)
    typist.type_at("pts/0", ago_s=100)
    assert typist.read(0).value == 100
    typist.clock.wall -= timedelta(hours=1)
    assert typist.read(10).value == 110
    typist.clock.wall += timedelta(hours=9)
    assert typist.read(10).value == 120


@pytest.mark.parametrize("ago_s", [-30.0, 1.7e9])
def test_an_absurd_time_counts_as_just_now(folder: Path, ago_s: float) -> None:
    typist = Typist(folder)
    typist.type_at("pts/0", ago_s=ago_s)
    assert typist.read(0).value == 0
    assert typist.read(5).value == 5


def test_a_terminal_that_opens_was_opened_by_somebody(folder: Path) -> None:
    typist = Typist(folder)
    typist.type_at("pts/0", ago_s=1000)
    typist.read()
    typist.type_at("pts/5", ago_s=800)
    assert typist.read().value == 0
    (folder / "pts" / "5").unlink()
    assert typist.read(9).value == 9
    typist.type_at("tty7", ago_s=800)
    assert typist.read(9).value == 0


def test_without_terminals_the_sensor_is_absent(folder: Path, tmp_path: Path) -> None:
    assert Typist(folder).read().absent == "there are no terminals"
    assert TerminalSensor(LIMITS, tmp_path / "none").read(SetClock().now())[0].absent == "there are no terminals"


def test_typing_at_a_real_terminal_is_seen() -> None:
    keyboard, terminal = pty.openpty()
    try:
        name = os.ttyname(terminal)
        if not name.startswith("/dev/pts/"):
            pytest.skip(f"terminals are not in /dev/pts here but at {name}")
        clock, sensor = SetClock(), TerminalSensor(LIMITS, Path("/dev"))
        old_s = time.time() - 5000  # far enough back for the kernel, which keeps the time in steps of 8 s
        os.utime(name, (old_s, old_s))
        sensor.read(clock.now())
        before = Path(name).stat().st_atime
        os.write(terminal, b"a program prints\n")
        os.read(keyboard, 100)
        assert Path(name).stat().st_atime == before  # what is printed is no input
        os.write(keyboard, b"somebody types\n")
        os.read(terminal, 100)
        assert Path(name).stat().st_atime != before
        reading, = sensor.read(clock.pass_s(30))
        assert reading.value == 0
    finally:
        os.close(keyboard)
        os.close(terminal)


# --- macOS ---

IOREG = """
+-o Root  <class IORegistryEntry, id 0x100000100, retain 30>
  | +-o IOHIDSystem  <class IOHIDSystem, id 0x1000003a5, registered, matched, active, busy 0 (0 ms), retain 21>
  |   | {
  |   |   "HIDParameters" = {"HIDClickTime"=500000000,"JitterNoClick"=1}
  |   |   "HIDIdleTime" = 41666958333
  |   |   "EvTicksPerSec" = 20
  |   | }
"""


def test_idle_time_is_found_in_what_ioreg_prints() -> None:
    assert hid_idle_s(IOREG) == pytest.approx(41.667, abs=0.001)
    assert hid_idle_s(IOREG + IOREG.replace("41666958333", "2000000000")) == 2.0
    assert hid_idle_s("+-o Root") is None


def test_ioreg_is_run_and_its_failure_is_unknown(tmp_path: Path) -> None:
    moment = SetClock().now()
    (tmp_path / "text").write_text(IOREG)
    reading, = HidSensor(LIMITS, ("cat", str(tmp_path / "text"))).read(moment)
    assert reading.value == pytest.approx(41.667, abs=0.001)
    assert (reading.limit, reading.unit, reading.above) == (300.0, "s", False)
    assert HidSensor(LIMITS, ("true",)).read(moment)[0].absent is not None
    with pytest.raises(subprocess.CalledProcessError):
        HidSensor(LIMITS, ("false",)).read(moment)


def test_an_ioreg_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.presence.TIMEOUT_S", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        HidSensor(LIMITS, ("tail", "-f", "/dev/null")).read(SetClock().now())


@pytest.mark.parametrize(("platform", "kinds"), [
    ("linux", [LogindSensor, TerminalSensor]), ("darwin", [HidSensor, TerminalSensor])])
def test_every_platform_has_its_sensors(monkeypatch: pytest.MonkeyPatch, platform: str, kinds: list[type]) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert [type(sensor) for sensor in presence_sensors(LIMITS)] == kinds
