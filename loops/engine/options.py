"""How the engine runs; known without loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass


def physical_cores() -> int:
    """Return the number of processors this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs. All of it enters the fingerprint: it moves the last digits.

    Attributes:
        threads: for computing.
        extra_buffers: repack weights for this CPU; off where the probe saw it crash.
        gpu_layers: layers to offload; 0 keeps all on the CPU, -1 offloads all.
        ubatch: tokens computed at once.
    """

    threads: int = 0
    extra_buffers: bool = True
    gpu_layers: int = 0
    ubatch: int = 512

    @property
    def thread_count(self) -> int:
        """The threads to use: as set, or one per processor."""
        return self.threads or physical_cores()
