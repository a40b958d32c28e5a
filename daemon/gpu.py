"""What others use of the NVIDIA GPUs: their share of the processors, and their memory.

Our own work is subtracted. Where others' work cannot be told from ours, the reading is
unknown; where a GPU cannot be watched at all, it has no vote and must not be used.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

from daemon.clock import Moment
from daemon.sensors import OwnPids, Sensor
from daemon.watchdog import Limits, Reading, absent

#: a driver or GPU that does not answer is asked again after this time
RETRY_S = 60.0
#: so long after its end a process of ours still counts as ours: NVML tells of work that is just past
REMEMBERED_S = 5.0
#: NVML knows only the GPUs that were there when it was started, so it is started anew so often
RENEW_S = 600.0


def load_library() -> Any:
    """Return the NVML bindings.

    Raises:
        ImportError: the package nvidia-ml-py is not installed.
    """
    return importlib.import_module("pynvml")


class _Unwatchable(Exception):
    """The load of this GPU cannot be read, whatever we do; it has no vote."""


class GpuSensor(Sensor):
    """Every GPU's work and memory that are not ours; comes back by itself when the driver does.

    A query that fails where others succeeded before is unknown, once. Then NVML is started
    anew; what still fails is absent, and is tried again every `RETRY_S`.

    Attributes:
        usable: whether work may use the GPU, and which, or why not.
    """

    name: ClassVar[str] = "gpu"
    every_s: ClassVar[float] = 1.0

    def __init__(self, limits: Limits, own_pids: OwnPids, library: Callable[[], Any] = load_library) -> None:
        super().__init__(limits)
        self.usable: tuple[bool, str] = (False, "CPU only: nobody looked for a GPU yet.")
        self._own_pids = own_pids
        self._library = library
        self._nvml: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        self._retry_s = self._renew_s = -math.inf
        self._why = ""
        self._good = False  # NVML answered since it was started
        self._lost: dict[int, str] = {}
        self._seen_us: dict[int, int] = {}
        self._own: dict[int, float] = {}

    def read(self, moment: Moment) -> list[Reading]:
        """Return two readings per GPU, in % and in bytes, or one where it cannot be watched or there is none."""
        now_s, running = moment.monotonic_s, self._nvml is not None
        if not running and now_s < self._retry_s:
            return [absent(self.name, moment, self._why)]
        retrying = bool(self._lost) and now_s >= self._retry_s
        if not running or retrying or now_s >= self._renew_s:
            why = self._restart(now_s)
            if why is not None:
                return self._fail(why, moment, once=running)
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._errors as error:
            return self._fail(f"the NVIDIA driver does not answer ({error})", moment, once=self._good)
        if count == 0:
            return self._fail("there is no NVIDIA GPU", moment, once=False)
        self._good = True
        self._lost = {index: why for index, why in self._lost.items() if index < count}
        own = self._own_lately(now_s)
        readings = [reading for index in range(count)
                    for reading in self._watch(index, own, moment, retrying=retrying)]
        self._judge_use(readings, count)
        return readings

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            with contextlib.suppress(*self._errors):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def _restart(self, now_s: float) -> str | None:
        """Start NVML anew; return why it does not start, None when it does."""
        self.close()
        try:
            nvml = self._library()
        except ImportError:
            return "the package nvidia-ml-py is not installed"
        self._errors = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)
        try:
            nvml.nvmlInit()
        except self._errors as error:
            return f"there is no NVIDIA driver that answers ({error})"
        self._nvml, self._good = nvml, False
        self._retry_s, self._renew_s = now_s + RETRY_S, now_s + RENEW_S
        return None

    def _fail(self, why: str, moment: Moment, *, once: bool) -> list[Reading]:
        """Take the failure of NVML as a whole: unknown and tried again at the next reading, or absent for a while."""
        self.close()
        self._lost.clear()
        self._retry_s, self._why = moment.monotonic_s + (0.0 if once else RETRY_S), why
        self.usable = False, f"CPU only: {why}."
        return [_unknown("", moment, why) if once else absent(self.name, moment, why)]

    def _own_lately(self, now_s: float) -> frozenset[int]:
        """Return the ids of our processes, those that ended a moment ago included."""
        self._own = {pid: seen_s for pid, seen_s in self._own.items() if now_s - seen_s <= REMEMBERED_S}
        self._own |= dict.fromkeys(self._own_pids(), now_s)
        return frozenset(self._own)

    def _watch(self, index: int, own: frozenset[int], moment: Moment, *, retrying: bool) -> list[Reading]:
        """Return the readings of one GPU, whatever happens to it; one that was lost only when it is its turn."""
        part = f"gpu{index}"
        if index in self._lost and not retrying:
            return [absent(self.name, moment, self._lost[index], part)]
        try:
            readings = self._measure(index, own, moment)
        except _Unwatchable as error:
            self._lost.pop(index, None)
            return [absent(self.name, moment, f"{part}: {error}", part)]
        except self._errors as error:
            why = f"{part}: it does not answer ({error})"
            if index in self._lost:
                return [absent(self.name, moment, why, part)]
            self._lost[index], self._retry_s = why, moment.monotonic_s
            return [_unknown(part, moment, f"it does not answer ({error})")]
        self._lost.pop(index, None)
        return readings

    def _judge_use(self, readings: list[Reading], count: int) -> None:
        """Decide whether work may use the GPUs: only when all can be watched, for work does not pick one."""
        for reading in readings:
            if reading.absent is not None:
                self.usable = False, f"CPU only: {reading.absent}."
                return
        for why in self._lost.values():
            self.usable = False, f"CPU only: {why}."
            return
        self.usable = True, ", ".join(f"gpu{index}" for index in range(count))

    # --- one GPU ---

    def _measure(self, index: int, own: frozenset[int], moment: Moment) -> list[Reading]:
        """Return the work and the memory of others on one GPU.

        Raises:
            _Unwatchable: it cannot tell them.
            NVMLError: it does not answer.
        """
        nvml, part, now_s = self._nvml, f"gpu{index}", moment.monotonic_s
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if self._mig_is_on(handle):
            raise _Unwatchable("MIG is on, its load cannot be read")
        held = self._held(handle)
        return [self._work(index, handle, own, set(held), moment),
                self._memory(handle, own, held, f"{part} memory", now_s)]

    def _mig_is_on(self, handle: Any) -> bool:
        try:
            current, _pending = self._nvml.nvmlDeviceGetMigMode(handle)
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
            return False
        return bool(current)

    def _held(self, handle: Any) -> dict[int, int | None]:
        """Return the bytes that every process with a context holds, None where the driver does not tell."""
        held: dict[int, int | None] = {}
        try:
            for process in (*self._nvml.nvmlDeviceGetComputeRunningProcesses(handle),
                            *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)):
                used, known = process.usedGpuMemory, held.get(process.pid, 0)
                # one that computes and draws is in both lists, with the same memory
                held[process.pid] = None if used is None or known is None else max(used, known)
        except self._nvml.NVMLError_NotSupported as error:
            raise _Unwatchable("its processes cannot be listed") from error
        return held

    def _work(self, index: int, handle: Any, own: frozenset[int], held: set[int], moment: Moment) -> Reading:
        """Return the share of others, by process where the driver tells it, else by who could have worked."""
        part, limit = f"gpu{index}", self.limits.gpu_percent
        by_process = self._by_process(index, handle, moment)
        whole = self._whole(handle)
        ours = bool(held & own)
        if by_process is not None:
            others = {pid: percent for pid, percent in by_process.items() if pid not in own}
            percent = sum(others.values())
            if whole is not None and not ours and len(others) == len(by_process):
                percent = max(percent, whole)  # the work of processes that are hidden from us, as in a container
            most = max(others, key=lambda pid: others[pid], default=None)
            detail = f"process {most}" if most is not None and others[most] else ""
            return Reading(self.name, moment.monotonic_s, percent, limit, "%", detail=detail, part=part)
        if whole is None:
            raise _Unwatchable("its load cannot be read (not supported)")
        if ours and held - own:
            return _unknown(part, moment, "we and others may work on it, and it does not tell who does how much")
        return Reading(self.name, moment.monotonic_s, 0.0 if ours else whole, limit, "%", part=part)

    def _by_process(self, index: int, handle: Any, moment: Moment) -> dict[int, float] | None:
        """Return the percentage of every process that worked since the last look, None where it is not told."""
        nvml, seen_us = self._nvml, self._seen_us.get(index, 0)
        if seen_us > moment.wall.timestamp() * 1e6:  # NVML's samples bear the wall clock, and that was set back
            seen_us = 0
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(handle, seen_us)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
            return None
        except nvml.NVMLError as error:
            if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_SUCCESS):
                raise
            samples = ()  # nobody worked; the bindings raise even "success"
        busy: dict[int, list[float]] = defaultdict(list)
        for sample in samples:
            # a movie that is decoded is somebody's too
            percent = max(sample.smUtil, sample.encUtil, sample.decUtil)
            if percent > 100:  # some drivers fill in nonsense
                return None
            busy[sample.pid].append(percent)
            seen_us = max(seen_us, sample.timeStamp)
        self._seen_us[index] = seen_us
        return {pid: sum(percents) / len(percents) for pid, percents in busy.items()}

    def _whole(self, handle: Any) -> float | None:
        """Return the percentage all processes together use, None where it is not told."""
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except self._nvml.NVMLError_NotSupported:
            return None

    def _memory(self, handle: Any, own: frozenset[int], held: dict[int, int | None], part: str,
                now_s: float) -> Reading:
        """Return the bytes that others hold; where the driver does not tell theirs, all that is used less ours."""
        others = [used for pid, used in held.items() if pid not in own]
        ours = [used for pid, used in held.items() if pid in own]
        limit = float(self.limits.gpu_memory_bytes)
        known = [used for used in others if used is not None]
        if len(known) == len(others):
            return Reading(self.name, now_s, float(sum(known)), limit, "bytes", part=part)
        known_ours = [used for used in ours if used is not None]
        if len(known_ours) < len(ours):
            return Reading(self.name, now_s, None, None, "bytes", part=part,
                           problem="it does not tell our memory from that of others")
        used = self._used(handle)
        return Reading(self.name, now_s, max(0.0, float(used - sum(known_ours))), limit, "bytes", part=part)

    def _used(self, handle: Any) -> int:
        """Return the bytes in use, without those that the driver keeps to itself where it tells them."""
        nvml = self._nvml
        try:  # `used` of the second version is without the reserved bytes, that of the first with them
            return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _unknown(part: str, moment: Moment, problem: str) -> Reading:
    return Reading(GpuSensor.name, moment.monotonic_s, None, None, "%", problem=problem, part=part)
