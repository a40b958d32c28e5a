"""The text that a run calibrates with: domains and files, a part of them kept back, nothing that is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibration_data import checks
from calibration_data.catalogue import GENERAL, Catalogue
from calibration_data.text import CalibrationRefused, Sample, read, write
from loops.evaluation.scenarios import Scenario
from loops.evaluation.text import EvaluationText

NONE = "none"  #: what stands for no matrix where matrices have names
ENOUGH_WORDS = 2_400  #: of a user's text, of which a part can then be kept back
KEPT_BACK_WORDS = 800  #: about two windows in most vocabularies


@dataclass(frozen=True)
class Source:
    """Text to calibrate with.

    Attributes:
        name: of the domain or file, several joined by `+`; `general` only where it is the domain, never `none`.
        samples: to collect from.
        held_out: of the same kind, never collected from; empty where there is too little.
    """

    name: str
    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    @property
    def sha256(self) -> str:
        """Of both parts."""
        return hashlib.sha256(f"{write(self.samples)}\0{write(self.held_out)}".encode()).hexdigest()


def read_source(domains: Sequence[str], files: Sequence[str], user_domains: str | None) -> Source | None:
    """Return the text that domains and files hold together; None for none of either.

    Raises:
        UnknownDomain: there is no such domain.
        CalibrationRefused: a text cannot be used.
    """
    catalogue = Catalogue(Path(user_domains) if user_domains else None)
    found = [Source(name, catalogue.load(name), catalogue.held_out(name)) for name in dict.fromkeys(domains)]
    found = [replace(source, name=f"{NONE} (domain)") if source.name == NONE else source for source in found]
    found += [Source(_named(Path(file)), read(Path(file)), ()) for file in dict.fromkeys(files)]
    found = [source if source.held_out else _keep_back(source) for source in found]
    if not found:
        return None
    return Source("+".join(source.name for source in found),
                  tuple(sample for source in found for sample in source.samples),
                  tuple(sample for source in found for sample in source.held_out))


def _named(file: Path) -> str:
    """Return what a file goes by: matrices and texts are told apart by name."""
    return f"{file.name} (file)" if file.name in (GENERAL, NONE) else file.name


def general() -> Source:
    """Return the general domain."""
    catalogue = Catalogue()
    return Source(GENERAL, catalogue.load(GENERAL), catalogue.held_out(GENERAL))


def general_apart_from(held_out: Sequence[Sample]) -> Source:
    """Return the general domain without what overlaps with a held-out part that its matrix is to be judged on."""
    whole = general()
    shared = {found.id for found in checks.overlaps(whole.samples, {"": _joined(held_out)})}
    return replace(whole, samples=tuple(one for one in whole.samples if one.id not in shared))


def _joined(samples: Sequence[Sample]) -> str:
    return "\n".join(sample.text for sample in samples)


def _keep_back(source: Source) -> Source:
    """Keep every so many-th sample back; nothing of a text that is too short."""
    words = sum(checks.count_words([sample]) for sample in source.samples)
    if words < ENOUGH_WORDS or len(source.samples) < 3:
        return source
    every = max(3, min(8, words // KEPT_BACK_WORDS))
    return Source(source.name, tuple(one for number, one in enumerate(source.samples) if number % every != every - 1),
                  source.samples[every - 1::every])


def refuse_overlap(source: Source, text: EvaluationText | None, scenarios: Sequence[Scenario], *,
                   compared: bool = False) -> None:
    """Make sure that nothing is measured on what was calibrated with.

    Args:
        source: neither its samples nor its held-out part, on which choices are made, may be what is measured on.
        text: that levels are measured on.
        scenarios: that they are asked.
        compared: matrices will be compared on held-out text: the source's own, and general text.

    Raises:
        CalibrationRefused: naming what overlaps.
    """
    judges = {f"scenario {one.id}": f"{one.prompt}\n{one.empathic}\n{one.dismissive}" for one in scenarios}
    if text is not None:
        judges |= {"the evaluation text": text.text}
    kept = {"its own held-out part": _joined(source.held_out),
            "held-out general text": _joined(general().held_out)} if compared else {}
    found = checks.overlaps((*source.samples, *source.held_out), judges) + checks.overlaps(source.samples, kept)
    if found:
        one = found[0]
        raise CalibrationRefused(
            f"The calibration text {source.name} overlaps with what the model is judged by, in {len(found)} places: "
            f"{one.id} shares {one.words} words with {one.other} ({one.excerpt[:80]!r}). Figures after calibrating "
            "with it would mean nothing; take them out.")
