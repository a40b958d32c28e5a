"""Chat prompts: the model's own template, rendered where it can do no harm.

A template comes with the file and is code from a stranger, so it runs in Jinja's immutable
sandbox without access to anything of ours, and within bounds of time and memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from loops.engine.model import Model, Tokens
from state.faults import NightpressError

#: templates that print the date get this one, so that the same model gives the same numbers every day
PINNED_DATE = "26 Jul 2024"


TIME_S = 5.0  #: a template that takes longer is broken; a real one takes milliseconds
MEMORY_BYTES = 256 << 20  #: more than this no prompt needs


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

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"**"})

        def call_binop(self, _context: Any, _operator: str, _left: Any, _right: Any) -> NoReturn:
            raise TemplateError("powers are not for prompts")  # one of them can compute for hours, uninterruptibly

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda _format: PINNED_DATE
    return environment.from_string(source)


def render(template: str, messages: Sequence[Mapping[str, str]], *, bos: str = "", eos: str = "",
           reply: bool = True) -> str:
    """Return the text of messages in template's format, open for the assistant's reply unless told otherwise.

    Args:
        template: Jinja source as stored in `tokenizer.chat_template`.
        messages: each with `role` and `content`.
        bos: text of the beginning-of-sequence token.
        eos: text of the end-of-sequence token.
        reply: end where the assistant is to speak, with what the template calls the generation prompt.

    Raises:
        ChatTemplateBroken: the template does not compile, raises, or tries what the sandbox forbids.
    """
    try:
        return _bounded(lambda: str(_compiled(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=reply, bos_token=bos,
            eos_token=eos, tools=None, date_string=PINNED_DATE)))
    except MemoryError as problem:
        raise ChatTemplateBroken("The model's chat template does not work: it asks for "
                                 f"more than {MEMORY_BYTES >> 20} MB.") from problem
    except Exception as problem:
        raise ChatTemplateBroken(f"The model's chat template does not work: {problem}") from problem


def _bounded(work: Callable[[], str]) -> str:
    """Return what work returns, with its time and its further memory bounded where this process and system allow it.

    Time needs the main thread, where a worker renders; memory needs Linux.
    """
    over = False

    def out_of_time(_number: int, _frame: FrameType | None) -> None:
        if not over:
            raise TimeoutError(f"it runs for more than {TIME_S:g} s")

    with contextlib.ExitStack() as undo:
        # The alarm may go off anywhere, and still everything is undone: each undoing is arranged before its change,
        # and the clock runs only inside of `try`, away from whoever catches OSError, which a TimeoutError is.
        used = _address_space()
        if used:
            limits = resource.getrlimit(resource.RLIMIT_AS)
            wanted = used + MEMORY_BYTES
            if limits[0] == resource.RLIM_INFINITY or wanted < limits[0]:
                undo.callback(resource.setrlimit, resource.RLIMIT_AS, limits)
                resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
        if timed := threading.current_thread() is threading.main_thread():
            undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, out_of_time))
            undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        try:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, TIME_S, 1.0)  # again, for what folds constants catches all
            return work()
        finally:
            over = True


def _address_space() -> int:
    """Return the bytes of address space this process has; 0 where that cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


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
