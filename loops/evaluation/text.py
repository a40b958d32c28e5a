"""Evaluation text: what perplexity and KL divergence are measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loops.starter import HELD_OUT as STARTER_TEXT
from loops.starter import STARTER_GGUF
from state.faults import NightpressError

BUILT_IN = Path(__file__).with_name("data") / "held_out.txt"
MAX_BYTES = 64 << 20


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


def read_plain(path: Path, what: str, refusal: type[NightpressError]) -> str:
    """Return the content of a file of UTF-8 text, with or without byte order mark.

    Raises:
        refusal: it is missing, no plain file, far too large, or not UTF-8; `what` names it.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or device might never end
            raise refusal(f"The {what} {path} is not a file.")
        if path.stat().st_size > MAX_BYTES:
            raise refusal(f"The {what} {path} is larger than {MAX_BYTES >> 20} MB. Give a sample of it.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise refusal(f"The {what} {path} cannot be read: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise refusal(f"The {what} {path} is not UTF-8 text (byte {problem.start}). Convert it first.") from problem


def read_text(path: Path | None, model: Path) -> EvaluationText:
    """Return the user's text, or what ships: for the starter its own held-out dialogues, else general English.

    Raises:
        TextRefused: it is missing, no UTF-8 text, binary or far too large.
    """
    if path is None and model.resolve() == STARTER_GGUF.resolve():
        return EvaluationText(STARTER_TEXT.read_text(encoding="utf-8"), special=True,
                              source="the starter's held-out dialogues")
    chosen = path or BUILT_IN
    text = read_plain(chosen, "evaluation text", TextRefused)
    if "\0" in text:
        raise TextRefused(f"{chosen} holds NUL characters: it is not plain text.")
    return EvaluationText(text, special=False, source=str(path) if path else "the built-in text")
