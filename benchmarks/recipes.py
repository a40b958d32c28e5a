"""Recipes against stock: KL divergence on held-out text at the byte sizes of four levels.

Of each model an importance matrix is collected, its output matrix included; then, for the size of each level, the
search of `nightpress quantize --target-size` looks for the best file of at most as many bytes. Recipe and stock are
really made and measured on the held-out text, which the search has not seen, stock both without and with the very
same matrix. What counts is the change against the better of the two.

    python benchmarks/recipes.py                                    # the starter
    python benchmarks/recipes.py --model wide.gguf --model untied.gguf
    python benchmarks/recipes.py --model F.gguf --text HELD_OUT.txt --calibration OTHER.txt

Without files the texts are the starter's: its held-out dialogues, and for calibration dialogues freshly drawn from
the same grammar with other seeds. That suits it and models that `loops.starter.train --shape` makes. Of a
calibration file the first half goes into the matrix, and the search measures on the second.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import cpu_seconds, engine_options, finish, options, run_in_child

from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.gguf_check import CheckedModel, check_model
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Imatrix
from loops.engine.levels import level_named
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.engine.windows import cut_windows
from loops.evaluation.text import EvaluationText
from loops.pass1.recipe import RecipeSearch
from loops.pass1.steps import Steps
from loops.starter import HELD_OUT, STARTER_GGUF
from loops.starter.corpus import HELD_OUT_SEED, RECIPE_SEEDS, dialogue, render

LEVELS = ("Q5_K_M", "Q4_K_M", "Q3_K_L", "Q2_K")
MATRIX_SEED, MEASURING_SEED = 777, 778
DIALOGUES = 400
PROMISED = {"starter": 0.40, "other": 0.30}  #: by how much the divergence is lower, on average over the sizes
SEARCH_S = 180.0  #: for the starter: all that is shared and one budget


def dialogues(seed: int) -> EvaluationText:
    """Draw dialogues that neither the starter's training nor its held-out text holds, but by chance."""
    if seed in {*RECIPE_SEEDS, HELD_OUT_SEED}:
        raise ValueError(f"the seed {seed} is taken")
    rng = random.Random(seed)
    return EvaluationText("".join("<s>" + render(dialogue(rng).turns) for _ in range(DIALOGUES)), special=True,
                          source=f"dialogues of seed {seed}")


def texts(arguments: argparse.Namespace) -> tuple[EvaluationText, EvaluationText, EvaluationText]:
    """Return what the matrix is collected from, what the search measures on, and the held-out text."""
    held_out = EvaluationText((arguments.text or HELD_OUT).read_text(encoding="utf-8"), special=arguments.text is None,
                              source=str(arguments.text or HELD_OUT.name))
    if arguments.calibration is None:
        return dialogues(MATRIX_SEED), dialogues(MEASURING_SEED), held_out
    content = arguments.calibration.read_text(encoding="utf-8")
    middle = content.find("\n", len(content) // 2) + 1 or len(content) // 2
    first, second = (EvaluationText(part, special=False, source=str(arguments.calibration))
                     for part in (content[:middle], content[middle:]))
    return first, second, held_out


@dataclass(frozen=True)
class Referee:
    """Measures files on the held-out text."""

    model: CheckedModel
    imatrix: Imatrix
    options: EngineOptions
    store: BaselineStore
    folder: Path

    def measure(self, file: Path) -> float:
        """Return the mean KL divergence of a file."""
        with TemporaryDirectory(dir=self.folder) as rows, load_model(file, self.options) as model:
            return measure_divergence(model, self.store, Path(rows)).kld

    def stock(self, level: str, imatrix: Imatrix | None) -> tuple[int, float]:
        """Return the size of a stock level and its divergence."""
        spec = QuantizeSpec(self.model, level_named(level), self.options, imatrix=imatrix)
        made = quantize(spec, forecast(spec), self.folder / "stock")
        found = self.measure(made.path)
        made.path.unlink()
        return made.n_bytes, found


def compare_sizes(path: Path, material: Sequence[EvaluationText], threads: int,
                  levels: Sequence[str]) -> list[dict[str, Any]]:
    """Search and measure at every size; return a row for each, with the seconds of the search."""
    options_, (for_matrix, for_search, held_out) = engine_options(threads), material
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        with load_model(path, options_) as model:
            chunks = cut_chunks(model, for_matrix.text, special=for_matrix.special)
            imatrix = collect_imatrix(model, chunks, folder / "imatrix", with_output=True)
            windows = cut_windows(model, held_out.text, special=held_out.special)
            store = BaselineStore(folder / "held-out", windows, model.n_vocab, 1 << 31)
            measure_baseline(model, store)
        checked = check_model(path)
        referee, steps = Referee(checked, imatrix, options_, store, folder), Steps(lambda _event: None, {})
        for level in levels:
            n_bytes, plain = referee.stock(level, None)
            _, weighted = referee.stock(level, imatrix)
            started, used = time.monotonic(), cpu_seconds()
            with RecipeSearch(checked, options_, imatrix, for_search, steps, folder / "scratch",
                              lambda _stage, _done, _total: None) as search:
                outcome = search.best(n_bytes, folder / "blobs")
            seconds, cpu = time.monotonic() - started, cpu_seconds() - used
            found = referee.measure(outcome.path)
            rows.append({"model": path.name, "size_of": level, "bytes": n_bytes, "stock": plain, "imatrix": weighted,
                         "found": found, "found_bytes": outcome.path.stat().st_size, "winner": outcome.winner.name,
                         "change": found / min(plain, weighted) - 1, "seconds": seconds, "cpu_s": cpu})
            outcome.path.unlink()
    return rows


def show(rows: Sequence[dict[str, Any]]) -> float:
    """Print the table of one model; return the mean change."""
    mean = sum(row["change"] for row in rows) / len(rows)
    print(f"\n| {rows[0]['model']}, size of | bytes | stock | stock, imatrix | found | change | search | processor |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row['size_of']} | {row['bytes']:,} | {row['stock']:.5f} | {row['imatrix']:.5f} | "
              f"{row['found']:.5f} ({row['winner']}) | {row['change']:+.0%} | {row['seconds']:.0f} s | "
              f"{row['cpu_s']:.0f} s |")
    print(f"| average | | | | | {mean:+.0%} | | |", flush=True)
    return mean


def main() -> int:
    """Read the options and compare."""
    parser = options(__doc__, rounds=1)
    parser.add_argument("--model", type=Path, action="append", help="an F16 GGUF, several times for several "
                                                                    "(default: the starter)")
    parser.add_argument("--text", type=Path, help="held-out text to report on")
    parser.add_argument("--calibration", type=Path, help="other text, for the matrix and the search")
    parser.add_argument("--levels", default=",".join(LEVELS), help=f"whose sizes (default {','.join(LEVELS)})")
    arguments = parser.parse_args()
    kept, every = True, []
    for path in arguments.model or [STARTER_GGUF]:
        rows, _ = run_in_child(compare_sizes, path, texts(arguments), arguments.threads, arguments.levels.split(","))
        every += rows
        promised = PROMISED["starter" if path.resolve() == STARTER_GGUF.resolve() else "other"]
        kept &= show(rows) <= -promised and all(row["change"] < 0 for row in rows)
        if path.resolve() == STARTER_GGUF.resolve():
            kept &= rows[0]["seconds"] <= SEARCH_S
    return finish("recipes", arguments, {"rows": every}, kept,
                  f"lower divergence than the better stock file at every size, by {PROMISED['starter']:.0%} on average "
                  f"on the starter, whose search takes at most {SEARCH_S:.0f} s, and by {PROMISED['other']:.0%} on "
                  "others")


if __name__ == "__main__":
    raise SystemExit(main())
