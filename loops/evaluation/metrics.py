"""The six emotional metrics: scores of a reply to a scenario, each from 0 to 1.

What they are good for is comparing a quantized model's reply with the original's on the same
scenario; as absolute grades they mean little. How well they agree with people is in docs/metrics.md.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loops.evaluation import emotions, plutchik
from loops.evaluation.empathy import attunes, grade
from loops.evaluation.feelings import PLUTCHIK, Family, family_of, find_feelings, kinship
from loops.evaluation.figurative import FIGURATIVE, figurativeness
from loops.evaluation.language import normalise, sentences, words
from loops.evaluation.names import METRICS
from loops.evaluation.relevance import drop_copies, on_topic, relevance
from loops.evaluation.scenarios import Scenario
from loops.evaluation.valence import compound

OFF_TOPIC = 0.3  #: of a score that a reply keeps which speaks of something else entirely
WORDS_IN_RANGE = (6, 160)  #: a reply of so many words is neither curt nor rambling

_GROUPS: dict[str, tuple[str, ...]] = {  # of GoEmotions' labels
    "sympathetic": ("disappointment", "embarrassment", "fear", "grief", "nervousness", "remorse", "sadness"),
    "hostile": ("anger", "annoyance", "disapproval", "disgust"),
    "supporting": ("caring", "optimism"),
    "warm": ("admiration", "amusement", "caring", "excitement", "gratitude", "joy", "love", "optimism", "pride",
             "relief"),
    "puzzled": ("confusion", "curiosity", "realization", "surprise")}
_FITTING = {"negative": ("sympathetic", "supporting"), "positive": ("warm",),
            "neutral": ("sympathetic", "warm", "puzzled")}
_NEUTRAL = emotions.LABELS.index("neutral")
_NAMED_ELSEWHERE = frozenset({"scenarios.jsonl", "held_out.txt"})  #: by their content
#: what weights are fitted with, besides `train_*.py`; the weights themselves tell whether a score can have changed
_TRAINING = frozenset({"labelled.py", "emotion_words.txt", "situations.txt"})
#: the libraries whose lexicon and rules decide scores; another NumPy rounds differently at most
_LIBRARIES = ("vaderSentiment", "snowballstemmer")
_HOSTILITY = 0.3  #: share of anger and disgust in a feeling from which on a reply may share them


@dataclass(frozen=True)
class Reading:
    """A reply, read once for all metrics.

    Attributes:
        scenario: what it answers.
        reply: the text.
        own: its sentences that are neither copied from the prompt nor said before.
        attuned: those of them that neither advise nor make light of things.
    """

    scenario: Scenario
    reply: str
    own: tuple[str, ...]
    attuned: tuple[str, ...]

    @classmethod
    def of(cls, scenario: Scenario, reply: str) -> Reading:
        """Read a reply."""
        own = tuple(drop_copies(scenario.prompt, sentences(reply)))
        return cls(scenario, reply, own, tuple(filter(attunes, own)))

    @functools.cached_property
    def topical(self) -> float:
        """What is left of a score when the reply speaks of something else, 0.3 to 1."""
        return OFF_TOPIC + (1 - OFF_TOPIC) * on_topic(self.scenario.prompt, " ".join(self.own))

    @functools.cached_property
    def tone(self) -> NDArray[np.float64]:
        """Probabilities of GoEmotions' labels for each attuned sentence, float64 (sentences, 28)."""
        return emotions.probabilities(self.attuned).astype(np.float64) if self.attuned else np.zeros((0, 28))

    @functools.cached_property
    def family(self) -> Family | None:
        """What the scenario's user feels, None when the vocabulary does not know the word."""
        return family_of(self.scenario.emotion)

    @functools.cached_property
    def named(self) -> tuple[tuple[float, float], ...]:
        """For each feeling that is named and not negated: its kinship to the user's, and its strength, 0 to 1."""
        found = []
        for sentence in self.attuned:
            tokens = words(normalise(sentence))
            found += [(kinship(self.family, mention.feeling.family) if self.family else 0.0,
                       plutchik.strength_of(tokens, mention)) for mention in find_feelings(tokens)
                      if not plutchik.is_negated(tokens, mention.start)]
        return tuple(found)

    @functools.cached_property
    def shown(self) -> float:
        """The probability that the most emotional sentence is not neutral, 0 to 1."""
        return float(1 - self.tone[:, _NEUTRAL].min()) if self.attuned else 0.0


def emotional_match(reading: Reading) -> float:
    """Return how well a reply recognises what the user feels.

    45 % for naming it: the best kinship of a named feeling to the user's (`feelings.kinship`), less
    for a weak word; 25 % for its tone: the cosine between Plutchik's emotions in the attuned sentences and
    the user's, times how emotional they are; 30 % for taking up what was told (`relevance`). Sentences that advise,
    make light of things or repeat the prompt do not count, so mimicry earns nothing.

    Limits: English; a feeling paraphrased without any word of feeling is seen by its tone and topic
    only. For an emotion that the vocabulary does not know the first part is 0.
    """
    if not reading.attuned:
        return 0.0
    named = max((kin * (0.6 + 0.4 * strength) for kin, strength in reading.named), default=0.0)
    taken_up = relevance(reading.scenario.prompt, " ".join(reading.attuned))
    return 0.45 * named + 0.25 * _toned(reading) + 0.3 * taken_up


def _toned(reading: Reading) -> float:
    if reading.family is None:
        return 0.0
    mixed, wanted = plutchik.mix(reading.tone), np.array(reading.family.shares)
    size = float(np.linalg.norm(mixed) * np.linalg.norm(wanted))
    emotional = float(1 - reading.tone[:, _NEUTRAL].mean())
    return float(mixed @ wanted) / size * emotional if size else 0.0


def empathy(reading: Reading) -> float:
    """Return EPITOME's emotional reaction, interpretation and exploration together, of 6 (Sharma et al. 2020).

    Less for a reply that speaks of something else (`relevance.on_topic`): to understand another's story is no empathy
    with this one.

    Limits: see `empathy.grade`, whose agreement with graders is in docs/metrics.md.
    """
    return grade(reading.scenario.prompt, reading.reply).score * reading.topical


def emotional_intensity(reading: Reading) -> float:
    """Return how well the intensity of a reply meets the scenario's.

    The smaller over the larger of the two, times the probability that the reply is not neutral, less off topic or for a
    scrap. The intensity of a reply is that of the strongest feeling it names, or, naming none, `plutchik.intensity` of
    its attuned sentences.

    Limits: intensity of words, not of events: "she is gone" is weaker here than "I am upset".
    """
    if not reading.attuned:
        return 0.0
    strongest = max((strength for _, strength in reading.named), default=0.0)
    mine = strongest or plutchik.intensity(" ".join(reading.attuned))
    theirs = reading.scenario.intensity
    most = max(mine, theirs)
    whole = length_fit(len(words(reading.reply)))  # of a scrap cut off before it says anything, little
    return reading.shown * reading.topical * whole * (min(mine, theirs) / most if most > 0 else 1.0)


def sentiment_accuracy(reading: Reading) -> float:
    """Return how well the tone of a reply fits the valence of what the user told.

    The mean over its sentences of f / (f + n): f is the probability of fitting emotions, plus half of VADER's compound
    valence in the fitting direction, n the probability of none and of hostility. Sympathy and care fit something
    negative (and anger, where the user is angry), warmth something positive, all but hostility something mixed.
    A sentence that advises or makes light counts 0, as does one copied from the prompt; less off topic.

    Limits: VADER and the classifier read English, and words rather than meaning; sarcasm escapes them.
    """
    if not reading.attuned:
        return 0.0
    groups = _FITTING[reading.scenario.valence]
    if reading.scenario.valence == "negative" and reading.family and _hostile(reading.family):
        groups = (*groups, "hostile")
    columns = sorted({emotions.LABELS.index(label) for group in groups for label in _GROUPS[group]})
    valences = np.array([compound(sentence) for sentence in reading.attuned])
    sign = {"negative": -1.0, "positive": 1.0, "neutral": 0.0}[reading.scenario.valence]
    hostile = reading.tone[:, [emotions.LABELS.index(label) for label in _GROUPS["hostile"]]].sum(axis=1)
    toned = np.maximum(0, sign * valences) if sign else np.abs(valences) * np.maximum(0, 1 - hostile)
    fitting = reading.tone[:, columns].sum(axis=1) + 0.5 * toned
    rest = reading.tone[:, _NEUTRAL] + (0.0 if "hostile" in groups else hostile)
    fit = float((fitting / (fitting + rest)).sum() / len(reading.own))
    return fit * reading.topical


def _hostile(family: Family) -> bool:
    shares = dict(zip(PLUTCHIK, family.shares, strict=True))
    return shares["anger"] + shares["disgust"] > _HOSTILITY


def repetition(text: str) -> float:
    """Return the share of word trigrams that occurred before in text, 0 to 1."""
    found = words(text)
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def length_fit(count: int) -> float:
    """Return 1 for a number of words in range, falling to 0 for none and for twice too many."""
    low, high = WORDS_IN_RANGE
    if count < low:
        return count / low
    return max(0.0, min(1.0, 2 - count / high))


def response_fluency(reply: str, mean_log_likelihood: float | None = None, *, ended: bool = False) -> float:
    """Return how fluent the reply is.

    The product of four factors: exp(l / 2), the inverse square root of its perplexity, where l is
    its mean log-likelihood per token under the unquantized model given the prompt; 1 - repeated
    trigrams; the fit of its length; and 1/2 unless the turn was ended or the text ends a sentence.

    Limits: the unquantized model is the judge, so a reply in another style than its own scores
    lower although people may like it; a model whose own text is poor cannot tell fluent from not.

    Args:
        reply: the text.
        mean_log_likelihood: in nats per token, at most 0; None where no model is at hand, and the factor 1.
        ended: the model ended its turn.
    """
    count = len(words(reply))
    if not count:
        return 0.0
    complete = ended or reply.rstrip("\"'”’)*_ \n").endswith((".", "!", "?", "…"))
    likely = 1.0 if mean_log_likelihood is None else math.exp(min(0.0, mean_log_likelihood) / 2)
    return likely * (1 - repetition(reply)) * length_fit(count) * (1.0 if complete else 0.5)


def metaphor_usage(reading: Reading) -> float:
    """Return whether a reply speaks in figures that fit, 0 to 1.

    The probability that at least one attuned sentence is figurative, 1 - the product of (1 - p) over
    `figurative.figurativeness`, times 1 less the share of figurative sentences beyond one half: one figure does as
    well as two, a string of them does not. Less off topic.

    Limits: a fresh metaphor without words of the usual domains is missed; taste is not measured.
    """
    if not reading.attuned:
        return 0.0
    each = [figurativeness(sentence) for sentence in reading.attuned]
    share = sum(value >= FIGURATIVE for value in each) / len(reading.own)
    return (1 - math.prod(1 - value for value in each)) * (1 - max(0.0, share - 0.5)) * reading.topical


def evaluate(scenario: Scenario, reply: str, mean_log_likelihood: float | None = None, *,
             ended: bool = False) -> dict[str, float]:
    """Return all six metrics of a reply by their names."""
    reading = Reading.of(scenario, reply)
    return {"emotional_match": emotional_match(reading), "empathy": empathy(reading),
            "emotional_intensity": emotional_intensity(reading), "sentiment_accuracy": sentiment_accuracy(reading),
            "response_fluency": response_fluency(reply, mean_log_likelihood, ended=ended),
            "metaphor_usage": metaphor_usage(reading)}


def overall(scores: Mapping[str, float], weights: Mapping[str, float] | None = None) -> float:
    """Return the weighted mean of the six metrics; without weights the mean, as the original had it."""
    chosen = {name: (weights or {}).get(name, 1.0) for name in METRICS}
    return sum(scores[name] * weight for name, weight in chosen.items()) / sum(chosen.values())


def _scoring_files(folder: Path) -> list[Path]:
    """Return the files of this package, in `folder`, that can change a score."""
    return sorted(path for path in (*folder.glob("*.py"), *(folder / "data").glob("*.[jnt]*"))
                  if not path.name.startswith("train_") and path.name not in _NAMED_ELSEWHERE | _TRAINING)


@functools.cache
def identity() -> str:
    """Return 16 hex digits that name how scores are made; where they differ, old scores are not reused.

    They change with the code and the weights of the metrics and with the versions of the libraries that decide
    scores, not with what only training uses.
    """
    parts = [hashlib.sha256(path.read_bytes()).digest() for path in _scoring_files(Path(__file__).parent)]
    parts += [f"{name} {metadata.version(name)}".encode() for name in _LIBRARIES]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def preference(margin: float) -> float:
    """Return the probability of choosing the empathic reply, given its margin in nats per token.

    The logistic function of the difference of mean log-likelihoods per token (Bradley and Terry 1952).
    """
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
