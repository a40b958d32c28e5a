"""Evaluation text: what perplexity and KL divergence are measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loops.starter import HELD_OUT as STARTER_TEXT
from loops.starter import STARTER_GGUF
from state.faults import NightpressError

BUILT_IN = Path(__file__).with_name("data") / "held_out.txt"
MAX_BYTES = 256 << 20


class TextRefused(NightpressError):
    """The evaluation text cannot be read."""

    exit_code = 29


@dataclass(frozen=True)
class EvaluationText:
    """Text for perplexity and KL divergence.

    Attributes:
        text: of it.
        special: markers in it are control tokens, as in the starter's own dialogues.
        source: a name for people.
    """

    text: str
    special: bool
    source: str

    @property
    def sha256(self) -> str:
        """Of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | None, model: Path) -> EvaluationText:
    """Return the user's text, or what ships: for the starter its own held-out dialogues, else general English.

    Raises:
        TextRefused: it is missing, no UTF-8 text, binary or far too large.
    """
    if path is None and model.resolve() == STARTER_GGUF.resolve():
        return EvaluationText(STARTER_TEXT.read_text(encoding="utf-8"), special=True,
                              source="the starter's held-out dialogues")
    chosen = path or BUILT_IN
    try:
        if chosen.stat().st_size > MAX_BYTES:
            raise TextRefused(f"{chosen} is larger than {MAX_BYTES >> 20} MB. Give a sample of it to --text.")
        text = chosen.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise TextRefused(f"The evaluation text {chosen} cannot be read: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise TextRefused(f"{chosen} is not UTF-8 text (byte {problem.start}). Convert it first.") from problem
    if "\0" in text:
        raise TextRefused(f"{chosen} holds NUL characters: it is not plain text.")
    return EvaluationText(text, special=False, source=str(path) if path else "the built-in text")
