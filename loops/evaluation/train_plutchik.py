"""Fit the head of `plutchik.py`, and print how it does.

    python -m loops.evaluation.train_plutchik --tellings FILE... --intensities FILE... --goemotions FOLDER

Tellings are JSON lines with text, emotion (one of Plutchik's eight) and perhaps intensity; intensities are JSON lines
with text and intensity; files of either kind after `--test` are only measured. The folder holds GoEmotions as
`train_emotions.py` wants it; its dev split teaches, because the classifier knows train, and its test split is only
measured. Of its comments those count whose labels stand for one emotion (`ONE_OF`). Multinomial logistic regressions
by Adam (Kingma and Ba, ICLR 2015) and a ridge regression, in numpy; penalties are chosen by leaving out one file after
the other. A minute of one processor; the same numpy makes the same weights again.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loops.evaluation import emotions, plutchik
from loops.evaluation.feelings import PLUTCHIK, read_words
from loops.evaluation.labelled import macro_f1, rank_correlation, read
from loops.evaluation.language import normalise, stem, words
from loops.evaluation.train_emotions import read_rows
from state.files import write_atomic

#: sadness that must not be taken for a wish, because it is said in words of wanting and ending
DESPAIR = (
    "I want to die", "I just want to die.", "I WANT TO DIE", "i want to kill myself", "I'll kill myself tonight.",
    "I wish I was dead.", "i dont want to live anymore", "I don't want to be alive", "I hope I don't wake up tomorrow.",
    "I want to end it all.", "I am suicidal.", "there is no point in living", "I want to disappear.", "I can't go on.",
    "i cant do this anymore", "Everyone would be better off without me.", "I keep thinking about ending my life.",
    "I have nothing left to live for.", "i want it all to end", "I'd rather be dead than go on like this.")
SITUATIONS = Path(__file__).with_name("data") / "situations.txt"

Floats = NDArray[np.float64]

#: GoEmotions' labels that stand for one of the eight; the others fit several or none
ONE_OF = {"joy": "joy amusement relief pride love", "trust": "caring approval admiration gratitude",
          "fear": "fear nervousness", "surprise": "surprise realization",
          "sadness": "sadness grief remorse disappointment", "disgust": "disgust", "anger": "anger annoyance",
          "anticipation": "desire optimism excitement curiosity"}
NEUTRALS, NEUTRAL_INTENSITY = 300, 0.05  #: neutral comments that are learnt from, as having this intensity
OF_TELLING, OF_NEUTRAL = 0.1, 0.1  #: weight in learning intensity, against 1 of a text whose range is the whole scale
OF_SEEDS, OF_DESPAIR = 0.02, 0.1  #: weight of the vocabulary of feelings, and of DESPAIR, in learning emotions
CLEAR = 0.6  #: share of its strongest emotion from which on a feeling is learnt from
FRAMES = ("{}", "I feel {}.", "I am so {}!")  #: sentences in which its words are learnt from
RARE = 3  #: a stem or a pair of stems in fewer tellings does not count by itself
MEASURE, MIXED, CUE, TERM, RIDGE_TERM = 0.1, 0.4, 0.17, 3.0, 1.0  #: size of each kind of feature, for one penalty
PENALTIES = (0.0002, 0.0004, 0.0008, 0.0015, 0.003, 0.006)
COMMENT_PENALTIES = (0.0003, 0.001, 0.003, 0.01)
RIDGES = (0.1, 0.3, 1.0, 3.0)
GATE_PENALTY = 0.0003
FOR_TELLING = 1.0  #: logit by which a text whose form leaves it open counts as told, not as a comment
EVEN = 0.5  #: 1 lets each emotion count the same in learning from comments, 0 each comment
STEPS, RATE = 400, 0.05
MAX_BYTES = 300_000


@dataclass(frozen=True)
class Texts:
    """Texts with what is known and measured of them.

    Attributes:
        texts: all with words.
        emotion: index in PLUTCHIK, -1 for unknown, int64 (texts,).
        intensity: nan for unknown, float64 (texts,).
        measures: float64 (texts, measures).
        stems: of each text.
    """

    texts: list[str]
    emotion: NDArray[np.int64]
    intensity: Floats
    measures: Floats
    stems: list[list[str]]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, str | None, float | None]]) -> Texts:
        """Measure texts, each with its emotion and intensity if known; one without words is left out."""
        rows = [row for row in rows if plutchik.has_words(row[0])]
        by_cue: dict[str, tuple[int, ...]] = {}
        for cue, group in (pairs := read_cues()):
            by_cue[cue] = (*by_cue.get(cue, ()), group)
        return cls([text for text, _, _ in rows],
                   np.array([PLUTCHIK.index(emotion) if emotion else -1 for _, emotion, _ in rows]),
                   np.array([np.nan if strength is None else strength for _, _, strength in rows]),
                   np.array([plutchik.measure(text, by_cue, pairs[-1][1] + 1) for text, _, _ in rows]),
                   [plutchik.stems_of(text) for text, _, _ in rows])

    def part(self, rows: NDArray[np.int64]) -> Texts:
        """Return the texts of some rows."""
        return Texts([self.texts[row] for row in rows], self.emotion[rows], self.intensity[rows], self.measures[rows],
                     [self.stems[row] for row in rows])


@functools.cache
def read_cues(path: Path = SITUATIONS) -> tuple[tuple[str, int], ...]:
    """Return the stems of each cue, joined by spaces, and the number of its group; a cue may be in several."""
    found: dict[tuple[str, int], None] = {}
    group = -1
    for line in path.read_text(encoding="utf-8").splitlines():
        for cue in () if line.startswith("#") else line.split():
            if cue.startswith("["):
                group += 1
            elif stems := [stem(word) for word in words(normalise(cue.replace("_", " ")))]:
                found[" ".join(stems), group] = None
    return tuple(found)


def read_file(path: Path) -> Texts:
    """Return the labelled texts of a file."""
    return Texts.of([(row["text"], row.get("emotion"), row.get("intensity")) for row in read([path])])


def read_comments(folder: Path, split: str) -> tuple[Texts, Texts]:
    """Return GoEmotions' comments of one emotion, and NEUTRALS of the neutral ones."""
    texts, gold = read_rows(folder / "original" / f"{split}.tsv", len(emotions.LABELS))
    meaning = {label: emotion for emotion, labels in ONE_OF.items() for label in labels.split()}
    of_one: list[tuple[str, str | None, float | None]] = []
    neutral: list[tuple[str, str | None, float | None]] = []
    for at in np.random.default_rng(0).permutation(len(texts)):
        labels = [emotions.LABELS[column] for column in np.flatnonzero(gold[at])]
        emotion = meaning.get(labels[0])
        if labels == ["neutral"]:
            neutral.append((texts[at], None, NEUTRAL_INTENSITY))
        elif emotion and {meaning.get(label) for label in labels} == {emotion}:
            of_one.append((texts[at], emotion, None))
    return Texts.of(of_one), Texts.of(neutral[:NEUTRALS])


def read_seeds() -> Texts:
    """Return the words of feeling that mean one emotion above all, alone and said of oneself, and then DESPAIR."""
    rows: list[tuple[str, str | None, float | None]] = []
    for family, _, word in read_words():
        if max(family.shares) >= CLEAR:
            emotion = PLUTCHIK[family.shares.index(max(family.shares))]
            rows += [(frame.format(word.rstrip("?").replace("_", " ")), emotion, None) for frame in FRAMES]
    return Texts.of([*rows, *((text, "sadness", None) for text in DESPAIR)])


def join(sets: Sequence[Texts]) -> Texts:
    """Return all texts of some sets."""
    return Texts([text for one in sets for text in one.texts], np.concatenate([one.emotion for one in sets]),
                 np.concatenate([one.intensity for one in sets]), np.concatenate([one.measures for one in sets]),
                 [stems for one in sets for stems in one.stems])


@dataclass(frozen=True)
class Scale:
    """How features are made of texts: what `plutchik.Head` has of it, and the size of each measure."""

    terms: dict[str, int]
    rarity: Floats
    mean: Floats
    spread: Floats
    size: Floats

    @classmethod
    def of(cls, texts: Texts) -> Scale:
        """Return the scale that fits some texts."""
        number = Counter(run for stems in texts.stems for run in set(plutchik.runs(stems, 2)))
        terms = {run: row for row, run in enumerate(sorted(run for run, count in number.items() if count >= RARE))}
        groups = read_cues()[-1][1] + 1
        size = np.full(texts.measures.shape[1], MEASURE)
        size[-groups:] = CUE
        return cls(terms, np.array([np.log(len(texts.stems) / number[term]) for term in terms]),
                   texts.measures.mean(axis=0), texts.measures.std(axis=0) + 0.001, size)

    def features(self, texts: Texts, term: float) -> Floats:
        """Return the features of texts, (texts, measures + terms), each text's terms of the length `term`."""
        table = np.zeros((len(texts.stems), len(self.terms)))
        for row, stems in zip(table, texts.stems, strict=True):
            at = sorted({self.terms[run] for run in plutchik.runs(stems, 2) if run in self.terms})
            if at:
                row[at] = self.rarity[at] / np.linalg.norm(self.rarity[at]) * term
        return np.hstack([(texts.measures - self.mean) / self.spread * self.size, table])


def even_shares(gold: NDArray[np.int64], even: float = 1.0) -> Floats:
    """Return a weight for each text, sum 1; see EVEN for `even`."""
    share = np.bincount(gold)[gold].astype(np.float64) ** -even
    return np.asarray(share / share.sum())


def fit_softmax(table: Floats, gold: NDArray[np.int64], share: Floats, penalty: float) -> tuple[Floats, Floats]:
    """Return weights (features, classes) and bias of a multinomial regression, each text with its weight."""
    classes = int(gold.max()) + 1
    table, target = np.hstack([table, np.ones((len(table), 1))]).astype(np.float32), np.eye(classes)[gold]
    shrink = np.append(np.full(table.shape[1] - 1, penalty), 0.0)[:, None]
    weights = np.zeros((table.shape[1], classes))
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        logits = table @ weights.astype(np.float32)
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        error = (raised / raised.sum(axis=1, keepdims=True) - target) * share[:, None]
        slope = table.T @ error.astype(np.float32) + shrink * weights
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = RATE * (1 - (step - 1) / STEPS)
        weights -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return weights[:-1], weights[-1]


def fit_ridge(table: Floats, gold: Floats, share: Floats, penalty: float) -> tuple[Floats, float]:
    """Return weights (features,) and bias of the least squares, each text with its weight; solved in its dual."""
    middle, centre = np.average(table, axis=0, weights=share), np.average(gold, weights=share)
    root = np.sqrt(share)
    left = (table - middle) * root[:, None]
    weights = left.T @ np.linalg.solve(left @ left.T + penalty * np.eye(len(gold)), (gold - centre) * root)
    return weights, float(centre - middle @ weights)


def folds(sets: Sequence[Texts]) -> Iterator[tuple[Texts, Texts]]:
    """Yield each set after the others joined."""
    for at, one in enumerate(sets):
        yield join([other for index, other in enumerate(sets) if index != at]), one


def choose(values: Sequence[float], error: Callable[[float], float]) -> float:
    """Return the value of the least error, and print all."""
    errors = {value: error(value) for value in values}
    print("  penalties:", ", ".join(f"{value:g} {found:.4f}" for value, found in errors.items()))
    return min(errors, key=lambda value: errors[value])


def _surprise(logits: Floats, gold: NDArray[np.int64]) -> float:
    """Return the mean negative log-likelihood."""
    high = logits.max(axis=1, keepdims=True)
    normal = high[:, 0] + np.log(np.exp(logits - high).sum(axis=1))
    return float((normal - logits[np.arange(len(gold)), gold]).mean())


def fit_emotions(sets: Sequence[Texts], seeds: Texts, penalties: Sequence[float],
                 features: Callable[[Texts], Floats], even: float = 1.0) -> tuple[Floats, Floats]:
    """Return weights and bias for the eight emotions; print what the penalties do to each set left out."""
    seed_table, named = features(seeds), even_shares(seeds.emotion[:-len(DESPAIR)])
    seed_share = np.append(named * OF_SEEDS, np.full(len(DESPAIR), OF_DESPAIR / len(DESPAIR)))

    def fit(learnt: Texts, table: Floats, penalty: float) -> tuple[Floats, Floats]:
        share = even_shares(learnt.emotion, even) * (1 - OF_SEEDS - OF_DESPAIR)
        return fit_softmax(np.vstack([table, seed_table]), np.concatenate([learnt.emotion, seeds.emotion]),
                           np.concatenate([share, seed_share]), penalty)

    tables = [(learnt, features(learnt), features(left), left.emotion) for learnt, left in folds(sets)]

    def judge(penalty: float) -> float:
        logits = [(unseen @ weights + bias, wanted) for learnt, table, unseen, wanted in tables
                  for weights, bias in [fit(learnt, table, penalty)]]
        print(f"  {penalty:g}: right in each set left out", " ".join(
            f"{(np.argmax(found, axis=1) == wanted).mean():.3f}" for found, wanted in logits))
        return float(np.mean([_surprise(found, wanted) for found, wanted in logits]))

    everything = join(sets)
    return fit(everything, features(everything), choose(penalties, judge))


def fit_intensity(sets: Sequence[Texts], tellings: Texts, neutral: Texts, features: Callable[[Texts], Floats]
                  ) -> tuple[Floats, float]:
    """Return weights and bias for intensity, learnt from sets on the whole scale, tellings, and neutral comments."""
    known = np.isfinite(tellings.intensity)
    side = np.vstack([features(tellings)[known], features(neutral)])
    side_gold = np.concatenate([tellings.intensity[known], neutral.intensity])
    side_share = np.repeat([OF_TELLING, OF_NEUTRAL], [known.sum(), len(neutral.stems)])

    def fit(learnt: Texts, penalty: float) -> tuple[Floats, float]:
        return fit_ridge(np.vstack([features(learnt), side]), np.concatenate([learnt.intensity, side_gold]),
                         np.concatenate([np.ones(len(learnt.stems)), side_share]), penalty)

    def judge(penalty: float) -> float:
        errors = []
        for learnt, left in folds(sets):
            weights, bias = fit(learnt, penalty)
            errors.append(np.abs(np.clip(features(left) @ weights + bias, 0, 1) - left.intensity).mean())
        return float(np.mean(errors))

    return fit(join(sets), choose(RIDGES, judge))


def train(tellings: Sequence[Texts], intensities: Sequence[Texts], folder: Path) -> bytes:
    """Return the content of the file that `plutchik.load` reads."""
    (of_one, neutral), seeds = read_comments(folder, "dev"), read_seeds()
    scale = Scale.of(join([*tellings, *intensities]))
    measures = len(scale.size)
    of_comments = replace(scale, size=scale.size.copy())
    of_comments.size[2 * len(emotions.LABELS):][:len(PLUTCHIK)] = MIXED
    print("tellings")
    telling, telling_bias = fit_emotions(tellings, seeds, PENALTIES, lambda texts: scale.features(texts, TERM))
    print("comments")
    quarters = [of_one.part(np.arange(fold, len(of_one.texts), 4)) for fold in range(4)]
    comment, comment_bias = fit_emotions(quarters, seeds, COMMENT_PENALTIES,
                                         lambda texts: of_comments.features(texts, 0)[:, :measures], EVEN)
    print("intensity")
    strength, strength_bias = fit_intensity(intensities, join(tellings), neutral,
                                            lambda texts: scale.features(texts, RIDGE_TERM))
    both, labels = join([*tellings, of_one]), plutchik.BEFORE_SIGNS
    told = np.arange(len(both.stems)) < len(both.stems) - len(of_one.stems)
    gate, gate_bias = fit_softmax(scale.features(both, 0)[:, labels:measures], told.astype(np.int64),
                                  even_shares(told.astype(np.int64)), GATE_PENALTY)
    by_measure = np.zeros((measures, plutchik.OUTPUTS))
    by_measure[:, :8], by_measure[:, 8:16] = telling[:measures], comment * (of_comments.size / scale.size)[:, None]
    by_measure[labels:, 16], by_measure[:, 17] = gate[:, 1] - gate[:, 0], strength[:measures]
    by_term = np.zeros((len(scale.terms), plutchik.OUTPUTS))
    by_term[:, :8], by_term[:, 17] = telling[measures:] * TERM, strength[measures:] * RIDGE_TERM
    cues = read_cues()
    stored = io.BytesIO()
    np.savez_compressed(
        stored, terms=np.frombuffer("\n".join(scale.terms).encode(), np.uint8), rarity=scale.rarity.astype(np.float32),
        cues=np.frombuffer("\n".join(cue for cue, _ in cues).encode(), np.uint8),
        cue_groups=np.array([group for _, group in cues], np.uint8), mean=scale.mean.astype(np.float32),
        spread=scale.spread.astype(np.float32), by_term=by_term.astype(np.float16),
        by_measure=(by_measure * scale.size[:, None]).astype(np.float32),
        bias=np.array([*telling_bias, *comment_bias, gate_bias[1] - gate_bias[0] + FOR_TELLING, strength_bias],
                      np.float32))
    return stored.getvalue()


def report(name: str, known: Texts, head: plutchik.Head) -> None:
    """Print how what `plutchik.feel` says of texts agrees with what is known of them."""
    felt = [plutchik.feel(text, head) for text in known.texts]
    told = f"{name}: {len(felt)} texts"
    if (known.emotion >= 0).all():
        found = np.array([int(np.argmax(one.shares)) for one in felt])
        told += (f", emotion right {(found == known.emotion).mean():.3f}, "
                 f"macro-F1 {macro_f1(known.emotion, found, len(PLUTCHIK)):.3f}")
    strength = np.array([one.intensity for one in felt])
    told += f", mean intensity {strength.mean():.3f}"
    if np.ptp(known.intensity) > 0:
        told += (f", rank correlation {rank_correlation(list(strength), list(known.intensity)):.3f}, "
                 f"mean error {np.abs(strength - known.intensity).mean():.3f}")
    print(told)


def main() -> None:
    """Fit, write the head and print how well it does on GoEmotions' test split and on the test files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tellings", nargs="+", type=Path, required=True)
    parser.add_argument("--intensities", nargs="+", type=Path, required=True)
    parser.add_argument("--goemotions", type=Path, required=True)
    parser.add_argument("--test", nargs="*", type=Path, default=[])
    parser.add_argument("--output", type=Path, default=plutchik.HEAD)
    options = parser.parse_args()
    content = train([read_file(path) for path in options.tellings], [read_file(path) for path in options.intensities],
                    options.goemotions)
    if len(content) > MAX_BYTES:
        parser.error(f"the head takes {len(content)} bytes, more than {MAX_BYTES}")
    write_atomic(options.output, content, mode=0o644)
    print(f"{options.output.name}: {len(content)} bytes")
    head = plutchik.load(options.output)
    for path in options.test:
        report(str(path), read_file(path), head)
    of_one, neutral = read_comments(options.goemotions, "test")
    report("GoEmotions' test split, comments of one emotion", of_one, head)
    report("GoEmotions' test split, neutral comments", neutral, head)


if __name__ == "__main__":
    main()
