"""Time of collecting an importance matrix, against llama.cpp's own llama-imatrix: same chunks, threads and minute.

Both are timed from start to end of a process: ours starts Python, loads the engine and the model, collects
with a checkpoint after each group of chunks and writes the file; llama-imatrix runs with `--no-ppl`, without
which it also computes the text's perplexity and takes longer. The sums must agree within float noise, and
whether they are the same to the bit is printed.

    python benchmarks/imatrix.py --llama-cpp FOLDER              # the starter
    python benchmarks/imatrix.py --llama-cpp FOLDER --make-model 60M --chunks 12 --rounds 3
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from random_model import SHAPES, model_for_a_while
from timing import (
    Sides,
    add_llama_cpp,
    engine_options,
    finish,
    options,
    pair,
    run_in_child,
    run_program,
    write_plain,
)

from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Imatrix, read_imatrix, write_imatrix
from loops.engine.model import load_model
from loops.starter import HELD_OUT, STARTER_GGUF

SLACK = 1.3
NOISE = 1e-4  #: of a sum, relative to the largest of its matrix


def collect_here(model: Path, text: Path, chunks: int, threads: int, target: Path) -> None:
    """Collect as the worker does and write the matrix to target."""
    with TemporaryDirectory(dir=target.parent) as folder, load_model(model, engine_options(threads)) as loaded:
        cut = cut_chunks(loaded, text.read_text(encoding="utf-8"), limit=chunks)
        write_imatrix(target, collect_imatrix(loaded, cut, Path(folder), datasets=[str(text)]))


def difference(ours: Imatrix, theirs: Imatrix) -> float:
    """Return the largest difference of two sums in units of the largest sum of their matrix; infinite for others."""
    if ours.entries.keys() != theirs.entries.keys():
        return float("inf")
    worst = 0.0
    for name, entry in ours.entries.items():
        other = theirs.entries[name]
        if entry.counts.tolist() != other.counts.tolist():
            return float("inf")
        largest = float(other.sums.max(initial=0)) or 1.0
        worst = max(worst, float(np.abs(entry.sums - other.sums).max()) / largest)
    return worst


class Comparison(Sides):
    """Both sides on the same chunks."""

    def __init__(self, arguments: argparse.Namespace, model: Path, folder: Path) -> None:
        super().__init__()
        self.arguments, self.model = arguments, model
        self.text, self.mine, self.other = folder / "text.txt", folder / "ours.gguf", folder / "theirs.gguf"
        write_plain(arguments.text, self.text)

    def ours(self) -> float:
        """Collect in a child process; return the seconds of the process."""
        with self.counted(ours=True):
            _, seconds = run_in_child(collect_here, self.model, self.text, self.arguments.chunks,
                                      self.arguments.threads, self.mine)
        return seconds

    def theirs(self) -> float:
        """Run llama-imatrix; return the seconds of the process."""
        with self.counted(ours=False):
            _, seconds = run_program([self.arguments.llama_cpp / "llama-imatrix", "-m", self.model, "-f", self.text,
                                      "-o", self.other, "-c", "512", "-t", str(self.arguments.threads), "--no-ppl",
                                      "--chunks", str(self.arguments.chunks)])
        return seconds


def compare(arguments: argparse.Namespace, model: Path, folder: Path) -> int:
    """Measure both and print the times."""
    sides = Comparison(arguments, model, folder)
    if arguments.llama_cpp is None:
        seconds = [sides.ours() for _ in range(arguments.rounds)]
        found = read_imatrix(sides.mine)
        print(f"{min(seconds):.2f} s for {found.chunks} chunks of {model.name}")
        return finish("imatrix", arguments, {"ours_s": seconds, "chunks": found.chunks}, None,
                      "needs --llama-cpp to be checked")
    times = pair(sides.ours, sides.theirs, arguments.rounds)
    mine, other = read_imatrix(sides.mine), read_imatrix(sides.other)
    worst, same = difference(mine, other), sides.mine.read_bytes() == sides.other.read_bytes()
    figures: dict[str, Any] = {"model": model.name, "bytes": model.stat().st_size, "chunks": mine.chunks,
                               "time": times.as_json(), "cpu_time": sides.cpu.as_json(), "difference": worst,
                               "same_file": same}
    print(f"{model.name}, {model.stat().st_size / 1e6:,.0f} MB, {mine.chunks} chunks, {arguments.threads} threads, "
          f"{arguments.rounds} rounds\n\n              ours      theirs  ratio\ntime    {times}\n"
          f"of CPU  {sides.cpu}\n\n"
          f"Largest difference of two sums: {worst:.1e} of the largest; the files are "
          f"{'the same to the byte' if same else 'not the same to the byte'}.")
    return finish("imatrix", arguments, figures, worst <= NOISE and times.ratio <= SLACK,
                  f"llama-imatrix's values, in at most {SLACK:.2f} times its time")


def main() -> int:
    """Read the options and compare."""
    parser = options(__doc__, rounds=5)
    add_llama_cpp(parser)
    parser.add_argument("--model", type=Path, default=STARTER_GGUF, help="a GGUF (default: the starter)")
    parser.add_argument("--make-model", choices=SHAPES, help="instead: one of this size with random weights")
    parser.add_argument("--folder", type=Path, help="for what is written (default: the temporary folder)")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="at least 1,024 tokens of text")
    parser.add_argument("--chunks", type=int, default=40, help="most pieces of 512 tokens (default 40)")
    arguments = parser.parse_args()
    with (model_for_a_while(arguments.folder, arguments.make_model) if arguments.make_model
          else nullcontext(arguments.model)) as model, TemporaryDirectory(dir=arguments.folder) as folder:
        return compare(arguments, model, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
