"""A bench without native work: sizes are computed, every score is invented from a seed.

It exists to try settings and displays in a second. What it yields is marked simulated from the plan
to the ledger, has no file, and can therefore never be promoted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loops.answers import overlap
from loops.answers.rows import Example
from loops.engine.generate import Sampling
from loops.engine.gguf_check import CheckedModel
from loops.engine.gguf_format import tensor_types
from loops.engine.levels import Level
from loops.engine.quantize import Forecast, refuse_quantized
from loops.evaluation import choices, eq_bench
from loops.evaluation.names import METRICS
from loops.evaluation.scenarios import Scenario
from loops.pass1.calibrate import Matrix
from loops.pass1.plan import PressPlan
from loops.pass1.rig import Subject
from loops.pass1.steps import Result


def _invented(*parts: str) -> np.random.Generator:
    import zlib

    return np.random.default_rng(zlib.crc32("|".join(parts).encode()))


def _main_type(level: Level) -> str:
    """Return the tensor type that most of a level's weights have, guessed from its name."""
    known = {name for name, _, _ in tensor_types().values()}
    stem = re.sub(r"_(XS|S|M|L|MOE)$", "", level.name)
    for name in (level.name, stem, f"{stem}_S", f"{stem}_K"):
        if name in known:
            return name
    return "Q4_K"


class SimulatedBench:
    """Same methods as `Bench`, invented results."""

    simulated = True

    def __init__(self, plan: PressPlan, model: CheckedModel, original: Subject) -> None:
        self.plan, self.model, self.original = plan, model, original
        self._bits: dict[str, float] = {"": 16.0}

    def finish(self) -> None:
        """Do nothing: no model is ever loaded."""

    def forecast_with_any(self, level: Level) -> Forecast:
        """Return the same as `forecast`."""
        return self.forecast(level)

    def forecast(self, level: Level, matrix: Matrix | None = None) -> Forecast:
        """Return the size that the level's main type gives for every matrix."""
        del matrix
        refuse_quantized(self.model, allow=self.plan.allow_requantize)
        sizes = {name: (block, size) for name, block, size in tensor_types().values()}
        main, types, n_bytes = _main_type(level), {}, 0
        for tensor in self.model.tensors:
            fits = len(tensor.shape) > 1 and tensor.shape[0] % sizes[main][0] == 0
            types[tensor.name] = main if fits else tensor.ggml_type
            block, size = sizes[types[tensor.name]]
            n_bytes += tensor.n_elements // block * size
        self._bits[level.name] = 8 * n_bytes / self.model.n_parameters
        return Forecast(level.name, n_bytes + self.model.header.data_offset, types, 0, needs_imatrix=False)

    def build(self, level: Level, forecast: Forecast, matrix: Matrix | None = None) -> tuple[Subject, Result]:
        """Return facts of a file that does not exist."""
        del matrix
        return Subject(level.name, Path(), f"simulated-{level.name}"), {
            "sha256": None, "bytes": forecast.n_bytes, "fallbacks": 0, "tensor_types": {}, "built_s": 0.0}

    def _loss(self, level: str) -> float:
        return math.exp(-1.1 * self._bits[level]) if level else 0.0

    def divergence(self, subject: Subject) -> Result:
        """Return invented statistics."""
        kld = self._loss(subject.level) * 1.5
        return {"kld": kld, "kld_error": kld / 20, "kld_median": kld / 3, "kld_max": 30 * kld,
                "kld_percentiles": {"90": 2 * kld, "95": 4 * kld, "99": 10 * kld, "99.9": 20 * kld},
                "delta_p_rms": math.sqrt(kld) / 10, "delta_p_rms_error": math.sqrt(kld) / 200,
                "same_top": 1 - kld / 2, "same_top_error": 0.002, "tokens": 0,
                "ppl": 10 * math.exp(kld), "ppl_error": 0.1, "ppl_base": 10.0, "ppl_base_error": 0.1,
                "ppl_ratio": math.exp(kld), "ppl_ratio_error": 0.001}

    def perplexity(self) -> Result:
        """Return an invented perplexity of the original."""
        return {"ppl": 10.0, "ppl_error": 0.1, "tokens": 0}

    def _scored(self, subject: Subject, scenarios: Sequence[Scenario],
                score: Callable[[float], Result]) -> dict[str, Result]:
        found = {}
        for scenario in scenarios:
            base = _invented(self.plan.name, scenario.id).uniform(0.6, 0.95)
            noise = _invented(self.plan.name, scenario.id, subject.level).normal(0, 0.02) if subject.level else 0.0
            found[scenario.id] = score(float(np.clip(base * (1 - self._loss(subject.level) + noise), 0, 1)))
        return found

    def forced_choice(self, subject: Subject, scenarios: Sequence[Scenario]) -> dict[str, Result]:
        """Return invented preferences."""
        return self._scored(subject, scenarios, lambda value: {"margin": value, "forced_choice": value})

    def responses(self, subject: Subject, scenarios: Sequence[Scenario],
                  sampling: Sampling | None = None) -> dict[str, Result]:
        """Return invented metrics of replies that nobody gave."""
        del sampling
        return self._scored(subject, scenarios, lambda value: {
            **dict.fromkeys(METRICS, value), "text": "(simulated)", "n_tokens": 0})

    def eq_bench(self, subject: Subject, questions: Sequence[eq_bench.Question]) -> Result:
        """Return an invented score."""
        value = 0.6 * (1 - self._loss(subject.level))
        return {"score": 100 * value, "valid": True, "parsed": len(questions), "items": [value] * len(questions)}

    def multiple_choice(self, subject: Subject, questions: Sequence[choices.Choice]) -> Result:
        """Return an invented accuracy."""
        right = [float(_invented(subject.level, question.id).random() < 0.7) for question in questions]
        value = sum(right) / len(right)
        return {"acc": value, "acc_interval": [value, value], "acc_norm": value, "acc_norm_interval": [value, value],
                "items": right}

    def answers(self, subject: Subject, rows: Sequence[Example]) -> dict[str, Result]:
        """Return invented metrics of answers that nobody gave."""
        loss = self._loss(subject.level)
        return {row.id: {**dict.fromkeys((*overlap.METRICS, "token_accuracy"), 0.7 * (1 - loss)),
                         "nll": 20 * (1 + loss), "tokens": 20} for row in rows}

    def speed(self, subject: Subject) -> float:
        """Return a rate that grows as bits fall."""
        return 160.0 / self._bits[subject.level]
