"""llama.cpp in this process: loaded once, its log kept, its build named.

Only the worker imports llama.cpp. The binding is the low-level layer of llama-cpp-python,
because its high-level class hides the switches that decide between a result and a crash.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from state.faults import NightpressError

GGML_LOG_LEVEL_ERROR = 4


class EngineFailed(NightpressError):
    """The engine refused to do its work."""

    exit_code = 30


class EngineMissing(NightpressError):
    """The engine is not installed. Install it with: pip install llama-cpp-python."""

    exit_code = 31


@dataclass(frozen=True)
class EngineBuild:
    """Which llama.cpp this is: measurements of two builds are never mixed.

    Attributes:
        version: of llama-cpp-python, whose source archive holds the llama.cpp it was built from.
        library: first 16 hex digits of the sha256 over the shared libraries.
        features: what the library found in this CPU, such as AVX2 or REPACK.
        cpu: the processor's architecture and model.
    """

    version: str
    library: str
    features: str
    cpu: str

    @property
    def id(self) -> str:
        """Sixteen hex digits that change with any part of the build or the CPU."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


class NativeLog:
    """The library's log: the last lines for error messages, and captures of single calls."""

    def __init__(self, lines: int = 200) -> None:
        self._tail: deque[tuple[int, str]] = deque(maxlen=lines)
        self._captures: list[list[str]] = []

    def receive(self, level: int, text: bytes, _user_data: object) -> None:
        """Take one message from the library's log callback."""
        decoded = text.decode(errors="replace")
        self._tail.append((level, decoded))
        for capture in self._captures:
            capture.append(decoded)

    @contextmanager
    def capture(self) -> Iterator[list[str]]:
        """Collect every message of the calls made inside the `with` block."""
        collected: list[str] = []
        self._captures.append(collected)
        try:
            yield collected
        finally:
            self._captures.remove(collected)

    def reason(self, otherwise: str) -> str:
        """Return the last error the library reported, as one line without its function name."""
        for level, text in reversed(self._tail):
            line = " ".join(text.split()).strip("= ")
            if level == GGML_LOG_LEVEL_ERROR and line:
                return line.partition(": ")[2] or line
        return otherwise

    def forget(self) -> None:
        """Drop what was reported so far, so that `reason` speaks of the next call."""
        self._tail.clear()


log = NativeLog()


class _Holder:
    """Keeps the ctypes callback alive: the library holds only its address."""

    callback: ClassVar[Any] = None


@functools.cache
def library() -> Any:
    """Return the llama_cpp module, initialised once per process.

    Raises:
        EngineMissing: llama-cpp-python is not installed or its library does not load.
    """
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort must not start a debugger
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as problem:
        raise EngineMissing(f"The engine does not load: {problem}. "
                            "Install it with: pip install --force-reinstall llama-cpp-python") from problem
    _Holder.callback = llama_cpp.llama_log_callback(log.receive)
    llama_cpp.llama_log_set(_Holder.callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the processor field below says enough
    return platform.processor()


@functools.cache
def build() -> EngineBuild:
    """Identify the installed engine and this CPU."""
    lib = library()
    digest = hashlib.sha256()
    for file in sorted((Path(lib.__file__).parent / "lib").glob("*")):
        if file.is_file() and not file.is_symlink() and "mtmd" not in file.name:
            digest.update(file.read_bytes())
    return EngineBuild(
        version=lib.__version__, library=digest.hexdigest()[:16],
        features=lib.llama_print_system_info().decode(), cpu=f"{platform.machine()} {_cpu_model()}")


def supports_gpu() -> bool:
    """Tell whether this build can offload layers to a GPU."""
    return bool(library().llama_supports_gpu_offload())
