"""Fit the weights of the empathy grades: `python -m loops.evaluation.train_empathy FILE... --test FILE...`.

Each file holds JSON lines with prompt, reply, reaction, interpretation and exploration, the last three
graded 0 to 2. Ordinal logistic regression (proportional odds, McCullagh 1980) with an L2 penalty,
by gradient descent in numpy; the penalty is chosen by five-fold cross-validation.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loops.evaluation.empathy import SCALES, WEIGHTS, features
from loops.evaluation.labelled import macro_f1, parse_files, rank_correlation, read
from state.files import write_atomic

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3)
STEPS, RATE = 1500, 0.05
RARE = 4  #: features found in fewer replies are left out

Floats = NDArray[np.float64]


def _fit(table: Floats, grades: NDArray[np.int64], penalty: float) -> tuple[Floats, Floats]:
    """Return weights (features,) and cuts (2,) that make the grades most likely; by Adam."""
    parameters = np.zeros(table.shape[1] + 2)
    parameters[-2:] = 0.5, 0.5  # the first cut, and the log of the step to the second
    first = second = np.zeros_like(parameters)
    at_least = np.stack([grades >= 1, grades >= 2], axis=1).astype(float)
    for step in range(1, STEPS + 1):
        cuts = np.array([parameters[-2], parameters[-2] + np.exp(parameters[-1])])
        error = 1 / (1 + np.exp(cuts - (table @ parameters[:-2])[:, None])) - at_least  # (replies, 2)
        slope = np.empty_like(parameters)
        slope[:-2] = table.T @ error.sum(axis=1) / len(table) + penalty * parameters[:-2]
        slope[-2:] = -error.sum() / len(table), -error[:, 1].sum() / len(table) * np.exp(parameters[-1])
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        parameters = parameters - RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return parameters[:-2], np.array([parameters[-2], parameters[-2] + np.exp(parameters[-1])])


def _expect(table: Floats, weights: Floats, cuts: Floats) -> Floats:
    expected: Floats = (1 / (1 + np.exp(cuts - (table @ weights)[:, None]))).sum(axis=1)
    return expected


def _cross_validate(table: Floats, grades: NDArray[np.int64], penalty: float) -> float:
    """Return the mean squared error of the expected grade over five folds."""
    folds = np.arange(len(table)) % 5
    errors = []
    for fold in range(5):
        weights, cuts = _fit(table[folds != fold], grades[folds != fold], penalty)
        errors.append((_expect(table[folds == fold], weights, cuts) - grades[folds == fold]) ** 2)
    return float(np.concatenate(errors).mean())


def main() -> None:
    """Fit, write the weights and print how well they do on the test files."""
    options = parse_files(__doc__, WEIGHTS)
    rows, test = read(options.files), read(options.test)
    found, unseen = ([features(row["prompt"], row["reply"]) for row in part] for part in (rows, test))
    names = sorted({name for one in found for name in one})
    names = [name for name in names if sum(name in one for one in found) >= RARE]
    table, unseen_table = (np.array([[one.get(name, 0.0) for name in names] for one in part]).reshape(-1, len(names))
                           for part in (found, unseen))
    stored: dict[str, Any] = {}
    for scale in SCALES:
        grades = np.array([row[scale] for row in rows])
        penalty = min(PENALTIES, key=lambda value: _cross_validate(table, grades, value))
        weights, cuts = _fit(table, grades, penalty)
        stored[scale] = {"weights": {name: round(float(weight), 3) for name, weight in zip(names, weights, strict=True)
                                     if abs(weight) >= 0.02}, "cuts": [round(float(cut), 3) for cut in cuts]}
        error = _cross_validate(table, grades, penalty)
        told = f"{scale}: {len(rows)} replies, penalty {penalty:g}, cross-validated squared error {error:.3f}"
        if test:
            gold, expected = np.array([row[scale] for row in test]), _expect(unseen_table, weights, cuts)
            told += (f"; on {len(test)} unseen: rank correlation {rank_correlation(list(expected), list(gold)):.3f}, "
                     f"macro-F1 {macro_f1(gold, np.rint(expected).astype(int)):.3f}, "
                     f"accuracy {(np.rint(expected) == gold).mean():.3f}")
        print(told)
    write_atomic(options.output, (json.dumps(stored, indent=1) + "\n").encode(), mode=0o644)


if __name__ == "__main__":
    main()
