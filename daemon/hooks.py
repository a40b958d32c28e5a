"""Hooks: commands and a web address that learn when a model was promoted or a run failed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from daemon.errors import Interrupted
from daemon.workers import ENVIRONMENT, signal_name
from state.clock import utc_now
from state.faults import NightpressError

Kind = Literal["promote", "failure"]

#: what may stand in braces in an argument; the values come from the facts
PLACEHOLDERS = ("model", "path", "level", "release", "reason")
#: what a command sees besides the environment of a worker: whose session it is, for systemctl --user and notify-send
SESSION = ("USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY")
OUTPUT_BYTES = 4096  #: of what a command prints, the end is kept
ARGUMENT_CHARACTERS = 4000  #: a longer value of a placeholder is cut; the kernel refuses overlong arguments
TICK_S = 0.1  #: how soon a stop is noticed
DELAYS_S = (1.0, 4.0)  #: before the second and third try of a web address
ANSWER_S = 10.0  #: how long a web address may take to answer

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class HookWrong(NightpressError):
    """A hook cannot work as it is set; the message names it and says what to change."""

    exit_code: ClassVar[int] = 9


@dataclass(frozen=True)
class Hooks:
    """What is told, and to whom.

    Attributes:
        on_promote: program and arguments, run after a promotion; empty for none. No shell reads them. `{model}`,
            `{path}`, `{level}`, `{release}` and `{reason}` are replaced, `{{` and `}}` stand for braces. A value
            that begins with a dash looks like an option to the program: put `--` before it.
        on_failure: the same, run after a failure.
        webhook: an http or https address that gets both as JSON; None for none.
        timeout_s: how long a command may run.
    """

    on_promote: tuple[str, ...] = ()
    on_failure: tuple[str, ...] = ()
    webhook: str | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True)
class HookOutcome:
    """How one hook went.

    Attributes:
        hook: `on_promote`, `on_failure` or `webhook`.
        target: the program, or scheme and host of the address; the rest of an address may be secret.
        worked: the command exited with 0, or the address answered with 2xx.
        detail: one sentence for a person.
        status: exit status, negative for a signal, or the HTTP status of the last answer; None for none.
        output: the end of what a command printed, at most 4 kB.
        tries: how often it was tried.
        took_s: over all tries.
    """

    hook: str
    target: str
    worked: bool
    detail: str
    status: int | None = None
    output: str = ""
    tries: int = 1
    took_s: float = field(default=0.0, compare=False)


def check_hooks(hooks: Hooks) -> None:
    """Return if every hook can be run as it is set.

    Raises:
        HookWrong: an unknown placeholder, a program that is missing or not executable, an address that is
            not http or https, or a time limit that is not above 0.
    """
    if not hooks.timeout_s > 0:
        raise HookWrong(f"The time limit of the hooks must be above 0 s, not {hooks.timeout_s:g}.")
    for name, command in (("on_promote", hooks.on_promote), ("on_failure", hooks.on_failure)):
        if command:
            _check_command(name, command)
    if hooks.webhook is not None:
        _origin(hooks.webhook)


def run_hooks(hooks: Hooks, kind: Kind, facts: Mapping[str, Any], *, stop: threading.Event | None = None,
              delays_s: Sequence[float] = DELAYS_S, answer_s: float = ANSWER_S) -> list[HookOutcome]:
    """Run the hooks of `kind` to their end, one after the other, and return how each went.

    A command gets `facts` with `event` and `at` as JSON on its standard input, the environment of a worker, what
    names the user's session, and NIGHTPRESS_EVENT. It and all its children are killed at the time limit; what it
    leaves behind in its process group when it exits is killed too. The address gets the same JSON by POST. No
    answer within `answer_s`, 429 and 5xx are tried again after each of `delays_s`; a redirect is not followed.

    Blocks, so give it a thread. Never raises: what goes wrong stands in the outcome. A name server that
    does not answer may hold it longer than `answer_s`.

    Args:
        hooks: what to run.
        kind: what happened.
        facts: JSON values; the placeholders are taken from them.
        stop: ends all waiting early, and the command with it.
        delays_s: pauses between the tries.
        answer_s: limit of one try.
    """
    halt = stop or threading.Event()
    name, command = ("on_promote", hooks.on_promote) if kind == "promote" else ("on_failure", hooks.on_failure)
    outcomes = []
    message = _as_json(kind, facts)
    if command:
        outcomes.append(_run_command(name, command, hooks.timeout_s, kind, facts, message, halt))
    if hooks.webhook is not None:
        outcomes.append(_call_webhook(hooks.webhook, message, delays_s, answer_s, halt))
    return outcomes


def _as_json(kind: Kind, facts: Mapping[str, Any]) -> bytes:
    told = {**{str(name): value for name, value in facts.items()}, "event": kind, "at": utc_now()}
    try:
        text = json.dumps(told, default=_text, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, not a number, or a circle
        text = json.dumps({name: _text(value) for name, value in told.items()})
    return text.encode("ascii")


def _text(value: object) -> str:
    try:
        return "" if value is None else str(value)
    except Exception as error:  # noqa: BLE001 - a fact that cannot be shown must not keep the hook from running
        return f"<{type(error).__name__}>"


def fill(argument: str, facts: Mapping[str, Any]) -> str:
    """Return `argument` with its placeholders replaced; a fact that is missing leaves nothing.

    Raises:
        HookWrong: a placeholder is unknown, or a brace stands alone.
    """
    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] not in PLACEHOLDERS:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise HookWrong(f"{found[0]!r} in {argument!r} is no placeholder; there are {known}, and a brace "
                            "that is meant is written twice.")
        # a zero byte would end the argument
        return _text(facts.get(found[1])).replace("\0", "")[:ARGUMENT_CHARACTERS]

    return _BRACES.sub(value, argument)


def _check_command(name: str, command: Sequence[str]) -> None:
    program = command[0]
    for argument in command:
        if "\0" in argument:
            raise HookWrong(f"{name} holds a zero byte; remove it.")
        fill(argument, {})
    if _BRACES.search(program):
        raise HookWrong(f"The program of {name} must stand there as it is, not {program!r}.")
    if "/" in program and not program.startswith("/"):
        raise HookWrong(f"The program of {name}, {program!r}, is named from a folder that the service does not "
                        "know; give its full path.")
    if shutil.which(program) is None:
        raise HookWrong(f"The program of {name}, {program!r}, is not there or not executable; "
                        "give the full path of one that is.")


def _run_command(name: str, command: Sequence[str], timeout_s: float, kind: Kind, facts: Mapping[str, Any],
                 message: bytes, stop: threading.Event) -> HookOutcome:
    began, program = time.monotonic(), command[0]
    if stop.is_set():
        return HookOutcome(name, program, False, "Not run: the service is stopping.", tries=0)
    environment = {key: os.environ[key] for key in (*ENVIRONMENT, *SESSION) if key in os.environ}
    try:
        process = subprocess.Popen(  # noqa: S603 - the command that the user set; no shell reads it
            [program, *(fill(argument, facts) for argument in command[1:])], bufsize=0, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "NIGHTPRESS_EVENT": kind})
    except (OSError, ValueError, HookWrong) as error:
        return HookOutcome(name, program, False, f"Could not be started: {error}", tries=0)
    talk = _Talk(process, message)
    try:
        cut_short = talk.go_on(began + timeout_s, stop)
    finally:
        _end(process)
    output = talk.rest()
    took_s, status = time.monotonic() - began, process.returncode
    if status is None:
        detail = "Ran too long, and could not be killed."
    elif cut_short == "stop":
        detail = "Killed: the service is stopping."
    elif cut_short == "late":
        detail = f"Killed after the {timeout_s:g} s that a hook may run."
    elif status:
        detail = f"Died of {signal_name(status)}." if signal_name(status) else f"Exited with status {status}."
    else:
        detail = "Done."
    return HookOutcome(name, program, not cut_short and status == 0, detail, status, output, took_s=took_s)


class _Talk:
    """Feeds a process its standard input and gathers the end of what it prints, without ever blocking."""

    def __init__(self, process: subprocess.Popen[bytes], message: bytes) -> None:
        assert process.stdin is not None  # noqa: S101 - PIPE was asked for
        assert process.stdout is not None  # noqa: S101 - PIPE was asked for
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._left, self._output = message, b""
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    def go_on(self, deadline: float, stop: threading.Event) -> Literal["", "stop", "late"]:
        """Return '' when the process has exited, or why it must be ended."""
        with selectors.DefaultSelector() as ready:
            ready.register(self._stdin, selectors.EVENT_WRITE)
            ready.register(self._stdout, selectors.EVENT_READ)
            while self._process.poll() is None:
                if stop.is_set():
                    return "stop"
                tick = min(deadline - time.monotonic(), TICK_S)
                if tick <= 0:
                    return "late"
                if not ready.get_map():  # it has closed both: nothing but its exit is left
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(tick)
                for key, _events in ready.select(tick) if ready.get_map() else ():
                    if key.fileobj is self._stdin and self._write():
                        ready.unregister(self._stdin)
                        self._stdin.close()
                    elif key.fileobj is self._stdout and self._read() == 0:
                        ready.unregister(self._stdout)
        return ""

    def _write(self) -> bool:
        """Return whether all is written, or nobody reads any more."""
        try:
            self._left = self._left[os.write(self._stdin.fileno(), self._left):]
        except BlockingIOError:
            return False
        except OSError:
            return True
        return not self._left

    def _read(self) -> int:
        """Return how many bytes came, 0 at the end, -1 when there is nothing just now."""
        try:
            chunk = os.read(self._stdout.fileno(), 65536)
        except BlockingIOError:
            return -1
        except OSError:
            return 0
        self._output = (self._output + chunk)[-OUTPUT_BYTES:]
        return len(chunk)

    def rest(self) -> str:
        """Return the output with what still lies in the pipe, which is closed."""
        for _chunk in range(64):  # a child that left the group may print for ever
            if self._read() <= 0:
                break
        self._stdin.close()
        self._stdout.close()
        return self._output.decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, its group, and its children in other groups."""
    import psutil

    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that became another user cannot be killed
        process.wait(5)


def _origin(url: str) -> str:
    """Return scheme and host of an address that may be called.

    Raises:
        HookWrong: naming nothing of the address, which may hold a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise HookWrong("The webhook must be an address that begins with http:// or https:// and a host.")
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{port}" if port else "")


def _call_webhook(url: str, message: bytes, delays_s: Sequence[float], answer_s: float,
                  stop: threading.Event) -> HookOutcome:
    import asyncio

    began, status, tries = time.monotonic(), None, 0

    def outcome(worked: bool, detail: str) -> HookOutcome:
        return HookOutcome("webhook", target, worked, detail, status, tries=tries, took_s=time.monotonic() - began)

    target = ""
    try:
        target = _origin(url)
    except HookWrong as error:
        return outcome(False, str(error))
    detail = ""
    for delay_s in (0.0, *delays_s):
        if stop.wait(delay_s):
            return outcome(False, f"{detail} Given up: the service is stopping.".strip())
        tries += 1
        try:
            status = asyncio.run(_ask(url, message, answer_s, stop))
        except Interrupted:
            return outcome(False, "Given up: the service is stopping.")
        except TimeoutError:
            status, detail = None, f"No answer within {answer_s:g} s."
        except Exception as error:  # noqa: BLE001 - whatever a library raises, its text may hold the address
            status, detail = None, f"No answer ({type(error).__name__})."
        else:
            if 200 <= status < 300:
                return outcome(True, f"Answered with {status}.")
            detail = f"Answered with {status}."
            if 300 <= status < 400:
                return outcome(False, f"{detail} A redirect is not followed; set the address it leads to.")
            if status < 500 and status != 429:
                return outcome(False, detail)
    return outcome(False, f"{detail} Given up after {tries} tries.")


async def _ask(url: str, message: bytes, answer_s: float, stop: threading.Event) -> int:
    """Return the status of the answer.

    Raises:
        TimeoutError: nothing came in time.
        Interrupted: stop was set while it waited.
    """
    import asyncio

    deadline = time.monotonic() + answer_s
    post = asyncio.ensure_future(_post(url, message))
    try:
        while not post.done():
            if stop.is_set():
                raise Interrupted
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            await asyncio.wait({post}, timeout=min(left, TICK_S))
        return post.result()
    finally:
        post.cancel()
        await asyncio.gather(post, return_exceptions=True)


async def _post(url: str, message: bytes) -> int:
    import httpx

    quiet = logging.getLogger("httpx")
    if quiet.getEffectiveLevel() < logging.WARNING:
        quiet.setLevel(logging.WARNING)  # at INFO it writes the whole address
    headers = {"Content-Type": "application/json", "User-Agent": "nightpress"}
    async with (httpx.AsyncClient(timeout=None, follow_redirects=False) as client,  # noqa: S113 - _ask has the limit
                client.stream("POST", url, content=message, headers=headers) as response):
        return response.status_code  # what else it says is not read
