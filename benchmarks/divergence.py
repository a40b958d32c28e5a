"""Time and figures of perplexity plus KL divergence of six levels, against llama.cpp's own llama-perplexity.

Ours is one new process: it starts Python, loads the original, keeps its log-probabilities, then loads
and compares each level. Theirs is seven: `--kl-divergence-base` for the original, `--kl-divergence`
for each level; same text, same windows of 512 tokens, same threads, default batch. Each is timed from
start to end of its processes. The levels are quantized before, untimed.

llama-perplexity stores the original's log-probabilities as 16-bit integers that reach 16 nats below
the most probable token; ours are 32-bit floats. Its figures therefore have a floor, which is measured
here as the divergence it finds between the original and itself (ours must be 0), and they count as
equal when they differ by no more than that floor, half a percent, or a tenth of the standard error.
What lies more than 16 nats down is cut off, so the PPL(base) that it prints for a level is too low;
ours is compared to the estimate of the run that stores. The less the model knows the text, the more
is cut off: so the default text is the starter's held-out dialogues without their control tokens
(llama-perplexity reads none), and not the general English that ships.

Some runs of llama-perplexity lose their last lines. They are repeated, and only the good one counts.

    python benchmarks/divergence.py --llama-cpp FOLDER
    python benchmarks/divergence.py --llama-cpp FOLDER --model MODEL.gguf --text TEXT.txt
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import (
    Paired,
    Sides,
    add_llama_cpp,
    cpu_seconds,
    engine_options,
    finish,
    options,
    pair,
    run_in_child,
    run_program,
    write_plain,
)

from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.gguf_check import check_model
from loops.engine.ladders import ORIGINAL_LADDER
from loops.engine.levels import level_named
from loops.engine.model import load_model
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.engine.windows import cut_windows
from loops.starter import HELD_OUT, STARTER_GGUF

Figures = dict[str, float]

#: what llama-perplexity prints of each of our figures; percentages become shares
_PRINTED = {
    "ppl": re.compile(r"Mean PPL\(Q\)\s+:\s*([\d.]+)"),
    "kld": re.compile(r"Mean\s+KLD:\s*(-?[\d.]+)"),
    "kld_error": re.compile(r"Mean\s+KLD:.*±\s*([\d.]+)"),
    "kld_median": re.compile(r"Median\s+KLD:\s*(-?[\d.]+)"),
    "kld_max": re.compile(r"Maximum KLD:\s*(-?[\d.]+)"),
    "delta_p_rms": re.compile(r"RMS Δp\s+:\s*([\d.]+)"),
    "same_top": re.compile(r"Same top p:\s*([\d.]+)"),
}
_ESTIMATE = re.compile(r"Final estimate: PPL = ([\d.]+)")  # of the run that stores the original
_SHARES = {"delta_p_rms", "same_top"}
_COMPARED = ("ppl", "kld", "delta_p_rms", "same_top")
STORE_BYTES = 2 << 30


def quantize_levels(model: Path, levels: list[str], threads: int, folder: Path) -> dict[str, Path]:
    """Return a file for every level, made by us."""
    checked = check_model(model)
    files = {}
    for name in levels:
        spec = QuantizeSpec(checked, level_named(name), engine_options(threads))
        files[name] = quantize(spec, forecast(spec), folder).path
    return files


def measure_here(model: Path, files: dict[str, Path], scratch: Path, text: str,
                 threads: int) -> dict[str, Figures]:
    """Measure all levels as the worker does; return the figures of each."""
    run = engine_options(threads)
    found: dict[str, Figures] = {}
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=scratch) as folder:
        with load_model(model, run) as original:
            windows = cut_windows(original, text)
            store = BaselineStore(Path(folder) / "store", windows, original.n_vocab, STORE_BYTES)
            measure_baseline(original, store)
        for name, file in files.items():
            with load_model(file, run) as level:
                whole = measure_divergence(level, store, Path(folder) / name)
            found[name] = {key: float(value) for key, value in whole.as_json().items()
                           if isinstance(value, int | float)}
    return found


class Comparison(Sides):
    """Both sides on the same files."""

    def __init__(self, arguments: argparse.Namespace, files: dict[str, Path], text: Path,
                 folder: Path) -> None:
        super().__init__()
        self.arguments, self.files, self.text, self.folder = arguments, files, text, folder
        self.found: tuple[dict[str, Figures], dict[str, Figures]] = ({}, {})
        self.repeated = 0

    def ours(self) -> float:
        """Measure in a child process; return the seconds of the process."""
        with self.counted(ours=True):
            figures, seconds = run_in_child(measure_here, self.arguments.model, self.files, self.folder,
                                            self.text.read_text(encoding="utf-8"), self.arguments.threads)
        self.found[0].update(figures)
        return seconds

    def _perplexity(self, model: Path, *more: str) -> tuple[str, float]:
        return run_program([self.arguments.llama_cpp / "llama-perplexity", "-m", model, "-f", self.text,
                            "-c", "512", "-t", str(self.arguments.threads),
                            "--kl-divergence-base", self.folder / "base.kld", *more])

    def _level(self, file: Path) -> tuple[Figures, float]:
        for _ in range(5):
            before = cpu_seconds()
            text, seconds = self._perplexity(file, "--kl-divergence")
            found = {name: pattern.search(text) for name, pattern in _PRINTED.items()}
            figures = {name: float(match[1]) / (100 if name in _SHARES else 1)
                       for name, match in found.items() if match}
            if figures.keys() == _PRINTED.keys():
                return figures, seconds
            self.wasted += cpu_seconds() - before
            self.repeated += 1
        raise SystemExit(f"llama-perplexity does not print {', '.join(_PRINTED.keys() - figures.keys())}; "
                         "is it of another version?")

    def theirs(self) -> float:
        """Run llama-perplexity for the original and every level; return the seconds of all."""
        with self.counted(ours=False):
            text, total = self._perplexity(self.arguments.model)
            estimate = _ESTIMATE.search(text)
            for name, file in self.files.items():
                self.found[1][name], seconds = self._level(file)
                self.found[1][name]["ppl_base"] = float(estimate[1]) if estimate else math.nan
                total += seconds
        return total

    def floors(self) -> tuple[float, float]:
        """Return the divergence between the original and itself as we and as llama-perplexity find it."""
        mine = run_in_child(measure_here, self.arguments.model, {"original": self.arguments.model},
                            self.folder, self.text.read_text(encoding="utf-8"), self.arguments.threads)[0]
        return mine["original"]["kld"], self._level(self.arguments.model)[0]["kld"]


def equal(name: str, ours: Figures, theirs: Figures, floor: float) -> bool:
    """Tell whether a figure is the same within what llama-perplexity's storage and printing can show."""
    slack = 0.005 * abs(theirs[name])
    if name == "kld":
        slack = max(slack, abs(floor), 0.1 * theirs["kld_error"])
    if name == "same_top":
        slack = 0.001 + 0.1 * ours["same_top_error"]  # ties between 16-bit values fall either way
    return abs(ours[name] - theirs[name]) <= slack


def compare(arguments: argparse.Namespace, folder: Path) -> int:
    """Measure and print both sets of figures."""
    text = folder / "text.txt"
    write_plain(arguments.text, text)
    files: dict[str, Path] = run_in_child(
        quantize_levels, arguments.model, arguments.levels.split(","), arguments.threads, folder)[0]
    sides = Comparison(arguments, files, text, folder)
    if arguments.llama_cpp is None:
        seconds = [sides.ours() for _ in range(arguments.rounds)]
        print(f"{min(seconds):.2f} s for the original and {len(files)} levels")
        return finish("divergence", arguments, {"ours_s": seconds, "levels": sides.found[0]}, None,
                      "needs --llama-cpp to be checked")
    times: Paired = pair(sides.ours, sides.theirs, arguments.rounds)
    floors = sides.floors()
    ours, theirs = sides.found
    same = all(equal(name, ours[level], theirs[level], floors[1]) for level in ours for name in _COMPARED)
    figures: dict[str, Any] = {"time": times.as_json(), "cpu_time": sides.cpu.as_json(), "ours": ours,
                               "theirs": theirs, "equal": same, "repeated": sides.repeated,
                               "self_divergence": {"ours": floors[0], "theirs": floors[1]}}
    print(f"{arguments.model.name}, {ours[next(iter(ours))]['tokens']:,.0f} scored predictions, "
          f"{arguments.threads} threads, {arguments.rounds} rounds\n\n"
          f"{'level':8}{'figure':>12}{'ours':>14}{'theirs':>14}{'difference':>12}")
    for level in ours:
        for name in (*_COMPARED, "kld_median", "kld_max", "ppl_base"):
            mine, other = ours[level][name], theirs[level][name]
            fits = name not in _COMPARED or equal(name, ours[level], theirs[level], floors[1])
            share = f"{(mine - other) / other:+11.3%}" if other else ""
            print(f"{level:8}{name:>12}{mine:14.6f}{other:14.6f}{share:>12}{'' if fits else '  NOT EQUAL'}")
    print(f"\nThe original against itself: {floors[0]:.2e} (ours), {floors[1]:.2e} (llama-perplexity's "
          f"floor)\n\n              ours      theirs  ratio\ntime    {times}\nof CPU  {sides.cpu}")
    return finish("divergence", arguments, figures, same and times.ratio < 1,
                  "equal figures, faster than llama-perplexity")


def main() -> int:
    """Read the options and compare."""
    parser = options(__doc__, rounds=3)
    add_llama_cpp(parser)
    parser.add_argument("--model", type=Path, default=STARTER_GGUF,
                        help="an unquantized GGUF (default: the starter)")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="at least 1,024 tokens of text")
    parser.add_argument("--folder", type=Path, help="for what is written (default: the temporary folder)")
    parser.add_argument("--levels", default=",".join(ORIGINAL_LADDER))
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=arguments.folder) as folder:
        return compare(arguments, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
