"""Scores of a reply to a scenario, each from 0 to 1.

Here are the two that need no judgement about feelings. What they are good for is comparing a
quantized model's reply with the original's on the same scenario; as absolute grades they mean little.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from loops.evaluation.scenarios import Scenario

WORDS_IN_RANGE = (6, 160)  #: a reply of so many words is neither curt nor rambling

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_SENTENCE = re.compile(r"[^.!?…]+[.!?…]*")


def words(text: str) -> list[str]:
    """Return the words of text in lower case."""
    return _WORD.findall(text.lower())


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """Return VADER's compound valence of text, -1 to 1 (Hutto and Gilbert, ICWSM 2014)."""
    return float(_vader().polarity_scores(text)["compound"])


def sentiment_accuracy(scenario: Scenario, reply: str) -> float:
    """Return how well the reply's tone fits the valence of what the user told.

    With c the compound valence of the whole reply and m the lowest of its sentences: (1 + c) / 2
    after something positive; (1 - m) / 2 after something negative, because a fitting reply says
    somewhere that it is hard, and comfort around it is no error; 1 - |c| / 2 after something neutral.
    0 for a reply without words.

    Limits: VADER reads English, and words rather than meaning; sarcasm escapes it.
    """
    if not words(reply):
        return 0.0
    if scenario.valence == "negative":
        return (1 - min(compound(sentence) for sentence in _SENTENCE.findall(reply))) / 2
    whole = compound(reply)
    return (1 + whole) / 2 if scenario.valence == "positive" else 1 - abs(whole) / 2


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


def response_fluency(reply: str, mean_log_likelihood: float, *, ended: bool) -> float:
    """Return how fluent the reply is.

    The product of four factors: exp(l / 2), the inverse square root of its perplexity, where l is
    its mean log-likelihood per token under the unquantized model given the prompt; 1 - repeated
    trigrams; the fit of its length; and 1/2 unless the turn was ended or the text ends a sentence.

    Limits: the unquantized model is the judge, so a reply in another style than its own scores
    lower although people may like it; a model whose own text is poor cannot tell fluent from not.

    Args:
        reply: the text.
        mean_log_likelihood: in nats per token, at most 0.
        ended: the model ended its turn.
    """
    count = len(words(reply))
    if not count:
        return 0.0
    complete = ended or reply.rstrip("\"'”’)*_ \n").endswith((".", "!", "?", "…"))
    return (math.exp(min(0.0, mean_log_likelihood) / 2) * (1 - repetition(reply)) * length_fit(count)
            * (1.0 if complete else 0.5))


def preference(margin: float) -> float:
    """Return the probability of choosing the empathic reply, given its margin in nats per token.

    The logistic function of the difference of mean log-likelihoods per token (Bradley and Terry 1952).
    """
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
