"""The levels: every quantization type that the installed llama.cpp knows, by its own name."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass

from loops.engine.ladders import LADDERS, ORIGINAL_LADDER, expand
from loops.engine.native import library
from state.faults import NightpressError

#: types of an unquantized model
UNQUANTIZED = frozenset({"F32", "F16", "BF16"})


class UnknownLevel(NightpressError):
    """The installed llama.cpp knows no such level."""

    exit_code = 32


@dataclass(frozen=True)
class Level:
    """A quantization type of llama.cpp.

    Attributes:
        name: as llama.cpp writes it, `Q4_K_M`.
        ftype: its number in `enum llama_ftype`.
    """

    name: str
    ftype: int


@functools.cache
def levels() -> dict[str, Level]:
    """Return every level of the installed library, by name, read from its constants."""
    lib = library()
    found = {}
    for constant in dir(lib):
        if constant.startswith("LLAMA_FTYPE_") and not constant.endswith("_GUESSED"):
            name = constant.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
            found[name] = Level(name, int(getattr(lib, constant)))
    return found


def level_named(text: str) -> Level:
    """Return the level that text names, in any case; `Q4_K` means `Q4_K_M`, as in llama-quantize.

    Raises:
        UnknownLevel: with the nearest names.
    """
    known = levels()
    name = text.strip().upper().replace("-", "_")
    for candidate in (name, f"{name}_M"):
        if candidate in known:
            return known[candidate]
    near = difflib.get_close_matches(name, [*known, *map(str.upper, LADDERS)], n=4, cutoff=0.5) or ORIGINAL_LADDER
    suggested = ", ".join(one.lower() if one.lower() in LADDERS else one for one in near)
    raise UnknownLevel(f"There is no level {text!r}. Did you mean {suggested}? `nightpress levels` lists all of them; "
                       f"ladders of several are {', '.join(LADDERS)}.")


def parse_ladder(text: str | None) -> tuple[Level, ...]:
    """Return the levels of a comma-separated list, without repeats; None means the original six.

    The name of a ladder, such as `knees`, stands for its levels, in any case and beside others.

    Raises:
        UnknownLevel: a name is unknown or the list is empty.
    """
    names = [name for name in (ORIGINAL_LADDER if text is None else text.split(",")) if name.strip()]
    if not names:
        raise UnknownLevel("The list of levels is empty. Give some, like --levels Q8_0,Q4_K_M, or --levels knees.")
    return tuple(dict.fromkeys(level_named(name) for name in expand(names)))
