"""Figurative language, found by how it is built rather than by a list of phrases.

Constructions (after Lakoff and Johnson 1980; Kovecses 2000; the types of the VU Amsterdam metaphor corpus, Steen et
al. 2010; breach of what a verb takes as its subject and object, Wilks 1975): similes; "as if"; source-of-target ("a
wave of relief"); a feeling, mind, illness, relation or body part that does what things and bodies do ("grief comes in
waves"); something bodily done to one by what has no body, or by one to what has none ("carry that guilt"); somebody or
something that is said to be a thing ("the marriage is a cage"); somebody in, on or under a source ("stuck in
quicksand"); a source beside a target ("emotional baggage"); and, against all these, words of literal narrative: clock
times, numbers, places, household things, "the" before a thing. A logistic regression, whose weights `train_figurative`
fits, weighs them against each other.

Limits: English; single sentences; nouns and verbs are told apart by their neighbours only; a fresh metaphor made of
everyday words ("the road has potholes") is missed, and a rare thing taken literally ("the cat has claws") may be found.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loops.evaluation.feelings import find_feelings
from loops.evaluation.language import normalise, sentences, stem, words

DOMAINS = Path(__file__).with_name("data") / "domains.txt"
WEIGHTS = Path(__file__).with_name("data") / "figurative.json"
FIGURATIVE = 0.35  #: probability from which on a sentence counts as figurative; cross-validated
REACH = 6  #: words between a verb and its subject or object
SHORT = 8  #: words up to which length says nothing
WORD = 1.0  #: of the feature that each word is by itself
MOST = 2.0  #: a construction counts at most that often in a sentence


def _set(members: str) -> frozenset[str]:
    return frozenset(members.split())


_TOKEN = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*|[,;:()!?]")
_A = _set("a an another one two")
_OWN = _set("my your his her our their its")
_THE = _set("the this that these those")
_DETERMINERS = _A | _OWN | _THE | _set("some any no every each all whole")
_BE = _set(
    "is are was were be been being am became become becomes isn't aren't wasn't weren't it's that's he's she's i'm "
    "you're they're we're who's i'll there's here's")
_CLITIC = {"it's": "it", "that's": "that", "he's": "he", "she's": "she", "i'm": "i", "you're": "you", "they're": "they",
           "we're": "we"}
_LINK = _BE | _set(
    "feel feels felt feeling seem seems seemed go goes went gone going get gets got getting run runs ran running come "
    "comes came turn turns turned stay stays stayed look looks sound sounds left leaves hang hanging keep keeps "
    "wearing wears worn")
_HAVE = _set("have has had having got i've you've they've we've with without need needs full")
_SKIP = _LINK | _HAVE | _set(
    "do does did don't doesn't didn't will would can could should may might must won't wouldn't can't couldn't "
    "shouldn't not never always just still really even only so too also often sometimes slowly quietly finally "
    "suddenly already almost again constantly to keep keeps kept started starts start begins began trying try tried "
    "want wants wanted used that which who i'd i'll you'd you'll literally basically kind of sort hardly barely been "
    "all both ever now then completely totally absolutely straight right back very much many")
_BREAKS = _set(
    ", ; : ( ) ! ? and but or so because when while if though although until til since after before where than")
_AS_WRITTEN = _set("abstract")
_NEAR = _set(
    "in into inside under underneath beneath behind on onto upon over through thru at against from off between out up "
    "down across around beyond along past toward towards within to by with without")
_LIKING = _set(
    "i we they you would really don't didn't doesn't do did would who also not to he she i'd you'd didn't never and")
_PLAIN_VEHICLE = _set(
    "that this it me him her them you us anything nothing everything he she they i we there what to my your his its "
    "their mom mum dad mother father said")
_HYPERBOLE = _set("million thousand thousands millions hundred forever zero whole world entire")
_INNER = _set("head heart mind chest soul brain stomach gut throat skin bones shoulders back veins life")
_NOMINAL = ("person", "body", "abstract", "vivid", "source", "figure", "thing", "event", "time", "role", "literal")
_SOURCES = _set("vivid source thing figure")
_VERBS = ("strong", "force", "action", "mental")  #: the first a verb belongs to counts
_STRONG = _set("strong")
_BODILESS = _set("abstract body time")
_ONE = _set("me us him her them myself himself herself yourself ourselves themselves")
_PARTICLES = _set("up apart down away over out off back shut")
_I = _set("i we they you he she to don't didn't doesn't can't couldn't won't wouldn't never really just do i'd i'll")
_ABOUT = _set("about after since before during for at until than")  #: a target named after these does nothing
_FULL = {"shes": "she's", "hes": "he's", "theyll": "they'll", "itll": "it'll"}


@functools.cache
def domains() -> dict[str, frozenset[str]]:
    """Return the classes of words that ship: by name, the stems of their words."""
    parts: dict[str, set[str]] = {}
    name = ""
    for line in DOMAINS.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            name = found[1]
        elif name and not line.startswith("#"):
            parts.setdefault(name, set()).update(word if name in _AS_WRITTEN else stem(word) for word in words(line))
    return {name: frozenset(stems) for name, stems in parts.items()}


@functools.lru_cache(maxsize=1 << 15)
def _classes(word: str) -> frozenset[str]:
    """Return the names of the classes a word belongs to."""
    if word in _DETERMINERS and word not in {"this", "that", "these", "those"}:
        return frozenset()
    bare = word.removesuffix("'s") if word not in _CLITIC else word
    return frozenset(name for name, has in domains().items() if (bare if name in _AS_WRITTEN else stem(bare)) in has)


@dataclass(frozen=True)
class _Parse:
    """Tokens of a sentence, punctuation among them, and what classes each belongs to."""

    tokens: Sequence[str]
    classes: Sequence[frozenset[str]]
    feelings: frozenset[int]

    def group(self, at: int) -> str:
        """Return what kind of noun a word is, empty for none; the first of `_NOMINAL` that it can be."""
        return next((name for name in _NOMINAL if name in self.classes[at]), "")

    def subject(self, at: int) -> str:
        """Return the kind of noun before a verb, "none" when there is none."""
        for place in range(at - 1, max(-1, at - 1 - REACH), -1):
            word = self.tokens[place]
            if word in _CLITIC:
                return "event" if word in {"it's", "that's"} else "person"
            if word in _BREAKS:
                return "shared" if word in {"and", "but", "or"} else "none"
            if word in _SKIP and word != "that":
                continue
            if found := self.group(place):
                return "person" if found == "role" else found
            if not word.endswith("ly") and word not in _NEAR:
                return "other"
        return "none"

    def head(self, at: int, reach: int = 4) -> tuple[str, int, str]:
        """Return kind, place and determiner of the noun that begins at or after a place: the last of a run of nouns."""
        determiner = "bare"
        for place in range(at, min(len(self.tokens), at + reach)):
            word = self.tokens[place]
            if word in _BREAKS or (word in _BE and place > at):
                break
            if word in _DETERMINERS and not (word in _THE and self._ends(place)):
                determiner = "a" if word in _A else "own" if word in _OWN else "the" if word in _THE else "some"
                continue
            if self.group(place):
                if "person" not in self.classes[place]:
                    while not self._ends(place) and self.group(place + 1) not in {"", "person"}:
                        place += 1
                return self.group(place), place, determiner
        return "none", -1, determiner

    def _ends(self, place: int) -> bool:
        return place + 1 >= len(self.tokens) or self.tokens[place + 1] in _BREAKS | _NEAR | _SKIP

    def any_in(self, names: frozenset[str], start: int, end: int) -> bool:
        """Return whether a word between two places belongs to any of some classes."""
        return any(found & names for found in self.classes[max(0, start):max(0, end)])


def _parse(sentence: str) -> _Parse:
    tokens = [_FULL.get(word, word) for word in _TOKEN.findall(normalise(sentence))]
    for at in range(len(tokens) - 1):
        if tokens[at] == "its" and tokens[at + 1] in _A | _THE | {"like", "been", "not", "so", "all"}:
            tokens[at] = "it's"
        elif tokens[at] == "so" and tokens[at + 1] not in _DETERMINERS | _ONE | _I | {"it", "that's", "i'm"}:
            tokens[at] = "very"  # "so much shame", not "so I left"
    feelings = frozenset(at for mention in find_feelings(tokens) for at in range(mention.start, mention.end))
    classes = [_classes(word) for word in tokens]
    for at, word in enumerate(tokens):
        before = tokens[at - 1] if at else ""
        governor = tokens[at - 2] if at > 1 and before in _DETERMINERS else before
        if word == "back" and before not in _OWN:
            classes[at] = frozenset()
        elif "abstract" in classes[at] and (before in _I or governor in _ABOUT):
            classes[at] -= {"abstract"}
        elif word in {"attack", "attacks"} and before in {"panic", "anxiety", "heart"}:
            classes[at - 1] = classes[at] = frozenset()
    return _Parse(tokens, classes, feelings)


def _similes(parse: _Parse) -> Iterator[str]:
    """Yield "like a ...", "like ... -ing", "like i'm ...", "as if", "as ... as a ..."."""
    tokens = parse.tokens
    for at, word in enumerate(tokens):
        after = tokens[at + 1:at + 6]
        if word == "like" and after:
            before = tokens[at - 1] if at else ""
            source = parse.any_in(_SOURCES, at + 1, at + 7)
            if before in _LIKING:
                yield "liking"
            elif after[0] in _A or after[0] in {"someone", "somebody", "something", "some"}:
                yield "like_a"
                if source:
                    yield "like_a_source"
            elif after[0] in _THE:
                yield "like_the_source" if source else "like_the"
            elif after[0].endswith("ing") and after[0] not in {"something", "nothing", "anything"}:
                yield "like_ing_source" if source else "like_ing"
            elif after[0] in _PLAIN_VEHICLE or after[0] in _CLITIC:
                yield "like_clause_source" if source or parse.any_in(_STRONG, at + 1, at + 8) else "like_plain"
            elif parse.any_in(_SOURCES, at + 1, at + 4):
                yield "like_source"
            else:
                yield "like_other"
        elif word == "as" and "as" in after[1:3]:
            second = at + 1 + after.index("as", 1)
            yield "as_as_a" if tokens[second + 1:second + 2] and tokens[second + 1] in _A | {"the"} else "as_as"
        elif word == "as" and after and after[0] in {"if", "though"}:
            yield "as_if"


def _of(parse: _Parse) -> Iterator[str]:
    """Yield "a wave of relief", "a heart of stone"."""
    for at, word in enumerate(parse.tokens):
        if word != "of" or not at:
            continue
        kind, _, determiner = parse.head(at + 1)
        before = parse.classes[at - 1]
        if before & (_SOURCES | {"strong", "force", "action"}):
            if kind in {"abstract", "time", "event"}:
                yield "vivid_of_target" if before & {"vivid", "source"} else "thing_of_target"
            elif kind in {"vivid", "source"} and determiner in {"bare", "a"}:
                yield "source_of_source"
        elif "body" in before and kind in _SOURCES:
            yield "source_of_source"


def _verbs(parse: _Parse) -> Iterator[str]:
    """Yield what does what to what: breaches of what an action takes as its subject and object."""
    for at, found in enumerate(parse.classes):
        kind = next((name for name in _VERBS if name in found), "")
        before = parse.tokens[at - 1] if at else ""
        if not kind or parse.tokens[at] in _SKIP or before in _DETERMINERS or before in {"of", "with"}:
            continue
        after = parse.tokens[at + 1] if at + 1 < len(parse.tokens) else ""
        subject = parse.subject(at)
        target, place, determiner = parse.head(at + 1)
        through = place > 0 and any(word in _NEAR for word in parse.tokens[at + 1:place])
        living = subject in {"person", "none", "shared", "role"}
        yield f"{kind}_by_{'source' if subject in {'vivid', 'source', 'thing'} else subject}"
        if subject in _BODILESS and kind != "mental":
            yield "bodiless_doing"
        if "mental" in found and subject in {"abstract", "body", "time", "source", "vivid", "thing", "event"}:
            yield "bodiless_minding"
        if target in {"abstract", "time", "body"} and living:
            yield f"{kind}_{'through' if through else 'done_to'}_{target}"
        if target == "person" and not living:
            yield "done_to_one" if kind == "mental" else f"{kind}_done_to_one"
        if target in _SOURCES or target in {"literal", "role"}:
            if subject in _BODILESS:
                yield "bodiless_and_thing"
            elif living:
                yield f"{kind}_{target}_{determiner if determiner in {'the', 'own'} else 'a'}"
                yield f"{'through' if through else 'done_to'}_{target}"
        if target == "none" and living:
            yield f"{kind}_bare"
        if after in _PARTICLES and living and kind != "mental":
            yield f"{kind}_particle"
        if after in {"on", "at", "through", "into", "over"} and _ONE.intersection(parse.tokens[at + 2:at + 3]):
            yield "on_one"
        if after == "it" or after in _ONE:
            yield f"{kind}_pronoun"


def _being(parse: _Parse) -> Iterator[str]:
    """Yield who or what is said to be a thing, in a place or in a state."""
    for at, word in enumerate(parse.tokens):
        if word not in _LINK:
            continue
        subject = ("event" if word in {"it's", "that's"} else "person") if word in _CLITIC else parse.subject(at)
        if word == "there's" or (at and parse.tokens[at - 1] == "there"):
            subject = "there"
        rest = at + 1
        while rest < len(parse.tokens) and parse.tokens[rest] in _SKIP | {"such", "like", "more", "bit"}:
            rest += 1
        if rest >= len(parse.tokens):
            continue
        first = parse.tokens[rest]
        if word in _BE and first not in _NEAR:
            kind, place, determiner = parse.head(rest, 6)
            between = parse.tokens[at + 1:max(at + 1, place)]
            if place > 0 and "role" in parse.classes[place]:
                yield "is_role"
            elif place > 0 and not any(word in _NEAR or word in _LINK - _BE for word in between):
                if kind in _SOURCES and subject != "there":
                    yield f"is_{determiner}_{kind}"
                    yield f"{subject}_is_source"
                elif kind in _SOURCES:
                    yield f"there_is_{kind}"
                if first in _A | _OWN and subject in _BODILESS | {"event", "person"} and kind != "person":
                    yield f"{subject}_is_a"
        kind = parse.head(rest + 1, 4)[0] if first in _NEAR and rest <= at + 2 else ""
        if kind in {"vivid", "source", "thing"}:
            yield f"{'bodiless' if subject in _BODILESS else subject}_is_in_{'thing' if kind == 'thing' else 'source'}"
        if parse.classes[rest] & {"state", "strong", "force"} and first not in _NEAR:
            yield f"{'source' if subject in _SOURCES else subject}_in_state"


def _places(parse: _Parse) -> Iterator[str]:
    """Yield "in quicksand", "under my skin", "got walls"; and places of literal narrative."""
    for at, word in enumerate(parse.tokens):
        if word in _NEAR:
            kind, _, determiner = parse.head(at + 1, 4)
            if kind in _SOURCES:
                yield f"in_{determiner if determiner in {'the', 'own', 'a'} else 'bare'}_{kind}"
            elif kind == "body" and any(word in _INNER for word in parse.tokens[at + 1:at + 4]):
                yield "in_inner"
            elif kind == "literal":
                yield "in_literal"
        elif word in _HAVE and parse.tokens[at + 1:at + 2] != ["to"]:
            kind, _, _ = parse.head(at + 1, 4)
            if kind in _SOURCES:
                yield f"has_{kind}"
            if kind in _SOURCES | {"body"} and parse.subject(at) in {"abstract", "time"}:
                yield "bodiless_has"


def _beside(parse: _Parse) -> Iterator[str]:
    """Yield a source or bodily state right before a target: "heavy heart", "emotional baggage", "racing thoughts"."""
    for at in range(len(parse.tokens) - 1):
        one, other = parse.classes[at], parse.group(at + 1)
        if parse.tokens[at] in _SKIP | _NEAR | _DETERMINERS or parse.tokens[at + 1] in _SKIP | _NEAR:
            continue
        if other in {"abstract", "body"} and one & {"vivid", "source", "state", "strong", "force"}:
            yield "source_beside_target"
        elif other in {"vivid", "source", "thing"} and parse.group(at) == "abstract":
            yield "target_beside_source"
        elif other in {"vivid", "source"} and "state" in one:
            yield "state_beside_source"


def features(sentence: str) -> dict[str, float]:
    """Return the constructions of a sentence, each counted at most `MOST` times, and how many words of each class."""
    parse = _parse(sentence)
    total: dict[str, float] = {}

    def add(name: str, value: float = 1.0) -> None:
        total[name] = min(MOST, total.get(name, 0.0) + value)

    if any(name.startswith(("like_a", "as_", "like_the_s", "like_ing_s", "like_clause_s", "like_source")) for name in
           _similes(parse)):
        add("simile")
    for finder in (_similes, _of, _verbs, _being, _places, _beside):
        for name in finder(parse):
            add(name)
    for at, (word, found) in enumerate(zip(parse.tokens, parse.classes, strict=True)):
        for name in sorted(found - {"person", "event", "mental"}):
            add(f"n_{name}", 0.5)
        if at in parse.feelings and "abstract" not in found:
            add("plain_feeling")
        if word.isdigit() or re.fullmatch(r"\d+\S*", word):
            add("number")
        elif word in _HYPERBOLE:
            add("hyperbole")
        elif word in {"the", "a"} and at + 1 < len(parse.tokens) and parse.group(at + 1) in {"thing", "literal"}:
            add(f"{word}_thing")
        elif word.endswith(("self", "selves")):
            add("self")
    if any(name in total for name in ("n_abstract", "n_body")):
        for name in ("vivid", "source", "strong", "force", "state", "thing"):
            if f"n_{name}" in total:
                add(f"target_with_{name}")
    add("length", max(0.0, math.log(len(parse.tokens) / SHORT)) if parse.tokens else 0.0)
    for word in sorted({stem(token) for token in parse.tokens}):
        add(f"word {word}", WORD)
    return total


@functools.cache
def _fitted() -> dict[str, Any]:
    return dict(json.loads(WEIGHTS.read_text(encoding="utf-8")))


def _probabilities(text: str) -> Iterator[float]:
    """Yield for each sentence what a logistic regression over `features` says, 0 to 1."""
    weights, bias = _fitted()["weights"], _fitted()["bias"]
    for sentence in sentences(text):
        at = bias + sum(weights.get(name, 0.0) * value for name, value in features(sentence).items())
        yield 1 / (1 + math.exp(-max(-60.0, min(60.0, at))))


def figurativeness(text: str) -> float:
    """Return the probability, 0 to 1, that text has a figure: that of its most figurative sentence, 0 without words."""
    return max(_probabilities(text), default=0.0)


def count_figures(text: str) -> int:
    """Return how many sentences of text are figurative."""
    return sum(probability >= FIGURATIVE for probability in _probabilities(text))
