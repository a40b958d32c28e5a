"""The domains of calibration text: those that ship, and the files of the user's folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from calibration_data.checks import count_words
from calibration_data.combine import Source, combine
from calibration_data.text import NAME, CalibrationRefused, Sample, read
from state.faults import NightpressError

FOLDER = Path(__file__).parent
GENERAL = "general"
BUILT_IN = (GENERAL, "emotional_support", "medical", "military", "rag", "summarization", "tone_analysis",
            "tool_calling")


class UnknownDomain(NightpressError):
    """There is no such domain; `nightpress calibration list` shows those there are."""

    exit_code: ClassVar[int] = 19


@dataclass(frozen=True)
class Facts:
    """What is in a text: how much, in which languages, under which licences, and from where, each said once."""

    samples: int
    words: int
    languages: tuple[str, ...]
    licences: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """All domains by name. `folder` is the user's: NAME.txt is a domain, held_out/NAME.txt its held-out part."""

    folder: Path | None = None

    def names(self) -> tuple[str, ...]:
        """Return the names of all domains: those that ship, then the user's by the alphabet."""
        return (*BUILT_IN, *sorted({path.stem for path in self._files() if NAME.fullmatch(path.stem)} - {*BUILT_IN}))

    def misplaced(self) -> tuple[CalibrationRefused, ...]:
        """Return, for each of the user's files that cannot be a domain because of its name, why."""
        found = []
        for path in self._files():
            if path.stem in BUILT_IN:
                found.append(_taken(path))
            elif not NAME.fullmatch(path.stem):
                found.append(CalibrationRefused(
                    f"{path} cannot be a domain: letters, digits, _ and - are allowed in its name, 64 at most."))
        return tuple(found)

    def load(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of a domain to calibrate with; `general` is a balanced mix of all that ship.

        Raises:
            UnknownDomain: there is none of that name.
            CalibrationRefused: its file cannot be used, or a file of the user's has the name of one that ships.
        """
        own = self._own(name)
        return _mixed("domains") if name == GENERAL else read(own)

    def held_out(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of a domain that are never calibrated with; none where the user's has no such file.

        Raises:
            UnknownDomain: there is no domain of that name.
            CalibrationRefused: its file cannot be used.
        """
        own = self._own(name)
        if name == GENERAL:
            return _mixed("held_out")
        if name in BUILT_IN:
            return read(FOLDER / "held_out" / own.name)
        path = own.parent / "held_out" / own.name
        return read(path) if path.exists() else ()

    def every_held_out(self) -> tuple[Sample, ...]:
        """Return all samples that are never calibrated with, of all domains, each file whole.

        Raises:
            CalibrationRefused: a file cannot be used.
        """
        mine = self.folder / "held_out" if self.folder is not None else None
        files = [*(FOLDER / "held_out" / f"{name}.txt" for name in BUILT_IN),
                 *(sorted(mine.glob("*.txt")) if mine is not None and mine.is_dir() else ())]
        return tuple(sample for file in files for sample in read(file))

    def open(self, source: str) -> tuple[str, tuple[Sample, ...]]:
        """Return the name and the samples of a domain, or of a file where no domain has that name.

        Raises:
            UnknownDomain: it is neither.
            CalibrationRefused: its text cannot be used.
        """
        if NAME.fullmatch(source) and source in self.names():
            return source, self.load(source)
        try:
            path = Path(source).expanduser()
            if source and (path.exists() or "/" in source):
                return path.name, read(path)
        except (OSError, ValueError, RuntimeError) as problem:  # too long, a NUL, the home of nobody
            reason = problem.strerror if isinstance(problem, OSError) else problem
            raise CalibrationRefused(f"{source[:80]!r} cannot be read: {reason}.") from problem
        raise self._unknown(source)

    def file(self, name: str) -> Path | None:
        """Return the file of a domain of the user's; None for one that ships.

        Raises:
            UnknownDomain: there is none of that name.
        """
        return None if name in BUILT_IN else self._own(name)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.txt")) if self.folder is not None and self.folder.is_dir() else []

    def _own(self, name: str) -> Path:
        """Return the file of a domain's own text."""
        if not NAME.fullmatch(name):
            raise UnknownDomain(
                f"{name[:40]!r} is no name of a domain: letters, digits, _ and - are allowed, 64 at most.")
        mine = self.folder / f"{name}.txt" if self.folder is not None else None
        if name in BUILT_IN:
            if mine is not None and mine.exists():
                raise _taken(mine)
            return FOLDER / "domains" / f"{name}.txt"
        if mine is None or not mine.exists():
            raise self._unknown(name)
        return mine

    def _unknown(self, name: str) -> UnknownDomain:
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"Did you mean {near[0]}?" if near else "`nightpress calibration list` shows those there are."
        return UnknownDomain(f"There is no domain {name[:80]!r} of calibration text. {hint}")


def describe(samples: Iterable[Sample]) -> Facts:
    """Return what is in the samples."""
    found = list(samples)
    headers = list(dict.fromkeys(sample.header for sample in found))
    languages, licences, sources = (
        tuple(dict.fromkeys(value for header in headers if (value := getattr(header, field))))
        for field in ("language", "licence", "source"))
    return Facts(len(found), count_words(found), languages, licences, sources)


def _mixed(part: str) -> tuple[Sample, ...]:
    return combine([Source(name, read(FOLDER / part / f"{name}.txt")) for name in BUILT_IN]).samples


def _taken(path: Path) -> CalibrationRefused:
    return CalibrationRefused(f"{path} has the name of a domain that ships with Nightpress. Give it another.")
