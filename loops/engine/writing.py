"""A model writes conversations by itself: first what a person says, then, asked that, its own answer.

Two plain replies ask less of a model than one in a prescribed form, so a small one can do it too, and the answers are
exactly what the model says through its own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loops.engine.chat import prompt_tokens
from loops.engine.generate import Reply, Sampling, generate
from loops.engine.gguf_check import check_gguf
from loops.engine.model import Model, load_model
from loops.engine.native import EngineFailed
from loops.engine.options import EngineOptions

LEAST_TOKENS = 64  #: of a reply that is worth asking for

_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|$)", re.DOTALL)
_LABEL = re.compile(r"(?:\*\*)?(?:user|person|message|human)(?:\*\*)?:(?:\*\*)?\s+", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}
_SENTENCE_END = re.compile(r".*(?:[.!?…}\]\"”»。！？]|```)", re.DOTALL)


class ContextTooSmall(EngineFailed):
    """The model's context has no room for the request; shorten the purpose or the examples, or take another model."""

    exit_code = 82


def write_exchanges(path: Path, options: EngineOptions, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    """Return for each prompt the message that it led to and the answer to that, and how many tokens it took.

    Args:
        path: of a GGUF, quantized or not.
        options: how the engine runs.
        prompts: each asks for one message.
        sampling: the same spec and prompts give the same exchanges; its `max_tokens` are a ceiling for each of the two.

    Returns:
        `exchanges`, in the order of the prompts, each with `message` and `answer`, '' where the model gave none of
        use; `sent` and `received`, in tokens.

    Raises:
        ContextTooSmall: a prompt is longer than the model can read.
        GgufRefused, ModelNotLoaded, OutOfMemory, ChatTemplateBroken: as they say.
    """
    check_gguf(path)
    with load_model(path, options) as model:
        asked = dict(enumerate(prompts))
        opened, sent, received = _replies(model, asked, sampling, model.n_context // 3)
        messages = {number: text for number, reply in opened.items() if (text := bare(tidy(reply)))}
        answered, sent_again, received_again = _replies(model, messages, sampling, model.n_context)
    answers: Mapping[int, str] = {number: tidy(reply) for number, reply in answered.items()}
    return {"exchanges": [{"message": messages.get(number, ""), "answer": answers.get(number, "")} for number in asked],
            "sent": sent + sent_again, "received": received + received_again}


def _replies(model: Model, asked: Mapping[int, str], sampling: Sampling,
             ceiling: int) -> tuple[dict[int, Reply], int, int]:
    """Return the replies to all texts at once, and the tokens sent and received."""
    prompts = [prompt_tokens(model, text) for text in asked.values()]
    longest = max(map(len, prompts), default=0)
    room = min(sampling.max_tokens, ceiling, model.n_context - longest)
    if room < LEAST_TOKENS:
        raise ContextTooSmall(f"{model.path.name} reads {model.n_context} tokens at once, and the request alone takes "
                              f"{longest}: shorten the purpose or the examples, or take another model.")
    replies = generate(model, prompts, replace(sampling, max_tokens=room))
    return (dict(zip(asked, replies, strict=True)), sum(map(len, prompts)),
            sum(len(reply.tokens) for reply in replies))


def tidy(reply: Reply) -> str:
    """Return a reply without its thoughts; one that was cut at the limit ends with its last whole sentence."""
    text = _THOUGHT.sub("", reply.text, count=1)
    if not reply.ended:
        found = _SENTENCE_END.match(text)
        text = found[0] if found else ""
    return text.strip()


def bare(text: str) -> str:
    """Return a message without the label in front of it and without quotation marks around all of it."""
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    if len(text) > 1 and text[-1] == _QUOTES.get(text[0]) and text[-1] not in text[1:-1]:
        text = text[1:-1]
    return text.strip()
