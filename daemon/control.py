"""The application behind the control socket: HTTP and JSON, one route per verb, described by OpenAPI."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from daemon import answers
from daemon.desk import Desk
from daemon.errors import ServiceRefused
from daemon.exposition import exposition
from daemon.hub import Message, Subscription
from daemon.logs import Logs
from daemon.service import Service
from daemon.verbs import VERBS
from state.faults import NightpressError
from state.files import DiskFull
from state.ledger import UnknownJob, UnknownRun

KEEP_ALIVE_S = 15.0  #: between comments on a quiet stream, so that a client that is gone is noticed
MOST_STREAMS = 32


def application(service: Service, logs: Logs) -> FastAPI:
    """Return the application that answers for a service."""
    desk = Desk(service)
    app = FastAPI(title="Nightpress", version="1", docs_url=None, redoc_url=None, openapi_url="/openapi.json",
                  summary="What nightpressd does, and how to tell it what to do.")
    _add_routes(app, desk, service, logs)
    app.add_exception_handler(NightpressError, _refused)
    app.add_exception_handler(RequestValidationError, _misunderstood)
    app.add_exception_handler(HTTPException, _unknown)
    return app


def _add_routes(app: FastAPI, desk: Desk, service: Service, logs: Logs) -> None:
    streams = Streams()

    def route(name: str, handler: Callable[..., Any], **options: Any) -> None:
        verb = VERBS[name]
        app.add_api_route(verb.path, handler, methods=[verb.method], operation_id=name, summary=verb.summary, **options)

    async def status() -> answers.Status:
        return desk.status()

    async def health() -> Response:
        found = desk.health()
        return JSONResponse(found.model_dump(), 200 if found.healthy else 503)

    def queue(every: bool = False) -> list[dict[str, Any]]:
        return desk.queue(every)

    def runs(limit: int = Query(20, ge=1, le=10_000)) -> list[dict[str, Any]]:
        return desk.runs(limit)

    async def events(after: int | None = None, job: int | None = None,
                     last_event_id: int | None = Header(None)) -> Response:
        def wanted(message: Message) -> bool:
            return job is None or message.data.get("job", job) == job

        start = after if after is not None else last_event_id
        return streams.answer(lambda: service.hub.subscribe(start), wanted)

    async def show_logs(n: int = Query(100, ge=0, le=100_000), follow: bool = False) -> Response:
        if not follow:
            return JSONResponse(logs.tail(n))
        kept = logs.lines.last - n
        return streams.answer(lambda: logs.subscribe(max(0, kept)), lambda _message: True)

    def metrics() -> Response:
        return PlainTextResponse(exposition(desk.status(), desk.queue()), media_type="text/plain; version=0.0.4")

    route("status", status, response_model=answers.Status)
    route("health", health, response_model=answers.Health)
    route("queue", queue)
    route("runs", runs)
    route("run", desk.run)
    route("events", events, response_class=StreamingResponse)
    route("logs", show_logs)
    route("metrics", metrics, response_class=PlainTextResponse)
    for name in ("add", "remove", "move", "run_now", "cancel", "pause", "resume", "promote", "rollback",
                 "release_quarantine", "reevaluate", "backup", "reload", "stop"):
        route(name, getattr(desk, name), response_model=answers.Done)


class Streams:
    """The open streams of server-sent events, at most `MOST_STREAMS`."""

    def __init__(self) -> None:
        self.open = 0

    def answer(self, subscribe: Callable[[], Subscription], wanted: Callable[[Message], bool]) -> Response:
        """Return a stream of the wanted messages, or a refusal when there are too many streams."""
        if self.open >= MOST_STREAMS:
            return _fault(503, "TooManyStreams", f"There are {self.open} streams open; close one.")
        return _Stream(self, subscribe, wanted)


class _Stream(StreamingResponse):
    """One of them. It ends with its answer: a generator of its own would end when its memory is collected."""

    def __init__(self, streams: Streams, subscribe: Callable[[], Subscription],
                 wanted: Callable[[Message], bool]) -> None:
        self._streams, self._subscribe, self._wanted = streams, subscribe, wanted
        super().__init__((), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams.open += 1
        try:
            with self._subscribe() as subscription:
                async with contextlib.aclosing(_parts(subscription, self._wanted)) as self.body_iterator:
                    await super().__call__(scope, receive, send)
        finally:
            self._streams.open -= 1


async def _parts(subscription: Subscription, wanted: Callable[[Message], bool]) -> AsyncGenerator[bytes]:
    upcoming: asyncio.Task[Message] | None = None
    try:
        yield b": listening\n\n"
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(subscription))
            done, _ = await asyncio.wait({upcoming}, timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                message = upcoming.result()
            except StopAsyncIteration:
                return
            finally:
                upcoming = None
            if wanted(message):
                data = json.dumps({"at": message.at, **message.data}, default=str)
                yield f"id: {message.id}\nevent: {message.kind}\ndata: {data}\n\n".encode()
    finally:
        if upcoming is not None:
            upcoming.cancel()


def _fault(status: int, code: str, message: str, exit_code: int = ServiceRefused.exit_code) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "exit_code": exit_code}}, status)


async def _refused(_request: Request, problem: Exception) -> Response:
    assert isinstance(problem, NightpressError)  # noqa: S101 - registered for it alone
    known: Mapping[type[Exception], int] = {UnknownJob: 404, UnknownRun: 404, DiskFull: 507}
    return _fault(known.get(type(problem), 409), type(problem).__name__, str(problem), exit_code=problem.exit_code)


async def _misunderstood(_request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)  # noqa: S101 - registered for it alone
    first = problem.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _fault(422, "Misunderstood", f"{where}: {first['msg']}.", exit_code=2)


async def _unknown(_request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)  # noqa: S101 - registered for it alone
    return _fault(problem.status_code, "Unknown" if problem.status_code == 404 else "Refused", str(problem.detail))
