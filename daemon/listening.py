"""The control socket: HTTP on a Unix socket that takes nobody's word and waits for nobody.

Only the service's own user and root are heard. Whatever a client does, or leaves undone, costs a bounded
amount of time and memory, and hurts no other client. A silent connection costs no processor time.
"""


from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

from daemon.exchange import Bounds, Connection
from daemon.socket_place import (
    BACKLOG,
    LONGEST_PATH,
    SocketBusy,
    SocketPathLong,
    SocketRefused,
    bind,
    permitted,
)

__all__ = ["LONGEST_PATH", "App", "Bounds", "Listener", "SocketBusy", "SocketPathLong", "SocketRefused", "bind",
           "permitted"]

LOG = logging.getLogger("nightpress.control")

App = Callable[[Any, Any, Any], Awaitable[None]]


class _Server(uvicorn.Server):
    """uvicorn's server without its clock: an idle one wakes up for nothing."""

    grace_s = 1.0

    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.loop.set_exception_handler(_report)
        await super().startup(sockets)
        self._ready.set()

    async def main_loop(self) -> None:
        await self.over.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002  as in the base
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        end = self.loop.time() + self.grace_s
        while self.server_state.connections and self.loop.time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # what still works for them is cancelled with the loop


def _report(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, OSError):  # no more file descriptors, for instance: nothing that a traceback explains
        LOG.warning("%s: %s", context["message"], error)
    else:
        LOG.error("%s", context["message"], exc_info=error)


class Listener:
    """Serves an application on a bound socket, in a thread with an event loop of its own."""

    def __init__(self, app: App, bound: socket.socket, path: Path, bounds: Bounds | None = None) -> None:
        self.path, self._bound = path, bound
        self._made = _identity(path)
        self._ready = threading.Event()
        self._fault: Exception | None = None
        config = uvicorn.Config(
            app, http=type("Connection", (Connection,), {"bounds": bounds or Bounds()}), ws="none", lifespan="off",
            interface="asgi3", log_config=None, access_log=False, proxy_headers=False, server_header=False,
            date_header=False, workers=1, backlog=BACKLOG)
        self.server = _Server(config, self._ready)
        self._thread = threading.Thread(target=self._serve, name="control-socket", daemon=True)

    def start(self) -> None:
        """Return as soon as requests are answered.

        Raises:
            Exception: whatever kept the event loop from starting.
        """
        self._thread.start()
        self._ready.wait()
        if self._fault is not None:
            raise self._fault

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._ready.is_set() and self._thread.is_alive()

    def stop(self, timeout_s: float = 3.0) -> bool:
        """End all connections and remove the socket if it is still ours; a second call does nothing.

        An answer that has begun is cut; a request that the application works on has a third of the time to
        be answered. Not to be called from the application itself.

        Returns:
            Whether everything ended in time. Code of the application that blocks a thread cannot be ended;
            the thread of the listener waits for it, and keeps no process from exiting.
        """
        end = time.monotonic() + timeout_s
        # while the socket is open its inode stays taken, so that the same number means the same socket
        if self._bound.fileno() >= 0 and self._made is not None and _identity(self.path) == self._made:
            self.path.unlink(missing_ok=True)
        if self._thread.is_alive():
            self.server.grace_s = timeout_s / 3
            with contextlib.suppress(RuntimeError):  # the loop ended by itself
                self.server.loop.call_soon_threadsafe(self.server.over.set)
            self._thread.join(max(0.0, end - time.monotonic()))
        if ended := not self._thread.is_alive():
            self._bound.close()
        return ended

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self.server.serve(sockets=[self._bound]))
        except Exception as fault:
            LOG.exception("the control socket failed")
            self._fault = fault
        finally:
            self._ready.set()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
