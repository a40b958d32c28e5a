"""One client of the control socket, within its bounds, and one request of it with its answer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import unquote

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from daemon.errors import ServiceRefused
from daemon.socket_place import peer, permitted

LOG = logging.getLogger("nightpress.control")

METHODS = frozenset({b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT"})


@dataclass(frozen=True)
class Bounds:
    """What one client, and all of them, may cost."""

    connections: int = 128
    #: from the first byte of a request, or from the connection, to the last byte of its body
    request_s: float = 10.0
    #: between two requests on one connection
    idle_s: float = 5.0
    #: from the moment the client stops reading until all that was written is taken
    write_s: float = 10.0
    #: how long what a refused client still sends is thrown away, so that it gets to read why
    linger_s: float = 1.0
    body_bytes: int = 1 << 20


def objection(request: h11.Request, body_bytes: int) -> tuple[int, str, str] | None:
    """Return status, code and message of the refusal that the head of a request earns, None for a good one."""
    names = dict(request.headers)
    if request.http_version not in (b"1.0", b"1.1"):
        return 505, "http_version", "This socket speaks HTTP/1.1."
    if request.method not in METHODS:
        return 501, "method_unknown", "This method is not known here."
    if not request.target.startswith(b"/"):
        return 400, "bad_target", "The target of a request starts with a slash."
    if b"origin" in names or b"referer" in names:
        return 403, "browser_refused", "Requests of a browser are refused: no Origin, no Referer."
    if b"upgrade" in names:
        return 400, "upgrade_refused", "This socket speaks HTTP/1.1 and upgrades to nothing else."
    if int(names.get(b"content-length", b"0")) > body_bytes:
        return _too_large(body_bytes)
    return None


def _too_large(body_bytes: int) -> tuple[int, str, str]:
    return 413, "body_too_large", f"The body of a request may have {body_bytes} bytes."


def fault_body(code: str, message: str) -> bytes:
    """Return the JSON that tells a client what went wrong."""
    return json.dumps({"error": {"code": code, "message": message, "exit_code": ServiceRefused.exit_code}}).encode()


class Exchange(RequestResponseCycle):
    """One complete request and its answer."""

    half_closed = False
    _told = False
    _replaced = False

    async def run_asgi(self, app: Any) -> None:
        """Answer; an exception becomes a line in the log and, where nothing was said yet, status 500."""
        failed = False
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            self.transport.close()
            raise
        except (Exception, SystemExit):
            failed = True
            LOG.exception("%s %s failed", self.scope["method"], self.scope["path"])
        finally:
            if not self.response_started and not self.disconnected and not self.transport.is_closing():
                await self.send({"type": "http.response.start", "status": 500, "headers": []})
            if not self.response_complete and not self.disconnected:
                if not failed and not self.half_closed and not self.transport.is_closing():
                    LOG.error("%s %s ended within its answer", self.scope["method"], self.scope["path"])
                self.transport.close()
            self.on_response = lambda: None

    async def receive(self) -> Any:
        """Return the body, which is complete; after that wait until the client is gone or has its answer."""
        if not self._told:
            self._told = True
            return {"type": "http.request", "body": bytes(self.body), "more_body": False}
        await self.message_event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Write a part of the answer; every status 500 is told in our own words, without a traceback."""
        # A stream to a fast client never waits, and neither does one to a client that is gone:
        # without this it would keep the loop, and nobody could even cancel it.
        await asyncio.sleep(0)
        if self._replaced:
            return
        if message["type"] == "http.response.start" and message["status"] == 500 and not _is_json(message):
            self._replaced = True
            body = fault_body("internal_error", "The service failed on this request; its log says more.")
            await super().send({"type": "http.response.start", "status": 500, "headers": _headers(len(body))})
            await super().send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await super().send(message)

    def end_reading(self) -> None:
        """Take note that the client sends nothing more, though it may read its answer."""
        self.half_closed, self.keep_alive = True, False
        self.message_event.set()


def _headers(length: int) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % length), (b"connection", b"close")]


def _is_json(message: Any) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"application/json")
               for name, value in message.get("headers", ()))


class Connection(H11Protocol):
    """One client, within its bounds. The application hears of a request once its body is complete."""

    bounds: ClassVar[Bounds] = Bounds()
    cycle: Exchange
    _born = 0.0
    _body: bytearray
    _warned: ClassVar[set[int]] = set()
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _task: asyncio.Task[None] | None = None
    _idle = False
    _refused = False

    @property
    def in_work(self) -> bool:
        """Whether a request is complete and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base
        """Look who it is before a byte is read; make room among the connections that do nothing."""
        super().connection_made(transport)
        self._born, self._body = self.loop.time(), bytearray()
        try:
            uid = peer(transport.get_extra_info("socket"))[1]
        except OSError:
            transport.abort()
            return
        if not permitted(uid, os.geteuid()):
            if uid not in self._warned:
                self._warned.add(uid)
                LOG.warning("user %d is not permitted on the control socket", uid)
            self._drop()
            return
        transport.set_write_buffer_limits(high=0)  # so that pause_writing tells of the first byte that waits
        if len(self.connections) > self.bounds.connections:
            waiting = [other for other in self.connections
                       if isinstance(other, Connection) and other is not self and not other.in_work]
            if not waiting:
                self.refuse(503, "too_many_connections", "Too many connections are in work; try again later.")
                self._drop()  # at once: those who linger would be without bound
                return
            min(waiting, key=lambda other: other._born)._drop()
        self._arm(self.bounds.request_s, self._overdue)

    def _drop(self) -> None:
        self.connections.discard(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and the stream that nobody reads any more."""
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)
        if self._task is not None and self.in_work and self.cycle.response_started:
            self._task.cancel()

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _overdue(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:  # nothing was begun
            self.transport.close()
        else:
            self.refuse(408, "request_timeout", "The request was not complete in time.")

    def data_received(self, data: bytes) -> None:
        """Read on; what comes after a refusal, or before the answer is complete, is thrown away."""
        if self._refused:
            return
        if self.in_work:
            self.cycle.keep_alive = False  # pipelining: the second request is not answered, which the close tells
            return
        if self._idle:
            self._idle = False
            self._arm(self.bounds.request_s, self._overdue)
        self.conn.receive_data(data)
        self.handle_events()

    def eof_received(self) -> bool:  # type: ignore[override]  # the base always closes
        """Keep the connection of a client that only waits for its answer; a stream ends."""
        if not self.in_work or _is_gone(self.transport):
            return False
        self.cycle.end_reading()
        return True

    def handle_events(self) -> None:
        """Read a request to its end, or refuse it as early as possible."""
        while True:
            try:
                event = self.conn.next_event()
            except h11.RemoteProtocolError as error:
                self.refuse(error.error_status_hint, "bad_request", "This is not a request of HTTP/1.1.")
                return
            if isinstance(event, h11.Request):
                if refusal := objection(event, self.bounds.body_bytes):
                    self.refuse(*refusal, head=event.method == b"HEAD")
                    return
                self._request = event
                if self.conn.they_are_waiting_for_100_continue:
                    self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > self.bounds.body_bytes:
                    self.refuse(*_too_large(self.bounds.body_bytes))
                    return
            elif isinstance(event, h11.EndOfMessage):
                self._answer(self._request)
                return
            else:
                return

    def _answer(self, request: h11.Request) -> None:
        self._disarm()
        raw_path, _, query = request.target.partition(b"?")
        self.scope = {
            "type": "http", "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": request.http_version.decode("ascii"), "server": self.server, "client": self.client,
            "scheme": "http", "method": request.method.decode("ascii"), "root_path": "",
            "path": unquote(raw_path.decode("ascii")), "raw_path": raw_path, "query_string": query,
            "headers": list(request.headers), "state": self.app_state.copy()}
        self.cycle = Exchange(
            scope=self.scope, conn=self.conn, transport=self.transport, flow=self.flow, logger=LOG, access_logger=LOG,
            access_log=False, default_headers=[], message_event=asyncio.Event(),
            on_response=self.on_response_complete)
        self.cycle.body, self._body = self._body, bytearray()
        if self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
        self._task = self.loop.create_task(self.cycle.run_asgi(self.app), context=contextvars.Context())
        self._task.add_done_callback(self.tasks.discard)
        self.tasks.add(self._task)

    def refuse(self, status: int, code: str, message: str, *, head: bool = False) -> None:
        """Answer with a fault and close, as soon as the client closes or after `linger_s`.

        Closing at once would reset the connection of a client that still sends, and it would never read why.
        """
        self._refused, self._body = True, bytearray()
        body = fault_body(code, message)
        lines = [b"HTTP/1.1 %d %s" % (status, code.encode()), *(b"%s: %s" % pair for pair in _headers(len(body)))]
        self.transport.write(b"\r\n".join([*lines, b"", b"" if head else body]))
        with contextlib.suppress(OSError):  # the client is gone already
            self.transport.write_eof()
        self._arm(self.bounds.linger_s, self.transport.abort)

    def on_response_complete(self) -> None:
        """Wait for the next request on this connection."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.conn.start_next_cycle()
        self._idle = True
        self._arm(self.bounds.idle_s, self._overdue)

    def pause_writing(self) -> None:
        """Make the application wait, and give the client its time to read."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.bounds.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """All that was written is taken."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close, cut a stream, or let an answer that has not begun be the last."""
        if not self.in_work:
            self.transport.close()
        elif self.cycle.response_started and self._task is not None:
            self._task.cancel()
        else:
            self.cycle.keep_alive = False


def _is_gone(transport: asyncio.Transport) -> bool:
    """Return whether the other end is closed altogether, not only for writing."""
    asked = select.poll()
    asked.register(transport.get_extra_info("socket").fileno(), 0)
    return any(event & select.POLLHUP for _, event in asked.poll(0))
