"""What the machine is doing beside our own work: processors, load, memory, battery, temperature, hours.

A sensor measures one thing and may raise or hang; `Sensors` asks all of them, turns what
raises into an unknown reading and never waits for what hangs. Our own work is subtracted.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from daemon.clock import Moment
from daemon.watchdog import HoursWrong as HoursWrong
from daemon.watchdog import Limits, Reading, absent, unknown
from daemon.watchdog import parse_hours as parse_hours

OwnPids = Callable[[], Iterable[int]]


class Sensor:
    """Measures one thing.

    Attributes:
        name: by which the limits count it or not.
        every_s: at most so often it is asked.
        limits: what its readings are to be compared with; may be exchanged at any time.
    """

    name: ClassVar[str]
    every_s: ClassVar[float] = 0.0

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def read(self, moment: Moment) -> list[Reading]:
        """Measure now; whatever it raises becomes an unknown reading."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it holds."""


# --- asking them all ---


@dataclass
class _Post:
    """One sensor on a thread of its own, its last answer, and what it was asked.

    Attributes:
        asked_s: when it was last asked, by the monotonic clock.
        waiting: it has not answered yet, so it is not asked again: a sensor that hangs costs one thread.
    """

    sensor: Sensor
    questions: queue.SimpleQueue[Moment | None]
    thread: threading.Thread
    readings: tuple[Reading, ...] = ()
    asked_s: float = -math.inf
    waiting: bool = False


class Sensors:
    """Asks every sensor that counts, each on a thread of its own. To be used from one thread.

    A sensor that hangs blocks nobody: its last reading is repeated with the moment it was
    taken, until the watchdog finds it stale.
    """

    def __init__(self, sensors: Iterable[Sensor], *, patience_s: float = 0.25) -> None:
        """Start the threads.

        Args:
            sensors: which are closed by `close`.
            patience_s: so long one `read_all` waits for answers at most.
        """
        self._patience_s = patience_s
        self._answers: queue.SimpleQueue[tuple[_Post, tuple[Reading, ...]]] = queue.SimpleQueue()
        self._posts = [self._start(sensor) for sensor in sensors]

    def _start(self, sensor: Sensor) -> _Post:
        questions: queue.SimpleQueue[Moment | None] = queue.SimpleQueue()
        thread = threading.Thread(target=lambda: self._serve(post), name=f"sensor-{sensor.name}", daemon=True)
        post = _Post(sensor, questions, thread)
        thread.start()
        return post

    def _serve(self, post: _Post) -> None:
        while (moment := post.questions.get()) is not None:
            self._answers.put((post, _measure(post.sensor, moment)))
        post.sensor.close()

    def update(self, limits: Limits) -> None:
        """Let every sensor measure against other limits from its next reading on."""
        for post in self._posts:
            post.sensor.limits = limits

    def read_all(self, moment: Moment) -> tuple[Reading, ...]:
        """Return the newest readings of every sensor that counts; takes at most `patience_s`."""
        counted = [post for post in self._posts if post.sensor.name in post.sensor.limits.sensors]
        asked = 0
        for post in counted:
            # nine tenths, so that a tick that comes a little early does not miss its turn
            if not post.waiting and moment.monotonic_s - post.asked_s >= 0.9 * post.sensor.every_s:
                post.waiting, post.asked_s = True, moment.monotonic_s
                post.questions.put(moment)
                asked += 1
        self._collect(moment, asked)
        return tuple(reading for post in counted for reading in post.readings or (
            unknown(post.sensor.name, moment, "it has not answered yet"),))

    def _collect(self, moment: Moment, asked: int) -> None:
        """Take answers until all that were asked at this moment have answered, or patience ends."""
        deadline = time.monotonic() + self._patience_s
        while True:
            wait_s = deadline - time.monotonic() if asked > 0 else 0.0
            try:
                post, readings = self._answers.get(timeout=wait_s) if wait_s > 0 else self._answers.get_nowait()
            except queue.Empty:
                return
            post.readings, post.waiting = readings, False
            asked -= post.asked_s == moment.monotonic_s  # else it answers an earlier question

    def usable(self) -> tuple[bool, str]:
        """Return whether work may use the GPU, and which GPU or why not."""
        for post in self._posts:
            if post.sensor.name == "gpu" and "gpu" in post.sensor.limits.sensors:
                found: tuple[bool, str] = getattr(post.sensor, "usable", (False, "CPU only: no GPU is watched."))
                return found
        return False, "CPU only: the sensor gpu does not count, so nobody would see who else needs the GPU."

    def close(self, timeout_s: float = 2.0) -> None:
        """End the threads and close their sensors; one that hangs is left behind after `timeout_s`."""
        for post in self._posts:
            post.questions.put(None)
        deadline = time.monotonic() + timeout_s
        for post in self._posts:
            post.thread.join(max(0.0, deadline - time.monotonic()))


def _measure(sensor: Sensor, moment: Moment) -> tuple[Reading, ...]:
    try:
        return tuple(sensor.read(moment)) or (unknown(sensor.name, moment, "it gave no reading"),)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in a sensor means unknown, and is shown
        return (unknown(sensor.name, moment, f"{type(error).__name__}: {error}"),)


def all_sensors(limits: Limits, own_pids: OwnPids) -> Sensors:
    """Return every sensor of this platform, started.

    Args:
        limits: what the readings are compared with.
        own_pids: gives the ids of the processes whose work is ours, see `own_tree`.
    """
    from daemon.gpu import GpuSensor
    from daemon.presence import presence_sensors

    return Sensors([
        CpuSensor(limits, own_pids), LoadSensor(limits, own_pids), GpuSensor(limits, own_pids),
        *presence_sensors(limits), BatterySensor(limits), MemorySensor(limits), TemperatureSensor(limits),
        HoursSensor(limits)])


# --- our own work ---


def own_tree() -> set[int]:
    """Return the ids of this process and all its descendants.

    A process that was forked twice and left by its parent is no descendant.
    """
    root = os.getpid()
    if not Path(f"/proc/{root}/task/{root}/children").exists():  # macOS, and some kernels
        return {root, *(child.pid for child in psutil.Process().children(recursive=True))}
    found, new = {root}, [root]
    try:  # cheaper than looking: the kernel refuses to wait where there is no child
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return found
    while new:
        new = [child for pid in new for child in _children(pid) if child not in found]
        found.update(new)
    return found


def _children(pid: int) -> list[int]:
    """Return the children of a process; ten times cheaper than asking every process for its parent."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # gone meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - a Path for each takes long
            with contextlib.suppress(OSError):
                children = os.open(f"/proc/{pid}/task/{thread}/children", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    found += map(int, os.read(children, 65536).split())
                finally:
                    os.close(children)
    return found


def own_cpu_s(own_pids: OwnPids) -> float:
    """Return the processor time that our own processes have used so far, in seconds.

    What a child used moves to its parent's `children` times when the parent reaps it. So the
    sum over all living and unreaped processes of both neither loses nor jumps at that moment.
    """
    total = 0.0
    for pid in own_pids():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


class CpuSensor(Sensor):
    """The share of the whole machine's processor time that others use.

    psutil's own `cpu_percent()` keeps a baseline per thread and answers 0.0 on a fresh one,
    so snapshots of the counters are kept here.
    """

    name = "cpu"
    every_s = 0.5
    #: an average over a shorter time is noise, over a longer one comes late, and over the last hides the present
    SHORTEST_S, WINDOW_S, LONGEST_S = 0.4, 2.0, 10.0
    #: Share of the machine by which our own counters, read a little later, may be ahead of the machine's.
    SLACK = 0.2

    def __init__(self, limits: Limits, own_pids: OwnPids) -> None:
        super().__init__(limits)
        self._own_pids = own_pids
        self._snapshots: deque[tuple[float, float, float]] = deque()

    def read(self, moment: Moment) -> list[Reading]:
        """Return the percentage over about the last two seconds."""
        return [self.judge(moment, _used_cpu_s(), own_cpu_s(self._own_pids), psutil.cpu_count() or 1)]

    def judge(self, moment: Moment, used_s: float, own_s: float, cpus: int) -> Reading:
        """Return the percentage from what all and what we used up to now, in seconds."""
        now_s = moment.monotonic_s
        past = self._snapshots
        while past and (now_s - past[0][0] > self.LONGEST_S or past[0][0] > now_s):
            past.popleft()
        while len(past) > 1 and now_s - past[0][0] > self.WINDOW_S and now_s - past[1][0] >= self.SHORTEST_S:
            past.popleft()
        past.append((now_s, used_s, own_s))
        then_s, used_then_s, own_then_s = past[0]
        if now_s - then_s < self.SHORTEST_S:
            return unknown(self.name, moment, "no second reading yet")
        machine_s = (now_s - then_s) * cpus
        # our sum falls where a process leaves our tree unreaped; then its time counts as that of others
        ours = max(0.0, own_s - own_then_s) / machine_s
        others = (used_s - used_then_s) / machine_s - ours
        if used_s < used_then_s or others < -self.SLACK:
            past.clear()
            return unknown(self.name, moment, "the counters of processor time run backwards")
        return Reading(self.name, now_s, 100 * max(0.0, others), self.limits.cpu_percent, "%",
                       detail=f"we use {100 * ours:.0f} %" if ours >= 0.005 else "")


def _used_cpu_s() -> float:
    """Return the seconds all processors together have worked; idle, waiting for a disk, and stolen are not work."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


class LoadSensor(Sensor):
    """The load average over a minute, less an average of our own processor time, per CPU."""

    name = "load"
    every_s = 5.0
    #: the kernel's load average over one minute decays by this time constant
    DECAY_S = 60.0

    def __init__(self, limits: Limits, own_pids: OwnPids) -> None:
        super().__init__(limits)
        self._own_pids = own_pids
        self._last: tuple[float, float] | None = None
        self._own_load = 0.0

    def read(self, moment: Moment) -> list[Reading]:
        """Return the load per CPU."""
        return [self.judge(moment, psutil.getloadavg()[0], own_cpu_s(self._own_pids), psutil.cpu_count() or 1)]

    def judge(self, moment: Moment, load: float, own_s: float, cpus: int) -> Reading:
        """Return the load per CPU from the machine's load and the seconds we used up to now."""
        now_s = moment.monotonic_s
        if self._last is not None and (passed_s := now_s - self._last[0]) > 0:
            rate = min(max(0.0, (own_s - self._last[1]) / passed_s), float(cpus))
            self._own_load += (rate - self._own_load) * (1 - math.exp(-passed_s / self.DECAY_S))
        self._last = now_s, own_s
        return Reading(self.name, now_s, max(0.0, load - self._own_load) / cpus, self.limits.load_per_cpu, "per CPU")


# --- the machine ---


class MemorySensor(Sensor):
    """How much memory is left, and how long processes wait for it (Linux pressure stall information)."""

    name = "memory"
    every_s = 2.0

    def __init__(self, limits: Limits, pressure: Path = Path("/proc/pressure/memory")) -> None:
        super().__init__(limits)
        self._pressure = pressure

    def read(self, moment: Moment) -> list[Reading]:
        """Return the available bytes and the percentage of time that some process waited."""
        return [Reading(self.name, moment.monotonic_s, float(psutil.virtual_memory().available),
                        float(self.limits.memory_free_bytes), "bytes", above=False, part="free memory"),
                self._read_pressure(moment)]

    def _read_pressure(self, moment: Moment) -> Reading:
        part = "memory pressure"
        try:
            text = self._pressure.read_text(encoding="ascii")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM):
                raise
            return absent(self.name, moment, f"this kernel does not tell it ({error.strerror})", part)
        found = re.search(r"^some avg10=([0-9.]+)", text, re.MULTILINE)
        if found is None:
            return unknown(self.name, moment, f"{self._pressure} does not say avg10")
        return Reading(self.name, moment.monotonic_s, float(found[1]), self.limits.memory_pressure_percent, "%",
                       part=part)


class BatterySensor(Sensor):
    """Whether the machine runs on battery."""

    name = "battery"
    every_s = 5.0

    def read(self, moment: Moment) -> list[Reading]:
        """Return 1 on battery, 0 on mains."""
        if self.limits.on_battery:
            return [absent(self.name, moment, "work on battery is allowed")]
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        if battery is None:
            return [absent(self.name, moment, "this machine has no battery")]
        if battery.power_plugged is None:
            return [unknown(self.name, moment, "it does not say whether the machine is plugged in")]
        value, where = (0.0, "on mains") if battery.power_plugged else (1.0, "on battery")
        return [Reading(self.name, moment.monotonic_s, value, 0.5, "", detail=f"{where} ({battery.percent:.0f} %)")]


class TemperatureSensor(Sensor):
    """The hottest processor; where no chip is known to be one, the hottest chip."""

    name = "temperature"
    every_s = 10.0
    PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "x86_pkg_temp")

    def read(self, moment: Moment) -> list[Reading]:
        """Return the temperature in °C."""
        chips = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        known = {chip: chips[chip] for chip in self.PROCESSORS if chip in chips} or chips
        # what is broken or not there says 0, -273 or 255
        found = [(entry.current, chip) for chip, entries in known.items() for entry in entries
                 if 0 < entry.current < 150]
        if not found:
            return [absent(self.name, moment, "this machine does not tell its temperature")]
        hottest, chip = max(found)
        return [Reading(self.name, moment.monotonic_s, hottest, self.limits.temperature_c, "°C", detail=chip)]


class HoursSensor(Sensor):
    """Whether work is allowed at this time of day.

    Only the wall time of the present moment is compared, so it is right on the days that
    have 23 or 25 hours too.
    """

    name = "hours"

    def read(self, moment: Moment) -> list[Reading]:
        """Return 1 outside the hours, 0 inside."""
        windows = parse_hours(self.limits.hours)
        if not windows:
            return [absent(self.name, moment, "work is allowed at any hour")]
        minute = 60 * moment.wall.hour + moment.wall.minute
        for start, end in windows:
            if start <= minute < end if start < end else minute >= start or minute < end:
                inside = f"inside {self.limits.hours}, until {end // 60:02}:{end % 60:02}"
                return [Reading(self.name, moment.monotonic_s, 0.0, 0.5, "", detail=inside)]
        return [Reading(self.name, moment.monotonic_s, 1.0, 0.5, "", detail=f"outside {self.limits.hours}")]
