"""Texts that graders labelled: how they are read, and how well what is found agrees with the labels.

For fitting weights and measuring how good they are; no score of a reply depends on this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRADES = 3  #: of EPITOME's scales: 0, 1, 2


def parse_files(description: str | None, output: Path) -> argparse.Namespace:
    """Return what the command line names: `files` to learn from, `test` files only to measure, `output` to write.

    Args:
        description: of the program, printed as it stands.
        output: where the weights go by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--test", nargs="*", type=Path, default=[])
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the labelled texts of some files of JSON lines, in order; blank lines are passed over."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank."""
    def ranks(values: Sequence[float]) -> NDArray[np.float64]:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def macro_f1(gold: NDArray[np.int64], found: NDArray[np.int64], classes: int = GRADES) -> float:
    """Return the mean F1 over the classes 0 to `classes` - 1; one that is neither there nor found counts 0."""
    scores = []
    for value in range(classes):
        hits = ((gold == value) & (found == value)).sum()
        scores.append(2 * hits / max(1, (gold == value).sum() + (found == value).sum()))
    return float(np.mean(scores))
