"""The vocabulary of feelings: words, how strong they are, and how near two feelings lie."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loops.evaluation.language import normalise, stem, word_set, words

PLUTCHIK = ("joy", "trust", "fear", "surprise", "sadness", "disgust", "anger", "anticipation")
VOCABULARY = Path(__file__).with_name("data") / "feelings.txt"
FRAME = 3  #: words before an ambiguous one among which a form of feel, be or the like must stand

OF_NAME = 0.6  #: strength of a family's own name, whatever line it stands in
RELATED = 0.8  #: kinship of two families that lie on the same spot among Plutchik's emotions


@dataclass(frozen=True)
class Family:
    """Feelings of one kind.

    Attributes:
        name: such as `grief`.
        shares: of Plutchik's eight emotions, in the order of `PLUTCHIK`, sum 1.
    """

    name: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Feeling:
    """A word or phrase for a feeling.

    Attributes:
        family: of the feeling.
        strength: 0 to 1.
    """

    family: Family
    strength: float


@dataclass(frozen=True)
class Vocabulary:
    """All families, all words by their stems (a phrase is a tuple of several), and ambiguous words as they stand."""

    families: Mapping[str, Family]
    entries: Mapping[tuple[str, ...], Feeling]
    ambiguous: Mapping[str, Feeling]
    longest: int


def read_words() -> Iterator[tuple[Family, float, str]]:
    """Yield each word and phrase of the vocabulary as it is written, with its family and its strength, 0 to 1."""
    family: Family | None = None
    for line in VOCABULARY.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\[(\w+)\] \S+ (.+)", line):
            parts = found[2].split()
            shares = dict(zip(parts[::2], map(float, parts[1::2]), strict=True))
            family = Family(found[1], tuple(shares.get(name, 0.0) for name in PLUTCHIK))
        elif family is not None and line[:1].isdigit():
            strength, *names = line.split()
            yield from ((family, float(strength), name) for name in names)


@functools.cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary that ships."""
    families: dict[str, Family] = {}
    entries: dict[tuple[str, ...], Feeling] = {}
    ambiguous: dict[str, Feeling] = {}
    for family, strength, name in read_words():
        if family.name not in families:
            families[family.name] = family
            entries.setdefault((stem(family.name),), Feeling(family, OF_NAME))
        if name.endswith("?"):
            ambiguous[name[:-1]] = Feeling(family, strength)
        else:
            key = tuple(stem(word) for word in words(name.replace("_", " ")))
            entries.setdefault(key, Feeling(family, strength))
    return Vocabulary(families, entries, ambiguous, max(map(len, entries)))


@dataclass(frozen=True)
class Mention:
    """A feeling found in a text.

    Attributes:
        feeling: what was found.
        start: index of its first word.
        end: index after its last word.
    """

    feeling: Feeling
    start: int
    end: int


def find_feelings(tokens: Sequence[str]) -> list[Mention]:
    """Return the feelings named in a list of words in lower case, the longest phrase first, none overlapping."""
    known = vocabulary()
    stems = [stem(token) for token in tokens]
    found, at = [], 0
    while at < len(stems):
        for length in range(min(known.longest, len(stems) - at), 0, -1):
            feeling = known.entries.get(tuple(stems[at:at + length]))
            if feeling is None and length == 1 and word_set("frames").intersection(tokens[max(0, at - FRAME):at]):
                feeling = known.ambiguous.get(tokens[at])
            if feeling is not None:
                found.append(Mention(feeling, at, at + length))
                at += length
                break
        else:
            at += 1
    return found


def family_of(emotion: str) -> Family | None:
    """Return the family that a name of an emotion belongs to, None when the vocabulary does not know it."""
    tokens = words(normalise(emotion))
    known = vocabulary()
    if emotion in known.families:
        return known.families[emotion]
    mentions = find_feelings(tokens)
    return mentions[0].feeling.family if mentions else None


def kinship(one: Family, other: Family) -> float:
    """Return how near two feelings lie, 0 to 1: 1 in one family, else 0.8 times the cosine of their shares."""
    if one.name == other.name:
        return 1.0
    dot = sum(a * b for a, b in zip(one.shares, other.shares, strict=True))
    return RELATED * dot / math.sqrt(sum(a * a for a in one.shares) * sum(b * b for b in other.shares))
