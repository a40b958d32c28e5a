"""Sensors tell others' work from ours, say when they do not know, and never hold each other up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from traces import SetClock

from daemon.clock import Moment, SystemClock
from daemon.sensors import (
    BatterySensor,
    CpuSensor,
    HoursSensor,
    HoursWrong,
    LoadSensor,
    MemorySensor,
    Sensor,
    Sensors,
    TemperatureSensor,
    all_sensors,
    own_cpu_s,
    own_tree,
    parse_hours,
)
from daemon.watchdog import SENSORS, Limits, Reading, Watchdog

#: works for at most a minute, should the test that started it not live to end it
BURN = "import time\nwhile time.process_time() < 60: pass"
Poll = Callable[..., Any]


@pytest.fixture
def burner() -> Iterator[subprocess.Popen[bytes]]:
    """A child of the test that uses all it gets of one processor."""
    with subprocess.Popen([sys.executable, "-c", BURN]) as process:
        yield process
        process.kill()


@pytest.fixture
def orphan(poll: Poll) -> Iterator[int]:
    """The same, left by its parent, so that it is nobody's child here; its process id."""
    code = ("import subprocess, sys\n"  # its output goes nowhere, or whoever reads ours would wait for its end
            f"print(subprocess.Popen([sys.executable, '-c', {BURN!r}], stdout=subprocess.DEVNULL).pid)")
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def used_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# --- processors ---


def cpu_sensor() -> CpuSensor:
    return CpuSensor(Limits(cpu_percent=15.0), set)


def cpu_trace(*counters: tuple[float, float, float], cpus: int = 4) -> list[Reading]:
    """Readings over (passed s, all used s, ours used s)."""
    sensor, clock = cpu_sensor(), SetClock()
    return [sensor.judge(clock.pass_s(passed_s), all_s, own_s, cpus) for passed_s, all_s, own_s in counters]


def test_others_share_of_the_machine_is_all_work_less_ours() -> None:
    first, second = cpu_trace((1, 100.0, 50.0), (2, 104.0, 52.0))  # 4 of 8 s worked, 2 by us
    assert first.problem == "no second reading yet"
    assert (second.value, second.limit, second.unit, second.detail) == (25.0, 15.0, "%", "we use 25 %")


def test_the_share_is_an_average_over_two_seconds() -> None:
    counters = [(0.5, 0.0, 0.0)] * 8 + [(0.5, 2.0, 0.0)] + [(0.5, 2.0, 0.0)] * 5  # half a second of full load
    values = [reading.value for reading in cpu_trace(*counters)[1:]]
    assert values == [0.0] * 7 + [25.0] * 4 + [0.0] * 2


def test_two_readings_at_once_are_not_a_measurement() -> None:
    assert cpu_trace((1, 0.0, 0.0), (0.1, 0.1, 0.0))[1].problem == "no second reading yet"


def test_a_pause_is_not_averaged_over() -> None:
    assert cpu_trace((1, 0.0, 0.0), (60, 0.0, 0.0))[1].problem == "no second reading yet"


@pytest.mark.parametrize("counters", [(99.0, 50.0), (101.0, 60.0)])  # all fall; ours grow by more than all
def test_counters_that_run_backwards_are_unknown_and_begin_anew(counters: tuple[float, float]) -> None:
    readings = cpu_trace((1, 100.0, 50.0), (2, *counters), (2, 104.0, 60.0), (2, 104.0, 60.0))
    assert readings[1].problem == "the counters of processor time run backwards"
    assert readings[2].problem == "no second reading yet"
    assert readings[3].value == 0.0


def test_counters_read_a_little_apart_do_not_matter() -> None:
    assert cpu_trace((1, 100.0, 50.0), (2, 102.0, 52.3))[1].value == 0.0


def test_what_leaves_our_tree_is_theirs() -> None:
    assert cpu_trace((1, 100.0, 50.0), (2, 102.0, 40.0))[1].value == 25.0


def test_work_of_a_child_is_ours(burner: subprocess.Popen[bytes], poll: Poll) -> None:
    clock, without = SystemClock(), CpuSensor(Limits(), set)
    sensor = CpuSensor(Limits(), own_tree)

    def difference() -> float:
        moment, before_s = clock.now(), used_s(burner.pid)
        everybody, others = without.read(moment)[0].value, sensor.read(moment)[0].value
        if everybody is None or others is None or moment.monotonic_s - start_s < 1:
            return 0.0
        ours = 100 * (before_s - start_used_s) / (moment.monotonic_s - start_s) / (psutil.cpu_count() or 1)
        return everybody - others if everybody - others > 0.5 * ours else 0.0

    start_s, start_used_s = clock.now().monotonic_s, used_s(burner.pid)
    assert poll(difference, 30, "the work of the child is subtracted") > 1


def test_our_processor_time_holds_that_of_children_and_not_of_orphans(
        burner: subprocess.Popen[bytes], orphan: int, poll: Poll) -> None:
    assert {os.getpid(), burner.pid} <= own_tree()
    assert orphan not in own_tree()
    before = own_cpu_s(own_tree), used_s(burner.pid), used_s(orphan)
    poll(lambda: used_s(burner.pid) > before[1] + 0.4 and used_s(orphan) > before[2] + 0.4, 60, "some work")
    burnt_s, orphan_s = used_s(burner.pid) - before[1], used_s(orphan)
    ours_s = own_cpu_s(own_tree)
    assert ours_s - before[0] >= burnt_s - 0.05
    assert own_cpu_s(lambda: {*own_tree(), orphan}) - ours_s >= orphan_s - 0.05


def test_the_sum_does_not_jump_when_a_child_is_reaped(poll: Poll) -> None:
    code = "import time\nwhile time.process_time() < 0.5: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        poll(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 60, "the end of the child")
        before_s = own_cpu_s(own_tree)
        child.wait()
        assert child.pid not in own_tree()
        assert abs(own_cpu_s(own_tree) - before_s) < 0.2


def test_a_process_that_is_gone_has_no_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert own_cpu_s(lambda: {child.pid}) == 0.0


def test_our_tree_is_the_one_that_psutil_sees(poll: Poll) -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE):
        below = poll(lambda: (found := psutil.Process().children(recursive=True))[1:] and found, 30, "a grandchild")
        assert own_tree() == {os.getpid(), *(child.pid for child in below)}


# --- load ---


def test_our_share_of_the_load_is_averaged_as_the_load_is() -> None:
    sensor, clock = LoadSensor(Limits(load_per_cpu=1.0), set), SetClock()
    values = [sensor.judge(clock.pass_s(5), load=4.0, own_s=2.0 * 5 * step, cpus=2).value for step in range(120)]
    assert values[0] == 2.0  # at first nothing is known of us
    assert values[12] == pytest.approx((4 - 2 * (1 - 1 / 2.71828)) / 2, rel=1e-4)  # a minute of two busy cores
    assert values[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_load_without_us_is_never_negative() -> None:
    sensor, clock = LoadSensor(Limits(), set), SetClock()
    sensor.judge(clock.pass_s(5), 0.0, 0.0, 2)
    assert sensor.judge(clock.pass_s(60), 0.0, 1e9, 2).value == 0.0  # our sum jumped
    assert sensor.judge(clock.pass_s(60), 3.0, 0.0, 2).value == pytest.approx((3 - 2 * 0.632 * 0.368) / 2, abs=1e-3)


def test_the_real_load_is_read() -> None:
    reading, = LoadSensor(Limits(load_per_cpu=1.5), own_tree).read(SystemClock().now())
    assert reading.value is not None
    assert (reading.limit, reading.unit) == (1.5, "per CPU")


# --- memory, battery, temperature ---


def test_available_memory_and_pressure_are_read(tmp_path: Path) -> None:
    pressure = tmp_path / "memory"
    pressure.write_text("some avg10=12.34 avg60=1.00 avg300=0.10 total=1\nfull avg10=5.00 avg60=0 avg300=0 total=0\n")
    free, waits = MemorySensor(Limits(), pressure).read(SetClock().now())
    assert (free.value or 0) > 1e6
    assert (free.part, free.above, free.limit) == ("free memory", False, 1e9)
    assert (waits.part, waits.value, waits.limit, waits.above) == ("memory pressure", 12.34, 10.0, True)


def test_pressure_is_absent_where_the_kernel_does_not_tell_it(tmp_path: Path) -> None:
    assert MemorySensor(Limits(), tmp_path / "none").read(SetClock().now())[1].absent is not None
    (tmp_path / "nonsense").write_text("avg10=0.00")
    assert MemorySensor(Limits(), tmp_path / "nonsense").read(SetClock().now())[1].problem is not None


Battery = namedtuple("Battery", "percent secsleft power_plugged")  # noqa: PYI024 - as psutil's


@pytest.mark.parametrize(("battery", "value", "words"), [
    (Battery(80.4, 100, True), 0.0, "on mains (80 %)"), (Battery(80.4, 100, False), 1.0, "on battery (80 %)")])
def test_a_battery_is_busy_when_it_feeds_the_machine(
        monkeypatch: pytest.MonkeyPatch, battery: Battery, value: float, words: str) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    reading, = BatterySensor(Limits()).read(SetClock().now())
    assert (reading.value, reading.limit, reading.unit, reading.detail) == (value, 0.5, "", words)
    assert BatterySensor(Limits(on_battery=True)).read(SetClock().now())[0].absent == "work on battery is allowed"


def test_no_battery_is_absent_and_an_unclear_one_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert BatterySensor(Limits()).read(SetClock().now())[0].absent is not None
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(50, 1, None))
    assert BatterySensor(Limits()).read(SetClock().now())[0].problem is not None
    monkeypatch.delattr(psutil, "sensors_battery")
    assert BatterySensor(Limits()).read(SetClock().now())[0].absent is not None


Chip = namedtuple("Chip", "label current high critical")  # noqa: PYI024 - as psutil's


def test_the_hottest_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = {"nvme": [Chip("", 99.0, None, None)],
             "coretemp": [Chip("Core 0", 71.0, 100, 100), Chip("Core 1", 84.5, 100, 100), Chip("x", 255.0, None, None)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips, raising=False)
    reading, = TemperatureSensor(Limits()).read(SetClock().now())
    assert (reading.value, reading.limit, reading.unit, reading.detail) == (84.5, 90.0, "°C", "coretemp")
    del chips["coretemp"]
    assert TemperatureSensor(Limits()).read(SetClock().now())[0].value == 99.0
    chips["nvme"] = [Chip("", -273.0, None, None)]
    assert TemperatureSensor(Limits()).read(SetClock().now())[0].absent is not None


# --- hours ---


def test_without_hours_the_sensor_is_absent_and_wrong_ones_are_unknown() -> None:
    moment = SetClock().now()
    assert HoursSensor(Limits()).read(moment)[0].absent == "work is allowed at any hour"
    sensors = Sensors([HoursSensor(Limits(hours="at night"))])
    assert "The hours 'at night' cannot be read" in (answer(sensors, moment)[0].problem or "")
    sensors.close()


def test_hours_can_be_tried_before_they_are_set() -> None:
    assert parse_hours("01:00-02:00") == ((60, 120),)
    with pytest.raises(HoursWrong):
        parse_hours("at night")


# --- asking them all ---


class Probe(Sensor):
    """A sensor that does as it is told, and counts."""

    name = "cpu"

    def __init__(self, act: Callable[[], list[float]] = lambda: [1.0], limits: Limits | None = None) -> None:
        super().__init__(limits or Limits())
        self.act, self.asked, self.closed = act, 0, 0

    def read(self, moment: Moment) -> list[Reading]:
        self.asked += 1
        return [Reading(self.name, moment.monotonic_s, value, self.limits.cpu_percent, "%") for value in self.act()]

    def close(self) -> None:
        self.closed += 1


class SlowProbe(Probe):
    name = "load"
    every_s = 5.0


def answer(sensors: Sensors, moment: Moment) -> tuple[Reading, ...]:
    """Ask until every sensor has answered once; a busy machine may be late."""
    end = SystemClock().now().monotonic_s + 30
    found = sensors.read_all(moment)
    while any(reading.problem == "it has not answered yet" for reading in found):
        assert SystemClock().now().monotonic_s < end
        found = sensors.read_all(moment)
    return found


def test_what_a_sensor_raises_becomes_an_unknown_reading() -> None:
    def fail() -> list[float]:
        raise OSError(5, "Input/output error")

    sensors = Sensors([Probe(fail), SlowProbe()], patience_s=10)
    wrong, right = sensors.read_all(SetClock().now())
    assert (wrong.sensor, wrong.problem) == ("cpu", "OSError: [Errno 5] Input/output error")
    assert right.value == 1.0
    sensors.close()


def test_a_sensor_that_says_nothing_is_unknown() -> None:
    sensors = Sensors([Probe(list)], patience_s=10)
    assert sensors.read_all(SetClock().now())[0].problem == "it gave no reading"
    sensors.close()


def test_a_dear_sensor_is_asked_less_often_and_its_reading_keeps_its_age() -> None:
    clock, cheap, dear = SetClock(), Probe(), SlowProbe()
    sensors = Sensors([cheap, dear], patience_s=10)
    ages = []
    for _ in range(11):
        moment = clock.pass_s(1)
        ages.append(moment.monotonic_s - sensors.read_all(moment)[1].at_s)
    assert (cheap.asked, dear.asked) == (11, 3)
    assert ages == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    sensors.close()


def test_a_sensor_that_hangs_becomes_stale_and_holds_up_nobody(poll: Poll) -> None:
    clock, gate = SetClock(), threading.Event()
    hanging, healthy = Probe(lambda: [float(gate.wait(60))]), SlowProbe()
    sensors, watchdog = Sensors([hanging, healthy], patience_s=0.05), Watchdog(Limits())
    threads = threading.active_count()
    gate.set()
    poll(lambda: sensors.read_all(clock.pass_s(1))[0].value == 1.0, 30, "the first reading")
    gate.clear()
    asked, hung_s = hanging.asked, clock.monotonic_s
    for _ in range(20):
        readings = sensors.read_all(moment := clock.pass_s(1))
        reason = watchdog.judge(readings, moment).reason
    assert reason.startswith("busy: cpu is unknown: its last reading is ")
    assert threading.active_count() == threads
    poll(lambda: moment.monotonic_s - sensors.read_all(moment)[1].at_s <= 6, 30, "the other sensor")
    gate.set()
    poll(lambda: sensors.read_all(clock.pass_s(1))[0].at_s > moment.monotonic_s, 30, "the sensor to come back")
    assert hanging.asked - asked <= clock.monotonic_s - hung_s - 15  # it was not asked while it hung
    moment = clock.now()
    assert watchdog.judge([reading for reading in sensors.read_all(moment) if reading.sensor == "cpu"],
                          moment).state == "settling"
    sensors.close()


def test_a_sensor_that_never_answered_is_unknown() -> None:
    gate = threading.Event()
    sensors = Sensors([Probe(lambda: [float(gate.wait(60))])], patience_s=0.01)
    assert sensors.read_all(SetClock().now())[0].problem == "it has not answered yet"
    gate.set()
    sensors.close()


def test_closing_ends_every_thread_and_sensor_but_not_one_that_hangs(poll: Poll) -> None:
    before, gate = threading.active_count(), threading.Event()
    hanging, probe = Probe(lambda: [float(gate.wait(60))]), SlowProbe()
    sensors = Sensors([hanging, probe], patience_s=0.01)
    sensors.read_all(SetClock().now())
    sensors.close(timeout_s=0.1)
    poll(lambda: probe.closed == 1, 30, "the sensor closed")
    assert hanging.closed == 0
    gate.set()
    poll(lambda: hanging.closed == 1 and threading.active_count() == before, 30, "the end of all threads")


def test_other_limits_reach_every_sensor_and_what_does_not_count_is_not_asked() -> None:
    clock, probe, slow = SetClock(), Probe(), SlowProbe()
    sensors = Sensors([probe, slow], patience_s=10)
    assert [reading.limit for reading in sensors.read_all(clock.pass_s(9))] == [15.0, 15.0]
    sensors.update(Limits(cpu_percent=50.0, sensors=("cpu",)))
    assert [reading.limit for reading in sensors.read_all(clock.pass_s(9))] == [50.0]
    assert slow.asked == 1
    sensors.close()


def test_the_gpu_is_not_used_when_nobody_watches_it() -> None:
    sensors = Sensors([Probe()])
    assert sensors.usable()[0] is False
    sensors.close()


def test_every_sensor_of_this_machine_answers() -> None:
    before = threading.active_count()
    sensors = all_sensors(Limits(), own_tree)
    readings = answer(sensors, SystemClock().now())
    assert {reading.sensor for reading in readings} == set(SENSORS)
    keys = [reading.key for reading in readings]
    assert len(keys) == len(set(keys))
    problems = {reading.sensor: reading.problem for reading in readings if reading.problem is not None}
    assert problems.pop("cpu") == "no second reading yet"
    assert problems == {}
    assert isinstance(sensors.usable()[1], str)
    sensors.close(timeout_s=30)
    assert threading.active_count() == before
