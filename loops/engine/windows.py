"""Text as a model reads it when it is measured or when an importance matrix is collected: windows of 512 tokens.

They are llama-perplexity's and llama-imatrix's: the beginning-of-sequence token replaces the first of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from loops.engine.model import Model, Tokens
from state.faults import NightpressError

WINDOW = 512
FIRST_SCORED = WINDOW // 2  #: llama-perplexity scores the predictions made from here on
ROWS = WINDOW - 1 - FIRST_SCORED  #: scored predictions in a window
LOGITS_BYTES = 192 << 20  #: most logits held at once
MAX_WINDOWS_PER_DECODE = 4  #: with 8 the starter took about 5 % longer, for the same bits


class TextTooShort(NightpressError):
    """The evaluation text is too short to measure anything."""

    exit_code = 27


@dataclass(frozen=True)
class Windows:
    """Evaluation text as the model reads it.

    Attributes:
        tokens: int32 of shape (windows, 512).
        per_decode: windows computed together; part of the fingerprint.
    """

    tokens: Tokens
    per_decode: int

    @property
    def groups(self) -> int:
        """How many decodes the text takes."""
        return -(-len(self.tokens) // self.per_decode)

    @property
    def scored(self) -> int:
        """How many predictions are scored."""
        return len(self.tokens) * ROWS

    def group(self, index: int) -> Tokens:
        """Return the windows of group index, int32 of shape (at most per_decode, 512)."""
        return self.tokens[index * self.per_decode:(index + 1) * self.per_decode]


def tokens_in_windows(model: Model, text: str, *, special: bool, limit: int, outputs: int) -> tuple[Windows, int]:
    """Tokenize text and cut it into windows; return them, and how many tokens the whole text has.

    Args:
        model: whose vocabulary to use.
        text: of any length; what fills no window at its end is left out.
        special: read control-token markers in the text as control tokens.
        limit: most windows to keep; 0 keeps all.
        outputs: tokens of a window whose logits are computed; they decide how many windows are decoded together.
    """
    tokens = model.tokenize(text, add_bos=True, special=special)
    count = len(tokens) // WINDOW
    windows = tokens[:count * WINDOW].reshape(count, WINDOW)[:limit or None].copy()
    if model.add_bos:
        windows[:, 0] = model.bos
    per_decode = max(1, min(MAX_WINDOWS_PER_DECODE, LOGITS_BYTES // (outputs * model.n_vocab * 4)))
    return Windows(windows, per_decode), len(tokens)


def cut_windows(model: Model, text: str, *, special: bool = False, limit: int = 0) -> Windows:
    """Tokenize an evaluation text and cut it into windows.

    Args:
        model: whose vocabulary to use.
        text: at least 1,024 tokens long, as llama.cpp demands too.
        special: read control-token markers in the text as control tokens.
        limit: most windows to keep; 0 keeps all.

    Raises:
        TextTooShort: saying how much there is and how much is needed.
    """
    windows, count = tokens_in_windows(model, text, special=special, limit=limit, outputs=ROWS)
    if count < 2 * WINDOW:
        raise TextTooShort(f"The evaluation text has {count} tokens, and at least {2 * WINDOW} are needed. "
                           "Give a longer one with --text.")
    return windows
