"""Several calibration texts made one: in the proportions asked for, interleaved, and the same each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from calibration_data.checks import words
from calibration_data.text import CalibrationRefused, Sample, Turn


@dataclass(frozen=True)
class Source:
    """A text to combine, and how many of its words per word of a source of weight 1."""

    name: str
    samples: tuple[Sample, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Taken:
    """What was taken of a source, and what it has; a sample that another source gave before is not counted as taken."""

    name: str
    samples: int
    words: int
    of_samples: int
    of_words: int


@dataclass(frozen=True)
class Combined:
    """Samples of several sources in the order in which they are to be read, and what each source gave."""

    samples: tuple[Sample, ...]
    taken: tuple[Taken, ...]


def combine(sources: Sequence[Source], max_words: int | None = None) -> Combined:
    """Return samples of all sources whose words are in the proportion of the weights, to within one sample of each.

    The next sample always comes from the source that is furthest behind its share, of equals from the one named
    first, in the order of the source; so the sources interleave, and each beginning of the result is as balanced as
    the whole. It ends where the source whose turn it is has no more: the scarcest decides, nothing is repeated. A
    sample that stands in several sources is taken once.

    Args:
        sources: one or more.
        max_words: also ends where this many words are reached; the last sample may go beyond it.

    Raises:
        CalibrationRefused: there is no source, or a weight is not a positive number.
    """
    if not sources:
        raise CalibrationRefused("There is no calibration text to combine.")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise CalibrationRefused(f"The weight of {source.name} is {source.weight}: a number above 0 is needed.")
    lengths = [[len(words(sample.text)) for sample in source.samples] for source in sources]
    given, samples, counts, position = [0] * len(sources), [0] * len(sources), [0] * len(sources), [0] * len(sources)
    chosen: list[Sample] = []
    seen: set[tuple[Turn, ...]] = set()
    while max_words is None or sum(given) < max_words:
        behind = min(range(len(sources)), key=lambda number: (counts[number] / sources[number].weight, number))
        source = sources[behind]
        while position[behind] < len(source.samples) and source.samples[position[behind]].turns in seen:
            position[behind] += 1
        if position[behind] == len(source.samples):
            break
        sample, length = source.samples[position[behind]], lengths[behind][position[behind]]
        position[behind] += 1
        chosen.append(sample)
        seen.add(sample.turns)
        samples[behind] += 1
        given[behind] += length
        counts[behind] += max(length, 1)  # marks alone are no words, but the others must get their turn
    return Combined(tuple(chosen), tuple(
        Taken(source.name, samples[number], given[number], len(source.samples), sum(lengths[number]))
        for number, source in enumerate(sources)))
