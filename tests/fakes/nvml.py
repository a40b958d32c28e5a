# ruff: noqa: N802, N815  the functions bear pynvml's names
"""The part of pynvml that the GPU sensor uses, over GPUs that a test sets; raises pynvml's own errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml


@dataclass
class FakeGpu:
    """One GPU.

    Attributes:
        percent: utilization of the whole GPU; None for not supported.
        work: percent by process since ever, as samples (pid, percent, time in µs); None for not supported.
        decoding: the work is decoding of films.
        silence: what is raised where no process worked.
        compute: bytes by process that computes; None for a process whose memory is not told.
        graphics: the same for processes that draw.
        used: bytes in use, the reserved ones left out.
        reserved: bytes of the driver.
        mig: whether it is cut into instances; None where it never can be.
        broken: what every query of it raises.
        lists_processes: whether the processes can be listed.
    """

    percent: int | None = 0
    work: list[tuple[int, int, int]] | None = field(default_factory=list)
    decoding: bool = False
    silence: int = pynvml.NVML_ERROR_NOT_FOUND
    compute: dict[int, int | None] = field(default_factory=dict)
    graphics: dict[int, int | None] = field(default_factory=dict)
    used: int = 0
    reserved: int = 400_000_000
    mig: bool | None = None
    broken: int | None = None
    lists_processes: bool = True


class FakeNvml:
    """A driver with GPUs. GPUs added after `nvmlInit` are seen only after the next, as with the real one."""

    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLError_NoPermission = pynvml.NVMLError_NoPermission
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVML_ERROR_NOT_FOUND = pynvml.NVML_ERROR_NOT_FOUND
    NVML_SUCCESS = pynvml.NVML_SUCCESS
    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = list(gpus)
        self.driver: int | None = None  #: what nvmlInit raises
        self.broken: int | None = None  #: what every query raises
        self.second_memory_version = True
        self.starts = self.stops = 0
        self._seen: list[FakeGpu] | None = None

    def nvmlInit(self) -> None:
        self.starts += 1
        if self.driver is not None:
            raise pynvml.NVMLError(self.driver)
        self._seen = list(self.gpus)

    def nvmlShutdown(self) -> None:
        self._all()
        self.stops += 1
        self._seen = None

    def _all(self) -> list[FakeGpu]:
        if self._seen is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if self.broken is not None:
            raise pynvml.NVMLError(self.broken)
        return self._seen

    def _gpu(self, handle: int) -> FakeGpu:
        gpu = self._all()[handle]
        if gpu.broken is not None:
            raise pynvml.NVMLError(gpu.broken)
        return gpu

    def nvmlDeviceGetCount(self) -> int:
        return len(self._all())

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self._all()):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        mig = self._gpu(handle).mig
        if mig is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(mig), int(mig)]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        percent = self._gpu(handle).percent
        if percent is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=percent, memory=0)

    def nvmlDeviceGetProcessUtilization(self, handle: int, since_us: int) -> list[SimpleNamespace]:
        gpu = self._gpu(handle)
        if gpu.work is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        samples = [SimpleNamespace(pid=pid, smUtil=0 if gpu.decoding else percent, memUtil=0, encUtil=0,
                                   decUtil=percent if gpu.decoding else 0, timeStamp=time_us)
                   for pid, percent, time_us in gpu.work if time_us > since_us]
        if not samples:
            raise pynvml.NVMLError(gpu.silence)
        return samples

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return self._list(handle, self._gpu(handle).compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return self._list(handle, self._gpu(handle).graphics)

    def _list(self, handle: int, processes: dict[int, int | None]) -> list[SimpleNamespace]:
        if not self._gpu(handle).lists_processes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes.items()]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        gpu = self._gpu(handle)
        if version is None:
            return SimpleNamespace(used=gpu.used + gpu.reserved)
        if not self.second_memory_version:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(used=gpu.used, reserved=gpu.reserved)
