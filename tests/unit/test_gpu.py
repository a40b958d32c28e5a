"""Others' work on a GPU is told from ours or counts as theirs; without a GPU there is a reason and a next try."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import nvml
import pynvml
import pytest
from nvml import FakeGpu, FakeNvml
from traces import SetClock

from daemon.gpu import REMEMBERED_S, RENEW_S, RETRY_S, GpuSensor, load_library
from daemon.watchdog import Limits, Reading

OURS, THEIRS, ALSO_THEIRS = 10, 20, 30
GIB = 2**30


class Bench:
    """A sensor on a fake driver, and a clock."""

    def __init__(self, *gpus: FakeGpu, own: Iterable[int] = (OURS,)) -> None:
        self.nvml, self.clock, self.own = FakeNvml(*gpus), SetClock(), set(own)
        self.sensor = GpuSensor(Limits(), lambda: self.own, lambda: self.nvml)

    def now_us(self) -> int:
        return int(self.clock.wall.timestamp() * 1e6)

    def read(self, after_s: float = 1.0) -> list[Reading]:
        return self.sensor.read(self.clock.pass_s(after_s))

    def values(self, after_s: float = 1.0) -> list[float | None]:
        readings = self.read(after_s)
        assert all(reading.problem is None and reading.absent is None for reading in readings), readings
        return [reading.value for reading in readings]


def test_our_own_work_is_not_theirs() -> None:
    bench = Bench(FakeGpu(percent=95, compute={OURS: 6 * GIB, THEIRS: GIB}))
    bench.nvml.gpus[0].work = [(OURS, 80, bench.now_us()), (THEIRS, 12, bench.now_us())]
    work, memory = bench.read()
    assert (work.part, work.value, work.limit, work.unit, work.detail) == ("gpu0", 12, 10, "%", "process 20")
    assert (memory.part, memory.value, memory.limit, memory.unit) == ("gpu0 memory", GIB, 1_500_000_000, "bytes")


def test_every_gpu_is_measured() -> None:
    gpus = [FakeGpu(percent=percent, graphics={THEIRS: percent}) for percent in (5, 50, 0)]
    readings = Bench(*gpus).read()
    assert [(reading.part, reading.value) for reading in readings] == [
        ("gpu0", 5), ("gpu0 memory", 5), ("gpu1", 50), ("gpu1 memory", 50), ("gpu2", 0), ("gpu2 memory", 0)]


def test_the_work_of_several_others_adds_up() -> None:
    bench = Bench(FakeGpu())
    now_us = bench.now_us()
    bench.nvml.gpus[0].work = [(THEIRS, 4, now_us), (THEIRS, 6, now_us + 1), (ALSO_THEIRS, 7, now_us)]
    assert bench.values()[0] == 12


def test_somebodys_film_is_work() -> None:
    bench = Bench(FakeGpu(decoding=True))
    bench.nvml.gpus[0].work = [(THEIRS, 25, bench.now_us())]
    assert bench.values()[0] == 25


@pytest.mark.parametrize("silence", [pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_SUCCESS])
def test_no_work_by_any_process_is_no_failure(silence: int) -> None:
    assert Bench(FakeGpu(silence=silence)).values() == [0, 0]


def test_work_by_process_that_may_not_be_read_is_told_by_who_could_have_worked() -> None:
    assert Bench(FakeGpu(percent=45, silence=pynvml.NVML_ERROR_NO_PERMISSION)).values()[0] == 45


def test_past_work_is_told_once() -> None:
    bench = Bench(FakeGpu(compute={OURS: 1}))
    bench.nvml.gpus[0].work = [(THEIRS, 50, bench.now_us())]
    assert bench.values()[0] == 50
    assert bench.values()[0] == 0


def test_a_wall_clock_set_back_hides_no_work() -> None:
    bench = Bench(FakeGpu(compute={OURS: 1}))
    bench.nvml.gpus[0].work = [(THEIRS, 50, bench.now_us())]
    assert bench.values()[0] == 50
    bench.clock.wall -= timedelta(hours=1)
    bench.nvml.gpus[0].work = [(THEIRS, 60, bench.now_us())]
    assert bench.values()[0] == 60


def test_a_worker_that_just_ended_is_still_ours() -> None:
    bench = Bench(FakeGpu(percent=90))
    bench.nvml.gpus[0].work = [(OURS, 90, bench.now_us())]
    bench.read()
    bench.own = set()
    bench.nvml.gpus[0].work = [(OURS, 90, bench.now_us())]
    assert bench.values()[0] == 0
    bench.nvml.gpus[0].work = [(OURS, 90, bench.now_us() + int(1e6 * (REMEMBERED_S + 9)))]
    assert bench.values(REMEMBERED_S + 0.1)[0] == 90


def test_work_of_hidden_processes_is_seen_while_we_hold_nothing() -> None:
    assert Bench(FakeGpu(percent=70, compute={})).values()[0] == 70


def test_nonsense_of_the_driver_is_not_believed() -> None:
    bench = Bench(FakeGpu(percent=33))
    bench.nvml.gpus[0].work = [(THEIRS, 4_000_000_000, bench.now_us())]
    assert bench.values()[0] == 33


@pytest.mark.parametrize(("compute", "expected"), [
    ({OURS: GIB}, 0), ({THEIRS: GIB}, 45), ({}, 45), ({OURS: GIB, THEIRS: GIB}, None)])
def test_without_work_by_process_it_is_told_by_who_could_have_worked(
        compute: dict[int, int | None], expected: float | None) -> None:
    bench = Bench(FakeGpu(percent=45, work=None, compute=compute))
    work, _memory = bench.read()
    assert work.value == expected
    assert (work.problem is not None) is (expected is None)
    assert bench.sensor.usable == (True, "gpu0")


# --- memory ---


@pytest.mark.parametrize(("compute", "graphics", "expected"), [
    ({THEIRS: 3 * GIB}, {THEIRS: 3 * GIB, ALSO_THEIRS: GIB}, 4 * GIB),  # one process in both lists counts once
    ({OURS: 3 * GIB}, {}, 0),
    ({THEIRS: None}, {}, 5 * GIB),  # all that is used
    ({OURS: 3 * GIB, THEIRS: None}, {}, 2 * GIB),  # all that is used, less ours
    ({OURS: None, THEIRS: GIB}, {}, GIB),
    ({OURS: None, THEIRS: None}, {}, None)])
def test_memory_of_others_is_counted_or_derived(
        compute: dict[int, int | None], graphics: dict[int, int | None], expected: int | None) -> None:
    _work, memory = Bench(FakeGpu(used=5 * GIB, compute=compute, graphics=graphics)).read()
    assert memory.value == expected
    assert (memory.problem is not None) is (expected is None)


def test_an_old_driver_counts_what_it_reserves() -> None:
    bench = Bench(FakeGpu(used=GIB, compute={THEIRS: None}))
    bench.nvml.second_memory_version = False
    assert bench.values()[1] == GIB + 400_000_000


# --- GPUs that cannot be watched ---


@pytest.mark.parametrize(("gpu", "why"), [
    (FakeGpu(mig=True), "gpu1: MIG is on, its load cannot be read"),
    (FakeGpu(percent=None, work=None), "gpu1: its load cannot be read (not supported)"),
    (FakeGpu(lists_processes=False), "gpu1: its processes cannot be listed")])
def test_a_gpu_that_cannot_be_watched_has_no_vote_and_is_not_used(gpu: FakeGpu, why: str) -> None:
    bench = Bench(FakeGpu(mig=False), gpu)
    readings = bench.read()
    assert [reading.absent for reading in readings] == [None, None, why]
    assert bench.sensor.usable == (False, f"CPU only: {why}.")


def test_a_gpu_is_used_again_when_mig_is_off() -> None:
    bench = Bench(FakeGpu(mig=True))
    bench.read()
    bench.nvml.gpus[0].mig = False
    assert bench.values() == [0, 0]
    assert bench.sensor.usable == (True, "gpu0")


# --- GPUs and drivers that come and go ---


def test_no_driver_is_absent_and_tried_once_a_minute_until_it_is_back() -> None:
    bench = Bench(FakeGpu())
    bench.nvml.driver = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    why = "there is no NVIDIA driver that answers (Driver Not Loaded)"
    assert [bench.read()[0].absent for _ in range(50)] == [why] * 50
    assert bench.nvml.starts == 1
    assert bench.sensor.usable == (False, f"CPU only: {why}.")
    bench.nvml.driver = None
    assert bench.values(RETRY_S - 49) == [0, 0]
    assert bench.sensor.usable == (True, "gpu0")


def test_an_absent_reading_is_as_fresh_as_any() -> None:
    bench = Bench()
    bench.read()
    assert bench.read(30)[0].at_s == bench.clock.monotonic_s


def test_without_any_gpu_the_sensor_is_absent_until_one_comes() -> None:
    bench = Bench()
    assert [reading.absent for reading in bench.read()] == ["there is no NVIDIA GPU"]
    bench.nvml.gpus.append(FakeGpu())
    assert bench.read()[0].absent is not None
    assert bench.values(RETRY_S) == [0, 0]


def test_without_the_package_the_sensor_is_absent() -> None:
    def missing() -> object:
        raise ImportError("No module named 'pynvml'")

    sensor = GpuSensor(Limits(), set, missing)
    assert sensor.read(SetClock().now())[0].absent == "the package nvidia-ml-py is not installed"
    sensor.close()


def test_a_driver_that_fails_is_unknown_once_and_then_absent() -> None:
    bench = Bench(FakeGpu())
    bench.read()
    bench.nvml.broken = bench.nvml.driver = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    first, = bench.read()
    assert first.problem == "the NVIDIA driver does not answer (Driver Not Loaded)"
    assert bench.sensor.usable == (False, f"CPU only: {first.problem}.")
    assert bench.read()[0].absent is not None
    starts = bench.nvml.starts
    assert bench.read(RETRY_S - 1)[0].absent is not None
    assert bench.nvml.starts == starts
    bench.nvml.broken = bench.nvml.driver = None
    assert bench.values(1) == [0, 0]


def test_a_driver_that_starts_but_never_answers_is_absent() -> None:
    bench = Bench(FakeGpu())
    bench.read()
    bench.nvml.broken = pynvml.NVML_ERROR_UNKNOWN
    kinds = [(reading.problem is None, reading.absent is None) for _ in range(20) for reading in bench.read()]
    assert kinds == [(False, True)] + [(True, False)] * 19


def test_one_failure_is_healed_by_starting_anew() -> None:
    bench = Bench(FakeGpu())
    bench.read()
    bench.nvml.broken = pynvml.NVML_ERROR_UNINITIALIZED
    assert bench.read()[0].problem is not None
    bench.nvml.broken = None
    assert bench.values() == [0, 0]


def test_one_lost_gpu_does_not_hide_the_others() -> None:
    bench = Bench(FakeGpu(percent=7), FakeGpu(percent=8))
    bench.read()
    bench.nvml.gpus[1].broken = pynvml.NVML_ERROR_GPU_IS_LOST
    assert [(reading.part, reading.value, reading.problem) for reading in bench.read()] == [
        ("gpu0", 7, None), ("gpu0 memory", 0, None), ("gpu1", None, "it does not answer (GPU is lost)")]
    assert not bench.sensor.usable[0]
    starts = bench.nvml.starts
    for _ in range(40):
        *good, lost = bench.read()
        assert [reading.value for reading in good] == [7, 0]
        assert lost.absent == "gpu1: it does not answer (GPU is lost)"
    assert bench.nvml.starts == starts + 1
    assert not bench.sensor.usable[0]
    bench.nvml.gpus[1].broken = None
    assert bench.read()[-1].absent is not None  # not its turn yet
    assert bench.values(RETRY_S) == [7, 0, 8, 0]
    assert bench.sensor.usable == (True, "gpu0, gpu1")


def test_a_gpu_that_is_pulled_is_forgotten() -> None:
    bench = Bench(FakeGpu(), FakeGpu())
    bench.read()
    bench.nvml.gpus[1].broken = pynvml.NVML_ERROR_GPU_IS_LOST
    bench.nvml.gpus.pop()
    assert bench.read()[-1].problem is not None
    assert bench.values() == [0, 0]
    assert bench.sensor.usable == (True, "gpu0")


def test_a_gpu_that_is_added_is_found() -> None:
    bench = Bench(FakeGpu())
    bench.read()
    bench.nvml.gpus.append(FakeGpu(percent=99))
    assert len(bench.values()) == 2
    assert bench.values(RENEW_S) == [0, 0, 99, 0]


def test_closing_gives_the_driver_back() -> None:
    bench = Bench(FakeGpu())
    bench.read()
    bench.sensor.close()
    bench.sensor.close()
    assert (bench.nvml.starts, bench.nvml.stops) == (1, 1)


def test_the_real_library_works_or_says_why_not() -> None:
    """On a machine without a driver: absent. With one: measured. Never a raise."""
    sensor = GpuSensor(Limits(), set, load_library)
    readings = sensor.read(SetClock().now())
    assert readings
    assert sensor.usable[0] is all(reading.absent is None and reading.problem is None for reading in readings)
    assert sensor.usable[0] or sensor.usable[1].startswith("CPU only: ")
    sensor.close()


def test_the_fake_has_only_what_the_real_library_has() -> None:
    missing = [name for name in dir(nvml.FakeNvml) if name.lower().startswith("nvml") and not hasattr(pynvml, name)]
    assert missing == []
