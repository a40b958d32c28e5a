"""What is wrong with calibration text: too few words, repetition, another language, text that models are judged by.

Nothing here estimates: similarities and shared runs are exact, up to a collision of 64-bit hashes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from calibration_data.text import Sample

ENOUGH_WORDS = 6000  #: of a domain; fewer calibrate little
SHINGLE = 5  #: words that are compared together for near-duplicates
NEAR = 0.3  #: Jaccard similarity of two samples' shingles from which one of them is a near-duplicate
RUN = 9  #: words in a row from which two texts overlap

_BY_CHARACTER = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  #: Chinese and Japanese, written without blanks
_MARKS = "\u0300-\u036f\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e00-\u0e7f"  #: belong to the letter before
_LETTER = rf"(?:[^\W_{_BY_CHARACTER}]|[{_MARKS}])"
_WORD = re.compile(rf"[{_BY_CHARACTER}]|{_LETTER}+(?:'{_LETTER}+)*")

#: the first that holds more than a third of the letters tells the language, or the one most written in that script
_SCRIPTS = (("ja", "\u3040-\u30ff"), ("zh", "\u3400-\u9fff"), ("ko", "\uac00-\ud7af"), ("ru", "\u0400-\u04ff"),
            ("ar", "\u0600-\u06ff"), ("hi", "\u0900-\u097f"), ("el", "\u0370-\u03ff"), ("he", "\u0590-\u05ff"),
            ("th", "\u0e00-\u0e7f"))
_SCRIPT = {code: re.compile(f"[{letters}]") for code, letters in _SCRIPTS}
_ANY_LETTER = re.compile(r"[^\W\d_]")
_STOP_WORDS = {code: frozenset(words.split()) for code, words in {
    "en": "the of and to in is that it for you was with on are this be have not as at or from but they your i my we",
    "de": "der die das und ist nicht ich sie ein eine zu den mit auf für es im dem wir auch sich von wird einen er",
    "fr": "le la les des et est un une que pas je vous pour dans qui sur ce il elle du en avec plus au sont de",
    "es": "el la los las y es que de en un una por con no para se su lo del más como al me muy",
    "it": "il la che di e è un una per non sono con del della le gli i lo si mi anche da nel più",
    "pt": "o a os as e é que de em um uma não para com do da no na se mais por ao você",
    "nl": "de het een en van is niet ik dat je in op te met voor zijn er ook maar aan dit wordt",
}.items()}
_FEWEST_WORDS = 8  #: to tell a language by
_AHEAD = 1.2  #: times as many stop words as of any other language; `no`, `me` and `as` are of several
_FEWEST_STOP_WORDS = 0.12  #: as a share; program text and lists stay below, prose of any of the languages above


@dataclass(frozen=True)
class NearDuplicate:
    """A sample that says much the same as one before it; `similarity` is from 0 to 1."""

    id: str
    like: str
    similarity: float


@dataclass(frozen=True)
class Overlap:
    """A run of words that a sample shares with another text: how many words at the longest, and their beginning."""

    id: str
    other: str
    words: int
    excerpt: str


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; a Chinese or Japanese character counts as one."""
    return _WORD.findall(text.casefold().replace("’", "'"))


def count_words(samples: Iterable[Sample]) -> int:
    """Return how many words the turns of the samples have."""
    return sum(len(words(sample.text)) for sample in samples)


def shingles(text: str) -> frozenset[int]:
    """Return hashes of all runs of SHINGLE words, or of all words where there are fewer.

    They hold within this process only.
    """
    found = words(text)
    return frozenset(hash(tuple(found[start:start + SHINGLE])) for start in range(max(1, len(found) - SHINGLE + 1)))


def similarity(one: frozenset[int], other: frozenset[int]) -> float:
    """Return the Jaccard similarity of two sets: what both have over what either has."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def near_duplicates(samples: Sequence[Sample], threshold: float = NEAR) -> list[NearDuplicate]:
    """Return every sample that is a near-duplicate of one before it which is none itself, with the most similar.

    Exact. Two sets that are so similar share one of their rarest elements, so only samples that do are compared (prefix
    filter: Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007).
    """
    sets = [shingles(sample.text) for sample in samples]
    frequency = Counter(shingle for found in sets for shingle in found)
    index: dict[int, list[int]] = {}
    repeated = []
    for number, mine in enumerate(sets):
        needed = math.ceil(threshold * len(mine) - 1e-9)
        rarest = sorted(mine, key=lambda shingle: (frequency[shingle], shingle))[:len(mine) - needed + 1]
        candidates = {other for shingle in rarest for other in index.get(shingle, ())}
        best, other = max(((similarity(mine, sets[other]), -other) for other in candidates), default=(0.0, 0))
        if best >= threshold:
            repeated.append(NearDuplicate(samples[number].id, samples[-other].id, best))
            continue
        for shingle in rarest:
            index.setdefault(shingle, []).append(number)
    return repeated


def guess_language(text: str) -> str:
    """Return the two-letter code of the language that most of a text is in; '' where that cannot be told.

    By script, and for Latin letters by stop words of seven languages. Good enough to say that a text is not English;
    Russian stands for all that is written in Cyrillic, and so on.
    """
    letters = len(_ANY_LETTER.findall(text))
    for code, script in _SCRIPT.items():
        if 3 * len(script.findall(text)) > letters > 0:
            return code
    found = words(text)
    if len(found) < _FEWEST_WORDS:
        return ""
    share = {code: sum(word in stop for word in found) / len(found) for code, stop in _STOP_WORDS.items()}
    second, best = sorted(share, key=share.__getitem__)[-2:]
    told = share[best] >= max(_FEWEST_STOP_WORDS, _AHEAD * share[second])
    return best if told and len(_STOP_WORDS[best].intersection(found)) > 1 else ""  # one may be a name


def count_languages(samples: Iterable[Sample]) -> dict[str, int]:
    """Return how many samples are in each language, the most frequent first; '' where it cannot be told."""
    return dict(Counter(guess_language(sample.text) for sample in samples).most_common())


def in_other_languages(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples in a language that their header does not name; a header that names none means English."""
    return [sample for sample in samples
            if (code := guess_language(sample.text))
            and code not in (re.findall(r"\b[a-z]{2}\b", sample.header.language) or ["en"])]


def overlaps(samples: Sequence[Sample], others: Mapping[str, str], run: int = RUN) -> list[Overlap]:
    """Return where samples share `run` or more words in a row with other texts: for each pair the longest run.

    Case and punctuation do not count, and a run does not go on from one turn to the next.

    Args:
        samples: of calibration text.
        others: texts by name, such as what a model is judged by.
        run: number of words.
    """
    turns = [(number, words(turn.text)) for number, sample in enumerate(samples) for turn in sample.turns]
    places: dict[int, list[tuple[int, int]]] = {}
    for turn, (_, said) in enumerate(turns):
        for start in range(len(said) - run + 1):
            places.setdefault(hash(tuple(said[start:start + run])), []).append((turn, start))
    found = []
    for name, text in others.items():
        theirs = words(text)
        shared = {hash(tuple(theirs[start:start + run])) for start in range(len(theirs) - run + 1)} & places.keys()
        longest: dict[int, tuple[int, str]] = {}
        for turn, start, count in _runs(sorted(place for shingle in shared for place in places[shingle])):
            number, said = turns[turn]
            length = count + run - 1
            if length > longest.get(number, (0, ""))[0]:
                longest[number] = (length, " ".join(said[start:start + min(length, 2 * run)]))
        found += [Overlap(samples[number].id, name, *longest[number]) for number in sorted(longest)]
    return found


def _runs(places: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Yield turn, start and number of places that follow each other without a gap."""
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != (places[end - 1][0], places[end - 1][1] + 1):
            yield *places[begin], end - begin
            begin = end
