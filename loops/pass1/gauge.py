"""The gauge: perplexity and KL divergence on one text, each result a step."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.windows import Windows, cut_windows
from loops.evaluation.text import EvaluationText
from loops.pass1.rig import Rig, Subject
from loops.pass1.steps import Result


class Gauge:
    """Measures against the original of a rig on one text.

    Attributes:
        text: what is measured on.
    """

    def __init__(self, rig: Rig, text: EvaluationText, windows: int, store_bytes: int) -> None:
        """Set up a gauge; nothing is loaded yet.

        Args:
            rig: has the original.
            text: what to measure on.
            windows: most windows of 512 tokens; 0 for all.
            store_bytes: most disk for the original's log-probabilities.
        """
        self.text = text
        self._rig, self._limit, self._store_bytes = rig, windows, store_bytes

    @cached_property
    def windows(self) -> Windows:
        """The text as the original's vocabulary cuts it."""
        return cut_windows(self._rig.loaded(self._rig.original), self.text.text, special=self.text.special,
                           limit=self._limit)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        return {"text": self.text.sha256, "special": self.text.special, "windows": len(self.windows.tokens),
                "per_decode": self.windows.per_decode, "original": self._rig.original.sha256,
                "store_bytes": self._store_bytes}

    @property
    def _store_folder(self) -> Path:
        return self._rig.scratch / self._rig.steps.name("baseline-store", **self._parts)

    def discard(self) -> None:
        """Free the disk that only an unfinished run needs."""
        shutil.rmtree(self._store_folder, ignore_errors=True)

    def store_bytes(self) -> int:
        """Return the disk that the original's log-probabilities will take at most."""
        whole = self.windows.scored * self._rig.loaded(self._rig.original).n_vocab * 4
        return min(whole, self._store_bytes)

    @cached_property
    def _store(self) -> BaselineStore:
        """The original's log-probabilities; computed when they are first needed, kept for the run."""
        model = self._rig.loaded(self._rig.original)
        store = BaselineStore(self._store_folder, self.windows, model.n_vocab, self._store_bytes)
        measure_baseline(model, store, self._rig.report("baseline", ""))
        return store

    def perplexity(self) -> Result:
        """Return the original's own perplexity; computing it fills the store."""
        return self._rig.steps.run("perplexity", "", lambda: self._store.perplexity(), **self._parts)

    def divergence(self, subject: Subject) -> Result:
        """Return every statistic of `Divergence` for a level or, as a check, for the original itself."""
        rig, parts = self._rig, {**self._parts, "subject": subject.sha256}

        def work() -> Result:
            folder = rig.scratch / rig.steps.name("divergence-rows", **parts)
            store = self._store
            found = measure_divergence(rig.loaded(subject), store, folder, rig.report("divergence", subject.level))
            shutil.rmtree(folder, ignore_errors=True)  # the step that follows holds the result
            return found.as_json()

        return rig.steps.run("divergence", subject.level, work, **parts)
