"""How many tokens texts have for a model, and which texts its control tokens are written as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loops.engine.calibration import load_vocabulary
from loops.engine.gguf_check import check_model
from loops.engine.native import library


def measure(path: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Return the number of tokens of each text, markers in it read as text, and the model's control tokens.

    Only the vocabulary of the model at path is loaded.

    Raises:
        ModelNotLoaded, GgufRefused: the model cannot be used.
    """
    with load_vocabulary(check_model(path).path) as model:
        return {"lengths": [len(model.tokenize(text, add_bos=False, special=False)) for text in texts],
                "special": [model.token_text(token) for token in range(model.n_vocab)
                            if library().llama_vocab_is_control(model.vocab, token)]}
