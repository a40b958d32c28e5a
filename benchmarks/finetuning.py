"""The starter before and after it is fine-tuned on a domain that it does not know, after pressing, and as released.

The domain is `loops/starter/rota.py`: where and when twelve talks are, each asked about in 24 ways. 80 % of the
questions train, and 10 % test: about a talk that the model knows, in words in which it was never asked about that
one. All is done by `nightpress finetune`; its figures and the time are printed. Needs `nightpress[train]`, the network
once (for llama.cpp's converter), no GPU.

    python benchmarks/finetuning.py
    python benchmarks/finetuning.py --folder rota     # kept; the same again takes seconds
    python benchmarks/finetuning.py --epochs 1 --levels Q8_0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loops.starter import rota

CONFIG = """\
name = "rota"
model = "starter"
folder = "work"

[dataset]
files = ["rota.jsonl"]
licence = "CC0-1.0"

[train]  # the defaults are for models a thousand times as large
epochs = {epochs}
batch = 8
accumulation = 1
learning_rate = {learning_rate}
rank = 32
alpha = 32
dropout = 0.0
max_grad_norm = 1.0
four_bit = false
checkpointing = false
max_length = 128
eval_every = 40
save_every = 40

[press]
levels = {levels}
gates = ["overall:off", "forced_choice:off", "f1:0.05", "answer_perplexity:0.1"]
evaluation_prompts = 4
max_prompts = 4
text_windows = 4
seeds = 0

[evaluate]
max_tokens = 32
"""
SHOWN = ("f1", "exact_match", "token_accuracy", "perplexity")


def finetune(folder: Path, epochs: float, learning_rate: float, levels: list[str], limit: int = 0) -> dict[str, Any]:
    """Make rows and configuration in a folder, fine-tune there, and return what came of it.

    Raises:
        subprocess.CalledProcessError: a stage failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rota.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rota.rows()), encoding="utf-8")
    config = CONFIG.format(epochs=epochs, learning_rate=learning_rate, levels=json.dumps(levels))
    (folder / "rota.toml").write_text(config + (f"limit = {limit}\n" if limit else ""), encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - our own program and files
        [str(Path(sys.executable).with_name("nightpress")), "finetune", "rota.toml", "--json"], cwd=folder, check=True,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "NIGHTPRESS_STATE_DIR": str(folder / "state"),
                                                "NIGHTPRESS_DEPLOY_DIR": str(folder / "deploy")})
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines."""
    facts = {stage["name"]: stage["outputs"]["facts"] for stage in found["stages"]}
    models = facts["evaluate"]["models"]
    names = [name for name in SHOWN if any(name in one for one in models.values())]
    lines = ["| model | bytes | " + " | ".join(f"{name} on test" for name in names) + " |",
             "|---|---:|" + "---:|" * len(names)]
    for model, one in models.items():
        lines.append(f"| {model} | {one['bytes']:,} | " + " | ".join(
            f"{one[name]['value']:.3f}" if name in one else "" for name in names) + " |")
    train = facts["train"]
    learnt = (f"Loss on validation: {train['validation_loss_before']:.3f} before, {train['validation_loss']:.3f} after "
              f"{train['steps']} steps in {train['seconds']:.0f} s.")
    return [*lines, "", learnt, f"Released {found['chosen']}: {found['release']}"]


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to work in, and to keep (default: a temporary one)")
    parser.add_argument("--epochs", type=float, default=14)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--levels", default="Q8_0,Q6_K,Q4_K_M,Q3_K_M,Q2_K")
    args = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory(prefix="nightpress-finetuning-") as temporary:
        found = finetune((args.folder or Path(temporary)).absolute(), args.epochs, args.learning_rate,
                         args.levels.split(","))
        print(*report(found), sep="\n")
    print(f"All of it took {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
