"""The client of the control socket: one method per verb, used by the command line and the tests.

Over the standard library's HTTP client: it is there at once, where a larger one takes longer to import than the
service to answer.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

from daemon.errors import ServiceMissing, ServiceRefused
from daemon.settings import Settings
from daemon.verbs import VERBS

ANSWER_S = 15.0
STREAM_S = 60.0  #: without a byte; a quiet stream has a comment four times as often
#: verbs that take as long as loading a model, or as writing a ledger
SLOW = {"promote": 3600.0, "backup": 600.0, "rollback": 60.0}


class _Connection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("nightpress", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket at the path.

        Raises:
            OSError: nobody listens there, or it is not ours.
        """
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Asks one service; a context manager."""

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is asked yet."""
        self.path = path

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the client of the service that these settings speak of."""
        return cls(settings.socket_to_ask)

    @classmethod
    def find(cls, settings: Settings) -> Self | None:
        """Return the client of the service that runs on this state folder, None when none does.

        Where no state folder was asked for, the service's own is the right one.
        """
        if not settings.socket_to_ask.is_socket():
            return None
        client = cls.of(settings)
        try:
            theirs = Path(client.status()["state_dir"])
            if "state_dir" not in settings.model_fields_set or theirs == settings.state_dir.absolute():
                return client
        except ServiceMissing:
            pass
        client.close()
        return None

    def close(self) -> None:
        """Do nothing: every question has a connection of its own."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def ask(self, verb: str, body: dict[str, Any] | None = None, *, query: dict[str, Any] | None = None,
            **named: Any) -> Any:
        """Ask one verb and return its answer.

        Args:
            verb: one of `VERBS`.
            body: sent as JSON.
            query: of the address; what is None is left out.
            named: what the verb's path names.

        Raises:
            ServiceMissing: nobody answers.
            ServiceRefused: the service refuses, with its sentence and exit code.
        """
        with _Answer(self.path, verb, body, query or {}, named, SLOW.get(verb, ANSWER_S)) as answer:
            try:
                content = answer.read()
            except (OSError, HTTPException) as problem:
                raise ServiceRefused("The service broke off; its log says why: `nightpress logs`.") from problem
            _refuse(answer.status, content)
            if answer.headers.get_content_type() == "application/json":
                return json.loads(content)
            return content.decode("utf-8", "replace")

    def stream(self, verb: str, **query: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield kind and data of the messages of a stream until the service ends it.

        Raises:
            ServiceMissing, ServiceRefused: as `ask`.
        """
        kind, data = "", ""
        with _Answer(self.path, verb, None, query, {}, STREAM_S) as answer:
            if answer.status >= 400:
                _refuse(answer.status, answer.read())
            while line := _line(answer):
                name, _, value = line.rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    data = value
                elif not name and data:
                    yield kind, json.loads(data)
                    kind, data = "", ""

    def status(self) -> dict[str, Any]:
        """Return what the service does, see `answers.Status`."""
        found: dict[str, Any] = self.ask("status")
        return found


def _line(answer: HTTPResponse) -> str:
    """Return the next line of a stream with its end, nothing when the service was cut off."""
    try:
        return answer.readline().decode("utf-8", "replace")
    except (HTTPException, OSError):
        return ""


class _Answer:
    """One question, asked when the `with` block is entered; its connection ends with the block."""

    def __init__(self, path: Path, verb: str, body: dict[str, Any] | None, query: dict[str, Any],
                 named: dict[str, Any], timeout_s: float) -> None:
        self._verb, self._path = VERBS[verb], path
        kept = {name: str(value).lower() if isinstance(value, bool) else value
                for name, value in query.items() if value is not None}
        place = self._verb.path.format(**{name: quote(str(value), safe="") for name, value in named.items()})
        self._target = f"{place}?{urlencode(kept)}" if kept else place
        self._body = json.dumps(body or {}) if self._verb.method == "POST" else None
        self._connection = _Connection(path, timeout_s)

    def __enter__(self) -> HTTPResponse:
        headers = {"Content-Type": "application/json"} if self._body is not None else {}
        try:
            self._connection.request(self._verb.method, self._target, self._body, headers)
            return self._connection.getresponse()
        except TimeoutError as problem:
            self._connection.close()
            raise ServiceRefused("The service does not answer; its log says why: `nightpress logs`.") from problem
        except PermissionError as problem:
            self._connection.close()
            raise ServiceMissing(f"The service's socket {self._path} is somebody else's.") from problem
        except (OSError, HTTPException) as problem:
            self._connection.close()
            raise ServiceMissing(
                f"No service listens on {self._path}; start one with `nightpress daemon`, or install it with "
                "`nightpress service install`.") from problem

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._connection.close()


def _refuse(status: int, content: bytes) -> None:
    """Raise ServiceRefused with the service's own sentence and exit code, if the answer is a refusal."""
    if status < 400:
        return
    try:
        answer = json.loads(content)
        if "healthy" in answer:
            return  # an answer, not a refusal
        message, code = str(answer["error"]["message"]), int(answer["error"]["exit_code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"The service answered {status}.", ServiceRefused.exit_code
    raise ServiceRefused(message, code)
