"""The worker: one job in on standard input, events out on standard output, gone with its parent.

Native code runs here and nowhere else. The first line of standard input is the job; the pipe stays
open as a leash, and when it closes the worker ends at once, whatever it is doing. The worker knows
no database: what it has done it tells, and what was done before it is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loops.events import Event, Failed, Finished, Note, to_line
from loops.leash import die_with_parent
from state.faults import NightpressError

Emit = Callable[[Event], None]
Job = dict[str, Any]


class JobRefused(NightpressError):
    """The worker was given a job that it does not know."""

    exit_code = 68


class Pipe:
    """Events out, lines in; a thread watches the leash."""

    def __init__(self) -> None:
        # Native code prints to descriptor 1 when it feels like it: events get a private copy.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="leash", daemon=True).start()

    def _watch(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        _end_group()

    def emit(self, event: Event) -> None:
        """Send one event; a parent that is gone ends the worker."""
        line = to_line(event)
        with self._lock:
            try:
                self._out.write(line + "\n")
            except BrokenPipeError:
                _end_group()

    def receive(self) -> Any:
        """Return the next line of standard input, decoded from JSON."""
        return json.loads(self._lines.get())


def _end_group() -> None:
    """End this process and every process it started, without waiting for native code to return."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _demote() -> None:
    """Ask for the lowest priority, and to go first when memory is short."""
    import psutil

    os.nice(19)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _press(job: Job, pipe: Pipe) -> None:
    from loops.pass1.loop import press
    from loops.pass1.plan import PressPlan
    from loops.pass1.prepared import prepare

    prepared = prepare(PressPlan.from_json(job["plan"]), pipe.emit, job.get("known_sha256"))
    pipe.emit(prepared.opened)
    go = pipe.receive()
    press(prepared, go["steps"], go["settled"], pipe.emit)


def _probe(job: Job, pipe: Pipe) -> None:
    from loops.engine.probe import probe_extra_buffers

    found = probe_extra_buffers(Path(job["folder"]))
    pipe.emit(Finished(None, "Extra buffers work on this CPU.", found))


def _smoke(job: Job, pipe: Pipe) -> None:
    from loops.engine.options import EngineOptions
    from loops.engine.smoke import smoke

    reply = smoke(Path(job["model"]), EngineOptions(**job["options"]), job["sha256"])
    pipe.emit(Finished(None, "The model loads and answers.", reply))


def _inspect(job: Job, pipe: Pipe) -> None:
    from loops.engine.gguf_check import check_model
    from loops.engine.inspection import describe

    pipe.emit(Finished(None, "", describe(check_model(Path(job["model"])))))


def _levels(job: Job, pipe: Pipe) -> None:
    from loops.engine.gguf_check import check_model
    from loops.engine.inspection import Survey, survey
    from loops.pass1.calibrate import blank

    model = check_model(Path(job["model"]))
    pipe.emit(Finished(None, "", survey(model, blank(model).imatrix, Survey.from_json(job["survey"]))))


def _count(job: Job, pipe: Pipe) -> None:
    from loops.engine.calibration import count_sources

    pipe.emit(Finished(None, "", count_sources(Path(job["model"]), Path(job["folder"]), job["sources"])))


def _lengths(job: Job, pipe: Pipe) -> None:
    from loops.engine.lengths import measure

    pipe.emit(Finished(None, "", measure(Path(job["model"]), job["texts"])))


def _write(job: Job, pipe: Pipe) -> None:
    from loops.engine.generate import Sampling
    from loops.engine.options import EngineOptions
    from loops.engine.writing import write_exchanges

    pipe.emit(Finished(None, "", write_exchanges(Path(job["model"]), EngineOptions(**job["options"]), job["prompts"],
                                                 Sampling(**job["sampling"]))))


def _imatrix(job: Job, pipe: Pipe) -> None:
    from loops.pass1.plan import SinglePlan
    from loops.pass1.single import make_matrix, show_matrix

    if "plan" in job:
        found = make_matrix(SinglePlan.from_json(job["plan"]), pipe.emit)
    else:
        found = show_matrix(Path(job["file"]))
    pipe.emit(Finished(None, "", found))


def _quantize(job: Job, pipe: Pipe) -> None:
    from loops.pass1.plan import SinglePlan
    from loops.pass1.single import make_files, make_sized

    plan = SinglePlan.from_json(job["plan"])
    sized = plan.target_bytes or plan.target_bits
    pipe.emit(Finished(None, "", {"files": [make_sized(plan, pipe.emit)] if sized else make_files(plan, pipe.emit)}))


def _engine(_job: Job, pipe: Pipe) -> None:
    from loops.engine import native

    pipe.emit(Finished(None, "", asdict(native.build()) | {"id": native.build().id, "gpu": native.supports_gpu()}))


def _finetune(job: Job, pipe: Pipe) -> None:
    from loops.finetune import jobs

    pipe.emit(Finished(None, "", jobs.JOBS[job["job"]](job, pipe.emit)))


def _answers(job: Job, pipe: Pipe) -> None:
    from loops.answers import jobs

    pipe.emit(Finished(None, "", jobs.JOBS[job["job"]](job, pipe.emit)))


def _train(job: Job, pipe: Pipe) -> None:
    from loops.finetune.trainer import train

    pipe.emit(Finished(None, "", train(job, pipe.emit, pipe.receive)))


JOBS: dict[str, Callable[[Job, Pipe], None]] = {
    "press": _press, "probe": _probe, "smoke": _smoke, "inspect": _inspect, "levels": _levels, "engine": _engine,
    "write": _write, "imatrix": _imatrix, "quantize": _quantize, "count": _count, "lengths": _lengths, "train": _train,
    **dict.fromkeys(("stage", "convert", "read", "agree", "verify", "merge"), _finetune),
    **dict.fromkeys(("answer", "time", "similar"), _answers)}


def main() -> int:
    """Carry out the job on standard input; return the exit status."""
    if (ask := die_with_parent()) is not None:
        ask()  # first of all: from here on a worker that is stopped does not outlive its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pipe = Pipe()
    try:
        job = pipe.receive()
        if job.get("job") not in JOBS:
            raise JobRefused(f"The worker knows no job {job.get('job')!r}.")
        if job.get("demote", True):
            _demote()
        JOBS[job["job"]](job, pipe)
    except NightpressError as problem:
        pipe.emit(Failed(type(problem).__name__, problem.exit_code, str(problem)))
        return problem.exit_code
    except MemoryError:
        pipe.emit(Failed("OutOfMemory", 35, "This machine has not enough memory for this model. Close other programs, "
                                            "or measure less at once with fewer scenarios."))
        return 35
    except Exception as problem:  # noqa: BLE001 - the parent must hear of a bug, with its place
        import traceback

        pipe.emit(Note(traceback.format_exc()))
        pipe.emit(Failed(type(problem).__name__, 70, f"A bug in the worker: {type(problem).__name__}: {problem}"))
        return 70
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # native destructors have nothing left to do, and some of them crash
