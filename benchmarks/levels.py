"""Size and KL divergence of every level, and which levels no other dominates; with --memory, what a level really takes.

Every level that the installed llama.cpp writes is built from the original, without an importance matrix where it can do
without, and with one, collected from dialogues that are drawn from the starter's grammar with a seed that neither its
training nor its held-out text had. Divergences are measured on the starter's held-out text. A level is a knee where no
other is at most as large and at most as far off, differences of a tenth aside, which is about the standard error. The
figures stand in `loops/engine/ladders.py`, beside llama.cpp's own of Llama-3-8B.

    python benchmarks/levels.py                                          # five minutes on 2 cores
    python benchmarks/levels.py --model OTHER.gguf --text A.txt --calibration B.txt
    python benchmarks/levels.py --memory --folder DISK                   # estimates against real processes
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from memory import resident
from random_model import model_for_a_while
from timing import engine_options, finish, options, run_in_child

from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.gguf_check import CheckedModel, check_model
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Imatrix
from loops.engine.ladders import FULL, KNEES, SLACK, TRAINED_FOR, knees
from loops.engine.levels import level_named
from loops.engine.memory import plan_memory
from loops.engine.model import ContextSpec, load_model, open_context
from loops.engine.options import EngineOptions
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.engine.windows import cut_windows
from loops.starter import HELD_OUT, STARTER_GGUF, corpus

SEED, DIALOGUES = 5, 800  #: of the calibration text: no seed of the recipe, nor the held-out text's
STORE_BYTES = 2 << 30
MEMORY_LEVELS = ("F16", "Q8_0", "Q4_K_M", "IQ4_XS")
MEMORY_SIZES = (("60M", 0), ("60M", 128_256), ("300M", 0))
MEMORY_CELLS = (1024, 4096)
ALLOWED = 0.1  #: how far off an estimate may be, as a share of what was taken

Row = dict[str, Any]


def fresh_dialogues(dialogues: int, seed: int) -> str:
    """Return dialogues of the starter's grammar, laid out as its training text is."""
    rng = random.Random(seed)
    return "".join("<s>" + corpus.render(corpus.dialogue(rng).turns) for _ in range(dialogues))


def _matrix(path: Path, text: str, run: EngineOptions, folder: Path) -> Imatrix:
    with load_model(path, run) as model:
        return collect_imatrix(model, cut_chunks(model, text, special=True), folder)


def _built(model: CheckedModel, name: str, run: EngineOptions, matrix: Imatrix | None,
           folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the file of a level and its bytes, and delete it; nothing where the level needs a matrix."""
    spec = QuantizeSpec(model, level_named(name), run, imatrix=matrix)
    expected = forecast(spec)
    if not expected.needs_imatrix:
        made = quantize(spec, expected, folder)
        yield made.path, made.n_bytes
        made.path.unlink()


def measure(path: Path, text: str, calibration: str, threads: int, scratch: Path | None) -> list[Row]:
    """Build and measure every level; return a row each: level, bits, bytes, KL divergence without and with matrix."""
    run, model, rows = engine_options(threads), check_model(path), []
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=scratch) as name:
        folder = Path(name)
        matrix = _matrix(path, calibration, run, folder / "sums")
        with load_model(path, run) as original:
            windows = cut_windows(original, text, special=True)
            store = BaselineStore(folder / "store", windows, original.n_vocab, STORE_BYTES)
            measure_baseline(original, store)
        loss = float(np.log(store.perplexity()["ppl"]))
        for level in FULL:
            row: Row = {"level": level, "loss": loss, "chunks": matrix.chunks, "scored": windows.scored}
            for side, used in (("without", None), ("with", matrix)):
                for file, n_bytes in _built(model, level, run, used, folder):
                    with load_model(file, run) as loaded:
                        found = measure_divergence(loaded, store, folder / f"{level}-{side}")
                    row |= {"bytes": n_bytes, "bits": 8 * n_bytes / model.n_parameters, side: found.kld,
                            f"{side}_error": found.kld_error, f"{side}_same_top": found.same_top}
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    def figure(side: str) -> str:
        return f"{row[side]:.5f} ±{row[f'{side}_error']:.5f}" if side in row else "refused"

    return (f"{row['level']:10}{row['bytes']:>12,}{row['bits']:>9.3f}{figure('without'):>20}{figure('with'):>20}"
            f"{row['with_same_top']:>9.2%}{row['with'] / row['loss']:>9.2%}")


def compare(arguments: argparse.Namespace) -> int:
    """Measure every level, print the table and the knees; hold the latter against `ladders.KNEES`."""
    text = arguments.text.read_text(encoding="utf-8")
    calibration = (arguments.calibration.read_text(encoding="utf-8") if arguments.calibration
                   else fresh_dialogues(DIALOGUES, SEED))
    print(f"{'level':10}{'bytes':>12}{'bits':>9}{'KLD without matrix':>20}{'KLD with':>20}{'same top':>9}"
          f"{'of loss':>9}")
    rows: list[Row] = run_in_child(measure, arguments.model, text, calibration, arguments.threads, arguments.folder)[0]
    found = {side: knees({row["level"]: (row["bytes"], row[side]) for row in rows if side in row}, SLACK)
             for side in ("without", "with")}
    print(f"\n{rows[0]['chunks']} chunks of calibration text, {rows[0]['scored']:,} scored predictions, loss of the "
          f"original {rows[0]['loss']:.4f} nats per token\nKnees without a matrix: {', '.join(found['without'])}\n"
          f"Knees with a matrix:    {', '.join(found['with'])}")
    missing = [level for level in found["with"] if level not in (*KNEES, *TRAINED_FOR)]
    print(f"Not in the ladder `knees`: {', '.join(missing) or 'none'}")
    return finish("levels", arguments, {"rows": rows, "knees": found},
                  not missing if arguments.model == STARTER_GGUF else None,
                  "the ladder `knees` has every level that no other dominates by more than the errors")


def occupy(path: Path, cells: int, threads: int) -> dict[str, int]:
    """Load a model, fill a context to its end and return the resident bytes of this process."""
    with (load_model(path, engine_options(threads)) as model,
          open_context(model, ContextSpec(1, cells, shared=False, outputs=1)) as context):
        for start in range(0, cells, 512):
            count = min(512, cells - start)
            context.decode(np.full(count, 5, dtype=np.int32), range(start, start + count), [(0,)] * count,
                           np.arange(count) == count - 1)
        return resident(os.getpid())


def plan(path: Path, cells: int) -> dict[str, int]:
    """Return what the estimate adds to a file's size."""
    found = plan_memory(check_model(path), cells)
    return {"cache": found.cache, "compute": found.compute, "process": found.process, "total": found.total}


def press(path: Path, level: str, threads: int, folder: Path) -> Path:
    """Quantize and return the file."""
    spec = QuantizeSpec(check_model(path), level_named(level), engine_options(threads))
    return quantize(spec, forecast(spec), folder).path


def compare_memory(arguments: argparse.Namespace) -> int:
    """Hold the estimate of `nightpress levels` against processes that load the level and fill the context."""
    rows: list[Row] = []
    print(f"{'MB':22}{'context':>8}{'level':>9}{'weights':>9}{'cache':>8}{'compute':>9}{'process':>9}{'estimate':>10}"
          f"{'taken':>9}{'off':>8}")
    with ExitStack() as held:
        folder = Path(held.enter_context(TemporaryDirectory(prefix="nightpress-benchmark-", dir=arguments.folder)))
        models = [("starter", STARTER_GGUF)] + [
            (f"random {size}" + (f" {vocabulary:,}" if vocabulary else ""),
             held.enter_context(model_for_a_while(arguments.folder, size, vocabulary)))
            for size, vocabulary in MEMORY_SIZES]
        for title, path in models:
            for level in MEMORY_LEVELS:
                file = path if level == "F16" else run_in_child(press, path, level, arguments.threads, folder)[0]
                for cells in MEMORY_CELLS:
                    added = run_in_child(plan, path, cells)[0]
                    taken = run_in_child(occupy, file, cells, arguments.threads)[0]["peak"]
                    weights = file.stat().st_size
                    off = (weights + added["total"]) / taken - 1
                    rows.append({"model": title, "level": level, "cells": cells, "weights": weights, **added,
                                 "taken": taken, "off": off})
                    print(f"{title:22}{cells:>8}{level:>9}" + "".join(
                        f"{value / 1e6:{width}.1f}" for value, width in (
                            (weights, 9), (added["cache"], 8), (added["compute"], 9), (added["process"], 9),
                            (weights + added["total"], 10), (taken, 9))) + f"{off:>+8.1%}", flush=True)
    worst = max(rows, key=lambda row: abs(row["off"]))
    print(f"\nFurthest off: {worst['off']:+.1%} ({worst['model']}, {worst['level']}, {worst['cells']} tokens)")
    return finish("levels-memory", arguments, {"rows": rows}, abs(worst["off"]) <= ALLOWED,
                  f"the estimate is within {ALLOWED:.0%} of what a process takes")


def main() -> int:
    """Read the options and measure."""
    parser = options(__doc__, rounds=1)
    parser.add_argument("--model", type=Path, default=STARTER_GGUF, help="an unquantized GGUF (default: the starter)")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="to measure on, special tokens written out")
    parser.add_argument("--calibration", type=Path,
                        help=f"to collect from (default: {DIALOGUES} fresh dialogues of the starter's grammar)")
    parser.add_argument("--folder", type=Path, help="for what is written (default: the temporary folder)")
    parser.add_argument("--memory", action="store_true", help="check the estimates of memory instead; Linux only")
    arguments = parser.parse_args()
    if not arguments.memory:
        return compare(arguments)
    if sys.platform != "linux":
        print("Not measured: resident memory is read from /proc, which only Linux has.")
        return 0
    return compare_memory(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
