"""What a run will take, before it starts: memory, disk and time; what cannot finish is refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from loops.engine.gguf_check import CheckedModel
from loops.pass1.plan import CannotFinish, PressPlan
from state.files import DiskFull

WORKING_BYTES = 1_500_000_000  #: most that an evaluation takes beside the weights
MARGIN_BYTES = 64 << 20  #: disk left free for the ledger and its backups


def check_memory(model: CheckedModel, *, ignore: bool = False) -> None:
    """Refuse a model that does not fit into this machine's memory together with its evaluation.

    Raises:
        CannotFinish: with both figures.
    """
    needs, there = model.file_bytes + min(WORKING_BYTES, 4 * model.file_bytes), psutil.virtual_memory().total
    if needs > there and not ignore:
        raise CannotFinish(
            f"Measuring {model.path.name} takes about {needs / 1e9:.1f} GB of memory, and this machine has "
            f"{there / 1e9:.1f} GB. Pass --force to try it all the same, from disk and slowly.")


def check_disk(folder: Path, sizes: Sequence[int], store_bytes: int, *, compared: int = 0) -> None:
    """Refuse a run for which the disk is too small.

    Two levels at a time must fit, the best so far and the one being built, and the original's
    log-probabilities; older levels give way when the disk budget says so.

    Args:
        folder: of the levels.
        sizes: of the levels, in bytes.
        store_bytes: of the original's log-probabilities.
        compared: bytes of the variants of a level that importance matrices are compared by, all at once.

    Raises:
        DiskFull: with what is needed and what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needs = max(sum(sorted(sizes)[-2:]), compared) + store_bytes + MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if needs > free:
        raise DiskFull(f"This run needs {needs / 1e9:,.2f} GB of disk under {folder.parent}, and "
                       f"{free / 1e9:,.2f} GB are free. Free some space, or choose another place with --state-dir.")


def check_time(plan: PressPlan, model_bytes: int, baseline_s: float, levels: int) -> str | None:
    """Return a sentence that says how long the levels will take, judging by the original.

    Quantized models are measured faster than the original, so this errs on the long side.

    Args:
        plan: for its deadline.
        model_bytes: of the original.
        baseline_s: what measuring the original took; 0 when it was not measured now.
        levels: to be built at most.

    Raises:
        CannotFinish: one level alone would break the deadline.
    """
    if baseline_s < 1:
        return None
    per_level = baseline_s + model_bytes / 60e6  # quantizing reads about 60 MB/s on two cores
    if plan.timeout_s and baseline_s > plan.timeout_s:
        raise CannotFinish(f"Measuring a level takes about {baseline_s:.0f} s here, and the deadline of a level is "
                           f"{plan.timeout_s:.0f} s. Raise --timeout or measure less with --text-windows.")
    if per_level * levels < 90:
        return None
    return f"About {per_level * levels / 60:.0f} minutes for at most {levels} levels, judging by the original."
