"""Which texts say much the same: exact up to some thousands, beyond that by MinHash, and then checked exactly.

The similarity of two texts is the Jaccard similarity of their sets of three words in a row: what both have over what
either has. Up to FEW texts all pairs that can be as similar are compared, so nothing is missed and no library is
needed. Beyond, candidates come from MinHash and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3; library datasketch) and each is then measured exactly; a pair just at the
threshold may be missed.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from calibration_data.checks import words
from loops.finetune.extra import require
from loops.finetune.records import Row

FEW = 2000  #: texts up to which all are compared
NEAR = 0.7  #: similarity from which two texts are near-duplicates, unless told
SHINGLE = 3  #: words in a row; of answers of twenty words one changed word leaves 0.7
LONG_ANSWER = 8  #: words from which two equal answers are no coincidence, as `yes` is

_PERMUTATIONS = 128
_WEIGHTS = (0.1, 0.9)  #: how bad a needless comparison is against a missed one, to choose the bands by


@dataclass(frozen=True)
class Pair:
    """Two texts by their places, the first one first, and their similarity from 0 to 1."""

    first: int
    second: int
    similarity: float


def _plain(text: str) -> str:
    """Return a text as it is compared: one form of each letter, however it is put together, and however wide."""
    return unicodedata.normalize("NFKC", text)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return all runs of SHINGLE words of a text, or all its words where there are fewer; nothing where it has none."""
    found = words(_plain(text))
    if not found:
        return frozenset()
    return frozenset(tuple(found[start:start + SHINGLE]) for start in range(max(1, len(found) - SHINGLE + 1)))


def similarity(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Return the Jaccard similarity of two sets; 0 where one is empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


Known = Callable[[int, int], bool]


def near_pairs(texts: Sequence[str], threshold: float = NEAR) -> list[Pair]:
    """Return the pairs of texts that are at least so similar, in order.

    Raises:
        TrainExtraMissing: there are more than FEW texts, and datasketch is not installed.
    """
    return sorted(pairs(texts, threshold), key=lambda pair: (pair.second, pair.first))


def pairs(texts: Sequence[str], threshold: float = NEAR, known: Known = lambda _first, _second: False,
          home: Sequence[str] = ()) -> Iterator[Pair]:
    """Yield the pairs of texts that are at least so similar, in the order of the second one.

    Of thousands of rows that are all alike nobody needs all pairs: what is known already is left out.

    Args:
        texts: to compare.
        threshold: from which they are similar.
        known: tells, when a pair is to be measured, whether it need not be; it may change from pair to pair.
        home: where each text belongs. A text with the same words as one before it of the same home is only near that,
            and near what that is near before it; for those after it, it need not be compared.

    Raises:
        TrainExtraMissing: there are more than FEW texts, and datasketch is not installed.
    """
    propose = _by_shingles(texts, threshold) if len(texts) <= FEW else _by_minhash(threshold)
    like = lru_cache(maxsize=4 * FEW)(lambda number: shingles(texts[number]))
    seen: dict[tuple[str, frozenset[tuple[str, ...]]], int] = {}
    found: dict[int, list[Pair]] = {}
    for second in range(len(texts)):
        mine = like(second)
        same = seen.setdefault((home[second], mine), second) if home and mine else second
        if same != second:
            near = [*found.get(same, ()), Pair(same, same, 1.0)]
            yield from (Pair(one.first, second, one.similarity) for one in near if not known(one.first, second))
            continue
        for first in propose(second, mine):
            if not known(first, second) and (alike := similarity(like(first), mine)) >= threshold:
                found.setdefault(second, []).append(Pair(first, second, alike))
                yield found[second][-1]


Propose = Callable[[int, frozenset[tuple[str, ...]]], list[int]]


def _by_shingles(texts: Sequence[str], threshold: float) -> Propose:
    """Return what proposes all texts before one that can be as similar: they share one of their rarest shingles.

    Prefix filter (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007): of n shingles, two sets that share
    enough share one of the n - ceil(threshold n) + 1 that are rarest.
    """
    frequency = Counter(shingle for text in texts for shingle in shingles(text))
    places: dict[tuple[str, ...], list[int]] = {}

    def propose(second: int, mine: frozenset[tuple[str, ...]]) -> list[int]:
        needed = math.ceil(threshold * len(mine) - 1e-9)
        rarest = sorted(mine, key=lambda shingle: (frequency[shingle], shingle))[:len(mine) - needed + 1]
        shared = sorted({first for shingle in rarest for first in places.get(shingle, ())})
        for shingle in rarest:
            places.setdefault(shingle, []).append(second)
        return shared

    return propose


def _by_minhash(threshold: float) -> Propose:
    """Return what proposes the texts before one that are likely to be as similar."""
    require(f"Comparing more than {FEW} rows", "datasketch")
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=_WEIGHTS)
    empty = MinHash(num_perm=_PERMUTATIONS, seed=1)

    def propose(second: int, mine: frozenset[tuple[str, ...]]) -> list[int]:
        if not mine:
            return []
        sketch = empty.copy()
        sketch.update_batch([" ".join(shingle).encode() for shingle in mine])
        shared = sorted(index.query(sketch))
        index.insert(second, sketch)
        return shared

    return propose


def exact_duplicates(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the place of each row that says, but for case and white space, just what one before says, and of that."""
    seen: dict[tuple[tuple[str, str], ...], int] = {}
    found = []
    for number, row in enumerate(rows):
        key = tuple((turn.role, " ".join(_plain(turn.text).casefold().split())) for turn in row.spoken)
        first = seen.setdefault(key, number)
        if first != number:
            found.append((number, first))
    return found


def near_duplicates(rows: Sequence[Row], threshold: float = NEAR, known: Known = lambda _first, _second: False
                    ) -> Iterator[Pair]:
    """Yield the pairs of rows that are near-duplicates: near with their context, and near without it.

    So several questions about one context are none, and neither is one question about several contexts. What is known
    is left out, as `pairs` does.
    """
    for pair in pairs([row.text for row in rows], threshold, known):
        if similarity(shingles(rows[pair.first].said), shingles(rows[pair.second].said)) >= threshold:
            yield pair


def same_answers(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return each row with an answer of LONG_ANSWER words or more that one before gives, and the place of that."""
    seen: dict[str, int] = {}
    found = []
    for number, row in enumerate(rows):
        said = words(_plain(row.answer))
        if len(row.turns) > 1 and len(said) >= LONG_ANSWER:
            first = seen.setdefault(" ".join(said), number)
            if first != number:
                found.append((number, first))
    return found


def groups(rows: Sequence[Row], threshold: float = NEAR) -> list[list[int]]:
    """Return rows that must not be parted, by place: near each other, about the same context, or of the same answer.

    What is near the same row is in one group, though not near each other. Groups and rows are in order.
    """
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    contexts: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.context:
            join(number, contexts.setdefault(" ".join(row.context.split()), number))
    for second, first in (*same_answers(rows), *exact_duplicates(rows)):
        join(first, second)
    for pair in pairs([row.text for row in rows], threshold, lambda one, other: root(one) == root(other),
                      [""] * len(rows)):
        join(pair.first, pair.second)
    found: dict[int, list[int]] = {}
    for number in range(len(rows)):
        found.setdefault(root(number), []).append(number)
    return list(found.values())
