"""The two providers that can judge and write, by their own libraries: one question in, one JSON object out.

Both libraries repeat what failed in passing (429, 5xx, lost connections) by themselves, with growing pauses or
as long as `retry-after` says. They are imported where they are used: they are an extra, and heavy.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from daemon.errors import Interrupted
from state.faults import NightpressError

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Provider = Literal["anthropic", "openai"]
#: small models, priced for such work: grading 40 replies costs a cent or two (November 2026)
DEFAULT_MODELS: Mapping[Provider, str] = {"anthropic": "claude-haiku-5-5", "openai": "gpt-6-luna"}
KEYS: Mapping[Provider, str] = {"anthropic": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
RETRIES = 4  #: of one request, by the library
POLL_S = 0.1  #: how soon a stop is seen
LONGEST_WAIT_S = 120  #: for which a provider may ask before it counts as not answering

#: what a model may refuse to be told, as its refusal names it, with what is left out or changed then
_NEGOTIABLE = {"temperature": "temperature", "tool_choice": "tool_choice", "thinking": "tool_choice",
               "max_completion_tokens": "max_completion_tokens"}


class JudgeExtraMissing(NightpressError):
    """The judge needs a library that is not installed: `pip install 'nightpress[generate]'`."""

    exit_code = 56


class JudgeKeyMissing(NightpressError):
    """The judge needs a key: set ANTHROPIC_API_KEY or OPENAI_API_KEY."""

    exit_code = 57


class JudgeKeyRefused(JudgeKeyMissing):
    """The provider does not take the key: set ANTHROPIC_API_KEY or OPENAI_API_KEY to one that is valid."""


class JudgeFailed(NightpressError):
    """The judge could not grade the replies. Run the same command again: what it graded is kept."""

    exit_code = 58


class OutOfForm(Exception):
    """The provider answered, but not in the form that was asked for; the message says what is wrong with it."""


@dataclass(frozen=True)
class JudgeSpec:
    """Who judges, and how.

    Attributes:
        provider: whose library and key.
        model: as the provider calls it; empty for the provider's entry in `DEFAULT_MODELS`.
        base_url: where the provider's protocol is spoken; None for the library's own variables
            (`ANTHROPIC_BASE_URL`, `OPENAI_BASE_URL`) and default.
        concurrency: requests under way at once.
        timeout_s: of one request.
        max_tokens: of one answer, a ceiling; models that think spend part of it on that.
        temperature: of the choice of tokens; None for the provider's default.
    """

    provider: Provider
    model: str = ""
    base_url: str | None = None
    concurrency: int = 4
    timeout_s: float = 60.0
    max_tokens: int = 8192
    temperature: float | None = 0

    def __post_init__(self) -> None:
        if self.provider not in DEFAULT_MODELS:
            raise ValueError(f"{self.provider!r} is no provider: {', '.join(DEFAULT_MODELS)} are")
        if not self.model:
            object.__setattr__(self, "model", DEFAULT_MODELS[self.provider])


@dataclass(frozen=True)
class Form:
    """What an answer must look like.

    Attributes:
        name: of it, an identifier.
        description: for the model.
        schema: a JSON schema, every property required.
    """

    name: str
    description: str
    schema: Mapping[str, Any]


def _bounded_wait(response: Any) -> None:
    """Make the library give up when the provider asks for a pause that nobody would sit through."""
    asked = response.headers.get("retry-after", "")
    try:
        too_long = float(asked) > LONGEST_WAIT_S
    except ValueError:  # a date, or nothing
        too_long = False
    if too_long:
        response.headers["x-should-retry"] = "false"


class Connection:
    """An open client of a provider; several threads may ask at once.

    Parameters that a model refuses (a temperature, a forced tool, the newer name of the ceiling) are left
    out from then on, so that every model is asked as exactly as it allows.

    Attributes:
        spec: of whom is asked.
        sent: tokens of all questions, as the provider counts them.
        received: tokens of all answers, the same.

    Raises:
        JudgeExtraMissing: the library is not installed.
        JudgeKeyMissing: its key is not in the environment.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self.spec = spec
        self._key = os.environ.get(KEYS[spec.provider], "").strip()
        if not self._key:
            raise JudgeKeyMissing(f"Asking {spec.provider} needs a key: set {KEYS[spec.provider]}.")
        if not re.fullmatch(r"[!-~]+", self._key):  # it could not be sent, and the library's error would show it
            raise JudgeKeyRefused(f"What {KEYS[spec.provider]} holds is no key: it has spaces or special characters.")
        try:
            self._library: Any = importlib.import_module(spec.provider)
        except ImportError:
            raise JudgeExtraMissing(f"The library {spec.provider!r} is not installed: run "
                                    "`pip install 'nightpress[generate]'`.") from None
        kind, self._error = ((self._library.Anthropic, self._library.AnthropicError) if spec.provider == "anthropic"
                             else (self._library.OpenAI, self._library.OpenAIError))
        try:
            self._client = kind(
                api_key=self._key, base_url=spec.base_url, timeout=spec.timeout_s, max_retries=RETRIES,
                http_client=self._library.DefaultHttpxClient(event_hooks={"response": [_bounded_wait]}))
        except Exception as problem:  # noqa: BLE001 - whatever the library dislikes, its words may hold the key
            raise JudgeFailed(f"The library {spec.provider!r} does not start: {self._safe(problem)}.") from None
        self._left_out: frozenset[str] = frozenset() if spec.temperature is not None else frozenset({"temperature"})
        self._counting = threading.Lock()
        self.sent = self.received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._client.close()

    def _safe(self, problem: object) -> str:
        """Return one short line without the key, or what may be a part of one."""
        body = getattr(problem, "body", None)
        inner = body.get("error", body) if isinstance(body, Mapping) else None
        said = inner.get("message") if isinstance(inner, Mapping) else None
        text = " ".join(str(said or problem).replace(self._key, "***").split())
        text = re.sub(r"\b(?:sk|Bearer)[-_ ][^\s\"']{6,}", "***", text)
        return (text if len(text) <= 200 else f"{text[:197]}…").rstrip(".")

    def ask(self, system: str, message: str, form: Form) -> Any:
        """Return the model's answer as JSON, not yet held against the form's schema.

        Raises:
            OutOfForm: there is no such answer in what came back.
            JudgeKeyRefused: the key is wrong, or may not use the model.
            JudgeFailed: the provider refuses the request, or does not answer after several attempts.
        """
        ask = self._ask_anthropic if self.spec.provider == "anthropic" else self._ask_openai
        while True:
            left_out = self._left_out
            try:
                return ask(system, message, form, left_out)
            except self._library.BadRequestError as problem:
                said = str(problem)
                refused = {change for name, change in _NEGOTIABLE.items() if name in said} - left_out
                if not refused:
                    raise self._failure(problem) from None
                self._left_out |= refused
            except self._error as problem:
                raise self._failure(problem) from None

    def _failure(self, problem: Any) -> NightpressError:
        """Return our own error for the library's; none of it is kept as a cause, for it may hold the key."""
        who, status = f"{self.spec.provider} ({self.spec.model})", getattr(problem, "status_code", None)
        if status in (401, 403):
            return JudgeKeyRefused(f"{self.spec.provider} does not take the key in {KEYS[self.spec.provider]} for "
                                   f"{self.spec.model} ({status}): set one that is valid for it.")
        if isinstance(problem, self._library.APITimeoutError):
            return JudgeFailed(f"{who} did not answer within {self.spec.timeout_s:g} s, {RETRIES + 1} times.")
        if isinstance(problem, self._library.APIConnectionError):
            return JudgeFailed(f"{who} cannot be reached: no connection after {RETRIES + 1} attempts.")
        if status == 429 or (status or 0) >= 500:
            return JudgeFailed(f"{who} is too busy or broken ({status}): {self._safe(problem)}.")
        return JudgeFailed(f"{who} refuses the request ({status}): {self._safe(problem)}.")

    def _sent(self, create: Callable[..., Any], **parameters: Any) -> Any:
        """Return the body of an answer as JSON, read here because the libraries trust its form."""
        response = create(model=self.spec.model, **parameters).http_response
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError):
            raise OutOfForm("the answer is not JSON") from None
        self._count(body.get("usage") if isinstance(body, dict) else None)
        return body

    def _count(self, usage: Any) -> None:
        """Add the tokens of an answer, whichever provider's names they have."""
        def number(*names: str) -> int:
            counts = [usage.get(name) for name in names] if isinstance(usage, dict) else []
            return sum(count for count in counts if isinstance(count, int) and count > 0)

        with self._counting:
            self.sent += number("input_tokens", "prompt_tokens")
            self.received += number("output_tokens", "completion_tokens")

    def _ask_anthropic(self, system: str, message: str, form: Form, left_out: frozenset[str]) -> Any:
        forced = {"type": "auto"} if "tool_choice" in left_out else {"type": "tool", "name": form.name}
        # newer versions of the library no longer know the temperature; older models still want it
        extra = {} if "temperature" in left_out else {"extra_body": {"temperature": self.spec.temperature}}
        body = self._sent(
            self._client.messages.with_raw_response.create, max_tokens=self.spec.max_tokens, system=system,
            messages=[{"role": "user", "content": message}], tool_choice=forced,
            tools=[{"name": form.name, "description": form.description, "input_schema": form.schema}], **extra)
        blocks = body.get("content") if isinstance(body, dict) else None
        for block in blocks if isinstance(blocks, list) else ():
            if isinstance(block, dict) and block.get("type") == "tool_use" and block.get("name") == form.name:
                return block.get("input")
        raise OutOfForm(f"no {form.name} in the answer{_stopped(body, 'stop_reason')}")

    def _ask_openai(self, system: str, message: str, form: Form, left_out: frozenset[str]) -> Any:
        ceiling = "max_tokens" if "max_completion_tokens" in left_out else "max_completion_tokens"
        extra = {} if "temperature" in left_out else {"temperature": self.spec.temperature}
        body = self._sent(
            self._client.chat.completions.with_raw_response.create,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": message}],
            response_format={"type": "json_schema", "json_schema": {
                "name": form.name, "description": form.description, "schema": form.schema, "strict": True}},
            **{ceiling: self.spec.max_tokens}, **extra)
        choices = body.get("choices") if isinstance(body, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        answer = choice.get("message") if isinstance(choice, dict) else None
        content = answer.get("content") if isinstance(answer, dict) else None
        if not isinstance(content, str) or not content:
            raise OutOfForm(f"no text in the answer{_stopped(choice, 'finish_reason')}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise OutOfForm(f"the text of the answer is not JSON{_stopped(choice, 'finish_reason')}") from None


def _stopped(answer: Any, name: str) -> str:
    """Return why the answer ended, in brackets, as far as it says so."""
    reason = answer.get(name) if isinstance(answer, dict) else None
    return f" (it ended with {reason[:40]!r})" if isinstance(reason, str) else ""


def ask_at_once(ask: Callable[[Job], Answer], next_job: Callable[[], Job | None], concurrency: int,
                stop: threading.Event) -> Generator[tuple[Job, Answer], None, None]:
    """Yield jobs with their answers, as they come, until there is no next job and none under way.

    The first is asked alone, so that a wrong key or model costs one request. Then several threads ask at once;
    they are daemons, because a request under way cannot be called back and must not hold up the end. What has
    arrived was paid for, so it is yielded before anything is raised.

    Args:
        ask: called in threads.
        next_job: called in the caller's thread, when there is room; None for none at present.
        concurrency: most jobs under way.
        stop: set it to end early.

    Raises:
        Interrupted: stop was set.
        Exception: the first that `ask` raised.
    """
    arrived: queue.SimpleQueue[tuple[Job, Future[Answer]]] = queue.SimpleQueue()

    def run(job: Job) -> None:
        future: Future[Answer] = Future()
        try:
            future.set_result(ask(job))
        except BaseException as problem:  # noqa: BLE001 - it is raised where somebody listens
            future.set_exception(problem)
        arrived.put((job, future))

    under_way, room = 0, 1
    failure: BaseException | None = None
    while True:
        ending = failure is not None or stop.is_set()
        while not ending and under_way < room and (job := next_job()) is not None:
            threading.Thread(target=run, args=(job,), daemon=True).start()
            under_way += 1
        if arrived.empty() and (ending or not under_way):
            break
        try:
            done, future = arrived.get(timeout=POLL_S)
        except queue.Empty:
            continue
        under_way, room = under_way - 1, max(1, concurrency)
        if (problem := future.exception()) is None:
            yield done, future.result()
        failure = failure or problem
    if failure is not None:
        raise failure
    if stop.is_set() and (under_way or next_job() is not None):
        raise Interrupted
