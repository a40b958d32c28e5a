"""Calibration text as a model reads it (in work)."""

from __future__ import annotations

from collections.abc import Sequence

from calibration_data.render import render
from calibration_data.text import Sample
from loops.engine.model import Model


def calibration_text(model: Model, samples: Sequence[Sample]) -> str:
    """Return the samples as one text."""
    del model
    return "\n\n".join(render(samples)) + "\n"
