"""The log: one line for each thing that happens, for people and machines, without secrets; no full disk stops it.

A line has `timestamp` (UTC), `level`, `action` (dotted, stable, for machines), `event` (a sentence) and facts. Lines of
libraries come the same way from WARNING on, with the action `library`; uvicorn's do if it gets `log_config=None`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import quote

from daemon.errors import SettingsWrong
from daemon.hub import Hub, Subscription
from state.clock import utc_now
from state.files import make_folder

if TYPE_CHECKING:  # 150 ms, and the command line may load this module
    from structlog.typing import FilteringBoundLogger

Level = Literal["debug", "info", "warning", "error", "critical"]
Line = dict[str, Any]

LOGGER = "nightpress"
FILE_BYTES, FILES = 2_000_000, 5
#: Together under journald's 48 kB for a line; from there on it would begin another, which we have not marked.
LINE_CHARACTERS, TRACE_CHARACTERS = 8_000, 6_000
ITEMS, DEPTH = 100, 5
HIDDEN = "[hidden]"
#: endings of the names of environment variables that hold secrets, and from what length on a value is one
SECRET_VARIABLES, SECRET_CHARACTERS = ("_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD"), 6

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_SYSLOG = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_FIXED = ("timestamp", "level", "action", "event", "logger", "exception")
# `token` only at the end: `tokens` and `token_embd.weight` are no secrets here
_SECRET_KEY = re.compile(r"passw(or)?d|passphrase|secret|api[_-]?key|authorization|credential|token$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
# control characters, what reorders a line on the screen, and halves of a character
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_current: list[Logs] = []  # at most one


def say(action: str, message: str, /, *, level: Level = "info", exc_info: Any = None, **facts: Any) -> None:
    """Write one line to the log; never raises because of what it is given.

    Before `configure` the line goes to Python's own logging, which shows warnings and errors only.

    Args:
        action: what happened, dotted lower case, stable: `run.started`.
        message: the same as a sentence for people.
        level: how bad it is.
        exc_info: an exception to tell, or True for the one being handled.
        facts: anything; one that has the name of a part of the line gets `_` behind it.
    """
    number = _LEVELS.get(level, logging.INFO)
    if logging.getLogger(LOGGER).isEnabledFor(number):  # structlog is loaded for nothing less
        logger().log(number, message, action=action, _facts=facts, exc_info=exc_info)


def logger(name: str = LOGGER) -> FilteringBoundLogger:
    """Return structlog's logger of that name below `nightpress`; it takes `action=` as a fact."""
    import structlog

    bound: FilteringBoundLogger = structlog.wrap_logger(
        logging.getLogger(name if name.split(".")[0] == LOGGER else f"{LOGGER}.{name}"), processors=[_route],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    return bound


class Logs:
    """The log as it was configured, until `close`. Its `lines` are messages of the kind `log`."""

    def __init__(self, handler: _Handler, level: int) -> None:
        self._handler, self.lines = handler, handler.lines
        self._found = [(found, found.level) for found in (logging.getLogger(), logging.getLogger(LOGGER))]
        logging.getLogger().setLevel(max(level, logging.WARNING))
        logging.getLogger(LOGGER).setLevel(level)
        logging.getLogger().addHandler(handler)

    @property
    def problem(self) -> str | None:
        """Why lines are lost just now, None when they are not; looked at anew with every line."""
        file = self._handler.file
        return (file.problem if file is not None else None) or self._handler.stream.problem

    def set_level(self, level: str) -> None:
        """Write lines from another level on."""
        logging.getLogger().setLevel(max(_LEVELS[level], logging.WARNING))
        logging.getLogger(LOGGER).setLevel(_LEVELS[level])

    def tail(self, n: int) -> list[Line]:
        """Return the last `n` lines, oldest first."""
        return [dict(message.data) for message in self.lines.since(0)[-n:]] if n > 0 else []

    def subscribe(self, after: int | None = None) -> Subscription:
        """Return the lines as they come, see `Hub.subscribe`."""
        return self.lines.subscribe(after)

    def close(self) -> None:
        """End all subscriptions and leave logging as it was before; a second call does nothing."""
        import structlog

        if self not in _current:
            return
        _current.remove(self)
        logging.getLogger().removeHandler(self._handler)
        for changed, level in self._found:
            changed.setLevel(level)
        structlog.reset_defaults()
        self._handler.close()


def configure(*, file: Path | None = None, stream: TextIO | None = None, level: str = "info",
              ring_lines: int = 2000) -> Logs:
    """Send all lines to a stream and, if wanted, to a file; an earlier configuration is closed.

    A terminal gets coloured prose, all else JSON, in the journal with the level before it (sd-daemon(3)).

    Args:
        file: 2 MB, then moved to `file.1` and so on, five in all, mode 0600; None under systemd.
        stream: stderr when None.
        level: the lowest that is written.
        ring_lines: how many of the last lines `Logs.tail` knows.

    Raises:
        SettingsWrong: no such level.
    """
    import structlog

    if level not in _LEVELS:
        raise SettingsWrong(f"{level!r} is no level of the log; there are {', '.join(_LEVELS)}.")
    while _current:
        _current[0].close()
    handler = _Handler(_LogFile(file) if file else None, _Stream(stream or sys.stderr),
                       Hub(ring_lines), max(_LEVELS[level], logging.WARNING))
    formatter = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(formatter(
        foreign_pre_chain=[structlog.processors.format_exc_info, _take_foreign],
        processors=[formatter.remove_processors_meta, structlog.processors.JSONRenderer(ensure_ascii=False)]))
    structlog.configure(processors=[_route], logger_factory=logging.getLogger,
                        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))
    logs = Logs(handler, _LEVELS[level])
    _current.append(logs)
    return logs


def _secrets() -> re.Pattern[str]:
    """Return what finds the values of the environment's secrets, as it is just now."""
    values = {value for name, value in os.environ.items()
              if name.upper().endswith(SECRET_VARIABLES) and len(value) >= SECRET_CHARACTERS}
    return _pattern(tuple(sorted(values)))


@functools.lru_cache(maxsize=4)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    forms = {form for value in values  # as it is, in an address, within quotes
             for form in (value, quote(value, safe="", errors="replace"), repr(value)[1:-1], json.dumps(value)[1:-1])}
    # the longest first: one secret may begin with another; (?!) is found nowhere
    return re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)) or "(?!)")


class _Cleaner:
    """Makes JSON of anything, without secrets and line breaks, LINE_CHARACTERS of it in all."""

    def __init__(self) -> None:
        self._left, self._secrets = LINE_CHARACTERS, _secrets()

    def hide(self, text: str) -> str:
        text = self._secrets.sub(HIDDEN, text)
        return _URL_PASSWORD.sub(f"{HIDDEN}@", text) if "://" in text else text

    def text(self, text: str) -> str:
        safe = _escape(self.hide(text))
        safe = safe if len(safe) <= self._left else safe[:max(self._left, 0)] + "…"
        self._left -= len(safe)
        return safe

    def trace(self, text: str) -> str:
        """Return a traceback line for line, the end of it when it is long."""
        whole = "\n".join(_escape(line) for line in self.hide(text.rstrip()).split("\n"))
        return whole if len(whole) <= TRACE_CHARACTERS else f"…{whole[-TRACE_CHARACTERS:]}"

    def fact(self, name: str, value: object, depth: int = 0) -> object:
        self._left -= 1
        plain = value is None or isinstance(value, bool)
        return value if plain else HIDDEN if _SECRET_KEY.search(name) else self.value(value, depth)

    def value(self, value: object, depth: int = 0) -> object:
        if (isinstance(value, int) and value.bit_length() < 64) or (isinstance(value, float) and math.isfinite(value)):
            return value
        try:
            if isinstance(value, Mapping | list | tuple | set | frozenset):
                if depth >= DEPTH or self._left <= 0:
                    return "…"
                if isinstance(value, Mapping):
                    pairs = [(str(key), item) for key, item in list(value.items())[:ITEMS]]
                    return {self.text(key): self.fact(key, item, depth + 1) for key, item in pairs}
                return [self.fact("", item, depth + 1) for item in list(value)[:ITEMS]]
            return self.text(f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value))
        except Exception as error:  # noqa: BLE001 - a fact that cannot be shown must not cost the line
            return f"<{type(value).__name__}: {type(error).__name__}>"


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _assemble(level: str, action: object, event: object, facts: Mapping[str, Any], trace: str = "") -> Line:
    """Return the whole line as JSON values, its fixed parts first."""
    clean = _Cleaner()
    line = {"timestamp": utc_now(), "level": level, "action": clean.value(action), "event": clean.value(event)}
    for name, value in facts.items():
        line[clean.text(f"{name}_" if name in _FIXED else name)] = clean.fact(name, value)
    if trace:
        line["exception"] = clean.trace(trace)
    return line


def _level(record: logging.LogRecord) -> str:
    return next((name for name, least in reversed(_LEVELS.items()) if record.levelno >= least), "debug")


def _route(bound: Any, name: str, event: MutableMapping[str, Any]) -> Any:
    """Hand a finished line to our handler when there is one, else as text to whatever Python's logging does."""
    from structlog.processors import format_exc_info
    from structlog.stdlib import ProcessorFormatter

    format_exc_info(bound, name, event)
    trace, action, sentence = event.pop("exception", ""), event.pop("action", "log"), event.pop("event", "")
    facts = event.pop("_facts", {})  # of `say`, where any name is allowed
    line = _assemble(name, action, sentence, {**event, **facts}, trace)
    if bound.name != LOGGER:
        line["logger"] = bound.name
    if _current:
        return ProcessorFormatter.wrap_for_formatter(bound, name, line)
    told = (f" {fact}={line[fact]!r}" for fact in line if fact not in _FIXED)
    return f"{line['event']} [{line['action']}]" + "".join(told)


def _take_foreign(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> Line:
    """Make a line of a library's record."""
    record: logging.LogRecord = event["_record"]
    line = _assemble(_level(record), "library", event["event"], {}, event.get("exception", ""))
    return {**line, "logger": _escape(record.name), "_record": record, "_from_structlog": False}


class _Handler(logging.Handler):
    """Writes each record once as JSON and gives it to the file, the stream and the ring."""

    def __init__(self, file: _LogFile | None, stream: _Stream, lines: Hub, foreign: int) -> None:
        super().__init__()
        self.file, self.stream, self.lines, self._foreign = file, stream, lines, foreign
        self._one = threading.RLock()

    def handle(self, record: logging.LogRecord) -> bool:
        if record.levelno < self._foreign and record.name.split(".")[0] != LOGGER:
            return False
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001 - wrong arguments of a library; the line tells of them instead
            text = json.dumps(_assemble(_level(record), "log.unreadable", "A line could not be formatted.",
                                        {"format": record.msg, "problem": error, "from": record.name}))
        line = json.loads(text)
        with self._one:
            if self.file is not None:
                self.file.write(text)
            self.stream.write(text, line)
        # outside of the lock: a destructor may log in a thread that has the hub's lock and wants this one
        self.lines.publish("log", line)
        return True

    def close(self) -> None:
        self.lines.close()
        with self._one:  # another thread may be writing its last line
            if self.file is not None:
                self.file.close()
            self.file = None
        super().close()


class _Stream:
    """A terminal, the journal, or whatever stderr is."""

    def __init__(self, stream: TextIO | None) -> None:
        self.problem: str | None = None
        self._stream = stream  # there is no stderr in a process that was started with it closed
        self._journal = stream is not None and _is_journal(stream)
        self._code = (getattr(stream, "encoding", None) or "utf-8").lower()
        self._prose: Callable[[Line], str] | None = None
        if stream is not None and stream.isatty():
            from structlog.dev import ConsoleRenderer, plain_traceback

            plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
            render = ConsoleRenderer(colors=not plain, exception_formatter=plain_traceback)
            self._prose = lambda line: render(None, line["level"], line)

    def write(self, text: str, line: Line) -> None:
        if self._stream is None:
            return
        if self._prose is not None:  # a trace is set off, so that no line of it looks like one of ours
            trace = {"exception": "  | " + line["exception"].replace("\n", "\n  | ")} if "exception" in line else {}
            text = self._prose({**line, **trace})
        elif not self._code.startswith("utf"):
            text = json.dumps(line)
        mark = f"<{_SYSLOG[line['level']]}>" if self._journal else ""
        try:
            self._stream.write(f"{mark}{text}\n".encode(self._code, "backslashreplace").decode(self._code))
            self._stream.flush()
        except (OSError, ValueError, RuntimeError) as error:  # full, gone, closed, or in the middle of a write
            self.problem = f"The log cannot be written to its stream ({error})."
        else:
            self.problem = None


def _is_journal(stream: TextIO) -> bool:
    """Whether JOURNAL_STREAM names this very stream, and not one that was redirected."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _LogFile:
    """A file and its predecessors that may fail without harm: the lines lost are counted before the next one."""

    def __init__(self, path: Path, largest: int = FILE_BYTES, files: int = FILES) -> None:
        self.problem: str | None = None
        self._path, self._largest, self._files = path, largest, files
        self._descriptor: int | None = None
        self._lost = 0

    def write(self, text: str) -> None:
        if self._lost:
            gap = f"Lines missing here: {self._lost}."
            text = json.dumps(_assemble("warning", "log.gap", gap, {"problem": self.problem})) + f"\n{text}"
        data = f"{text}\n".encode("utf-8", "backslashreplace")
        try:
            self._append(self._open(len(data)), data)
        except OSError as error:
            self._lost += 1
            self.problem = f"The log file {self._path} cannot be written ({error.strerror or error})."
        else:
            self._lost, self.problem = 0, None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, room: int) -> int:
        """Return the file with room for so many bytes; one that was moved or removed is made anew."""
        descriptor, in_place = self._descriptor, False
        if descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                in_place = os.path.samestat(os.fstat(descriptor), self._path.lstat())
        if descriptor is None or not in_place:
            descriptor = self._open_anew()
        size = os.fstat(descriptor).st_size
        if size and size + room > self._largest:
            self._rotate()
            descriptor = self._open_anew()
        return descriptor

    def _open_anew(self) -> int:
        self.close()
        make_folder(self._path.parent, 0o700)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # the mode of a device is not ours to change
            self.close()
            raise OSError(errno.EINVAL, "not a regular file")
        os.fchmod(self._descriptor, 0o600)
        return self._descriptor

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            newer = f"{self._path}.{number - 1}" if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                Path(newer).replace(f"{self._path}.{number}")

    def _append(self, descriptor: int, data: bytes) -> None:
        size, left = os.fstat(descriptor).st_size, memoryview(data)
        try:
            while left:
                left = left[os.write(descriptor, left):]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)  # half a line would spoil the next
            raise
