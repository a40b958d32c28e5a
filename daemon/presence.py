"""Whether a person is at this machine: seconds since the last input, as far as the system tells.

Linux: login sessions by logind over D-Bus, and terminals by the times the kernel keeps for
them. macOS: the idle time of keyboard and mouse. Nobody's input itself is ever read.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from daemon.clock import Moment
from daemon.sensors import Sensor
from daemon.watchdog import Limits, Reading, absent

if TYPE_CHECKING:
    from jeepney.io.blocking import DBusConnection  # type: ignore[import-untyped]  # jeepney ships no types

#: what stands for the age of the last input where the person is away for certain, as behind a locked screen
AWAY_S = 86_400.0
#: logind answers in milliseconds; one that does not is unknown
TIMEOUT_S = 3.0
LOGIND = "org.freedesktop.login1"
#: errors on the bus that mean: nobody has that name here, and: that session has ended
NOT_THERE = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")
LOGGED_OUT = ("org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.login1.NoSuchSession")


def presence_sensors(limits: Limits) -> list[Sensor]:
    """Return the sensors of presence for this platform."""
    if sys.platform == "darwin":
        return [HidSensor(limits), TerminalSensor(limits)]
    return [LogindSensor(limits), TerminalSensor(limits)]


# --- login sessions ---


@dataclass(frozen=True)
class Session:
    """What logind knows of one session.

    Attributes:
        session_id: its name for logind.
        user: name of the user.
        kind: `x11`, `wayland`, `mir`, `tty`, `web` or `unspecified`.
        kind_of_user: `user` for a person; `greeter`, `background` and others for none.
        place: the display, terminal or remote host.
        active: in front; a session on another virtual terminal is not. Remote sessions are always active.
        closing: logged out.
        locked: its screen is locked.
        idle: the desktop says that nobody uses it.
        idle_since_s: since when, by the monotonic clock.
    """

    session_id: str
    user: str
    kind: str
    kind_of_user: str
    place: str
    active: bool
    closing: bool
    locked: bool
    idle: bool
    idle_since_s: float

    @property
    def name(self) -> str:
        """What a person calls the session."""
        where = f", {self.place}" if self.place else ""
        return f"session {self.session_id} of {self.user} ({self.kind}{where})"


def last_used(sessions: Iterable[Session], now_s: float) -> tuple[float, str] | None:
    """Return the seconds since the last input in the session used last, and its name; None without a desktop.

    Sessions in text mode are left to the terminals: logind calls them used for half an hour after
    the last key. A desktop that never tells logind it is idle counts as used until it is locked.
    """
    ages = []
    for session in sessions:
        if not session.kind_of_user.startswith("user") or session.closing or session.kind not in (
                "x11", "wayland", "mir"):
            continue
        if session.locked:
            ages.append((AWAY_S, f"{session.name} is locked"))
        elif not session.active:
            ages.append((AWAY_S, f"{session.name} is not in front"))
        elif session.idle:
            ages.append((max(0.0, now_s - session.idle_since_s), f"{session.name} says it is idle"))
        else:
            ages.append((0.0, f"{session.name} says it is in use"))
    return min(ages, default=None)


class LogindSensor(Sensor):
    """The last input in any graphical session of any user, as logind knows it.

    Absent where there is no system bus or no logind. Once it has answered, its silence is unknown.
    logind tells when a session changes; only then, and every `REFRESH_S`, is it asked.
    """

    name: ClassVar[str] = "presence"
    every_s: ClassVar[float] = 0.5
    REFRESH_S = 5.0

    def __init__(self, limits: Limits, bus: str = "SYSTEM") -> None:
        """Promise nothing before the first reading.

        Args:
            limits: what the readings are compared with.
            bus: `SYSTEM`, or the address of another D-Bus.
        """
        super().__init__(limits)
        self._bus = bus
        self._connection: DBusConnection | None = None
        self._signals: deque[Any] = deque(maxlen=1)
        self._sessions: list[Session] = []
        self._asked_s = -math.inf
        self._answered = False

    def read(self, moment: Moment) -> list[Reading]:
        """Return the seconds since the last input."""
        part = "desktop"
        try:
            if self._connection is None or self._has_changed() or (
                    moment.monotonic_s - self._asked_s >= self.REFRESH_S):
                self._sessions = self._ask_sessions()
                self._asked_s = moment.monotonic_s
        except BaseException as error:
            self.close()  # the bus may be gone, and another be there at the next reading
            if self._answered or not _is_missing(error):
                raise
            return [absent(self.name, moment, f"there is no logind ({_words(error)})", part)]
        self._answered = True
        used = last_used(self._sessions, moment.monotonic_s)
        if used is None:
            return [absent(self.name, moment, "nobody is logged in to a desktop", part)]
        return [Reading(self.name, moment.monotonic_s, used[0], self.limits.presence_away_s, "s", above=False,
                        detail=used[1], part=part)]

    def close(self) -> None:
        """Leave the bus."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> DBusConnection:
        """Join the bus and have it pass on what logind tells of its sessions."""
        from jeepney import MatchRule  # type: ignore[import-untyped]  # jeepney ships no types
        from jeepney.bus_messages import message_bus  # type: ignore[import-untyped]
        from jeepney.io.blocking import Proxy, open_dbus_connection

        connection = open_dbus_connection(self._bus)
        try:
            rule = MatchRule(type="signal", sender=LOGIND, path_namespace="/org/freedesktop/login1")
            connection.filter(MatchRule(type="signal"), queue=self._signals)
            Proxy(message_bus, connection, timeout=TIMEOUT_S).AddMatch(rule)
        except BaseException:
            connection.close()
            raise
        self._signals.clear()
        return connection

    def _has_changed(self) -> bool:
        """Tell whether logind has told of a change since the last question; does not wait."""
        assert self._connection is not None  # noqa: S101 - asked only then
        with contextlib.suppress(TimeoutError):
            while True:
                self._connection.recv_messages(timeout=0)
        return bool(self._signals)

    def _ask_sessions(self) -> list[Session]:
        if self._connection is None:
            self._connection = self._connect()
        self._signals.clear()  # what changes from here on is told anew
        found = []
        (listed,) = self._ask("/org/freedesktop/login1", "org.freedesktop.login1.Manager", "ListSessions")
        for *_, path in listed:
            try:
                (answer,) = self._ask(path, "org.freedesktop.DBus.Properties", "GetAll", "s",
                                      ("org.freedesktop.login1.Session",))
            except Exception as error:
                if getattr(error, "name", "") not in LOGGED_OUT:
                    raise
                continue
            found.append(as_session({name: value for name, (_type, value) in answer.items()}))
        return found

    def _ask(self, path: str, interface: str, method: str, signature: str | None = None,
             body: tuple[Any, ...] = ()) -> Any:
        from jeepney import DBusAddress, MessageFlag, new_method_call
        from jeepney.wrappers import unwrap_msg  # type: ignore[import-untyped]

        assert self._connection is not None  # noqa: S101 - opened just before
        address = DBusAddress(path, bus_name=LOGIND, interface=interface)
        question = new_method_call(address, method, signature, body)
        question.header.flags |= MessageFlag.no_auto_start  # who asks must not start what is not there
        return unwrap_msg(self._connection.send_and_get_reply(question, timeout=TIMEOUT_S))


def as_session(properties: dict[str, Any]) -> Session:
    """Return a session from its properties on the bus.

    Raises:
        KeyError: one is missing.
    """
    host = properties.get("RemoteHost", "") if properties["Remote"] else ""
    return Session(
        str(properties["Id"]), str(properties["Name"]), str(properties["Type"]), str(properties["Class"]),
        str(host or properties.get("Display") or properties.get("TTY") or ""), bool(properties["Active"]),
        properties.get("State") == "closing", bool(properties.get("LockedHint")), bool(properties["IdleHint"]),
        float(properties["IdleSinceHintMonotonic"]) / 1e6)


def _is_missing(error: BaseException) -> bool:
    """Tell whether there is no bus or no logind here, in contrast to one that does not answer."""
    return isinstance(error, FileNotFoundError | ConnectionRefusedError) or getattr(error, "name", "") in NOT_THERE


def _words(error: BaseException) -> str:
    return str(getattr(error, "name", "") or getattr(error, "strerror", "") or error)


# --- terminals ---


class TerminalSensor(Sensor):
    """The last input in any terminal: the kernel sets its access time when a program reads what was typed.

    The kernel does so in steps of eight seconds. Only the very first look compares with the
    wall clock; from then on it counts when a change was seen.
    """

    name: ClassVar[str] = "presence"
    every_s: ClassVar[float] = 1.0
    #: an age that no terminal has: its time is not set, or the wall clock is wrong
    ABSURD_S = 10 * 365 * 86_400.0

    def __init__(self, limits: Limits, folder: Path = Path("/dev")) -> None:
        super().__init__(limits)
        self._folder = folder
        self._consoles: tuple[int, list[str]] = (0, [])
        self._times: dict[str, float] | None = None
        self._last: tuple[float, str] | None = None

    def read(self, moment: Moment) -> list[Reading]:
        """Return the seconds since the last input."""
        times: dict[str, float] = {}
        for path in (*self._list_consoles(), *_list(f"{self._folder}/pts", re.compile("[0-9]+"))):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                times[path] = os.stat(path).st_atime  # noqa: PTH116 - a Path for each of dozens is what takes long
        self._note(times, moment)
        self._times = times
        part = "terminals"
        if not times or self._last is None:
            return [absent(self.name, moment, "there are no terminals", part)]
        seen_s, terminal = self._last
        return [Reading(self.name, moment.monotonic_s, max(0.0, moment.monotonic_s - seen_s),
                        self.limits.presence_away_s, "s", above=False, detail=terminal, part=part)]

    def _list_consoles(self) -> list[str]:
        """Return the terminals right in the folder; it holds hundreds of names, so only after it changed anew."""
        with contextlib.suppress(FileNotFoundError):
            changed_ns = self._folder.stat().st_mtime_ns
            if changed_ns != self._consoles[0]:
                # Linux names them tty1, macOS ttys000
                self._consoles = changed_ns, _list(str(self._folder), re.compile("ttys?[0-9]+"))
        return self._consoles[1]

    def _note(self, times: dict[str, float], moment: Moment) -> None:
        """Take note of the latest input; a terminal that is new was just opened by somebody."""
        for terminal, time_s in times.items():
            if self._times is None:
                age_s = moment.wall.timestamp() - time_s
                seen_s = moment.monotonic_s - (age_s if 0 <= age_s < self.ABSURD_S else 0.0)
            elif self._times.get(terminal) != time_s:
                seen_s = moment.monotonic_s
            else:
                continue
            if self._last is None or seen_s > self._last[0]:
                self._last = seen_s, terminal


def _list(folder: str, names: re.Pattern[str]) -> list[str]:
    """Return the paths in a folder whose names match; none where there is no such folder."""
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder) if names.fullmatch(name)]  # noqa: PTH208 - as above
    except FileNotFoundError:
        return []


# --- macOS ---


class HidSensor(Sensor):
    """The last input at keyboard, mouse or trackpad of a Mac."""

    name: ClassVar[str] = "presence"
    every_s: ClassVar[float] = 5.0  # a process each time

    def __init__(self, limits: Limits, command: tuple[str, ...] = (
            "/usr/sbin/ioreg", "-c", "IOHIDSystem", "-d", "4")) -> None:
        super().__init__(limits)
        self._command = command

    def read(self, moment: Moment) -> list[Reading]:
        """Return the seconds since the last input."""
        done = subprocess.run(self._command, stdin=subprocess.DEVNULL, capture_output=True,  # noqa: S603 - fixed
                              timeout=TIMEOUT_S, check=True)
        idle_s = hid_idle_s(done.stdout.decode("utf-8", "replace"))
        part = "keyboard and mouse"
        if idle_s is None:
            return [absent(self.name, moment, "this machine has no keyboard and no mouse", part)]
        return [Reading(self.name, moment.monotonic_s, idle_s, self.limits.presence_away_s, "s", above=False,
                        part=part)]


def hid_idle_s(text: str) -> float | None:
    """Return the seconds since the last input as `ioreg` tells them, in nanoseconds; None where it does not."""
    found = [int(number) for number in re.findall(r'"HIDIdleTime"\s*=\s*([0-9]+)', text)]
    return min(found) / 1e9 if found else None
