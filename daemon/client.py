"""The client of the control socket: one method per verb, used by the command line and the tests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from daemon.errors import ServiceMissing, ServiceRefused
from daemon.settings import Settings
from daemon.verbs import VERBS

ANSWER_S = 15.0
#: verbs that take as long as loading a model, or as writing a ledger
SLOW = {"promote": 3600.0, "backup": 600.0, "rollback": 60.0}


class Client:
    """Asks one service; a context manager."""

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is asked yet."""
        self.path = path
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://nightpress",
                                  timeout=ANSWER_S)

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
        """Close the connection."""
        self._http.close()

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
        found = VERBS[verb]
        sent = body if body is not None else {} if found.method == "POST" else None
        kept = {name: value for name, value in (query or {}).items() if value is not None}
        self._knock()
        try:
            answer = self._http.request(found.method, found.path.format(**named), json=sent, params=kept,
                                        timeout=SLOW.get(verb, ANSWER_S))
        except httpx.TimeoutException as problem:
            raise ServiceRefused("The service does not answer; its log says why: `nightpress logs`.") from problem
        except httpx.TransportError as problem:
            raise self._missing() from problem
        _refuse(answer)
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text

    def _knock(self) -> None:
        """Make sure that somebody listens; a connection refused inside httpx would leave its socket open."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
                knocking.settimeout(ANSWER_S)
                knocking.connect(str(self.path))
        except PermissionError as problem:
            raise ServiceMissing(f"The service's socket {self.path} is somebody else's.") from problem
        except OSError as problem:
            raise self._missing() from problem

    def _missing(self) -> ServiceMissing:
        return ServiceMissing(f"No service listens on {self.path}; start one with `nightpress daemon`, or install it "
                              "with `nightpress service install`.")

    def stream(self, verb: str, **query: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield kind and data of the messages of a stream until the service ends it.

        Raises:
            ServiceMissing, ServiceRefused: as `ask`.
        """
        kept = {name: value for name, value in query.items() if value is not None}
        kind, data = "", ""
        self._knock()
        try:
            with self._http.stream("GET", VERBS[verb].path, params=kept,
                                   timeout=httpx.Timeout(ANSWER_S, read=60.0)) as answer:
                if answer.is_error:
                    answer.read()
                _refuse(answer)
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        data = value
                    elif not line and data:
                        yield kind, json.loads(data)
                        kind, data = "", ""
        except httpx.RemoteProtocolError:  # the service was cut off
            return
        except httpx.TransportError as problem:
            raise self._missing() from problem

    def status(self) -> dict[str, Any]:
        """Return what the service does, see `answers.Status`."""
        found: dict[str, Any] = self.ask("status")
        return found


def _refuse(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        fault = answer.json()["error"]
        message, code = str(fault["message"]), int(fault.get("exit_code", ServiceRefused.exit_code))
    except (ValueError, KeyError, TypeError):
        message, code = f"The service answered {answer.status_code}.", ServiceRefused.exit_code
    if answer.status_code == 503 and "healthy" in answer.text:
        return  # an answer, not a refusal
    raise ServiceRefused(message, code)
