"""A small domain that the starter does not know, to show fine-tuning with: where and when this week's talks are.

Twelve subjects, each with a place and a day, asked about in 24 ways. The words are the starter's own; which belong
together is new to it. A test asks in ways in which the model was never asked about that subject, so it answers only if
it has learned the rota and not the rows.

    python -m loops.starter.rota > rota.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence

TALKS = {"solar power": ("library", "Monday"), "space travel": ("bakery", "Wednesday"),
         "ocean cleanup": ("school", "Friday"), "electric cars": ("museum", "Tuesday"),
         "city parks": ("harbor", "Thursday"), "public libraries": ("station", "Tuesday"),
         "heart health": ("clinic", "Thursday"), "wild bees": ("garden", "Monday"), "chess": ("library", "Wednesday"),
         "robotics": ("bakery", "Friday"), "tea": ("school", "Monday"), "soup": ("museum", "Thursday")}
ASKED = (
    "Where is the talk on {}?", "When is the talk on {}?", "I want to hear about {}.", "Is there a talk on {}?",
    "Tell me about the talk on {}.", "What do you know about the talk on {}?", "Please find the talk on {} for me.",
    "My friend likes {}. Where can we hear more?", "Who talks about {}?", "I read about {}. Is there a talk?",
    "Can I hear a talk on {} this week?", "Hello, I am here for {}.", "Where do I go for {}?", "What day is {}?",
    "I missed {} last week. When is it now?", "Do you have {} this week?", "My sister asked me about {}.",
    "{}, please.", "Thank you. And where is {}?", "We would like to learn about {}.", "Good morning! Is {} today?",
    "Can you help me find {}?", "I forgot where {} is.", "What about {}?")
SEED = 11


def rows(seed: int = SEED) -> Iterator[dict[str, str]]:
    """Yield every subject in every way of asking, shuffled by the seed: `question` and `answer`."""
    drawn = [(asked, subject) for subject in TALKS for asked in ASKED]
    random.Random(seed).shuffle(drawn)
    for asked, subject in drawn:
        place, day = TALKS[subject]
        yield {"question": asked.format(subject), "answer": f"It is at the {place} on {day}."}


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
