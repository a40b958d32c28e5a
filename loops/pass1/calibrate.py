"""Which importance matrix a run quantizes with: collected from calibration text, and compared before it is trusted.

A matrix of a domain need not help: on text of the very domain that was kept back, and on general text, the
lowest level is built with the domain's matrix, with the general one and with none, and the best is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calibration_data.catalogue import GENERAL
from loops.engine.calibration import calibration_text
from loops.engine.gguf_check import CheckedModel
from loops.engine.imatrix import OUTPUTS, CalibrationTooShort, collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Entry, Imatrix, check_fits, read_imatrix, write_imatrix
from loops.engine.imatrix_stats import coverage
from loops.engine.windows import WINDOW, Windows
from loops.evaluation.text import EvaluationText
from loops.events import Note
from loops.pass1.gauge import Gauge
from loops.pass1.plan import PressPlan
from loops.pass1.rig import Rig, Subject
from loops.pass1.sensitivity import LEAST_WINDOWS
from loops.pass1.source import NONE, Source, general, general_apart_from
from loops.pass1.steps import Result
from state.files import explained, make_folder

#: builds a level with a matrix or without; returns it with its facts, None where it cannot be made so
Builder = Callable[["Matrix | None"], tuple[Subject, Result] | None]

#: of 512 tokens that a matrix is collected from. Of Llama-3-8B, matrices of 10 thousand to 10 million tokens do
#: equally well (llama.cpp, tools/perplexity/README.md).
CHUNKS = 128
COMPARED_WINDOWS = 12  #: of 512 tokens, of each text that matrices are compared on


@dataclass(frozen=True)
class Matrix:
    """An importance matrix and what it is called."""

    name: str
    imatrix: Imatrix

    @cached_property
    def sha256(self) -> str:
        """Of its values."""
        return self.imatrix.sha256


@dataclass(frozen=True)
class Compared:
    """What a comparison came to.

    Attributes:
        level: that was built.
        rows: per matrix and text: `matrix`, `text`, `kld`, `error` in nats per token, `n` predictions, `bytes`.
        used: name of the matrix that does best on the domain's own text, `none` for no matrix.
        judged_on: name of that text.
        reason: a sentence.
    """

    level: str
    rows: tuple[Result, ...]
    used: str
    judged_on: str
    reason: str


def blank(model: CheckedModel, *, with_output: bool = False) -> Matrix:
    """Return a matrix that knows every tensor and weighs all alike: for sizes, not for quantizing.

    Args:
        model: whose tensors.
        with_output: also the output matrix, as `collect` does.
    """
    output = next((name for name in OUTPUTS if any(tensor.name == name for tensor in model.tensors)), None)
    entries = {tensor.name: Entry(np.ones(tensor.shape[0] * int(np.prod(tensor.shape[2:], dtype=np.int64)),
                                          dtype=np.float32), np.ones(1, dtype=np.int64))
               for tensor in model.tensors if len(tensor.shape) > 1 and (
                   tensor.name.startswith("blk.") or (with_output and tensor.name == output))}
    return Matrix("", Imatrix(entries, (), 1, 1))


def given(model: CheckedModel, file: Path) -> Matrix:
    """Return the matrix that the user gives.

    Raises:
        ImatrixRefused: it is none, or of another model.
    """
    found = read_imatrix(file)
    check_fits(found, model.tensors, str(file), model.path.name)
    return Matrix(file.name, found)


def tell_gaps(matrix: Matrix, rig: Rig) -> str:
    """Tell what a matrix does not know of a rig's original, if anything, and return that; '' where it knows all."""
    covered = coverage(matrix.imatrix, rig.model.tensors)
    if covered.is_complete:
        return ""
    told = f"The {matrix.name} importance matrix is partial: {covered}"
    rig.emit(Note(told))
    return told


def collect(rig: Rig, source: Source, limit: int = CHUNKS) -> Matrix:
    """Collect the importance matrix of a rig's original from a text; a step, whose file is kept.

    The output matrix is looked at too: recipes gain by it, see benchmarks/README.md.

    Args:
        rig: has the original.
        source: the text.
        limit: most chunks of 512 tokens, taken from all of the text at equal distances; 0 for all.

    Raises:
        CalibrationTooShort: the text has too few tokens.
    """
    text = calibration_text(rig.loaded(rig.original), source.samples)
    parts = {"text": hashlib.sha256(text.encode()).hexdigest(), "original": rig.original.sha256, "limit": limit}

    def work() -> Result:
        model = rig.loaded(rig.original)
        chunks = _spread(cut_chunks(model, text, special=True), limit)
        folder = rig.scratch / rig.steps.name("imatrix-sums", **parts)
        found = collect_imatrix(model, chunks, folder, datasets=[source.name], with_output=True,
                                progress=lambda done, total: rig.report("importance matrix", "")(done, total))
        with explained(rig.matrices):
            make_folder(rig.matrices, 0o700)
        write_imatrix(rig.matrices / f"{found.sha256}.gguf", found)
        return {"sha256": found.sha256, "chunks": found.chunks, "tensors": len(found.entries)}

    def stands(result: Result) -> bool:
        return (rig.matrices / f"{result['sha256']}.gguf").is_file()

    result = rig.steps.run("imatrix", "", work, stands, **parts)
    return Matrix(source.name, read_imatrix(rig.matrices / f"{result['sha256']}.gguf"))


def compare(rig: Rig, level: str, source: Source, matrices: Mapping[str, Matrix | None], build: Builder,
            store_bytes: int) -> Compared:
    """Build a level with each matrix and measure it on held-out text of the domain and on general text.

    Args:
        rig: has the original.
        level: to be built, for the report.
        source: the domain.
        matrices: by name, the domain's first; None for no matrix.
        build: makes the level.
        store_bytes: most disk for the original's log-probabilities.
    """
    model = rig.loaded(rig.original)
    texts = {one.name: EvaluationText(calibration_text(model, one.held_out), special=True, source=one.name)
             for one in (source, general()) if one.held_out}
    gauges = {name: Gauge(rig, text, COMPARED_WINDOWS, store_bytes) for name, text in texts.items()}
    rows: list[Result] = []
    for name, matrix in matrices.items():
        built = build(matrix)
        if built is None:
            continue
        subject, facts = built
        for text, gauge in gauges.items():
            found = gauge.divergence(subject)
            rows.append({"matrix": name, "text": text, "kld": found["kld"], "error": found["kld_error"],
                         "n": found["tokens"], "bytes": facts["bytes"]})
    for gauge in gauges.values():
        gauge.discard()
    judged_on = next(iter(texts))
    used = best_on(judged_on, rows)
    return Compared(level, tuple(rows), used, judged_on, _sentence(level, source.name, judged_on, rows, used))


def best_on(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the matrix whose level has the lowest divergence on a text, see `Compared.rows`; of equals the first."""
    return str(min((row for row in rows if row["text"] == text), key=lambda row: row["kld"])["matrix"])


def _sentence(level: str, domain: str, judged_on: str, rows: Sequence[Mapping[str, Any]], used: str) -> str:
    mine = [row for row in rows if row["text"] == judged_on]
    told = ", ".join(f"{row['kld']:.4g} {_with(row['matrix'])}" for row in mine)
    bound = "" if any(row["matrix"] == NONE for row in mine) else f"; {level} cannot be made without"
    end = (f"the {domain} matrix is used." if used == domain else
           f"calibrating with {domain} text does not help this model here, and "
           f"{'no matrix' if used == NONE else f'the {used} matrix'} is used.")
    return f"KL divergence of {level} on held-out {judged_on} text, nats per token: {told}{bound}. So {end}"


def _with(name: str) -> str:
    return "without a matrix" if name == NONE else f"with the {name} matrix"


def _spread(chunks: Windows, limit: int) -> Windows:
    """Return at most so many chunks, at equal distances; 0 for all."""
    count = len(chunks.tokens)
    if not 0 < limit < count:
        return chunks
    return replace(chunks, tokens=chunks.tokens[[place * count // limit for place in range(limit)]])


def text_to_measure(rig: Rig, source: Source) -> EvaluationText:
    """Return everything that a source holds, as a rig's original reads it: what recipes are found on.

    Raises:
        CalibrationTooShort: there are not enough windows to measure on some and compare on others.
    """
    model = rig.loaded(rig.original)
    text = calibration_text(model, (*source.samples, *source.held_out))
    tokens = len(model.tokenize(text, add_bos=True, special=True))
    if tokens < LEAST_WINDOWS * WINDOW:
        raise CalibrationTooShort(f"The calibration text {source.name} has {tokens} tokens, and finding a recipe takes "
                                  f"at least {LEAST_WINDOWS * WINDOW}; give more text.")
    return EvaluationText(text, special=True, source=source.name)


class Calibration:
    """The importance matrices of one run.

    Attributes:
        source: the text that the user asked for, None for none.
        compared: what the comparison came to, once it was made.
    """

    def __init__(self, plan: PressPlan, rig: Rig, source: Source | None) -> None:
        self.source = source
        self.compared: Compared | None = None
        self._plan, self._rig = plan, rig
        self._collected_from: dict[str, Matrix] = {}  # by what the text is, whatever it is called
        self._compared: dict[str, Matrix | None] = {}  # by name
        self._gaps: dict[str, str] = {}  # what a matrix does not know, by its name

    @cached_property
    def given(self) -> Matrix | None:
        """The matrix that the user gave."""
        if not self._plan.imatrix:
            return None
        found = given(self._rig.model, Path(self._plan.imatrix))
        tell_gaps(found, self._rig)
        return found

    def _collected(self, source: Source) -> Matrix:
        if source.sha256 not in self._collected_from:
            found = self._collected_from[source.sha256] = collect(self._rig, source)
            self._gaps[source.name] = tell_gaps(found, self._rig)
        return self._collected_from[source.sha256]

    def reads_general(self, needed: bool) -> bool:
        """Tell whether the general text will be read: to compare with, for levels that need a matrix, or for recipes.

        Args:
            needed: there are such levels.
        """
        compared = self.source is not None and self.given is None
        return compared or needed or (self.source is None and self._plan.strategy == "refine")

    def settle(self, level: str, build: Builder) -> Compared:
        """Compare the domain's matrix with the general one and with none at a level, and use the best from now on.

        Raises:
            CalibrationTooShort: the text has too few tokens.
        """
        assert self.source is not None  # noqa: S101 - only asked for where a domain was
        matrices: dict[str, Matrix | None] = {self.source.name: self._collected(self.source)}
        if self.source.name != GENERAL:
            matrices[GENERAL] = self._collected(general_apart_from(self.source.held_out))
        matrices[NONE] = None
        found = compare(self._rig, level, self.source, matrices, build, self._plan.store_bytes)
        self.compared = replace(found, reason=f"{found.reason} {self._gaps.get(found.used, '')}".strip())
        self._compared = matrices
        return self.compared

    def text_to_measure(self) -> EvaluationText:
        """Return the text that recipes are found on: the user's, else the general domain."""
        return text_to_measure(self._rig, self.source or general())

    def matrix_for(self, needed: bool) -> Matrix | None:
        """Return the matrix to quantize with.

        Args:
            needed: the level cannot be made without.
        """
        if self.given is not None:
            return self.given
        if self.compared is None:  # nothing to choose from
            return self._collected(general()) if needed else None
        if not needed or self.compared.used != NONE:
            return self._compared[self.compared.used]
        return self._compared[best_on(self.compared.judged_on,
                                      [row for row in self.compared.rows if row["matrix"] != NONE])]
