"""Broadcasting: numbered messages for whoever listens, from any thread, without waiting for a listener."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from state.clock import utc_now

if TYPE_CHECKING:  # 40 ms; who awaits a message has it already
    from asyncio import AbstractEventLoop, Future

#: the kind of the message that tells a listener how many it has missed
LAGGED = "lagged"
#: messages that wait for one listener before the oldest give way
WAITING = 1000


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        id: counted from 1 within one hub; a `lagged` message has that of the last one lost.
        at: when it was published, UTC.
        kind: what `data` is about.
        data: JSON values, as they were published; `{"lost": n}` of a `lagged` message.
    """

    id: int
    at: str
    kind: str
    data: Mapping[str, Any]


class Hub:
    """Keeps the last messages and hands each new one to every subscription, in the order of their numbers."""

    def __init__(self, keep: int = 1000, *, waiting: int = WAITING) -> None:
        """Make a hub without messages.

        Args:
            keep: how many of the last messages `since` knows.
            waiting: how many wait for one subscription; of more, the oldest are lost to it.
        """
        # Re-entrant: collecting garbage inside publish may run a destructor that logs, and so publishes.
        self._lock = threading.RLock()
        self._numbers = count(1)
        self._last = 0
        self._kept: deque[Message] = deque(maxlen=keep)
        self._waiting = waiting
        # weak, so that a subscription that is forgotten without `close` goes too
        self._subscriptions: list[weakref.ref[Subscription]] = []
        self._closed = False

    @property
    def last(self) -> int:
        """The number of the last message, 0 before the first."""
        return self._last

    @property
    def listeners(self) -> int:
        """How many subscriptions are open."""
        with self._lock:
            return sum(subscription() is not None for subscription in self._subscriptions)

    def publish(self, kind: str, data: Mapping[str, Any]) -> int:
        """Give a message to all subscriptions and return its number; callable from any thread, never blocks.

        `data` is copied at its top level only: change nothing within it afterwards. After `close` the
        message is still kept.
        """
        content = dict(data)
        with self._lock:
            number = self._last = next(self._numbers)
            message = Message(number, utc_now(), kind, content)
            self._kept.append(message)
            for reference in tuple(self._subscriptions):
                subscription = reference()
                if subscription is None:
                    self._forget(None)
                else:
                    subscription._take(message)
        return number

    def since(self, after: int) -> list[Message]:
        """Return the messages kept with a number above `after`, oldest first.

        A number that this hub has not reached comes from an earlier run of the daemon: all are returned.
        """
        with self._lock:
            return [message for message in self._kept if message.id > after or after > self._last]

    def subscribe(self, after: int | None = None) -> Subscription:
        """Return a subscription to what is published from now on.

        Args:
            after: begin with what `since(after)` returns; a gap before it is told as `lagged`.
        """
        with self._lock:
            kept = [] if after is None else self.since(after)
            oldest = kept[0].id if kept else self._last + 1
            known = self._last if after is None else 0 if after > self._last else max(after, 0)
            subscription = Subscription(self, kept, lost=oldest - 1 - known, waiting=self._waiting)
            if self._closed:
                subscription.close()
            else:
                self._subscriptions.append(weakref.ref(subscription))
        return subscription

    def close(self) -> None:
        """End all subscriptions: each still gives what waits for it, then stops."""
        with self._lock:
            self._closed = True
            for reference in tuple(self._subscriptions):
                subscription = reference()
                if subscription is not None:
                    subscription.close()
            self._subscriptions.clear()

    def _forget(self, gone: Subscription | None) -> None:
        self._subscriptions = [reference for reference in self._subscriptions
                               if (subscription := reference()) is not None and subscription is not gone]


class Subscription:
    """An asynchronous iterator over messages, for one task at a time, on any event loop.

    Leaving its `with` block, or `close` from any thread, ends it and takes it out of the hub. A
    subscription whose loop was closed ends by itself at the next message.
    """

    def __init__(self, hub: Hub, kept: list[Message], *, lost: int, waiting: int) -> None:
        self._hub = hub
        self._lock = hub._lock
        self._queue = deque(kept)
        self._room = waiting + len(kept)  # what the hub still kept is no lag
        self._lost = lost
        self._lost_to = kept[0].id - 1 if kept else hub.last
        self._ended = False
        self._loop: AbstractEventLoop | None = None
        self._waiter: Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """Return the next message, waiting for it.

        Raises:
            StopAsyncIteration: the subscription or its hub was closed, and nothing waits any more.
            RuntimeError: another task waits on this subscription.
        """
        from asyncio import get_running_loop

        while True:
            with self._lock:
                message = self._next()
                if message is not None:
                    return message
                if self._ended:
                    raise StopAsyncIteration
                if self._waiter is not None and not self._waiter.done():
                    raise RuntimeError("another task waits on this subscription; take one for each task")
                self._loop = get_running_loop()
                self._waiter = waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                with self._lock:
                    if self._waiter is waiter:
                        self._waiter = None

    def close(self) -> None:
        """End the subscription; what waits can still be read. A second call does nothing."""
        with self._lock:
            self._ended = True
            self._hub._forget(self)
            self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _next(self) -> Message | None:
        if self._lost:
            lost, self._lost = self._lost, 0
            return Message(self._lost_to, utc_now(), LAGGED, {"lost": lost})
        return self._queue.popleft() if self._queue else None

    def _take(self, message: Message) -> None:
        """Queue a message; the hub holds the lock."""
        if self._loop is not None and self._loop.is_closed():
            self._drop()
            return
        if len(self._queue) >= self._room:
            self._lost_to = self._queue.popleft().id
            self._lost += 1
        self._queue.append(message)
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        try:
            waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
        except RuntimeError:  # the loop was closed while its task waited
            self._drop()

    def _drop(self) -> None:
        self._ended, self._waiter, self._lost = True, None, 0
        self._queue.clear()
        self._hub._forget(self)


def _resolve(waiter: Future[None]) -> None:
    if not waiter.done():  # its task may be cancelled
        waiter.set_result(None)
