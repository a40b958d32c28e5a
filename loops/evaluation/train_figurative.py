"""Fit the weights of figurative language: `python -m loops.evaluation.train_figurative FILE... --test FILE...`.

Each file holds JSON lines with text and figurative. Logistic regression with an L2 penalty, by Newton's method in
numpy; the penalty is chosen by cross-validation. A text of several sentences is learnt from as a whole, and judged, as
`figurativeness` does, by its most figurative sentence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loops.evaluation.figurative import FIGURATIVE, WEIGHTS, features
from loops.evaluation.labelled import parse_files, read
from loops.evaluation.language import sentences
from state.files import write_atomic

PENALTIES = (1.0, 2.0, 4.0)
STEPS, CLOSE = 25, 1e-4
FOLDS, ROUNDS = 5, 1
RARE = 4  #: features found in fewer texts are left out

Floats = NDArray[np.float64]


def _table(found: Sequence[dict[str, float]], names: Sequence[str]) -> Floats:
    """Return one row of features for each, the last column 1."""
    return np.array([[*(one.get(name, 0.0) for name in names), 1.0] for one in found]).reshape(-1, len(names) + 1)


def fit(table: Floats, gold: Floats, penalty: float) -> Floats:
    """Return the weights (features + 1,) that make the labels most likely; the last, the bias, is not penalised."""
    weights = np.zeros(table.shape[1])
    ridge = np.full(table.shape[1], penalty)
    ridge[-1] = 1e-6
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(table @ weights, -30, 30)))
        slope = table.T @ (chance - gold) + ridge * weights
        curve = (table * (chance * (1 - chance))[:, None]).T @ table + np.diag(ridge)
        step = np.linalg.solve(curve, slope)
        weights = weights - step
        if float(np.abs(step).max()) < CLOSE:
            break
    return weights


def scores(gold: Sequence[bool], chances: Sequence[float]) -> dict[str, float]:
    """Return accuracy, precision, recall and F1."""
    said = [chance >= FIGURATIVE for chance in chances]
    hits = sum(a and b for a, b in zip(gold, said, strict=True))
    return {"accuracy": sum(a == b for a, b in zip(gold, said, strict=True)) / max(1, len(gold)),
            "precision": hits / max(1, sum(said)), "recall": hits / max(1, sum(gold)),
            "f1": 2 * hits / max(1, sum(said) + sum(gold))}


class Texts:
    """Labelled texts and what `features` finds in them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.gold = [bool(row["figurative"]) for row in rows]
        self.whole = [features(row["text"]) for row in rows]
        self.parts = [[features(sentence) for sentence in sentences(row["text"])] for row in rows]

    def names(self) -> list[str]:
        """Return the features that enough texts have."""
        names = sorted({name for one in self.whole for name in one})
        return [name for name in names if sum(name in one for one in self.whole) >= RARE]

    def table(self, names: Sequence[str]) -> Floats:
        """Return a row of features for each text."""
        return _table(self.whole, names)

    def labels(self) -> Floats:
        """Return 1 for each figurative text, else 0."""
        return np.array(self.gold, dtype=np.float64)

    def chances(self, weights: Floats, names: Sequence[str], places: Sequence[int]) -> list[float]:
        """Return the probability of some texts, each that of its most figurative sentence."""
        return [max((float(1 / (1 + np.exp(-at))) for at in _table(self.parts[place], names) @ weights), default=0.0)
                for place in places]

    def cross_validate(self, names: Sequence[str], penalty: float) -> tuple[float, list[list[float]]]:
        """Return the mean log loss over the folds of several rounds, and each round's probabilities."""
        table, gold, rounds = self.table(names), self.labels(), []
        for seed in range(ROUNDS):
            folds = np.random.default_rng(seed).permutation(len(gold)) % FOLDS
            chances = np.zeros(len(gold))
            for fold in range(FOLDS):
                weights = fit(table[folds != fold], gold[folds != fold], penalty)
                places = np.flatnonzero(folds == fold)
                chances[places] = self.chances(weights, names, [int(place) for place in places])
            rounds.append([float(chance) for chance in chances])
        found = np.clip(np.array(rounds), 1e-6, 1 - 1e-6)
        return float(-(gold * np.log(found) + (1 - gold) * np.log(1 - found)).mean()), rounds


def main() -> None:
    """Fit, write the weights and print how well they do, cross-validated and on the test files."""
    options = parse_files(__doc__, WEIGHTS)
    texts = Texts(read(options.files))
    names = texts.names()
    penalty = min(PENALTIES, key=lambda value: texts.cross_validate(names, value)[0])
    loss, rounds = texts.cross_validate(names, penalty)
    each = [scores(texts.gold, chances) for chances in rounds]
    told = ", ".join(f"{name} {np.mean([one[name] for one in each]):.3f}" for name in each[0])
    print(f"{len(texts.gold)} texts, {len(names)} features, penalty {penalty:g}, "
          f"cross-validated loss {loss:.3f}: {told}")
    weights = fit(texts.table(names), texts.labels(), penalty)
    if options.test:
        test = Texts(read(options.test))
        reached = scores(test.gold, test.chances(weights, names, range(len(test.gold))))
        print(f"{len(test.gold)} unseen: " + ", ".join(f"{name} {value:.3f}" for name, value in reached.items()))
    stored = {"bias": round(float(weights[-1]), 3),
              "weights": {name: round(float(weight), 3) for name, weight in zip(names, weights, strict=False)
                          if abs(weight) >= 0.05}}
    write_atomic(options.output, (json.dumps(stored, indent=1) + "\n").encode(), mode=0o644)


if __name__ == "__main__":
    main()
