"""A provider on this machine: a real HTTP server that speaks enough of both protocols, faults included."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD: dict[str, Any] = {"reaction": 2, "interpretation": 1, "exploration": 0, "fit": 2, "harm": 0,
                        "reason": "It is warm."}


@dataclass
class Provider:
    """What the server does and has seen.

    Attributes:
        url: where it listens.
        script: faults for the next requests, in order; afterwards every request is answered well. One of `429`,
            `429-for-an-hour`, `500`, `drop`, `not-json`, `wrong-schema`, `off-scale`, `no-answer`, `cut-off`,
            `echo-key`, `401`, `404`, or `refuses:NAME` for a model that does not allow the parameter NAME.
        grade: from an exchange to the marks.
        write: from a request's body to the answer, in place of the marks.
        seen: bodies of all requests.
        headers: of all requests, names in lower case.
        open: while it is clear, no request is answered.
        waiting: requests under way.
    """

    url: str = ""
    script: list[str] = field(default_factory=list)
    grade: Callable[[dict[str, str]], dict[str, Any]] = lambda _exchange: GOOD
    write: Callable[[dict[str, Any]], Any] | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def message_of(body: dict[str, Any]) -> str:
    """The text of the user's message in a request."""
    return str(body["messages"][-1]["content"])


def system_of(body: dict[str, Any]) -> str:
    """The system prompt of a request."""
    return str(body["system"] if "system" in body else body["messages"][0]["content"])


def exchange_of(body: dict[str, Any]) -> dict[str, str]:
    """What stands between the markers, as a judge would read it."""
    text = message_of(body)
    found: dict[str, str] = json.loads(text[len("<exchange>\n"):text.index("\n</exchange>")])
    return found


def _good(body: dict[str, Any], marks: Any, cut_off: bool) -> dict[str, Any]:
    if "system" in body:
        tool = {"type": "tool_use", "id": "toolu_1", "name": body["tools"][0]["name"], "input": marks}
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
                "content": [{"type": "text", "text": "Well."}] + ([] if cut_off else [tool]),
                "stop_reason": "max_tokens" if cut_off else "tool_use", "stop_sequence": None,
                "usage": {"input_tokens": 1, "output_tokens": 1}}
    text = json.dumps(marks)
    return {"id": "chatcmpl_1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "length" if cut_off else "stop", "logprobs": None,
                         "message": {"role": "assistant", "content": text[:9] if cut_off else text}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    provider: Provider

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was ended
            super().handle()

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, message: str, **headers: str) -> None:
        self._send(status, json.dumps({"type": "error", "error": {"type": "some_error", "message": message}}).encode(),
                   **headers)

    def do_POST(self) -> None:
        provider = self.provider
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with provider.lock:
            provider.seen.append(body)
            provider.headers.append(headers)
            provider.waiting += 1
            fault = provider.script.pop(0) if provider.script else ""
        try:
            provider.open.wait(timeout=30)
            self._answer(body, headers, fault)
        except OSError:  # the client did not wait
            self.close_connection = True
        finally:
            with provider.lock:
                provider.waiting -= 1

    def _answer(self, body: dict[str, Any], headers: dict[str, str], fault: str) -> None:
        write = self.provider.write
        marks: Any = write(body) if write is not None else self.provider.grade(exchange_of(body))
        key = headers.get("x-api-key") or headers["authorization"].removeprefix("Bearer ")
        kind, _, name = fault.partition(":")
        if kind == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif kind == "429":
            self._refuse(429, "slow down", retry_after="0", retry_after_ms="1")
        elif kind == "429-for-an-hour":
            self._refuse(429, "come back later", retry_after="3600")
        elif kind == "500":
            self._refuse(500, "broken", retry_after_ms="1")
        elif kind == "echo-key":
            self._refuse(400, f"bad request by {key}\nwith Bearer {key[:20]}", retry_after_ms="1")
        elif kind == "401":
            self._refuse(401, f"Incorrect API key provided: {key[:8]}***{key[-4:]}. {key}")
        elif kind == "404":
            self._refuse(404, "model: there is no such model")
        elif kind == "refuses" and name in body:
            self._refuse(400, f"`{name}` is not supported by this model.")
        elif kind == "not-json":
            self._send(200, b'{"content": [')
        elif kind == "wrong-schema":
            self._send(200, json.dumps(_good(body, {"stars": 5}, False)).encode())
        elif kind == "off-scale":
            self._send(200, json.dumps(_good(body, {**marks, "fit": 3}, False)).encode())
        elif kind == "no-answer":
            self._send(200, b"[]")
        else:
            self._send(200, json.dumps(_good(body, marks, kind == "cut-off")).encode())


@contextmanager
def serving() -> Iterator[Provider]:
    """Run a provider until the block ends."""
    provider = Provider()
    provider.open.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"provider": provider}))
    server.daemon_threads = True
    server.block_on_close = False  # a connection that a client left open must not hold up a test
    provider.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.open.set()
        server.shutdown()
        server.server_close()
        thread.join()
