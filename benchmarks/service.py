"""The promises of the service, measured on the real `nightpressd` with the starter model. Linux only.

    idle     nothing queued, the machine's real sensors: processor time of the process and its children (10 ms
             ticks of the kernel) over `--minutes`, in percent of one core; memory, threads, open files.
    stop     from the moment the sensors' file says busy until every thread of the worker is stopped, looked
             at every millisecond. It then goes on, and the next trial follows at another phase of the tick.
    free     from busy until the worker is gone, and until MemAvailable has grown by nine tenths of what only
             the worker held; the service waits its default `yield_after_s` in between.
    status   GET /v1/status, each over a connection of its own, from before `connect` to the last byte,
             while the worker works on all processors at its low priority.
    cycles   busy and idle again and again, each 25th time until the worker is ended; open files, threads,
             memory and ledger.db-wal after a tenth, half and all of them must be flat. Half a second each.

All but `idle` run over the scripted sensors of the tests: how long the real sensors take to notice
somebody is not part of the figures. Other programs on the machine are: run it on a quiet one.

    python benchmarks/service.py                           # half an hour
    python benchmarks/service.py --only idle,stop --quick  # in short: does it work at all?
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import psutil
from timing import ProgramFailed, finish

from daemon.sensors import own_cpu_s
from daemon.settings import Settings
from loops.engine.options import EngineOptions, physical_cores
from loops.pass1.plan import PressPlan
from loops.starter import STARTER_GGUF
from state.faults import NightpressError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))
from scripted_service import BUSY, QUIET, Running, running

IDLE_PERCENT, IDLE_BYTES, STOP_S, FREE_S, STATUS_S = 0.5, 100e6, 1.0, 20.0, 0.2
#: What counts as flat. Threads and files come and go by one or two; memory is compared between half and all of
#: the cycles, because the kept lines of log and events fill up before; SQLite keeps a log of about 4 MB.
FLAT_COUNT, FLAT_BYTES, FLAT_WAL_BYTES = 2, 4e6, 8e6
ENDED_EVERY = 25  #: cycles, of which one lasts until the worker is ended
AT_WORK_BYTES = 30e6  #: what only the worker holds once it has loaded the model
SERVICE_MANAGER = ("STATE_DIRECTORY", "CONFIGURATION_DIRECTORY", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC",
                   "WATCHDOG_PID", "INVOCATION_ID", "JOURNAL_STREAM")
FOLDERS = ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "TMPDIR",
           "NIGHTPRESS_STATE_DIR", "NIGHTPRESS_DEPLOY_DIR", "NIGHTPRESS_CONFIG_DIR")

T = TypeVar("T")
#: what was measured, what was found, what is promised, and whether that is kept
Row = tuple[str, str, str, bool]
#: lines of the table, and every figure
Part = tuple[list[Row], dict[str, Any]]


def footprint(process: psutil.Process) -> dict[str, float]:
    """Return what a process uses: processor seconds with those of its ended children, bytes, and counts."""
    times, memory = process.cpu_times(), process.memory_full_info()
    return {"cpu_s": times.user + times.system + times.children_user + times.children_system, "rss": memory.rss,
            "uss": memory.uss, "threads": process.num_threads(), "files": process.num_fds(),
            "children": len(process.children())}


def own_bytes(process: psutil.Process) -> int:
    """Return resident bytes without the pages of files, 0 of a process that is gone."""
    with contextlib.suppress(psutil.Error):
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    return 0


def wait_for(predicate: Callable[[], T], deadline_s: float, what: str, every_s: float = 0.02) -> T:
    """Return the first true answer; raise ProgramFailed when none comes in time."""
    end = time.monotonic() + deadline_s
    while not (answer := predicate()):
        if time.monotonic() > end:
            raise ProgramFailed(f"{what} did not come within {deadline_s:g} s.")
        time.sleep(every_s)
    return answer


def spread(seconds: Sequence[float]) -> str:
    """Return the quantiles by nearest rank as text, in milliseconds."""
    ranked = sorted(seconds)
    shown = [f"p{place} {1000 * ranked[math.ceil(place * len(ranked) / 100) - 1]:.1f}" for place in (50, 90, 99)]
    return f"{', '.join(shown)}, max {1000 * ranked[-1]:.1f} ms"


@contextlib.contextmanager
def isolated() -> Iterator[Path]:
    """Point every path of this process and its children at a temporary folder; yield it."""
    with TemporaryDirectory(prefix="npb-") as name:  # short: the path of a socket has about 100 characters
        for variable in [*SERVICE_MANAGER, *(found for found in os.environ if found.startswith("NIGHTPRESS_"))]:
            os.environ.pop(variable, None)
        for variable in FOLDERS:
            os.environ[variable] = str(Path(name, variable.lower()))
            Path(os.environ[variable]).mkdir(mode=0o700)
        yield Path(name)


@contextlib.contextmanager
def answering(service: Running) -> Iterator[psutil.Process]:
    """Yield the process of a started service once it answers, else raise ProgramFailed; end it and all it started."""
    popen = service.process
    assert popen is not None  # noqa: S101 - it was started
    found: list[psutil.Process] = []
    try:
        wait_for(lambda: service.status() is not None or popen.poll() is not None, 60, "The service's answer")
        if popen.poll() is not None:
            raise ProgramFailed(f"The service ended with {popen.returncode}: {service.log().strip()[-300:]}")
        yield psutil.Process(popen.pid)
    finally:
        try:
            with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
                found = psutil.Process(popen.pid).children(recursive=True)
                service.end(15)
        finally:  # by force where it does not go by itself
            service.close()
            for one in found:
                with contextlib.suppress(psutil.Error):
                    one.kill()


class Load:
    """A service with work that does not run out; fresh work takes its time, and other ends soon."""

    def __init__(self, service: Running, process: psutil.Process, fresh: bool = True, **plan: Any) -> None:
        self.service, self.process, self._fresh = service, process, fresh
        self._plan = PressPlan(
            model=str(STARTER_GGUF), name="starter", blobs="", scratch="", levels=("Q8_0", "Q4_K_M"),
            options=EngineOptions(), **plan).as_json()

    def worker(self, holding_bytes: float = 0.0) -> psutil.Process:
        """Return a worker that works and holds so much memory; where no job waits, one is queued first."""
        with self.service.client() as client:
            if not client.status()["queued"]:
                client.ask("add", {"plan": self._plan, "fresh": self._fresh, "promoting": False})

        def found() -> list[psutil.Process]:
            return [one for one in self.service.workers()
                    if leader(one.pid) not in ("T", "") and own_bytes(one) >= holding_bytes]

        return wait_for(found, 60, "A worker at work")[0]

    def jobs(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        with self.service.client() as client:
            return dict(Counter(row["state"] for row in client.ask("queue", query={"every": True})))


@contextlib.contextmanager
def scripted(yield_after_s: float, **plan: Any) -> Iterator[Load]:
    """Yield the load of a service over scripted sensors, quiet at first; end the service afterwards."""
    with isolated() as base, running(
            base, NIGHTPRESS_IDLE_AFTER_S="0", NIGHTPRESS_YIELD_AFTER_S=f"{yield_after_s:g}") as service:
        service.start()
        with answering(service) as process:
            yield Load(service, process, **plan)


def leader(pid: int, of: str = "") -> str:
    """Return the state of a process, or its thread `of`, as the kernel names it, such as R or T; '' when it is gone."""
    try:
        return Path(f"/proc/{pid}{of}/stat").read_bytes().rpartition(b") ")[2][:1].decode().strip("ZX")
    except OSError:
        return ""


def stopped(pid: int) -> bool:
    """Tell whether every thread of a process is stopped."""
    return leader(pid) == "T" and all(leader(pid, f"/task/{one.name}") in ("T", "")
                                      for one in Path(f"/proc/{pid}/task").glob("*"))


def disturb(service: Running, pid: int) -> float | None:
    """Let the sensors say busy; return the seconds until the worker is stopped, None when it ended by itself."""
    started = time.perf_counter()
    service.feel(BUSY)
    wait_for(lambda: stopped(pid) or not leader(pid), 30, "The worker's stop", 0.001)
    return time.perf_counter() - started if leader(pid) else None


def idle(arguments: argparse.Namespace) -> Part:
    """What the service uses when there is nothing to do."""
    with isolated() as base, contextlib.closing(Running(base, {}, outputs=[base / "service.log"])) as service:
        with service.outputs[0].open("w") as log:
            service.process = subprocess.Popen(  # noqa: S603 - our own program
                [str(Path(sys.executable).with_name("nightpressd"))], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                text=True, cwd=base)
        with answering(service) as process:
            time.sleep(10)  # what it does once after its start is not part of waiting
            samples, started = [footprint(process)], time.monotonic()
            while (left := started + 60 * arguments.minutes - time.monotonic()) > 0:
                time.sleep(min(60.0, left))
                samples.append(footprint(process))
            wall_s, sensors = time.monotonic() - started, (service.status() or {}).get("sensors", [])
    percent = 100 * (samples[-1]["cpu_s"] - samples[0]["cpu_s"]) / wall_s
    votes = ", ".join(f"{count} {state}" for state, count in sorted(Counter(one["state"] for one in sensors).items()))
    memory = "; ".join(f"RSS {one['rss'] / 1e6:.1f} MB, USS {one['uss'] / 1e6:.1f} MB, {one['threads']} threads, "
                       f"{one['files']} files" for one in (samples[0], samples[-1]))
    return [
        (f"idle {wall_s / 60:.1f} min, sensors: {votes}", f"{percent:.3f} % of a core", f"under {IDLE_PERCENT} %",
         percent < IDLE_PERCENT),
        ("idle, at start and end", memory, f"under {IDLE_BYTES / 1e6:g} MB",
         max(one["rss"] for one in samples) < IDLE_BYTES)], {"percent_of_a_core": percent, "wall_s": wall_s,
                                                             "sensors": sensors, "by_minute": samples}


def stop(arguments: argparse.Namespace) -> Part:
    """How soon the worker is stopped."""
    phases, seconds = random.Random(0), list[float]()
    with scripted(3600) as load:
        load.worker(AT_WORK_BYTES)
        while len(seconds) < arguments.trials:
            pid = load.worker().pid
            time.sleep(phases.uniform(0.1, 0.6))
            took = disturb(load.service, pid)
            seconds += [took] if took is not None else []  # else its job was done just then
            load.service.feel(QUIET)
    return [(f"stop, {len(seconds)} trials", spread(seconds), f"at most {STOP_S:g} s", max(seconds) <= STOP_S)], {
        "seconds": seconds}


def free(arguments: argparse.Namespace) -> Part:
    """How soon the worker's memory is free again."""
    after_s = Settings.model_fields["yield_after_s"].default
    trials: list[tuple[float, float, int]] = []
    with scripted(after_s) as load:
        while len(trials) < arguments.free_trials:
            worker, free_bytes = load.worker(AT_WORK_BYTES), list[int]()
            time.sleep(3)
            started = time.perf_counter()
            if disturb(load.service, worker.pid) is not None:
                own = own_bytes(worker)
                while leader(worker.pid):
                    free_bytes.append(psutil.virtual_memory().available)
                    if time.perf_counter() - started > after_s + 60:
                        raise ProgramFailed(f"The worker was not ended within {after_s + 60:g} s.")
                    time.sleep(0.01)
                gone_s = time.perf_counter() - started
                # not the last moments: a process that is killed gives its memory back before it is gone
                enough = statistics.median(free_bytes[-200:-20]) + 0.9 * own
                wait_for(lambda enough=enough: psutil.virtual_memory().available >= enough,  # type: ignore[misc]
                         30, "The worker's memory (other programs take some, too)", 0.01)
                trials.append((gone_s, time.perf_counter() - started, own))
            load.service.feel(QUIET)
    gone, back, owned = zip(*trials, strict=True)
    found = f"gone {min(gone):.2f} to {max(gone):.2f} s, memory back {min(back):.2f} to {max(back):.2f} s"
    return [(f"free, {len(trials)} trials, {min(owned) / 1e6:.0f} MB, yield_after_s {after_s:g}", found,
             f"at most {FREE_S:g} s", max(back) <= FREE_S)], {"gone_s": gone, "back_s": back, "own_bytes": owned}


def ask_status(path: Path) -> float:
    """Ask for the status over a new connection; return the seconds until the answer was read."""
    started = time.perf_counter()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(30)
        asking.connect(str(path))
        asking.sendall(b"GET /v1/status HTTP/1.1\r\nHost: nightpress\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := asking.recv(65536):
            answer += part
    seconds = time.perf_counter() - started
    if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"}")):
        raise ProgramFailed(f"The status is answered by {answer[:60]!r}.")
    return seconds


def status(arguments: argparse.Namespace) -> Part:
    """How soon the status is answered while the worker works."""
    pauses, seconds = random.Random(0), list[float]()
    with scripted(3600) as load:
        def used_s() -> float:
            return own_cpu_s(lambda: [one.pid for one in [load.process, *load.process.children(recursive=True)]])

        load.worker(AT_WORK_BYTES)
        path, used, started = Settings.load().socket, used_s(), time.monotonic()
        while len(seconds) < arguments.requests:
            if len(seconds) % 100 == 0:
                load.worker()
            time.sleep(pauses.uniform(0, 0.02))
            seconds.append(ask_status(path))
        busy = (used_s() - used) / (time.monotonic() - started)
    what = f"status, {len(seconds)} requests, our work on {busy:.1f} of {physical_cores()} processors"
    return [(what, spread(seconds), f"at most {1000 * STATUS_S:g} ms", max(seconds) <= STATUS_S)], {
        "seconds": seconds, "processors_at_work": busy}


def cycles(arguments: argparse.Namespace) -> Part:
    """Whether anything grows over many changes between busy and idle."""
    total, pid, stops, ended = max(10, arguments.cycles), 0, list[float](), 0
    samples: dict[int, dict[str, float]] = {total // 10: {}, total // 2: {}, total: {}}
    # short jobs, so that some are done between two that are ended
    with scripted(1, fresh=False, text_windows=4, first_scenarios=4, max_scenarios=6) as load:
        wal, started = Settings.load().state_dir / "ledger.db-wal", time.monotonic()
        while len(stops) < total:
            pid = pid if leader(pid) else load.worker().pid
            took = disturb(load.service, pid)
            stops += [took] if took is not None else []  # else its job was done just then
            if took is not None and len(stops) % ENDED_EVERY == 1:
                wait_for(lambda pid=pid: not leader(pid), 30, "The worker's end")  # type: ignore[misc]
                ended += 1
            load.service.feel(QUIET)
            wait_for(lambda pid=pid: leader(pid) != "T", 30, "Going on", 0.005)  # type: ignore[misc]
            if samples.get(len(stops)) == {}:
                load.worker()
                time.sleep(1)  # until the connection that this took is closed
                samples[len(stops)] = footprint(load.process) | {"wal": wal.stat().st_size}
        each_s, jobs = (time.monotonic() - started) / total, load.jobs()
    told = ", ".join(f"{count} {state}" for state, count in jobs.items())
    rows = [("cycles", f"{total}, {each_s:.2f} s each, {ended} workers ended, jobs: {told}", "none fails",
             not {"failed", "quarantined"} & set(jobs)), *flat(samples)]
    return rows, {"samples": samples, "stops_s": stops, "ended": ended, "jobs": jobs, "each_s": each_s}


def flat(samples: dict[int, dict[str, float]]) -> list[Row]:
    """Judge what was sampled after so many cycles."""
    numbers = sorted(samples)
    rows = []
    for key, unit, since, allowed in (("files", 1, 0, FLAT_COUNT), ("threads", 1, 0, FLAT_COUNT),
                                      ("children", 1, 0, FLAT_COUNT), ("rss", 1e6, -2, FLAT_BYTES),
                                      ("uss", 1e6, -2, FLAT_BYTES), ("wal", 1e6, None, FLAT_WAL_BYTES)):
        before = 0 if since is None else samples[numbers[since]][key]
        rows.append((f"cycles, {key} after {', '.join(map(str, numbers))}",
                     ", ".join(f"{samples[number][key] / unit:.4g}" for number in numbers),
                     f"at most {allowed / unit:g}" + ("" if since is None else f" more than after {numbers[since]}"),
                     samples[numbers[-1]][key] - before <= allowed))
    return rows


PARTS = {part.__name__: part for part in (idle, stop, free, status, cycles)}
#: option: default, with --quick, what
SIZES = {"minutes": (10.0, 0.5, "of idling"), "trials": (100, 10, "of stopping"),
         "free-trials": (5, 1, "of freeing memory"), "requests": (1000, 100, "for the status"),
         "cycles": (1000, 50, "of busy and idle")}


def read_arguments() -> argparse.Namespace:
    """Read the options; `--quick` shortens what was not set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}; all unless set")
    parser.add_argument("--quick", action="store_true", help="every part in short: does it work at all?")
    for name, (usual, short, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=type(usual), help=f"{what} (default {usual}; quick {short})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    arguments = parser.parse_args()
    for name, found in vars(arguments).items():
        if found is None and name != "json":
            setattr(arguments, name, SIZES[name.replace("_", "-")][arguments.quick])
    arguments.only = arguments.only.split(",")
    if set(arguments.only) - set(PARTS):
        parser.error(f"--only takes {','.join(PARTS)}, separated by commas")
    return arguments


def main() -> int:
    """Measure the parts asked for, print the table, and return 1 where a promise is not kept."""
    arguments = read_arguments()
    if sys.platform != "linux":
        print("Not measured: what a process does is read from /proc, which only Linux has.")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves every `with` block, as Ctrl-C does
    rows: list[Row] = []
    figures: dict[str, Any] = {}
    for name in arguments.only:
        print(f"{name} ...", flush=True)
        try:
            found, figures[name] = PARTS[name](arguments)
        except (ProgramFailed, NightpressError, OSError, psutil.Error) as problem:
            found, figures[name] = [(name, f"not measured: {problem}", "", False)], {"problem": str(problem)}
        rows += found
    print("\n| what | found | promise | |\n| --- | --- | --- | --- |")
    for what, shown, promise, kept in rows:
        print(f"| {what} | {shown} | {promise} | {'kept' if kept else '**missed**'} |")
    return finish("service", arguments, figures, all(row[-1] for row in rows), "what the table says")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; every process that was started is ended.")
        sys.exit(130)
