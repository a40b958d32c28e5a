"""Peak memory of an evaluation, against the size of the model: the original and its Q4_K_M level.

One evaluation does all that a level goes through, each step in a new process, loading what it needs as
the worker does: the original's log-probabilities, KL divergence, forced choice and 25 replies, and the
likelihood of these replies under the original. A model with random weights is made for it.

Peak is the kernel's high-water mark of resident memory (VmHWM), Python included. It counts pages of
the memory-mapped model file, which the kernel may drop and read again, as much as memory that nothing
but the process holds; so the two are also sampled apart every 20 ms (RssFile with shared memory, and
RssAnon, in /proc/PID/status). Where weights are repacked for the CPU (extra buffers), a mapped file is
in memory twice. Linux only.

    python benchmarks/memory.py --folder /somewhere/with/4GB
    python benchmarks/memory.py --size 300M --vocabulary 128256    # a large vocabulary: logits weigh more
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from random_model import add_model_options, model_for_a_while
from timing import ProgramFailed, engine_options, finish, options, run_in_child, start_child

from loops.engine.chat import prompt_tokens
from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.generate import Sampling, generate
from loops.engine.gguf_check import check_model
from loops.engine.levels import level_named
from loops.engine.model import Model, load_model
from loops.engine.quantize import QuantizeSpec, forecast, quantize
from loops.engine.score import Question, score
from loops.engine.windows import cut_windows
from loops.evaluation.scenarios import read_scenarios
from loops.starter import HELD_OUT

ALLOWED_BYTES = 1_500_000_000
STORE_BYTES = 2 << 30


def resident(process_id: int) -> dict[str, int]:
    """Return resident bytes of a process: its peak, what only it holds, and pages of files."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in fields:
        return {}

    def size(name: str) -> int:
        return int(fields[name].split()[0]) * 1024

    return {"peak": size("VmHWM"), "anonymous": size("RssAnon"), "files": size("RssFile") + size("RssShmem")}


def _store(model: Model, scratch: Path, windows: int) -> BaselineStore:
    text = HELD_OUT.read_text(encoding="utf-8")
    return BaselineStore(scratch / "store", cut_windows(model, text, special=True, limit=windows), model.n_vocab,
                         STORE_BYTES)


def evaluate(step: str, path: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Do one step of an evaluation with the model at path; return this process's resident bytes at its end."""
    scenarios = read_scenarios()[:arguments.scenarios]
    with load_model(path, engine_options(arguments.threads)) as model:
        if step == "load":
            pass
        elif step == "baseline":
            measure_baseline(model, _store(model, scratch, arguments.windows))
        elif step == "divergence":
            measure_divergence(model, _store(model, scratch, arguments.windows), scratch / path.stem)
        elif step == "forced choice":
            score(model, [Question(prompt_tokens(model, scenario.prompt), tuple(
                model.tokenize(reply, add_bos=False, special=False)
                for reply in (scenario.empathic, scenario.dismissive))) for scenario in scenarios])
        elif step == "replies":
            generate(model, [prompt_tokens(model, scenario.prompt) for scenario in scenarios],
                     Sampling(max_tokens=arguments.max_tokens))
        return resident(os.getpid())


def watch(step: str, path: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Do one step in a new process and return the highest of all that was sampled."""
    process, pipe = start_child(evaluate, step, path, scratch, arguments)
    highest = {"peak": 0, "anonymous": 0, "files": 0}
    while not pipe.poll(0.02):
        for name, value in resident(process.pid).items():
            highest[name] = max(highest[name], value)
    try:
        highest |= {"peak": pipe.recv()["peak"]}
    except EOFError:
        raise ProgramFailed(f"The process for {step} died; see its message above.") from None
    finally:
        process.join()
    return highest


def make_level(model: Path, level: str, threads: int, folder: Path) -> Path:
    """Quantize and return the file."""
    spec = QuantizeSpec(check_model(model), level_named(level), engine_options(threads))
    return quantize(spec, forecast(spec), folder).path


def compare(arguments: argparse.Namespace, original: Path) -> int:
    """Run every step, print each, and judge the highest."""
    figures: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="nightpress-benchmark-", dir=arguments.folder) as name:
        scratch = Path(name)
        level: Path = run_in_child(make_level, original, arguments.level, arguments.threads, scratch)[0]
        print(f"{'MB':16}{'step':14}{'model':>8}{'peak':>8}{'over':>8}{'own':>10}{'of files':>10}{'seconds':>9}")
        for title, path, steps in (
                ("original", original, ("load", "baseline", "forced choice", "replies")),
                (arguments.level, level, ("load", "divergence", "forced choice", "replies"))):
            size = path.stat().st_size
            for step in steps:
                started = time.monotonic()
                seen = watch(step, path, scratch, arguments)
                over = seen["peak"] - size
                figures.append({"model": title, "step": step, "model_bytes": size, "over_bytes": over, **seen})
                print(f"{title:16}{step:14}" + "".join(
                    f"{value / 1e6:{width}.0f}" for value, width in
                    ((size, 8), (seen["peak"], 8), (over, 8), (seen["anonymous"], 10), (seen["files"], 10)))
                    + f"{time.monotonic() - started:9.1f}", flush=True)
    worst = max(figures, key=lambda row: row["over_bytes"])
    print(f"\nHighest: {worst['over_bytes'] / 1e6:,.0f} MB over the model's size ({worst['model']}, {worst['step']})")
    return finish("memory", arguments, {"steps": figures}, worst["over_bytes"] <= ALLOWED_BYTES,
                  "an evaluation takes the model's size plus at most 1.5 GB")


def main() -> int:
    """Read the options, make the model and measure."""
    parser = options(__doc__, rounds=1)
    add_model_options(parser, "1B")
    parser.add_argument("--vocabulary", type=int, default=0, help="fill the vocabulary up to this many tokens")
    parser.add_argument("--level", default="Q4_K_M")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default 8)")
    parser.add_argument("--scenarios", type=int, default=25)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("Not measured: resident memory is read from /proc, which only Linux has.")
        return 0
    with model_for_a_while(arguments.folder, arguments.size, arguments.vocabulary, keep=arguments.keep) as path:
        return compare(arguments, path)


if __name__ == "__main__":
    raise SystemExit(main())
