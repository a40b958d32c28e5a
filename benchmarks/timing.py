"""Shared by the benchmarks: paired timings, work in a fresh process, options, output.

Other programs on the machine slow both sides of a comparison, so the two are run in turn (A B, B A,
A B, ...) and compared round by round; the median of the rounds' ratios is what is reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loops.engine.options import EngineOptions, physical_cores


class ProgramFailed(RuntimeError):
    """A program that a benchmark started ended with an error."""


@dataclass(frozen=True)
class Paired:
    """Seconds of both sides, round by round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Our time in units of theirs, one per round."""
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios; below 1 we are faster."""
        return statistics.median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        """Return a dict that json can write."""
        return {"ours_s": list(self.ours), "theirs_s": list(self.theirs), "ratio": self.ratio,
                "ratio_low": min(self.ratios), "ratio_high": max(self.ratios)}

    def __str__(self) -> str:
        return (f"{statistics.median(self.ours):8.2f} s  {statistics.median(self.theirs):8.2f} s  "
                f"x{self.ratio:.3f} ({min(self.ratios):.3f} to {max(self.ratios):.3f})")


def cpu_seconds() -> float:
    """Return processor seconds of this process and its ended children: a clock that waiting does not move."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Sides:
    """Two sides of a comparison and the processor time of each of their rounds.

    Attributes:
        wasted: processor seconds of runs that do not count.
    """

    def __init__(self) -> None:
        self._cpu: tuple[list[float], list[float]] = ([], [])
        self.wasted = 0.0

    @contextmanager
    def counted(self, *, ours: bool) -> Iterator[None]:
        """Add what is done meanwhile to a side's rounds."""
        before = cpu_seconds() - self.wasted
        yield
        self._cpu[0 if ours else 1].append(cpu_seconds() - self.wasted - before)

    @property
    def cpu(self) -> Paired:
        """Processor seconds of both, round by round."""
        return Paired(tuple(self._cpu[0]), tuple(self._cpu[1]))


def write_plain(text: Path, target: Path) -> None:
    """Copy a text without its control tokens, which llama.cpp's programs do not read."""
    target.write_text(re.sub(r"</?s>|<\|\w+\|>\n?", "", text.read_text(encoding="utf-8")), encoding="utf-8")


def pair(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Paired:
    """Run both sides in turn, the order swapped every round; each returns its seconds."""
    mine: list[float] = []
    other: list[float] = []
    for number in range(rounds):
        sides = [(mine, ours), (other, theirs)]
        for seconds, side in sides if number % 2 == 0 else reversed(sides):
            seconds.append(side())
    return Paired(tuple(mine), tuple(other))


def _answer(pipe: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe.send(function(*arguments))
    pipe.close()


def start_child(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Connection]:
    """Start a new interpreter that calls function; return it and the pipe its answer comes through."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, arguments))
    process.start()
    sending.close()
    return process, receiving


def run_in_child(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call function in a new interpreter; return its answer and the seconds from start to end of the process.

    Raises:
        ProgramFailed: the process died without an answer; its own error is on standard error.
    """
    started = time.monotonic()
    process, pipe = start_child(function, *arguments)
    try:
        answer = pipe.recv()
    except EOFError:
        process.join()
        raise ProgramFailed(f"The process for {function.__name__} ended with {process.exitcode}.") from None
    process.join()
    return answer, time.monotonic() - started


def run_program(command: Sequence[str | Path]) -> tuple[str, float]:
    """Run a program; return all it printed and the seconds it took.

    Raises:
        ProgramFailed: with its last line.
    """
    started = time.monotonic()
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL,  # noqa: S603 - the user's own
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - started
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        last = (text.strip().splitlines() or ["it printed nothing"])[-1]
        raise ProgramFailed(f"{Path(command[0]).name} ended with {done.returncode}: {last}")
    return text, seconds


def options(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores(), help="threads of both sides")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"repetitions (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def add_llama_cpp(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder of llama.cpp's own programs."""
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER",
                        help="folder with llama.cpp's programs, built from the same version; without it "
                             "only our side is measured")


def engine_options(threads: int) -> EngineOptions:
    """Return the engine's default options with a number of threads."""
    return EngineOptions(threads=threads)


def finish(name: str, arguments: argparse.Namespace, figures: dict[str, Any], kept: bool | None,
           promise: str) -> int:
    """Print the verdict and write the figures where asked; return the exit status, 1 for a broken promise."""
    verdict = {True: "kept", False: "MISSED", None: "not checked"}[kept]
    print(f"\nPromise: {promise}: {verdict}.")
    if arguments.json is not None:
        given = {key: str(value) for key, value in vars(arguments).items() if value is not None}
        report = {"benchmark": name, "promise": promise, "kept": kept, "figures": figures, "arguments": given,
                  "machine": {"cpus": physical_cores(), "platform": platform.platform(),
                              "load_average": os.getloadavg()[0]},
                  "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if kept is False else 0
