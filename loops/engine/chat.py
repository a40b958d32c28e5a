"""Chat prompts: the model's own template, rendered where it can do no harm.

A template comes with the file and is code from a stranger, so it runs in Jinja's immutable
sandbox without access to anything of ours.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from loops.engine.model import Model, Tokens
from state.faults import NightpressError

#: templates that print the date get this one, so that the same model gives the same numbers every day
PINNED_DATE = "26 Jul 2024"


class ChatTemplateBroken(NightpressError):
    """The model's chat template does not work."""

    exit_code = 39


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda _format: PINNED_DATE
    return environment.from_string(source)


def render(template: str, messages: Sequence[Mapping[str, str]], *, bos: str = "", eos: str = "") -> str:
    """Return the text of messages in template's format, open for the assistant's reply.

    Args:
        template: Jinja source as stored in `tokenizer.chat_template`.
        messages: each with `role` and `content`.
        bos: text of the beginning-of-sequence token.
        eos: text of the end-of-sequence token.

    Raises:
        ChatTemplateBroken: the template does not compile, raises, or tries what the sandbox forbids.
    """
    try:
        return str(_compiled(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True, bos_token=bos,
            eos_token=eos, tools=None, date_string=PINNED_DATE))
    except Exception as problem:
        raise ChatTemplateBroken(f"The model's chat template does not work: {problem}") from problem


def prompt_tokens(model: Model, message: str) -> Tokens:
    """Return the tokens of a conversation with one user message, ready for the reply.

    Without a template the message is given as plain text under `User:` and `Assistant:`.

    Raises:
        ChatTemplateBroken: see `render`.
    """
    lib_template = model.metadata("tokenizer.chat_template")
    if not lib_template:
        return model.tokenize(f"User: {message}\nAssistant:", add_bos=model.add_bos, special=False)
    bos, eos = model.token_text(model.bos), model.token_text(model.eos)
    text = render(lib_template, [{"role": "user", "content": message}], bos=bos, eos=eos)
    starts_with_bos = bool(bos) and text.startswith(bos)
    return model.tokenize(text, add_bos=model.add_bos and not starts_with_bos, special=True)
