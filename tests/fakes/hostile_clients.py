"""Clients of the control socket that say what they like, and an application for them to say it to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from daemon.listening import Bounds, Listener, bind

#: of somebody else, where the tests run as root
STRANGER = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
#: start a listener: `serve(app, request_s=0.2)`, by default for the application of the stage
Serve = Callable[..., Listener]
#: the fixture `poll`
Poll = Callable[..., Any]


def connect(path: Path, timeout_s: float = 10.0) -> socket.socket:
    """Return a connected socket; the caller closes it."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.connect(str(path))  # blocking, so that a full queue makes it wait and not fail
    except BaseException:
        client.close()
        raise
    client.settimeout(timeout_s)
    return client


def request(target: str = "/", *headers: str, method: str = "GET", body: bytes = b"", close: bool = True) -> bytes:
    """Return the bytes of a request; after its answer the server closes, unless close is False."""
    lines = [f"{method} {target} HTTP/1.1", "Host: nightpress", *headers]
    lines += [f"Content-Length: {len(body)}"] * bool(body) + ["Connection: close"] * close
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_to_end(client: socket.socket) -> bytes:
    """Return all that comes until the server closes; TimeoutError when it does not."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def say(path: Path, *words: bytes) -> bytes:
    """Connect, send the words, return all that comes until the server closes."""
    with connect(path) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before it heard us out
            for word in words:
                client.sendall(word)
        return read_to_end(client)


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Return what comes up to and with end."""
    got = b""
    while not got.endswith(end):
        part = client.recv(1)
        assert part, f"the server closed after {got!r}"
        got += part
    return got


def fault(answer: bytes) -> tuple[int, str]:
    """Return status and code of an answer that tells a fault; it must be in our form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer
    told = json.loads(body)["error"]
    assert set(told) == {"code", "message", "exit_code"}
    return status(answer), told["code"]


def status(answer: bytes) -> int:
    """Return the status of an answer."""
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split(b" ", 2)[1])


class Stage:
    """An application, and what happened in it."""

    def __init__(self) -> None:
        self.app = FastAPI(debug=True)  # debug, so that a traceback would reach the client if it could
        self.streams = self.ended = self.sent = self.waiting = 0
        self.bodies: list[int] = []
        self.event, self.release = asyncio.Event(), threading.Event()
        self.app.get("/")(self.hello)
        self.app.api_route("/echo", methods=["POST", "PUT"])(self.echo)
        self.app.get("/events")(self.events)
        self.app.get("/flood")(self.flood)
        self.app.get("/waits")(self.waits)
        self.app.get("/blocks")(self.blocks)
        self.app.get("/fails")(self.fails)
        self.app.get("/fails-midway")(self.fails_midway)
        self.app.get("/large")(self.large)

    async def hello(self) -> str:
        return "hello"

    async def echo(self, told: Request) -> int:
        self.bodies.append(len(await told.body()))
        return self.bodies[-1]

    async def events(self) -> StreamingResponse:
        """Say one thing at once and one after `event` is set."""
        async def lines() -> AsyncIterator[bytes]:
            self.streams += 1
            try:
                yield b"data: first\n\n"
                await self.event.wait()
                yield b"data: second\n\n"
                await asyncio.Event().wait()
            finally:
                self.ended += 1
        return StreamingResponse(lines(), media_type="text/event-stream")

    async def flood(self) -> StreamingResponse:
        """Send without end and without a pause."""
        async def lines() -> AsyncIterator[bytes]:
            self.streams += 1
            try:
                while True:
                    self.sent += 1
                    yield b"x" * (1 << 16)
            finally:
                self.ended += 1
        return StreamingResponse(lines())

    async def waits(self) -> str:
        self.waiting += 1
        await self.event.wait()
        return "waited"

    def blocks(self) -> str:
        self.waiting += 1
        self.release.wait(30)
        return "blocked"

    async def fails(self) -> None:
        raise RuntimeError("the inside of the service")

    async def fails_midway(self) -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            yield b"begun"
            raise RuntimeError("the inside of the service")
        return StreamingResponse(lines())

    async def large(self) -> Any:
        return {"text": "x" * (8 << 20)}


@contextlib.contextmanager
def serving(place: Path, stage: Stage) -> Iterator[Serve]:
    """Yield what starts a listener at place, within the bounds named; it must end in time."""
    begun: list[Listener] = []

    def start(app: Any = None, **bounds: Any) -> Listener:
        begun.append(Listener(app or stage.app, bind(place), place, Bounds(**bounds)))
        begun[-1].start()
        return begun[-1]

    yield start
    stage.release.set()
    assert all(listener.stop(10) for listener in begun)


def all_ended(listener: Listener, stage: Stage, poll: Poll) -> None:
    """Wait until no request is in work and no generator of a stream is left."""
    poll(lambda: not listener.server.server_state.tasks, what="the end of all requests")
    gc.collect()  # Starlette does not close a generator that waits in `yield`; it ends as garbage
    poll(lambda: stage.ended == stage.streams, what="the end of the streams")


def troubles(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of the log that tell of more than a client's doing."""
    return [record.getMessage() for record in caplog.records
            if record.exc_info or record.levelno >= logging.WARNING]


def open_files() -> int:
    """Return the number of this process's file descriptors."""
    return psutil.Process().num_fds()


def mode(path: Path) -> int:
    """Return the permissions of a path itself."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def leave(path: Path) -> None:
    """Leave a socket that nobody listens on."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
