"""What comes back when calibration text is generated: read leniently, held against what there is, counted.

Nothing here asks anybody; `daemon.generating` does.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration_data.briefs import SYSTEM, Brief, opening, request, vary
from calibration_data.catalogue import FOLDER
from calibration_data.checks import NEAR, RUN, guess_language, shingles, words
from calibration_data.text import ROLES, CalibrationRefused, Header, Sample, Turn, parse, read, write

AT_ONCE = 5  #: samples asked for in one request
FEWEST_WORDS, MOST_WORDS = 8, 4000  #: of a sample
FEWEST_DIFFERENT = 0.5  #: of the runs of five words of a sample; below, it goes round in circles
LONGEST_TOPIC = 80  #: characters
#: languages that `checks.guess_language` tells from each other and from what is written nearby
TOLD_APART = frozenset({"en", "de", "fr", "es", "it", "pt", "nl", "ja", "zh", "ko", "el", "he", "th"})
#: to estimate by: of UTF-8 text; English has 3 to 4.5 bytes per token, so the estimate is rather too high
BYTES_PER_TOKEN = 3
TOKENS_PER_WORD = 2
TOKENS_AROUND = 60  #: a sample's braces, names and topic
SPARE = 1.1  #: requests per request that is needed if nothing is dropped

MALFORMED, DUPLICATE, OVERLAP, FOREIGN, REPETITIVE = "malformed", "duplicate", "overlap", "language", "repetitive"
#: why samples are dropped, for people
REASONS: Mapping[str, str] = {
    MALFORMED: "out of form", DUPLICATE: "like another sample", OVERLAP: "like text that models are judged by",
    FOREIGN: "in another language", REPETITIVE: "repeating itself"}

#: of an answer; every property required and no other allowed, as strict structured output wants it
SCHEMA: Mapping[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["samples"],
    "properties": {"samples": {"type": "array", "items": {
        "type": "object", "additionalProperties": False, "required": ["topic", "turns"],
        "properties": {
            "topic": {"type": "string", "description": "at most eight words"},
            "turns": {"type": "array", "items": {
                "type": "object", "additionalProperties": False, "required": ["role", "content"],
                "properties": {"role": {"type": "string", "enum": list(ROLES)}, "content": {"type": "string"}}}}}}}}}


def read_answer(answer: Any, languages: Sequence[str]) -> tuple[list[Sample], Counter[str]]:
    """Return the samples of an answer that can be used, exactly as a file will hold them, and why others were dropped.

    What is missing or superfluous around the samples is overlooked: a list without its object, or JSON inside a string.

    Args:
        answer: decoded JSON, supposed to follow SCHEMA.
        languages: that the samples may be in; checked where they can be told apart.
    """
    for _ in range(2):  # an object may hold its list as text
        if isinstance(answer, str):
            try:
                answer = json.loads(answer)
            except (ValueError, RecursionError):
                break
        if isinstance(answer, Mapping):
            answer = answer.get("samples")
    if not isinstance(answer, list) or not answer:
        return [], Counter({MALFORMED: 1})
    samples, dropped = [], Counter[str]()
    for one in answer:
        sample = _read_sample(one)
        reason = MALFORMED if sample is None else _fault(sample, languages)
        if sample is None or reason:
            dropped[reason] += 1
        else:
            samples.append(sample)
    return samples, dropped


def _read_sample(one: Any) -> Sample | None:
    """Return a sample as a file will hold it; None where it is none, or no conversation."""
    if not isinstance(one, Mapping) or not isinstance(one.get("turns"), list):
        return None
    turns = []
    for turn in one["turns"]:
        role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            return None
        turns.append(Turn(str(role), text))
    roles = [turn.role for turn in turns]
    if "user" not in roles or roles[-1] != "assistant" or "system" in roles[1:]:
        return None
    topic = one.get("topic")
    topic = " ".join(topic.split())[:LONGEST_TOPIC] if isinstance(topic, str) else ""
    try:
        text = write([Sample("1", topic, tuple(turns), Header("generated"))])
        text.encode()  # half a character cannot be written
        return parse(text)[0]
    except (CalibrationRefused, UnicodeEncodeError):
        return None


def _fault(sample: Sample, languages: Sequence[str]) -> str:
    """Return why a sample is of no use; '' where it is."""
    said = words(sample.text)
    if not FEWEST_WORDS <= len(said) <= MOST_WORDS:
        return MALFORMED
    if len(shingles(sample.text)) < FEWEST_DIFFERENT * (len(said) - 4):
        return REPETITIVE
    if TOLD_APART.issuperset(languages) and guess_language(sample.text) not in ("", *languages):
        return FOREIGN
    return ""


def shipped() -> list[Sample]:
    """Return all samples of the domains that ship.

    Raises:
        CalibrationRefused: a file is damaged.
    """
    return [sample for path in sorted((FOLDER / "domains").glob("*.txt")) for sample in read(path)]


class Sieve:
    """Lets through what is new: no near-duplicate, and nothing in common with what models are judged by.

    The measures are those of `checks.near_duplicates` and `checks.overlaps`, exact up to a collision of 64-bit hashes.
    """

    def __init__(self, held: Iterable[Sample], judged_by: Iterable[str]) -> None:
        """Hold samples that are there already, and texts that must not come back.

        Args:
            held: what ships, the examples, and what was generated before.
            judged_by: evaluation text, scenarios, held-out parts.
        """
        self._sets: list[frozenset[int]] = []
        self._index: dict[int, list[int]] = {}
        self._judged_by = {run for text in judged_by for run in _runs(text)}
        self.add(held)

    def add(self, samples: Iterable[Sample]) -> None:
        """Hold samples, whatever is in them."""
        for sample in samples:
            self._hold(shingles(sample.text))

    def sift(self, samples: Iterable[Sample]) -> tuple[list[Sample], Counter[str]]:
        """Return the samples that are new, which are held from now on, and why others were dropped."""
        new, dropped = [], Counter[str]()
        for sample in samples:
            mine = shingles(sample.text)
            if any(not self._judged_by.isdisjoint(_runs(turn.text)) for turn in sample.turns):
                dropped[OVERLAP] += 1
            elif self._nearest(mine) >= NEAR:
                dropped[DUPLICATE] += 1
            else:
                self._hold(mine)
                new.append(sample)
        return new, dropped

    def _hold(self, mine: frozenset[int]) -> None:
        for shingle in mine:
            self._index.setdefault(shingle, []).append(len(self._sets))
        self._sets.append(mine)

    def _nearest(self, mine: frozenset[int]) -> float:
        """Return the Jaccard similarity of the most similar set that is held."""
        shared = Counter(number for shingle in mine for number in self._index.get(shingle, ()))
        return max((count / (len(mine) + len(self._sets[number]) - count) for number, count in shared.items()),
                   default=0.0)


def _runs(text: str) -> set[int]:
    """Return hashes of all runs of RUN words; they hold within this process only."""
    found = words(text)
    return {hash(tuple(found[start:start + RUN])) for start in range(len(found) - RUN + 1)}


def finish(samples: Sequence[Sample], header: Header) -> tuple[Sample, ...]:
    """Return the samples with their header and with ids in their order: NAME-001 and so on."""
    return tuple(Sample(f"{header.domain}-{number:03d}", sample.topic, sample.turns, header)
                 for number, sample in enumerate(samples, 1))


@dataclass(frozen=True)
class Estimate:
    """About what generating takes: requests, and tokens in both directions, rather too many than too few."""

    requests: int
    sent: int
    received: int


def estimate(brief: Brief, samples: int, first: int = 0, *, local: bool = False) -> Estimate:
    """Return about what it takes to get so many samples more, from request number `first` on.

    Args:
        brief: what is to be written.
        samples: still missing.
        first: number of the next request.
        local: a request is one sample, in two steps: the message, then the answer.
    """
    at_once = 1 if local else AT_ONCE
    requests = math.ceil(max(0, samples) * SPARE / at_once)
    sent = received = 0
    for number in range(first, first + requests):
        most = at_once * (vary(brief, number).words[1] * TOKENS_PER_WORD + TOKENS_AROUND)
        asked = opening(brief, number) if local else SYSTEM + json.dumps(SCHEMA) + request(brief, number, at_once)
        sent += -(-len(asked.encode()) // BYTES_PER_TOKEN) + (most if local else 0)
        received += most
    return Estimate(requests, sent, received)


def price(sent: int, received: int, price_in: float, price_out: float) -> float:
    """Return what tokens cost, from prices for a million of each, in the currency of the prices."""
    return (sent * price_in + received * price_out) / 1e6
