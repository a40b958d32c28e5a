"""Rows parted into train, validation and test, the same each time, what belongs together in one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from loops.finetune import near
from loops.finetune.faults import DatasetRefused, TooFewRows
from loops.finetune.records import Row
from loops.finetune.sources import SPLITS

SHARES = (0.8, 0.1, 0.1)


def parse_shares(text: str) -> tuple[float, float, float]:
    """Return the shares of train, validation and test from a text such as `0.8,0.1,0.1`.

    Raises:
        DatasetRefused: they are not three numbers above 0 that make 1 together.
    """
    try:
        train, validation, test = map(float, text.split(","))
    except ValueError:
        raise DatasetRefused(f"--shares is {text[:40]!r}; it is three numbers such as 0.8,0.1,0.1.") from None
    if not all(share > 0 for share in (train, validation, test)) or not math.isclose(train + validation + test, 1):
        raise DatasetRefused(f"--shares is {text[:40]!r}; each must be above 0, and they must make 1 together.")
    return train, validation, test


def part(rows: Sequence[Row], shares: tuple[float, float, float] = SHARES, seed: int = 0, threshold: float = near.NEAR
         ) -> dict[str, list[Row]]:
    """Return the splits by name, each with its rows in the order of the source; none is empty.

    Rows that are near-duplicates, share a context or share a long answer are in the same split. The shares are met
    but for what the size of the groups forbids: groups go, the largest first and else in an order that the seed
    decides, to the split that is furthest from full.

    Raises:
        TooFewRows: there are fewer than three groups of rows.
        TrainExtraMissing: there are many rows to compare, and the library for that is not installed.
    """
    groups = near.groups(rows, threshold)
    if len(groups) < len(SPLITS):
        told = f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
        if len(rows) >= len(SPLITS):
            told += f", of which only {len(groups)} {'differs' if len(groups) == 1 else 'differ'}"
        raise TooFewRows(f"There {'is' if len(rows) == 1 else 'are'} {told}; train, validation and test need at least "
                         "three that differ. Give more data, or remove fewer rows.")
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)
    room = [share * len(rows) for share in shares]
    chosen: list[list[list[int]]] = [[] for _ in SPLITS]
    for group in groups:
        place = max(range(len(SPLITS)), key=lambda number: room[number])
        chosen[place].append(group)
        room[place] -= len(group)
    while not all(chosen):  # few rows round to none: the split with the most groups gives its smallest
        giver = max(range(len(SPLITS)), key=lambda number: len(chosen[number]))
        chosen[next(number for number, found in enumerate(chosen) if not found)].append(chosen[giver].pop())
    return {name: [rows[number] for number in sorted(number for group in found for number in group)]
            for name, found in zip(SPLITS, chosen, strict=True)}
