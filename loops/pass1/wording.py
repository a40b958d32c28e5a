"""Verdicts in words, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loops.pass1.criteria import Ruling


def signed(share: float) -> str:
    """Return a share as per cent with one digit, and no minus before a zero."""
    text = f"{100 * share:.1f}"
    return "0.0" if text == "-0.0" else text


def describe(ruling: Ruling) -> str:
    """Return a ruling in part of a sentence: what was lost, its interval, of how many, and what is allowed."""
    from loops.pass1.criteria import ABSOLUTE, RELATIVE

    name = ruling.gate.replace("_", " ").replace("kl divergence", "KL divergence")
    name += f" ({ruling.slice})" if ruling.slice else ""
    loss = ruling.loss
    if ruling.gate in ABSOLUTE:
        return f"{name} is {loss.value:.4g} [{loss.low:.4g}, {loss.high:.4g}], {ruling.limit:g} allowed"
    value, low, high = (signed(share) for share in (loss.value, loss.low, loss.high))
    verb = {"perplexity": "grew by", "answer_perplexity": "grew by", "same_top_token": "changed for"}.get(
        ruling.gate, "lost")
    count = "" if ruling.gate in RELATIVE else f", n = {loss.n}"
    return f"{name} {verb} {value} % [{low}, {high}]{count}, {100 * ruling.limit:g} % allowed"
