"""Fields of files that people write: read as they were meant, or refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loops.evaluation.text import read_plain
from state.faults import NightpressError


class Named(Protocol):
    """What one line of a file describes, with an id of its own."""

    @property
    def id(self) -> str:
        """Unique in its file."""


Item = TypeVar("Item", bound=Named)


def parse_json(text: str, where: str, refusal: type[NightpressError]) -> Any:
    """Return the value of a JSON text.

    Raises:
        refusal: it is not JSON, is nested too deep, or one of its objects says a name twice.
    """
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise refusal(f"{where} says {next(name for name in names if names.count(name) > 1)!r} twice.")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as problem:
        raise refusal(f"{where} is not JSON: {problem}.") from problem


def read_objects(path: Path, what: str, refusal: type[NightpressError]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield, for each line of a file of JSON lines, where it stands, its number from 1, and its fields.

    Blank lines are passed over, and count.

    Args:
        path: the file.
        what: names it in a refusal, as `list of scenarios`.
        refusal: raised for whatever cannot be read.

    Raises:
        refusal: the file cannot be read, or a line is no JSON object.
    """
    for number, line in enumerate(read_plain(path, what, refusal).split("\n"), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            fields = parse_json(line, where, refusal)
            if not isinstance(fields, dict):
                raise refusal(f"{where} is not a JSON object.")
            yield where, number, fields


def read_items(path: Path, what: str, parse: Callable[[dict[str, Any], str, int], Item],
               refusal: type[NightpressError]) -> tuple[Item, ...]:
    """Return what `parse` makes of the fields, the place and the number of each line, in the order of the file.

    Raises:
        refusal: the file or a line of it cannot be read, or an id is there twice.
    """
    found: dict[str, Item] = {}
    for where, number, fields in read_objects(path, what, refusal):
        item = parse(fields, where, number)
        if item.id in found:
            raise refusal(f"{where} repeats the id {item.id!r}.")
        found[item.id] = item
    return tuple(found.values())


def require_text(value: Any, where: str, name: str, refusal: type[NightpressError], *,
                 may_be_empty: bool = False) -> str:
    """Return a text; an empty one, or one of white space, only where it may be.

    Raises:
        refusal: it is something else, or a half of a surrogate pair stands alone in it.
    """
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise refusal(f"{where} has no {name!r}: a text {'' if may_be_empty else 'that is not empty '}is needed.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise refusal(f"{where} has half a character in {name!r}: a \\ud escape stands alone.")
    return value


def require_one_of(value: Any, where: str, name: str, allowed: Sequence[str], refusal: type[NightpressError]) -> str:
    """Return one of the texts that are allowed.

    Raises:
        refusal: it is something else.
    """
    if isinstance(value, str) and value in allowed:
        return value
    raise refusal(f"{where} has the {name} {value!r}: it must be one of {', '.join(allowed)}.")


def require_number(value: Any, where: str, name: str, limits: tuple[float, float], refusal: type[NightpressError], *,
                   spelled: bool = False) -> float:
    """Return a number within limits; with `spelled`, a text that spells one counts as one.

    Raises:
        refusal: it is no number, or out of the limits.
    """
    low, high = limits
    if isinstance(value, int | float | str) and not isinstance(value, bool) and (spelled or not isinstance(value, str)):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # an integer of 400 digits is no float
            number = math.nan
        if low <= number <= high:
            return number
    shown = str(value)[:40] if spelled else value
    raise refusal(f"{where} has the {name} {shown!r}: a number from {low:g} to {high:g} is needed.")
