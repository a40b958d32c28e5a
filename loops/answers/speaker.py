"""One interface for both kinds of models: what tokenizes, answers, and says how likely an answer is.

`EngineSpeaker` is llama.cpp's side; `loops.answers.transformer.TorchSpeaker` that of Hugging Face folders. Both get
their prompts from here, rendered by the same sandbox, so that the same model gives the same numbers in both forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loops.engine import generate as engine
from loops.engine.chat import render
from loops.engine.generate import Reply, Sampling
from loops.engine.model import ContextSpec, Model, Tokens, open_context
from loops.engine.score import Likelihood, Question, score

Advance = Callable[[int, int], None]
#: how plain text calls the speakers, as `loops.engine.chat.prompt_tokens` does
NAMES = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
WINDOW = 512  #: tokens of a text that are read at once, at most


@dataclass(frozen=True)
class Timing:
    """How long one reply took.

    Attributes:
        prompt_tokens: of the prompt.
        prompt_s: until the first token of the reply.
        tokens: of the reply after that first one.
        reply_s: for them.
    """

    prompt_tokens: int
    prompt_s: float
    tokens: int
    reply_s: float


class Speaker(Protocol):
    """A model that can be asked.

    Attributes:
        template: of chats; empty for none.
        bos: text of the token that begins a text; empty for none.
        eos: text of the token that ends one.
        bos_id: its id; -1 for none.
        adds_bos: the model wants it in front.
        context: most tokens that it was made for.
    """

    template: str
    bos: str
    eos: str
    bos_id: int
    adds_bos: bool
    context: int

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> Tokens:
        """Return the ids of text, int32; `special` reads markers in it as control tokens."""

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends a turn or the text."""

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, progress: Advance | None = None) -> list[Reply]:
        """Reply to every prompt; at temperature 0 with the most probable tokens."""

    def score(self, questions: Sequence[Question], progress: Advance | None = None) -> list[tuple[Likelihood, ...]]:
        """Return the likelihood of every continuation of every question."""

    def time(self, prompt: Tokens, tokens: int) -> Timing:
        """Answer one prompt alone, with so many tokens whatever they are, and return how long it took."""


class EngineSpeaker:
    """A GGUF, in llama.cpp."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.template = model.metadata("tokenizer.chat_template") or ""
        self.bos, self.eos = model.token_text(model.bos), model.token_text(model.eos)
        self.bos_id, self.adds_bos, self.context = model.bos, model.add_bos, model.n_context

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> Tokens:
        """See `Speaker`."""
        return self.model.tokenize(text, add_bos=add_bos, special=special)

    def is_end(self, token: int) -> bool:
        """See `Speaker`."""
        return self.model.is_end(token)

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, progress: Advance | None = None) -> list[Reply]:
        """See `Speaker`."""
        return engine.generate(self.model, prompts, sampling, progress or (lambda _done, _total: None))

    def score(self, questions: Sequence[Question], progress: Advance | None = None) -> list[tuple[Likelihood, ...]]:
        """See `Speaker`."""
        return score(self.model, questions, progress)

    def time(self, prompt: Tokens, tokens: int) -> Timing:
        """See `Speaker`."""
        n = len(prompt)
        cells = -(-(n + tokens) // 256) * 256
        with open_context(self.model, ContextSpec(sequences=1, cells=cells, shared=False)) as context:
            started = time.monotonic()
            logits = context.decode(prompt, range(n), [(0,)] * n, [False] * (n - 1) + [True])
            token = int(logits[0].argmax())
            first = time.monotonic()
            for position in range(n, n + tokens - 1):
                token = int(context.decode([token], [position], [(0,)], [True])[0].argmax())
            return Timing(n, first - started, tokens - 1, time.monotonic() - first)


def prompt_of(speaker: Speaker, messages: Sequence[Mapping[str, str]]) -> Tokens:
    """Return the tokens of a conversation, ready for the assistant's next turn.

    By the model's chat template, which `loops.engine.chat.render` renders; without one as plain text under `User:`
    and `Assistant:`.

    Raises:
        ChatTemplateBroken: see `render`.
    """
    text = _open(speaker, messages)
    if not speaker.template:
        return speaker.tokenize(text, add_bos=speaker.adds_bos, special=False)
    return speaker.tokenize(text, add_bos=_adds_bos(speaker, text), special=True)


def _adds_bos(speaker: Speaker, text: str) -> bool:
    return speaker.adds_bos and not (bool(speaker.bos) and text.startswith(speaker.bos))


def _open(speaker: Speaker, messages: Sequence[Mapping[str, str]]) -> str:
    if speaker.template:
        return render(speaker.template, messages, bos=speaker.bos, eos=speaker.eos)
    said = "".join(f"{NAMES[message['role']]}: {message['content']}\n" for message in messages)
    return f"{said}Assistant:"


def answer_of(speaker: Speaker, messages: Sequence[Mapping[str, str]], reference: str) -> Question:
    """Return the tokens of a conversation and of the answer that is wanted, with the token that ends its turn.

    The answer is what the template writes after the open conversation, up to the first token that ends a turn. A
    template that rewrites what was before (some drop thoughts) has the answer as it is and the end-of-sequence token
    instead; without a template the answer stands after a space, and no end.

    Raises:
        ChatTemplateBroken: see `render`.
    """
    start, special = _open(speaker, messages), bool(speaker.template)
    answer = f" {reference}"
    if speaker.template:
        whole = render(speaker.template, [*messages, {"role": "assistant", "content": reference}], bos=speaker.bos,
                       eos=speaker.eos, reply=False)
        answer = whole[len(start):] if whole.startswith(start) else reference + speaker.eos
    prompt = prompt_of(speaker, messages)
    continuation = joined(speaker, prompt, start, answer, add_bos=_adds_bos(speaker, start), special=special)
    if special:
        end = next((at for at, token in enumerate(continuation) if speaker.is_end(int(token))), len(continuation))
        continuation = continuation[:end + 1]
    return Question(prompt, (continuation,))


def joined(speaker: Speaker, prompt: Tokens, start: str, text: str, *, add_bos: bool, special: bool) -> Tokens:
    """Return the tokens of a text that follows another: cut out of the whole where its tokens allow that.

    Args:
        speaker: tokenizes.
        prompt: tokens of what is before.
        start: text of it.
        text: that follows.
        add_bos: of the whole.
        special: markers are control tokens.
    """
    whole = speaker.tokenize(start + text, add_bos=add_bos, special=special)
    if len(whole) > len(prompt) and bool((whole[:len(prompt)] == prompt).all()):
        return whole[len(prompt):]
    return speaker.tokenize(text, add_bos=False, special=special)


def windows_of(speaker: Speaker, text: str) -> list[Question]:
    """Return a text as pieces to score, each after the token that begins a text, or its own first where there is none.

    Pieces of `WINDOW` tokens, or of the model's context where that is smaller.
    """
    ids = speaker.tokenize(text, add_bos=False, special=False)
    size = max(2, min(WINDOW, speaker.context)) - 1
    begin = np.asarray([speaker.bos_id] if speaker.adds_bos else [], dtype=np.int32)
    found = []
    for at in range(0, len(ids), size):
        piece = np.concatenate([begin, ids[at:at + size]]).astype(np.int32)
        found.append(Question(piece[:1], (piece[1:],)))
    return found
