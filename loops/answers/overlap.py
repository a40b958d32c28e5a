"""How much of a reference a reply says in the same words: exact match, F1, ROUGE, BLEU.

Small code of our own instead of three libraries, so that a base installation has it; tests hold it against the
libraries. Where it differs: scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are
split into characters, ROUGE keeps the letters of every script, and Unicode is composed (NFC).
"""

from __future__ import annotations

import functools
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = 4  #: of BLEU's n-grams
METRICS = ("exact_match", "precision", "recall", "f1", "rouge1", "rouge2", "rougeL", "bleu")  #: 0 to 1 each

#: scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Han
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                       "\U00020000-\U0003ffff])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = frozenset(string.punctuation)
#: mteval-v13a, as sacrebleu has it (`tokenizers/tokenizer_re.py`)
_13A = ((re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "), (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
        (re.compile(r"([\.,])([^0-9])"), r" \1 \2"), (re.compile(r"([0-9])(-)"), r"\1 \2 "))
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


@dataclass(frozen=True)
class Overlap:
    """What a reply and its reference have in common.

    Attributes:
        scores: by the names of `METRICS`, 0 to 1; `bleu` is that of the sentence.
        bleu: what BLEU of many sentences adds up: matches and n-grams of each order, lengths of reply and reference.
    """

    scores: dict[str, float]
    bleu: tuple[int, ...]


def _apart(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text if text.isascii() else unicodedata.normalize("NFC", text))


@functools.lru_cache(maxsize=1 << 12)
def _is_mark(character: str) -> bool:
    return character in _ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")


def squad_tokens(text: str) -> list[str]:
    """Return the words that SQuAD compares: lower case, no punctuation, no English articles.

    `normalize_answer` of the official evaluation script (Rajpurkar et al. 2018, evaluate-v2.0.py); punctuation of
    other scripts goes too.
    """
    plain = "".join(character for character in _apart(text).lower() if not _is_mark(character))
    return _ARTICLES.sub(" ", plain).split()


def rouge_tokens(text: str) -> list[str]:
    """Return runs of letters, digits and their marks, in lower case: of ASCII what rouge-score returns unstemmed."""
    return "".join(character if character.isalnum() or unicodedata.category(character).startswith("M") else " "
                   for character in _apart(text).lower()).split()


def bleu_tokens(text: str) -> list[str]:
    """Return the tokens of mteval-v13a."""
    line = _apart(text.rstrip()).replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, replacement in _13A:
        line = pattern.sub(replacement, line)
    return line.split()


def _shares(common: int, said: int, wanted: int) -> tuple[float, float, float]:
    """Return precision, recall and F1; all 0 where nothing is in common."""
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / said, common / wanted
    return precision, recall, 2 * precision * recall / (precision + recall)


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at:at + n]) for at in range(len(tokens) - n + 1))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (Allison and Dix 1986: a row of the table is an integer)."""
    places: dict[str, int] = {}
    for at, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << at
    row = 0
    for token in second:
        both = row | places.get(token, 0)
        row = both & ~(both - (row << 1 | 1))
    return row.bit_count()


def compare(reply: str, reference: str) -> Overlap:
    """Return what a reply has in common with its reference.

    Exact match, precision, recall and F1 are SQuAD's: over the multiset of words, 1 where both are empty after
    normalising, 0 where one is. ROUGE-1, -2 and -L (Lin 2004) are F-measures, 0 where either is empty. BLEU (Papineni
    et al. 2002) is that of the sentence, smoothed (`bleu_of`), 0 where either is empty.
    """
    said, wanted = squad_tokens(reply), squad_tokens(reference)
    if said and wanted:
        precision, recall, f1 = _shares((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))
    else:
        precision = recall = f1 = float(said == wanted)
    scores = {"exact_match": float(said == wanted), "precision": precision, "recall": recall, "f1": f1}
    said, wanted = rouge_tokens(reply), rouge_tokens(reference)
    for n in (1, 2):
        common = (_grams(said, n) & _grams(wanted, n)).total()
        scores[f"rouge{n}"] = _shares(common, len(said) - n + 1, len(wanted) - n + 1)[2]
    scores["rougeL"] = _shares(longest_common(said, wanted), len(said), len(wanted))[2]
    said, wanted = bleu_tokens(reply), bleu_tokens(reference)
    matches = [(_grams(said, n) & _grams(wanted, n)).total() for n in range(1, ORDERS + 1)]
    totals = [max(0, len(said) - n + 1) for n in range(1, ORDERS + 1)]
    statistics = (*matches, *totals, len(said), len(wanted))
    scores["bleu"] = float(bleu_of(np.asarray([statistics], dtype=np.float64), sentence=True)[0])
    return Overlap(scores, statistics)


def bleu_of(statistics: NDArray[np.float64], *, sentence: bool = False) -> NDArray[np.float64]:
    """Return BLEU, 0 to 1, of each row of added-up statistics, as `Overlap.bleu` orders them.

    sacrebleu's defaults (Post 2018): 4-grams, brevity penalty, an order without matches counts as 1 / (2^k n-grams),
    k counting such orders (`exp` of Chen and Cherry 2014).

    Args:
        statistics: shape (rows, 10).
        sentence: leave orders out for which the reply is too short (sacrebleu's effective order).
    """
    matches, totals = statistics[:, :ORDERS], statistics[:, ORDERS:2 * ORDERS]
    said, wanted = statistics[:, -2], statistics[:, -1]
    there = np.cumprod(totals > 0, axis=1) > 0
    missing = there & (matches == 0)
    halved = np.cumsum(missing, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(missing, 0.5 ** halved, matches) / totals
        logs = np.where(there, np.log(shares), 0.0 if sentence else -math.inf)
        orders = np.maximum(there.sum(axis=1), 1) if sentence else ORDERS
        penalty = np.where(said < wanted, np.exp(1 - wanted / said), 1.0)
        score = penalty * np.exp(logs.sum(axis=1) / orders)
    found: NDArray[np.float64] = np.where(matches.any(axis=1), score, 0.0)
    return found
