"""Validity of the emotional metrics: do they prefer what people would, and agree with graders?

On the bank of scenarios: each empathic reply against the dismissive one, against an empathic reply to
another scenario, and against spoilt versions of itself. On labelled texts that no weights were fitted to
(`labels/*_test.jsonl`): EPITOME grades, intensity, figurative language, Plutchik's emotions. With --goemotions
FOLDER also the classifier on GoEmotions' test split, which people labelled.

Prints the tables of docs/metrics.md.

    python benchmarks/validity.py [--goemotions FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from loops.evaluation import emotions
from loops.evaluation.empathy import grade
from loops.evaluation.feelings import PLUTCHIK
from loops.evaluation.figurative import count_figures
from loops.evaluation.labelled import macro_f1, rank_correlation
from loops.evaluation.language import words
from loops.evaluation.metrics import evaluate, overall, response_fluency
from loops.evaluation.names import METRICS
from loops.evaluation.plutchik import feel, intensity
from loops.evaluation.scenarios import Scenario, read_scenarios

LABELS = Path(__file__).with_name("labels")
EKMAN_F1 = 0.57
SHUFFLES = 5

Scores = Mapping[str, float]

#: spoilt versions of a reply, and the metrics that must be nearly nothing for each
SPOILT: dict[str, tuple[Callable[[Scenario], str], tuple[str, ...]]] = {
    "empty": (lambda _scenario: "", METRICS),
    "punctuation": (lambda _scenario: "?!... --- !!! ,,, ?", METRICS),
    "the prompt itself": (lambda scenario: scenario.prompt, tuple(set(METRICS) - {"response_fluency"})),
    "one word again and again": (lambda scenario: " ".join(words(scenario.empathic)[:1] * 60),
                                 ("emotional_match", "empathy", "response_fluency", "metaphor_usage")),
    "one sentence 20 times": (lambda scenario: " ".join([scenario.empathic.split(". ")[0] + "."] * 20),
                              ("response_fluency",)),
    "cut after three words": (lambda scenario: " ".join(scenario.empathic.split()[:3]), ("response_fluency",)),
}
NEARLY_NOTHING = {"cut after three words": 0.3}  #: mean score allowed; 0.1 for the others


@dataclass(frozen=True)
class Bank:
    """All scenarios with the scores of their replies.

    Attributes:
        scenarios: of the bank.
        empathic: scores of each empathic reply.
        dismissive: of each dismissive reply.
        shuffled: per shuffle, of an empathic reply to another scenario with another emotion.
    """

    scenarios: Sequence[Scenario]
    empathic: Sequence[Scores]
    dismissive: Sequence[Scores]
    shuffled: Sequence[Sequence[Scores]]


def _score(scenario: Scenario, reply: str) -> dict[str, float]:
    scores = evaluate(scenario, reply)
    return {**scores, "overall": overall(scores)}


def _partners(scenarios: Sequence[Scenario], seed: int) -> list[int]:
    """Return for each scenario the place of another one with another emotion, at random."""
    rng, everywhere = random.Random(seed), range(len(scenarios))
    return [rng.choice([other for other in everywhere if scenarios[other].emotion != scenario.emotion])
            for scenario in scenarios]


def score_bank(scenarios: Sequence[Scenario], shuffles: int = SHUFFLES) -> Bank:
    """Score every reply of the bank."""
    return Bank(scenarios, [_score(one, one.empathic) for one in scenarios],
                [_score(one, one.dismissive) for one in scenarios],
                [[_score(one, scenarios[other].empathic)
                  for one, other in zip(scenarios, _partners(scenarios, seed), strict=True)]
                 for seed in range(shuffles)])


def share_above(better: Sequence[Scores], worse: Sequence[Scores], name: str) -> float:
    """Return the share of pairs in which the first scores higher."""
    return fmean(one[name] > other[name] for one, other in zip(better, worse, strict=True))


def figure_share(bank: Bank) -> tuple[float, int]:
    """Return how often the reply that both annotators call figurative, the other not, has the higher metaphor usage."""
    labels = {row["id"]: (set(row["empathic"]), set(row["dismissive"])) for row in _read(LABELS / "bank_figures.jsonl")}
    right = []
    for one, good, bad in zip(bank.scenarios, bank.empathic, bank.dismissive, strict=True):
        if labels[one.id] == ({True}, {False}):
            right.append(good["metaphor_usage"] > bad["metaphor_usage"])
        elif labels[one.id] == ({False}, {True}):
            right.append(bad["metaphor_usage"] > good["metaphor_usage"])
    return fmean(right), len(right)


def fluency_share(scenarios: Sequence[Scenario]) -> float:
    """Return how often a reply is more fluent than its own words in another order, by the starter's likelihood."""
    from loops.engine.chat import prompt_tokens
    from loops.engine.model import load_model
    from loops.engine.options import EngineOptions
    from loops.engine.score import Question, score
    from loops.starter import STARTER_GGUF

    rng = random.Random(0)
    pairs = []
    for scenario in scenarios:
        mixed = scenario.empathic.split()
        rng.shuffle(mixed)
        pairs.append((scenario.empathic, " ".join(mixed) + "."))
    with load_model(STARTER_GGUF, EngineOptions(extra_buffers=False)) as model:
        found = score(model, [Question(prompt_tokens(model, one.prompt), tuple(
            model.tokenize(text, add_bos=False, special=False) for text in pair))
            for one, pair in zip(scenarios, pairs, strict=True)])
    return fmean(response_fluency(good, first.mean) > response_fluency(bad, second.mean)
                 for (good, bad), (first, second) in zip(pairs, found, strict=True))


def spoilt_means(scenarios: Sequence[Scenario]) -> dict[str, dict[str, float]]:
    """Return the mean of each metric over the bank for each way to spoil a reply."""
    means = {}
    for name, (spoil, _) in SPOILT.items():
        scores = [evaluate(one, spoil(one)) for one in scenarios]
        means[name] = {metric: fmean(row[metric] for row in scores) for metric in METRICS}
    return means


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def agreement() -> dict[str, dict[str, float]]:
    """Return how well the measures agree with the labelled texts that nothing was fitted to."""
    found: dict[str, dict[str, float]] = {}
    rows = _read(LABELS / "empathy_test.jsonl")
    grades = [grade(row["prompt"], row["reply"]) for row in rows]
    for scale in ("reaction", "interpretation", "exploration"):
        gold, mine = [row[scale] for row in rows], [getattr(one, scale) for one in grades]
        import numpy as np

        found[scale] = {"n": len(rows), "rank correlation": rank_correlation(mine, gold),
                        "macro-F1": macro_f1(np.array(gold), np.rint(mine).astype(int))}
    rows = _read(LABELS / "intensity_test.jsonl")
    gold, mine = [row["intensity"] for row in rows], [intensity(row["text"]) for row in rows]
    found["intensity"] = {"n": len(rows), "rank correlation": rank_correlation(mine, gold),
                          "mean error": fmean(abs(a - b) for a, b in zip(mine, gold, strict=True))}
    rows = _read(LABELS / "figurative_test.jsonl")
    pairs = [(row["figurative"], count_figures(row["text"]) > 0) for row in rows]
    hits = sum(gold and mine for gold, mine in pairs)
    found["figurative language"] = {"n": len(rows), "accuracy": fmean(gold == mine for gold, mine in pairs),
                                    "F1": 2 * hits / max(1, sum(gold + mine for gold, mine in pairs))}
    rows = _read(LABELS / "emotions_test.jsonl")
    found["Plutchik's emotions"] = {"n": len(rows), "chance": 1 / len(PLUTCHIK),
                                    "accuracy": fmean(feel(row["text"]).dominant == row["emotion"] for row in rows)}
    return found


def ekman_f1(folder: Path) -> dict[str, float]:
    """Return F1 of each Ekman class on GoEmotions' test split and their mean."""
    lines = [line.split("\t") for line in (folder / "ekman" / "test.tsv").read_text(encoding="utf-8").splitlines()]
    names = (folder / "ekman" / "labels.txt").read_text(encoding="utf-8").split()
    gold = [{names[int(number)] for number in line[1].split(",")} for line in lines]
    mine = [set(labels) for labels in emotions.ekman_labels([line[0] for line in lines])]
    scores = {}
    for name in names:
        hits = sum(name in one and name in other for one, other in zip(gold, mine, strict=True))
        scores[name] = 2 * hits / max(1, sum((name in one) + (name in other)
                                             for one, other in zip(gold, mine, strict=True)))
    return {**scores, "macro-F1": fmean(scores.values())}


def _print_bank(bank: Bank) -> bool:
    figures, n_figures = figure_share(bank)
    kept = True
    print(f"\n### On the {len(bank.scenarios)} scenarios\n")
    print("| metric | empathic over dismissive | over a reply to another scenario | rank correlation with length |")
    print("|---|---|---|---|")
    lengths = [float(len(words(one.empathic))) for one in bank.scenarios]
    for name in ("overall", *METRICS):
        over = share_above(bank.empathic, bank.dismissive, name)
        shuffled = fmean(share_above(bank.empathic, other, name) for other in bank.shuffled)
        length = rank_correlation([one[name] for one in bank.empathic], lengths)
        told = f"{100 * over:.1f} %"
        if name == "response_fluency":
            told = f"{100 * fluency_share(bank.scenarios):.1f} % over its own words in another order"
        elif name == "metaphor_usage":
            told = f"{100 * figures:.1f} % of the {n_figures} pairs where, by two annotators, one reply has a figure"
            kept &= figures >= 0.85
        else:
            kept &= over >= (0.95 if name == "overall" else 0.85)
        if name == "overall":
            kept &= shuffled >= 0.9 and abs(length) < 0.2
        print(f"| {name.replace('_', ' ')} | {told} | {100 * shuffled:.1f} % | {length:+.2f} |")
    return kept


def _print_spoilt(means: Mapping[str, Mapping[str, float]]) -> bool:
    print("\n### Spoilt replies, mean scores (bold: must be nearly nothing)\n")
    print("| reply |" + "".join(f" {name.replace('_', ' ')} |" for name in METRICS) + "\n|---|" + "---|" * len(METRICS))
    kept = True
    for name, row in means.items():
        cells = []
        for metric in METRICS:
            must = metric in SPOILT[name][1]
            kept &= not must or row[metric] <= NEARLY_NOTHING.get(name, 0.1)
            cells.append(f"**{row[metric]:.2f}**" if must else f"{row[metric]:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    return kept


def main() -> int:
    """Measure, print, and return 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goemotions", type=Path, help="folder with GoEmotions (ekman/test.tsv, ekman/labels.txt)")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    bank = score_bank(read_scenarios())
    kept = _print_bank(bank)
    means = spoilt_means(bank.scenarios)
    kept &= _print_spoilt(means)
    found = agreement()
    print("\n### Against labelled texts that nothing was fitted to\n\n| measure | texts | agreement |\n|---|---|---|")
    for name, row in found.items():
        told = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "n")
        print(f"| {name} | {row['n']:.0f} | {told} |")
    f1 = ekman_f1(arguments.goemotions) if arguments.goemotions else {}
    if f1:
        kept &= f1["macro-F1"] >= EKMAN_F1
        print("\n### Emotion classifier on GoEmotions' test split (labelled by people), F1\n")
        print("| " + " | ".join(f1) + " |\n|" + "---|" * len(f1))
        print("| " + " | ".join(f"{value:.3f}" for value in f1.values()) + " |")
    print("\nkept" if kept else "\nMISSED")
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "bank": [{"id": one.id, "empathic": dict(good), "dismissive": dict(bad)} for one, good, bad in
                     zip(bank.scenarios, bank.empathic, bank.dismissive, strict=True)],
            "spoilt": means, "agreement": found, "ekman_f1": f1, "kept": kept}, indent=1), encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
