"""The hub: every message in order to everybody who listens, from any thread, and nobody is waited for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest

from daemon.hub import LAGGED, Hub, Message, Subscription

LONG_S = 30.0  #: only a hub that is broken takes so long


async def take(subscription: Subscription, count: int) -> list[Message]:
    async with asyncio.timeout(LONG_S):
        return [await anext(subscription) for _ in range(count)]


async def rest(subscription: Subscription) -> list[Message]:
    async with asyncio.timeout(LONG_S):
        return [message async for message in subscription]


def test_messages_are_numbered_from_one_and_kept_in_order() -> None:
    hub = Hub(keep=3)
    assert [hub.publish("tick", {"n": n}) for n in range(5)] == [1, 2, 3, 4, 5]
    assert hub.last == 5
    assert [(message.id, message.kind, message.data) for message in hub.since(0)] == [
        (3, "tick", {"n": 2}), (4, "tick", {"n": 3}), (5, "tick", {"n": 4})]
    assert [message.id for message in hub.since(4)] == [5]
    assert hub.since(5) == []


def test_a_message_stays_as_it_was_published() -> None:
    hub, data = Hub(), {"n": 1}
    hub.publish("tick", data)
    data["n"] = 2
    [message] = hub.since(0)
    assert message.data == {"n": 1}
    assert message.at.endswith("Z")
    with pytest.raises(FrozenInstanceError):
        message.kind = "other"  # type: ignore[misc]


def test_a_number_from_an_earlier_run_gets_everything() -> None:
    hub = Hub()
    hub.publish("tick", {})
    assert [message.id for message in hub.since(5000)] == [1]
    with hub.subscribe(5000) as subscription:
        assert [message.id for message in asyncio.run(take(subscription, 1))] == [1]


def test_a_subscription_gets_what_comes_after_it() -> None:
    async def scene() -> list[int]:
        hub = Hub()
        hub.publish("before", {})
        with hub.subscribe() as subscription:
            hub.publish("after", {})
            hub.publish("after", {})
            return [message.id for message in await take(subscription, 2)]

    assert asyncio.run(scene()) == [2, 3]


def test_a_subscription_goes_on_after_the_number_it_names() -> None:
    async def scene() -> list[int]:
        hub = Hub()
        for _ in range(4):
            hub.publish("tick", {})
        with hub.subscribe(2) as subscription:
            hub.publish("tick", {})
            return [message.id for message in await take(subscription, 3)]

    assert asyncio.run(scene()) == [3, 4, 5]


def test_a_gap_before_what_is_kept_is_told() -> None:
    hub = Hub(keep=2)
    for _ in range(6):
        hub.publish("tick", {})
    with hub.subscribe(1) as subscription:
        lagged, fifth = asyncio.run(take(subscription, 2))
    assert (lagged.kind, lagged.id, lagged.data) == (LAGGED, 4, {"lost": 3})
    assert fifth.id == 5


def test_more_than_may_wait_is_no_lag_when_the_hub_still_has_it() -> None:
    hub = Hub(keep=50, waiting=5)
    for _ in range(50):
        hub.publish("tick", {})
    with hub.subscribe(0) as subscription:
        for _ in range(5):
            hub.publish("tick", {})
        assert [message.id for message in asyncio.run(take(subscription, 55))] == list(range(1, 56))


def test_a_waiting_task_is_woken_from_another_thread() -> None:
    async def scene() -> Message:
        hub = Hub()
        with hub.subscribe() as subscription, ThreadPoolExecutor(1) as pool:
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.wait([waiting], timeout=0.05)  # it has come to wait
            pool.submit(hub.publish, "tick", {"n": 1}).result(LONG_S)
            async with asyncio.timeout(LONG_S):
                return await waiting

    assert asyncio.run(scene()).data == {"n": 1}


def test_eight_threads_reach_three_listeners_completely_and_in_order() -> None:
    threads, each = 8, 200
    hub = Hub(keep=10, waiting=threads * each)
    start = threading.Barrier(threads + 3)
    got: list[list[Message]] = [[], [], []]

    def publish(thread: int) -> None:
        start.wait(LONG_S)
        for n in range(each):
            hub.publish("tick", {"thread": thread, "n": n})

    def listen(index: int) -> None:
        async def scene() -> None:
            with hub.subscribe() as subscription:
                start.wait(LONG_S)
                got[index] = await take(subscription, threads * each)
        asyncio.run(scene())

    with ThreadPoolExecutor(threads + 3) as pool:
        jobs = [*(pool.submit(listen, index) for index in range(3)), *(pool.submit(publish, n) for n in range(threads))]
        for job in jobs:
            job.result(LONG_S)
    for messages in got:
        assert [message.id for message in messages] == list(range(1, threads * each + 1))
        for thread in range(threads):
            assert [message.data["n"] for message in messages if message.data["thread"] == thread] == list(range(each))
    assert hub.listeners == 0


def test_a_listener_that_lags_learns_how_much_it_lost_and_goes_on() -> None:
    async def scene() -> list[Message]:
        hub = Hub(waiting=3)
        with hub.subscribe() as subscription:
            for _ in range(10):
                hub.publish("tick", {})
            first = await take(subscription, 4)
            hub.publish("tick", {})
            return [*first, *await take(subscription, 1)]

    messages = asyncio.run(scene())
    assert [(message.kind, message.id) for message in messages] == [
        (LAGGED, 7), ("tick", 8), ("tick", 9), ("tick", 10), ("tick", 11)]
    assert messages[0].data == {"lost": 7}


def test_a_listener_that_lags_costs_the_others_nothing() -> None:
    async def scene() -> tuple[int, int]:
        hub = Hub(waiting=2)
        with hub.subscribe() as slow, hub.subscribe() as quick:
            for _ in range(5):
                hub.publish("tick", {})
                await take(quick, 1)
            [lagged] = await take(slow, 1)
            return lagged.data["lost"], hub.last

    assert asyncio.run(scene()) == (3, 5)


@pytest.mark.parametrize("end", [lambda hub, _listener: hub.close(), lambda _hub, listener: listener.close()],
                         ids=["hub", "subscription"])
def test_closing_gives_what_waits_and_then_ends(end: Callable[[Hub, Subscription], None]) -> None:
    async def scene() -> list[int]:
        hub = Hub()
        subscription = hub.subscribe()
        hub.publish("tick", {})
        end(hub, subscription)
        hub.publish("late", {})
        assert hub.listeners == 0
        return [message.id for message in await rest(subscription)]

    assert asyncio.run(scene()) == [1]


def test_closing_the_hub_ends_a_task_that_waits() -> None:
    async def scene() -> list[Message]:
        hub = Hub()
        with hub.subscribe() as subscription, ThreadPoolExecutor(1) as pool:
            waiting = asyncio.ensure_future(rest(subscription))
            await asyncio.wait([waiting], timeout=0.05)
            pool.submit(hub.close).result(LONG_S)
            return await waiting

    assert asyncio.run(scene()) == []


def test_a_closed_hub_still_keeps_and_shows_what_it_has() -> None:
    hub = Hub()
    hub.close()
    hub.publish("tick", {})
    assert [message.id for message in hub.since(0)] == [1]
    assert [message.id for message in asyncio.run(rest(hub.subscribe(0)))] == [1]


def test_a_loop_that_was_closed_is_dropped() -> None:
    hub = Hub()
    loop = asyncio.new_event_loop()
    subscription = hub.subscribe()
    waiting = loop.create_task(anext(subscription))  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.wait([waiting], timeout=0.01))
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    loop.close()
    assert hub.listeners == 1
    hub.publish("tick", {})
    assert hub.listeners == 0
    assert asyncio.run(rest(subscription)) == []


@pytest.mark.parametrize("what", [lambda hub: hub.publish("tick", {}), Hub.close], ids=["publish", "close"])
def test_a_loop_that_was_closed_while_a_task_waited_is_dropped(what: Callable[[Hub], object]) -> None:
    hub = Hub()
    loop = asyncio.new_event_loop()
    subscription = hub.subscribe()
    waiting = subscription.__anext__()

    async def come_to_wait() -> None:
        waiting.send(None)  # driven by hand, so that no task is left pending

    loop.run_until_complete(come_to_wait())
    loop.close()
    what(hub)
    assert hub.listeners == 0
    waiting.close()


def test_a_cancelled_listener_can_listen_again() -> None:
    async def scene() -> None:
        hub, trouble = Hub(), []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: trouble.append(context))
        with hub.subscribe() as subscription:
            for number in (1, 2):
                waiting = asyncio.ensure_future(anext(subscription))
                await asyncio.wait([waiting], timeout=0.01)
                if number == 1:
                    hub.publish("tick", {})  # just before, so that its call meets a task that is gone
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                if number == 2:
                    hub.publish("tick", {})
                assert [message.id for message in await take(subscription, 1)] == [number]
        assert trouble == []

    asyncio.run(scene())


def test_two_tasks_cannot_wait_on_one_subscription() -> None:
    async def scene() -> None:
        hub = Hub()
        with hub.subscribe() as subscription:
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.wait([waiting], timeout=0.01)
            with pytest.raises(RuntimeError, match="one for each task"):
                await take(subscription, 1)
            hub.publish("tick", {})
            assert (await waiting).id == 1

    asyncio.run(scene())


def test_a_forgotten_subscription_leaves_nothing_behind() -> None:
    hub = Hub()
    hub.subscribe()
    gc.collect()
    hub.publish("tick", {})
    assert hub._subscriptions == []


def test_publishing_within_publishing_does_not_hang() -> None:
    """A destructor that runs while the garbage is collected may log, and so publish, in the same thread."""
    hub = Hub()
    done = threading.Event()

    def nested() -> None:
        with hub._lock:
            hub.publish("inner", {})
        done.set()

    threading.Thread(target=nested, daemon=True).start()
    assert done.wait(LONG_S)
