"""Time of quantizing, against llama.cpp's own llama-quantize: same input, levels, threads, machine, minute.

Two times are compared for each level. The engine's own: `Quantized.seconds` of ours against the
"quantize time" that llama-quantize prints. And the whole process: ours starts Python, loads the
engine, forecasts, quantizes, verifies (loads and evaluates the file), syncs it to disk and hashes it;
llama-quantize does none of these but starting and quantizing. The files must be the same to the byte.

    python benchmarks/quantization.py --llama-cpp FOLDER              # the starter, six levels
    python benchmarks/quantization.py --llama-cpp FOLDER --make-model 300M --levels Q8_0,Q4_K_M --rounds 3
"""

from __future__ import annotations

import argparse
import hashlib
import re
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from random_model import SHAPES, model_for_a_while
from timing import Paired, add_llama_cpp, engine_options, finish, options, pair, run_in_child, run_program

from loops.engine.gguf_check import check_model
from loops.engine.ladders import ORIGINAL_LADDER
from loops.engine.levels import level_named
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.starter import STARTER_GGUF

SLACK = 1.05
_QUANTIZE_TIME = re.compile(r"quantize time =\s*([\d.]+) ms")


def quantize_here(model: Path, level: str, threads: int, folder: Path) -> tuple[str, float]:
    """Quantize as the worker does; return the file's sha256 and the engine's seconds."""
    spec = QuantizeSpec(check_model(model), level_named(level), engine_options(threads))
    made = quantize(spec, forecast(spec), folder)
    made.path.unlink()
    return made.sha256, made.seconds


class Level:
    """Both ways of making one level, with what each run told."""

    def __init__(self, arguments: argparse.Namespace, model: Path, name: str, folder: Path) -> None:
        self.arguments, self.model, self.name, self.folder = arguments, model, name, folder
        self.whole: tuple[list[float], list[float]] = ([], [])
        self.sha256: dict[str, set[str]] = {"ours": set(), "theirs": set()}

    def ours(self) -> float:
        """Quantize in a child process; return the engine's seconds."""
        (sha256, seconds), whole = run_in_child(
            quantize_here, self.model, self.name, self.arguments.threads, self.folder)
        self.whole[0].append(whole)
        self.sha256["ours"].add(sha256)
        return float(seconds)

    def theirs(self) -> float:
        """Quantize with llama-quantize; return the seconds it prints."""
        target = self.folder / "theirs.gguf"
        text, whole = run_program([self.arguments.llama_cpp / "llama-quantize", self.model, target, self.name,
                                   str(self.arguments.threads)])
        self.whole[1].append(whole)
        with target.open("rb") as file:
            self.sha256["theirs"].add(hashlib.file_digest(file, "sha256").hexdigest())
        target.unlink()
        found = _QUANTIZE_TIME.search(text)
        if found is None:
            raise SystemExit("llama-quantize printed no quantize time; is it of another version?")
        return float(found[1]) / 1000

    @property
    def same_file(self) -> bool:
        """Whether every run of both made the same bytes."""
        return len(self.sha256["ours"] | self.sha256["theirs"]) == 1


def compare(arguments: argparse.Namespace, model: Path) -> int:
    """Measure every level and print the table."""
    figures: dict[str, Any] = {"model": model.name, "bytes": model.stat().st_size, "levels": {}}
    runs: list[Paired] = []
    same = True
    print(f"{model.name}, {model.stat().st_size / 1e6:,.0f} MB, {arguments.threads} threads, "
          f"{arguments.rounds} rounds\n\n"
          "level          ours      theirs  ratio of the engine's time     whole process")
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=arguments.folder) as folder:
        for name in arguments.levels.split(","):
            level = Level(arguments, model, name, Path(folder))
            if arguments.llama_cpp is None:
                seconds = [level.ours() for _ in range(arguments.rounds)]
                figures["levels"][name] = {"ours_s": seconds, "whole_s": level.whole[0]}
                print(f"{name:8} {min(seconds):8.2f} s")
                continue
            engine = pair(level.ours, level.theirs, arguments.rounds)
            whole = Paired(tuple(level.whole[0]), tuple(level.whole[1]))
            runs.append(engine)
            same = same and level.same_file
            figures["levels"][name] = {"engine": engine.as_json(), "whole": whole.as_json(),
                                       "same_file": level.same_file}
            print(f"{name:8} {engine}   x{whole.ratio:.2f}{'' if level.same_file else '  THE FILES DIFFER'}",
                  flush=True)
    if not runs:
        return finish("quantization", arguments, figures, None, "needs --llama-cpp to be checked")
    total = Paired(tuple(map(sum, zip(*(run.ours for run in runs), strict=True))),
                   tuple(map(sum, zip(*(run.theirs for run in runs), strict=True))))
    figures |= {"total": total.as_json(), "same_files": same}
    print(f"{'all':8} {total}\n\nThe files of both are {'the same to the byte' if same else 'NOT the same'}.")
    return finish("quantization", arguments, figures, same and total.ratio <= SLACK,
                  f"the same files as llama-quantize, in at most {SLACK:.2f} times its time")


def main() -> int:
    """Read the options and compare."""
    parser = options(__doc__, rounds=5)
    add_llama_cpp(parser)
    parser.add_argument("--model", type=Path, default=STARTER_GGUF,
                        help="an unquantized GGUF (default: the starter)")
    parser.add_argument("--make-model", choices=SHAPES, help="instead: one of this size with random weights")
    parser.add_argument("--folder", type=Path, help="for what is written (default: the temporary folder)")
    parser.add_argument("--levels", default=",".join(ORIGINAL_LADDER))
    arguments = parser.parse_args()
    with (model_for_a_while(arguments.folder, arguments.make_model) if arguments.make_model
          else nullcontext(arguments.model)) as model:
        return compare(arguments, model)


if __name__ == "__main__":
    raise SystemExit(main())
