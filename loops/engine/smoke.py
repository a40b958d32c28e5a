"""The last test before a model is deployed: it is the file we think, it loads, and it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loops.engine.chat import prompt_tokens
from loops.engine.generate import Sampling, generate
from loops.engine.gguf_check import check_gguf
from loops.engine.model import check_finite, load_model
from loops.engine.native import EngineFailed
from loops.engine.options import EngineOptions
from state.files import sha256_file

PROMPT = "I had a long day and I feel a little sad. Can you say something kind?"


class SmokeFailed(EngineFailed):
    """The model did not answer the smoke prompt."""

    exit_code = 69


def smoke(path: Path, options: EngineOptions, sha256: str) -> dict[str, Any]:
    """Verify, load and ask the model; return prompt and reply.

    Raises:
        SmokeFailed: the file is not the expected one, or the reply has no words.
        GgufRefused, ModelNotLoaded, NotFinite: as they say.
    """
    if sha256_file(path) != sha256:
        raise SmokeFailed(f"{path.name} is not the file that was measured: its sha256 differs.")
    check_gguf(path)
    with load_model(path, options) as model:
        check_finite(model)
        reply = generate(model, [prompt_tokens(model, PROMPT)], Sampling(max_tokens=48))[0]
    if not any(character.isalnum() for character in reply.text):
        raise SmokeFailed(f"The model answers {reply.text!r} to a simple sentence: it is broken.")
    return {"prompt": PROMPT, "reply": reply.text}
