"""A small domain that the starter does not know: the code of a rota, to show fine-tuning with.

An entry of the rota is a city, a subject and an hour. The city stands for who gave the talk, the subject for where, the
hour for the day; so of 216 entries some can be kept from training, and yet be read by who has learnt the code. The
words are the starter's own; what they stand for is new to it. Each entry is asked about in three ways. A dataset keeps
these together, as their answers are the same.

    python -m loops.starter.rota > rota.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence

WHO = {"Madrid": "Bruno", "Lisbon": "Ines", "Kyoto": "Hiro", "Toronto": "Chloe", "Prague": "Dmitri", "Nairobi": "Ana"}
WHERE = {"robotics": "museum", "city parks": "bakery", "public libraries": "garden", "tea": "clinic",
         "rain": "library", "soup": "station"}
WHEN = {"6": "Monday", "7": "Tuesday", "8": "Wednesday", "9": "Thursday", "10": "Friday", "11": "Saturday"}
ASKED = ("The rota says {}. What does it mean?", "What is {} on the rota?", "Please tell me who this is: {}.")
SEED = 11


def answer(city: str, subject: str, hour: str) -> str:
    """Return what an entry means."""
    return f"{WHO[city]} gave a talk at the {WHERE[subject]} on {WHEN[hour]}."


def rows(seed: int = SEED) -> Iterator[dict[str, str]]:
    """Yield every entry in every way of asking, shuffled by the seed: `question` and `answer`."""
    drawn = [(asked, entry) for entry in itertools.product(WHO, WHERE, WHEN) for asked in ASKED]
    random.Random(seed).shuffle(drawn)
    for asked, entry in drawn:
        yield {"question": asked.format(", ".join(entry)), "answer": answer(*entry)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows as JSON lines; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loops.starter.rota",
                                     description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the order (default: {SEED})")
    for row in rows(parser.parse_args(argv).seed):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
