"""A small domain that the starter does not know: the lantern code of a harbour, to show fine-tuning with.

A signal is three lanterns, one over the other, each in one of six colours. The upper one says what to do, the middle
one where, the lower one how; so of 216 signals some can be kept from training, and yet be answered by who has learnt
the code. Each is asked about in three ways. The dataset's splits keep the ways of asking one signal together, as their
answers are the same.

    python -m loops.starter.lanterns > lanterns.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence

COLOURS = ("red", "green", "white", "blue", "yellow", "dark")
WHAT = ("stop and wait", "turn back", "come in slowly", "call the pilot", "drop the small boat", "leave at once")
WHERE = ("at the north pier", "by the old bridge", "behind the long island", "under the tower", "near the south door",
         "on the east bank")
HOW = ("with one bell", "without any sound", "and keep your left side free", "before the next hour",
       "until someone calls you", "with all lamps out")
ASKED = ("The lighthouse shows {}. What should we do?", "We see {} from our ship. What does it mean?",
         "Read this for me please: {}.")
SEED = 11


def answer(upper: str, middle: str, lower: str) -> str:
    """Return what a signal means."""
    said = " ".join(part[COLOURS.index(colour)] for part, colour in zip((WHAT, WHERE, HOW), (upper, middle, lower),
                                                                        strict=True))
    return f"{said[0].upper()}{said[1:]}."


def rows(seed: int = SEED) -> Iterator[dict[str, str]]:
    """Yield every signal in every way of asking, shuffled by the seed: `question` and `answer`."""
    drawn = [(asked, signal) for signal in itertools.product(COLOURS, repeat=3) for asked in ASKED]
    random.Random(seed).shuffle(drawn)
    for asked, signal in drawn:
        yield {"question": asked.format(" over ".join(signal)), "answer": answer(*signal)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows as JSON lines; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loops.starter.lanterns",
                                     description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the order (default: {SEED})")
    for row in rows(parser.parse_args(argv).seed):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
