"""What is known of the engine on this machine: the probe's answer, remembered per build and CPU."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

from daemon.errors import WorkerRefused
from daemon.grip import Grip
from daemon.settings import Settings
from daemon.supervisor import run_job
from loops.engine.options import EngineOptions
from state.clock import utc_now
from state.files import explained, write_atomic

FILE = "engine.json"


@dataclass(frozen=True)
class Probed:
    """Whether quantized models survive the engine's extra buffers here.

    Attributes:
        key: of the engine build and CPU that this is about.
        extra_buffers: they do.
        reason: a sentence.
        at: when it was found out.
    """

    key: str
    extra_buffers: bool
    reason: str
    at: str


def engine_key() -> str:
    """Return a name for this engine build on this CPU, without loading it."""
    parts = [platform.machine(), _cpu_flags()]
    try:
        parts.append(metadata.version("llama-cpp-python"))
    except metadata.PackageNotFoundError:
        parts.append("none")
    found = util.find_spec("llama_cpp")
    if found is not None and found.origin:
        for file in sorted((Path(found.origin).parent / "lib").glob("*")):
            facts = file.stat()
            parts.append(f"{file.name} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def remembered(state_dir: Path) -> Probed | None:
    """Return the probe's answer for this very build and CPU, None when there is none."""
    try:
        found = Probed(**json.loads((state_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.key == engine_key() else None


def engine_options(settings: Settings, grip: Grip | None = None, *, gpu: bool = True) -> EngineOptions:
    """Return how the engine runs here: as the settings say, with extra buffers where the probe found that they work.

    Args:
        settings: threads and layers to offload.
        grip: by which the probe is stopped or ended, where it is not known yet.
        gpu: offload layers at all.
    """
    return EngineOptions(threads=settings.threads, gpu_layers=settings.gpu_layers if gpu else 0,
                         extra_buffers=probe(settings.state_dir, grip).extra_buffers)


def probe(state_dir: Path, grip: Grip | None = None) -> Probed:
    """Return the remembered answer, or find out in a worker of its own and remember it."""
    known = remembered(state_dir)
    if known is not None:
        return known
    folder = Path(tempfile.mkdtemp(prefix="nightpress-probe-"))
    try:
        outcome = run_job({"job": "probe", "folder": str(folder)}, state_dir, grip)
    except WorkerRefused as problem:
        if problem.exit_code not in {30, 71}:  # anything but a wrong result or a dead worker says nothing
            raise
        found = Probed(engine_key(), extra_buffers=False, at=utc_now(), reason=(
            f"Extra buffers are off: {problem}"))
    else:
        found = Probed(engine_key(), extra_buffers=True, at=utc_now(), reason=outcome.reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with explained(state_dir):
        write_atomic(state_dir / FILE, json.dumps(asdict(found), indent=2).encode())
    return found
