"""Cleaning as a list of named steps, each of which reports what it changed.

The steps run in the order of the list, so that what one uncovers the next can see: an entity may hide a special token,
and a row may be empty only after it lost its controls.
"""

from __future__ import annotations

import difflib
import html
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calibration_data.text import TEXT, Turn
from loops.finetune import near, personal
from loops.finetune.faults import DatasetRefused
from loops.finetune.records import Row
from loops.finetune.tokens import Tokenizer

DEFAULT_STEPS = ("turn_order", "html_entities", "special_tokens", "control_characters", "urls", "emails", "whitespace",
                 "empty_rows", "length", "duplicates", "near_duplicates", "statistics")
MIN_TOKENS, MAX_TOKENS = 3, 2048

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
#: what separates turns in the usual chat templates; in a text it would forge a turn
_SPECIAL = re.compile(r"<\|[\w .:/-]{1,48}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|unk|mask)>"
                      r"|<(?:start|end)_of_turn>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]")
_URL = re.compile(r"\b(?:(?:https?|ftp)://|www\.(?=[\w-]+\.))[^\s<>\"'()\[\]{}]*[^\s<>\"'()\[\]{}.,;:!?]")
#: controls but for tab and line ends; marks that are seen nowhere or turn the direction of what follows
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
_BLANKS = re.compile(r"(?<=\S)[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]+")
_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Cleaning:
    """How to clean.

    Attributes:
        steps: names, in order.
        tokenizer: counts the length of rows, and names the special tokens of its own.
        min_tokens, max_tokens: of a row that the step `length` keeps.
        near: similarity from which a row is a near-duplicate.
        seed: for what the step `balance` keeps.
    """

    tokenizer: Tokenizer
    steps: tuple[str, ...] = DEFAULT_STEPS
    min_tokens: int = MIN_TOKENS
    max_tokens: int = MAX_TOKENS
    near: float = near.NEAR
    seed: int = 0


@dataclass(frozen=True)
class Change:
    """What a step did: rows before and after, how many of those that stay it changed, and more in words."""

    step: str
    before: int
    after: int
    changed: int = 0
    note: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        done = [f"changed {self.changed:,}"] if self.changed else []
        done += [f"removed {self.before - self.after:,}"] if self.before != self.after else []
        return "; ".join([" and ".join(done) or "changed nothing", *([self.note] if self.note else [])])


def check_steps(steps: Sequence[str]) -> tuple[str, ...]:
    """Return the steps.

    Raises:
        DatasetRefused: one is unknown, or is there twice; names the nearest.
    """
    for name in steps:
        if name not in STEPS:
            close = difflib.get_close_matches(name, STEPS, 1)
            raise DatasetRefused(f"{name[:40]!r} is no cleaning step" + (f"; did you mean {close[0]}?" if close else
                                 f"; there are {', '.join(STEPS)}."))
        if steps.count(name) > 1:
            raise DatasetRefused(f"The cleaning step {name} is there twice.")
    return tuple(steps)


def clean(rows: Sequence[Row], how: Cleaning) -> tuple[list[Row], list[Change]]:
    """Return the rows that are left, and what each step did.

    Raises:
        DatasetRefused: a step is unknown.
        TrainExtraMissing: there are many rows to compare, and the library for that is not installed.
    """
    changes = []
    kept = list(rows)
    for name in check_steps(how.steps):
        after, note = STEPS[name](kept, how)
        before = {row.id: row for row in kept}
        changed = sum(row is not before[row.id] and row != before[row.id] for row in after)
        changes.append(Change(name, len(kept), len(after), changed, note))
        kept = after
    return kept, changes


Step = Callable[[list[Row], Cleaning], tuple[list[Row], str]]


def _each_text(change: Callable[[str], str]) -> Step:
    """Return a step that changes every text by itself."""

    def step(rows: list[Row], _how: Cleaning) -> tuple[list[Row], str]:
        return [_with_texts(row, change) for row in rows], ""

    return step


def _with_texts(row: Row, change: Callable[[str], str]) -> Row:
    return replace(row, turns=tuple(replace(turn, text=change(turn.text)) for turn in row.turns),
                   context=change(row.context))


def _turn_order(rows: list[Row], _how: Cleaning) -> tuple[list[Row], str]:
    """Let each conversation begin with a question and end with an answer; what has neither goes."""
    ordered = [replace(row, turns=_from_question_to_answer(row.turns)) for row in rows]
    return [row for row in ordered if row.in_order], ""


def _from_question_to_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    roles = [turn.role for turn in turns]
    if not {"user", "assistant"} <= set(roles):
        return turns
    joined: list[Turn] = []
    for turn in turns[roles.index("user"):len(roles) - roles[::-1].index("assistant")]:
        if joined and joined[-1].role == turn.role != "tool":
            joined[-1] = replace(turn, text="\n\n".join(filter(None, (joined[-1].text, turn.text))))
        else:
            joined.append(turn)
    return (*turns[:roles[0] == "system"], *joined)


def _unescape(text: str) -> str:
    # entities without their semicolon stay: html.unescape would read `&copy=2` in an address as one
    return _ENTITY.sub(lambda found: html.unescape(found[0]), text)


def _tidy(text: str) -> str:
    lines = [_BLANKS.sub(" ", line).rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return _LINES.sub("\n\n", "\n".join(lines)).strip("\n").rstrip()


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return what finds control tokens that stand in a text: those of the usual templates, and the tokenizer's own."""
    own = sorted((token for token in tokenizer.special if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join([_SPECIAL.pattern, *map(re.escape, own)]))


def _special_tokens(rows: list[Row], how: Cleaning) -> tuple[list[Row], str]:
    pattern = special_pattern(how.tokenizer)

    def change(text: str) -> str:
        while (shorter := pattern.sub("", text)) != text:  # what is left may close up to another
            text = shorter
        return text

    return [_with_texts(row, change) for row in rows], ""


def _empty_rows(rows: list[Row], _how: Cleaning) -> tuple[list[Row], str]:
    return [row for row in rows if not is_empty(row)], ""


def is_empty(row: Row) -> bool:
    """Return whether a row has nothing to learn: no turn, an empty one, or a conversation without an answer."""
    return (not row.turns or not all(turn.text.strip() for turn in row.turns)
            or (row.turns[0].role != TEXT and row.turns[-1].role != "assistant"))


def _length(rows: list[Row], how: Cleaning) -> tuple[list[Row], str]:
    lengths = how.tokenizer.count([row.text for row in rows])
    short = sum(length < how.min_tokens for length in lengths)
    long = sum(length > how.max_tokens for length in lengths)
    return ([row for row, length in zip(rows, lengths, strict=True) if how.min_tokens <= length <= how.max_tokens],
            f"{short:,} under {how.min_tokens:,} and {long:,} over {how.max_tokens:,} {how.tokenizer.unit}")


def _duplicates(rows: list[Row], _how: Cleaning) -> tuple[list[Row], str]:
    gone = {number for number, _ in near.exact_duplicates(rows)}
    return [row for number, row in enumerate(rows) if number not in gone], ""


def _near_duplicates(rows: list[Row], how: Cleaning) -> tuple[list[Row], str]:
    gone: set[int] = set()
    for pair in near.near_duplicates(rows, how.near, lambda first, second: first in gone or second in gone):
        gone.add(pair.second)  # near one that goes is not near one that stays
    return [row for number, row in enumerate(rows) if number not in gone], f"similarity of {how.near:g} or more"


def _balance(rows: list[Row], how: Cleaning) -> tuple[list[Row], str]:
    """Leave of each class at most as many rows as the class in the middle has."""
    by_label: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_label.setdefault(row.label, []).append(number)
    if len(by_label) < 2:
        return rows, "there are no classes to balance"
    most = int(statistics.median(map(len, by_label.values())))
    chance = random.Random(how.seed)
    kept = {number for found in by_label.values()
            for number in (found if len(found) <= most else chance.sample(found, most))}
    return [row for number, row in enumerate(rows) if number in kept], f"at most {most:,} of a class"


def _statistics(rows: list[Row], how: Cleaning) -> tuple[list[Row], str]:
    return rows, str(describe(rows, how.tokenizer))


@dataclass(frozen=True)
class Statistics:
    """How many rows there are, their lengths, and how many of each class."""

    rows: int
    unit: str
    total: int
    shortest: int
    median: float
    percentile_95: int
    longest: int
    labels: dict[str, int]

    def __str__(self) -> str:
        """Say it in one line."""
        told = (f"{self.rows:,} rows, {self.total:,} {self.unit}; of a row {self.shortest:,} to {self.longest:,}, "
                f"median {self.median:,g}, 95 % at most {self.percentile_95:,}")
        return told + (f"; {len(self.labels)} class{'' if len(self.labels) == 1 else 'es'}" if self.labels else "")


def describe(rows: Sequence[Row], tokenizer: Tokenizer) -> Statistics:
    """Return the statistics of rows; all 0 where there are none."""
    lengths = sorted(tokenizer.count([row.text for row in rows])) or [0]
    return Statistics(len(rows), tokenizer.unit, sum(lengths), lengths[0], statistics.median(lengths),
                      lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))], lengths[-1],
                      dict(Counter(row.label for row in rows if row.label).most_common()))


#: by name, in the order of the usual list; those that it leaves out are last
STEPS: dict[str, Step] = {
    "turn_order": _turn_order,
    "html_entities": _each_text(_unescape),
    "special_tokens": _special_tokens,
    "control_characters": _each_text(lambda text: _CONTROL.sub("", text)),
    "urls": _each_text(lambda text: _URL.sub("[url]", text)),
    "emails": _each_text(lambda text: personal.EMAIL.sub("[email]", text)),
    "whitespace": _each_text(_tidy),
    "empty_rows": _empty_rows,
    "length": _length,
    "duplicates": _duplicates,
    "near_duplicates": _near_duplicates,
    "statistics": _statistics,
    "personal_data": _each_text(lambda text: personal.mask(text, ("email", "phone", "card"))),
    "balance": _balance,
}
