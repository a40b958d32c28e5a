"""Calibration text on disk: plain text that reads, diffs and concatenates well; docs/calibration.md tells the format.

A line that starts with `%%` is markup. Header lines (`%% domain`, `%% language`, `%% licence`, `%% source`) hold for
what follows, `%% sample ID TOPIC` begins a sample, `%% user` and its like begin a turn. Text outside of samples, and
a file without markup, is one sample per paragraph.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import ClassVar

from state.faults import NightpressError

MAX_BYTES = 16 << 20  #: far more than a model is ever calibrated on
ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"  #: the role of a passage that nobody says to anybody; never written in a file
FIELDS = ("domain", "language", "licence", "source")
#: of a domain; a file of the user's folder is found by it, so no dot and no slash
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

_MARKUP = re.compile(r"%% ([^ \t]+)(?:[ \t]+(.*?))?[ \t]*")
_ESCAPED = re.compile(r"\\+%%")
_TO_ESCAPE = re.compile(r"^(\\*%%)", re.MULTILINE)
_JOINED = re.compile(r".*[^ \t]%% domain [A-Za-z0-9_-]+[ \t]*")


class CalibrationRefused(NightpressError):
    """The calibration text cannot be used; the message says why."""

    exit_code: ClassVar[int] = 18


@dataclass(frozen=True)
class Header:
    """Where samples come from; what a file does not say is empty, but for the domain."""

    domain: str
    language: str = ""
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is one of ROLES, or TEXT."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation, or one passage of plain text, with the header that held for it."""

    id: str
    topic: str
    turns: tuple[Turn, ...]
    header: Header

    @property
    def text(self) -> str:
        """What all turns say, end to end."""
        return "\n".join(turn.text for turn in self.turns)


def read(path: Path) -> tuple[Sample, ...]:
    """Return the samples of a file of UTF-8 text, with or without markup; at least one.

    Raises:
        CalibrationRefused: it is missing, no plain file, too large, binary, not UTF-8, empty or wrongly marked up.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or device might never end
            raise CalibrationRefused(f"The calibration text {path} is not a file.")
        if path.stat().st_size > MAX_BYTES:
            raise CalibrationRefused(
                f"The calibration text {path} is larger than {MAX_BYTES >> 20} MB. Give a sample of it.")
        content = path.read_bytes()
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise CalibrationRefused(f"The calibration text {path} cannot be read: {reason}.") from problem
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CalibrationRefused(f"The calibration text {path} is UTF-16. Convert it to UTF-8 first.")
    if b"\0" in content:
        raise CalibrationRefused(f"{path} holds NUL characters: it is not plain text.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise CalibrationRefused(
            f"The calibration text {path} is not UTF-8 text (byte {problem.start}). Convert it first.") from problem
    samples = parse(text, path.name, re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:64] or TEXT)
    if not samples:
        raise CalibrationRefused(f"{path} holds no calibration text.")
    return samples


def parse(text: str, where: str = "the text", domain: str = TEXT) -> tuple[Sample, ...]:
    """Return the samples of a text in the order in which they stand.

    Line ends of any system are understood, and a byte order mark at the start of a line is dropped, as concatenated
    files have them.

    Args:
        text: with or without markup.
        where: names it in a refusal.
        domain: of what stands before the first `%% domain`.

    Raises:
        CalibrationRefused: naming the line.
    """
    lines = _lines(text)
    reader = _Reader(where, Header(domain))
    if not any(map(_is_markup, lines)):
        for line in lines:
            reader.take_text(line)
    else:
        for number, line in enumerate(lines, 1):
            reader.number = number
            if line.startswith("%%"):
                reader.take_markup(line)
            else:
                if _JOINED.fullmatch(line) and number < len(lines) and _begins_with(lines[number], *FIELDS, "sample"):
                    raise reader.refusal("has %% in its middle: two files were joined without a line break between")
                reader.take_text(line[1:] if _ESCAPED.match(line) else line)
    return reader.finish()


def write(samples: Iterable[Sample]) -> str:
    """Return the text that `parse` reads as these samples, each header where it changes.

    White space inside an id, a topic or a header becomes one blank (in an id `-`), and blank lines around a turn go.

    Raises:
        CalibrationRefused: a sample has no turn, a turn no text, a role or domain is none, or there is a NUL.
    """
    parts: list[str] = []
    header: Header | None = None
    for sample in samples:
        if sample.header != header:
            header = sample.header
            if not NAME.fullmatch(header.domain):
                raise CalibrationRefused(f"{header.domain[:40]!r} is no name of a domain.")
            values = [" ".join(value.split()) for value in astuple(header)]
            parts += [*(f"%% {field} {value}" for field, value in zip(FIELDS, values, strict=True) if value), ""]
        name = "-".join(sample.id.split())
        roles = [turn.role for turn in sample.turns]
        if not name or not roles or (roles != [TEXT] and not set(roles) <= set(ROLES)):
            raise CalibrationRefused(f"Sample {sample.id[:40]!r} cannot be written: its roles are {roles}.")
        parts.append(f"%% sample {name} {' '.join(sample.topic.split())}".rstrip())
        for turn in sample.turns:
            said = _trim(_lines(turn.text))
            if not said or "\0" in said:  # what could not be read again
                raise CalibrationRefused(f"Sample {name[:40]} cannot be written: what the {turn.role} says is "
                                         f"{'no plain text' if said else 'empty'}.")
            parts += [*([] if turn.role == TEXT else [f"%% {turn.role}"]), _TO_ESCAPE.sub(r"\\\1", said)]
        parts.append("")
    return "\n".join(parts)


def _lines(text: str) -> list[str]:
    return [line.lstrip("\ufeff") for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def _trim(lines: Sequence[str]) -> str:
    """Return lines as text without the blank ones at both ends."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    return "\n".join(lines[filled[0]:filled[-1] + 1]) if filled else ""


def _begins_with(line: str, *keys: str) -> bool:
    found = _MARKUP.fullmatch(line)
    return found is not None and found[1] in keys


def _is_markup(line: str) -> bool:
    """Return whether a line is markup as it should be; one such line makes a file a marked one."""
    found = _MARKUP.fullmatch(line)
    return found is not None and found[1] in ((*FIELDS, "sample") if found[2] else ROLES)


class _Reader:
    """Takes the lines of a text one by one and builds its samples."""

    def __init__(self, where: str, header: Header) -> None:
        self.number = 0
        self._where = where
        self._header = header
        self._block: dict[str, str] = {}  # header lines under way
        self._head: tuple[str, str, int] | None = None  # id, topic and line of the sample under way
        self._turns: list[tuple[str, list[str]]] = []
        self._loose: list[str] = []  # the paragraph under way outside of samples
        self._samples: list[Sample] = []
        self._paragraphs = 0

    def refusal(self, what: str, number: int | None = None) -> CalibrationRefused:
        """Return the refusal of a line, of the one under way unless told."""
        return CalibrationRefused(f"{self._where}, line {number or self.number}, {what}.")

    def take_markup(self, line: str) -> None:
        """Take a line that starts with `%%`."""
        found = _MARKUP.fullmatch(line)
        key, rest = (found[1], found[2] or "") if found else ("", "")
        if key in FIELDS:
            self._end()
            self._add_field(key, rest)
        elif key == "sample":
            self._end()
            self._close_block()
            name, _, topic = rest.partition(" ")
            if not name:
                raise self.refusal("has a sample without an id")
            self._head, self._turns = (name, topic.strip(), self.number), [(TEXT, [])]
        elif key in ROLES:
            if self._head is None:
                raise self.refusal(f"has a turn of the {key} before any '%% sample ID'")
            if rest:
                raise self.refusal(f"has text behind '%% {key}': it belongs on the next line")
            self._turns.append((key, []))
        else:
            near = difflib.get_close_matches(key, (*FIELDS, *ROLES, "sample"), 1)
            raise self.refusal(f"starts with %% but is no markup: {line[:40]!r}. "
                               + (f"Did you mean '%% {near[0]}'? " if near else "")
                               + "Text that starts so is written \\%%")

    def take_text(self, line: str) -> None:
        """Take a line of text."""
        if self._head is not None:
            self._turns[-1][1].append(line)
        elif line.strip():
            self._close_block()
            self._loose.append(line)
        else:
            self._end()

    def finish(self) -> tuple[Sample, ...]:
        """Return all samples."""
        self._end()
        return tuple(self._samples)

    def _add_field(self, key: str, value: str) -> None:
        if key == "domain":
            self._close_block()  # of a file that is a header and nothing else
            if not NAME.fullmatch(value):
                raise self.refusal(f"has {value[:40]!r} for the name of a domain: letters, digits, _ and - are "
                                   "allowed, 64 at most")
        elif not value:
            raise self.refusal(f"has a {key} that says nothing")
        elif key in self._block:
            raise self.refusal(f"says the {key} twice")
        self._block[key] = value

    def _close_block(self) -> None:
        """Let a header hold: one with a domain replaces all of the former, another only what it says."""
        if self._block:
            before = {} if "domain" in self._block else dict(zip(FIELDS, astuple(self._header), strict=True))
            self._header = Header(**(before | self._block))
            self._block = {}

    def _end(self) -> None:
        """End the sample or the paragraph under way."""
        if self._loose:
            self._paragraphs += 1
            name = f"{self._header.domain}-p{self._paragraphs:03d}"
            self._samples.append(Sample(name, "", (Turn(TEXT, "\n".join(self._loose)),), self._header))
            self._loose = []
        if self._head is None:
            return
        name, topic, line = self._head
        turns = tuple(Turn(role, _trim(lines)) for role, lines in self._turns)
        if len(turns) > 1:
            if turns[0].text:
                raise self.refusal(f"begins the sample {name[:40]}, which has text before its first turn", line)
            turns = turns[1:]
        for turn in turns:
            if not turn.text:
                what = "there is nothing" if turn.role == TEXT else f"a turn of the {turn.role} is empty"
                raise self.refusal(f"begins the sample {name[:40]}, in which {what}", line)
        self._samples.append(Sample(name, topic, turns, self._header))
        self._head, self._turns = None, []
