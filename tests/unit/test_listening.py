"""The control socket under slow, silent and many clients, its streams, and its end."""

from __future__ import annotations

import select
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_clients import (
    Poll,
    Serve,
    Stage,
    all_ended,
    connect,
    fault,
    open_files,
    read_to_end,
    read_until,
    request,
    say,
    status,
    troubles,
)

from daemon.listening import (
    Listener,
    bind,
)

# Slow, silent and many


def test_slow_clients_are_closed_in_time_and_hold_up_nobody(place: Path, serve: Serve, poll: Poll) -> None:
    serve(request_s=1.5, linger_s=0.2)
    begun, words = time.monotonic(), request("/", "Cookie: " + "x" * 5000)
    slow = [connect(place) for _ in range(40)]
    for letter in range(5):
        for client in slow:
            client.send(words[letter:letter + 1])
        asked = time.monotonic()
        assert status(say(place, request())) == 200
        assert time.monotonic() - asked < 10
    for client in slow:
        assert fault(read_to_end(client)) == (408, "request_timeout")
        client.close()
    assert 1.4 < time.monotonic() - begun < 60


def test_a_client_that_sends_byte_by_byte_has_no_longer(place: Path, serve: Serve) -> None:
    serve(request_s=0.5)
    words = request("/", "Cookie: " + "x" * 5000)
    with connect(place) as client:
        for number in range(200):
            client.send(words[number:number + 1])
            if select.select([client], [], [], 0.05)[0]:
                break
        else:
            pytest.fail("it had 10 s, and no answer")
        assert fault(read_to_end(client)) == (408, "request_timeout")


@pytest.mark.parametrize("words", [b"", request("/echo", "Content-Length: 9", method="POST") + b"12"])
def test_a_request_that_never_comes_to_its_end_is_given_up(place: Path, serve: Serve, words: bytes) -> None:
    serve(request_s=0.3)
    begun = time.monotonic()
    answer = say(place, words)
    assert 0.25 < time.monotonic() - begun < 60
    assert (fault(answer)[0] if words else answer) == (408 if words else b"")


def test_a_connection_serves_several_requests_and_is_closed_when_idle(place: Path, serve: Serve) -> None:
    serve(idle_s=1, request_s=60)
    with connect(place) as client:
        for _ in range(2):
            client.sendall(request(close=False))
            assert status(read_until(client, b'"hello"')) == 200
            client.sendall(request(close=False)[:9])
            threading.Event().wait(1.5)  # a request that has begun is not idle
            client.sendall(request(close=False)[9:])
            assert status(read_until(client, b'"hello"')) == 200
        assert read_to_end(client) == b""


def test_500_clients_at_once_leave_nothing_behind(place: Path, serve: Serve, poll: Poll) -> None:
    listener = serve()
    for _ in range(20):
        say(place, request())
    process = psutil.Process()
    files, threads, memory = open_files(), process.num_threads(), process.memory_info().rss
    crowd = [connect(place) for _ in range(500)]
    assert status(say(place, request())) == 200  # the oldest that does nothing makes room
    assert len(listener.server.server_state.connections) <= 128
    assert open_files() - files <= 500 + 128
    assert read_to_end(crowd[0]) == b""
    crowd[-1].sendall(request())
    assert status(read_to_end(crowd[-1])) == 200
    for client in crowd:
        client.close()
    poll(lambda: open_files() <= files, what="the connections closed")
    assert process.num_threads() <= threads
    assert process.memory_info().rss - memory < 16 << 20


def test_requests_in_work_are_never_dropped_for_a_newcomer(
        place: Path, serve: Serve, stage: Stage, poll: Poll) -> None:
    listener = serve(connections=5)
    working = [connect(place) for _ in range(5)]
    for client in working:
        client.sendall(request("/waits"))
    poll(lambda: stage.waiting == 5)
    for _ in range(20):
        assert fault(say(place, request()))[1] == "too_many_connections"
    poll(lambda: len(listener.server.server_state.connections) == 5)
    listener.server.loop.call_soon_threadsafe(stage.event.set)
    for client in working:
        assert read_to_end(client).endswith(b'"waited"')
        client.close()


def test_1000_requests_leave_nothing_behind(place: Path, serve: Serve, poll: Poll) -> None:
    serve()
    for _ in range(50):
        say(place, request())
    process = psutil.Process()
    files, threads, memory = open_files(), process.num_threads(), process.memory_info().rss
    with connect(place) as client:
        for _ in range(500):
            assert status(say(place, request())) == 200
            client.sendall(request(close=False))
            assert status(read_until(client, b'"hello"')) == 200
    poll(lambda: open_files() <= files, what="the connections closed")
    assert process.num_threads() <= threads
    assert process.memory_info().rss - memory < 16 << 20


# Streams, and clients that do not read


def test_a_quiet_stream_outlives_every_bound(place: Path, serve: Serve, stage: Stage) -> None:
    listener = serve(request_s=0.1, idle_s=0.1, write_s=0.1, linger_s=0.1)
    with connect(place) as client:
        client.sendall(request("/events", close=False))
        read_until(client, b"data: first\n\n")
        threading.Event().wait(0.6)
        listener.server.loop.call_soon_threadsafe(stage.event.set)
        read_until(client, b"data: second\n\n")


@pytest.mark.parametrize("target", ["/events", "/flood"])
@pytest.mark.parametrize("how", ["close", "half-close"])
def test_a_stream_ends_when_its_client_goes(
        place: Path, serve: Serve, stage: Stage, poll: Poll, caplog: pytest.LogCaptureFixture,
        target: str, how: str) -> None:
    listener = serve()
    say(place, request())
    files = open_files()
    for _ in range(5):
        with connect(place) as client:
            client.sendall(request(target))
            client.recv(300)
            if how == "half-close":
                client.shutdown(socket.SHUT_WR)
                read_to_end(client)
    all_ended(listener, stage, poll)
    assert stage.streams == 5
    poll(lambda: open_files() <= files, what="the connections closed")
    assert status(say(place, request())) == 200
    assert troubles(caplog) == []


def test_a_client_that_only_stopped_sending_gets_its_answer(
        place: Path, serve: Serve, stage: Stage, poll: Poll) -> None:
    listener = serve(idle_s=60)
    with connect(place) as client:
        client.sendall(request("/waits", close=False))
        client.shutdown(socket.SHUT_WR)
        poll(lambda: stage.waiting)
        listener.server.loop.call_soon_threadsafe(stage.event.set)
        assert read_to_end(client).endswith(b'"waited"')


def test_a_client_that_is_gone_holds_no_connection(place: Path, serve: Serve, stage: Stage, poll: Poll) -> None:
    listener = serve()
    with connect(place) as client:
        client.sendall(request("/waits"))
        poll(lambda: stage.waiting)
    poll(lambda: not listener.server.server_state.connections)


def test_a_client_that_reads_late_is_not_dropped(place: Path, serve: Serve, stage: Stage) -> None:
    async def pauses(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2000003")]})
        await send({"type": "http.response.body", "body": bytes(2_000_000), "more_body": True})
        await stage.event.wait()
        await send({"type": "http.response.body", "body": b"end"})

    listener = serve(pauses, write_s=1)
    with connect(place) as client:
        client.sendall(request())
        head, left = read_until(client, b"\r\n\r\n"), 2_000_000
        threading.Event().wait(0.1)
        while left:
            left -= len(client.recv(left))
        threading.Event().wait(1.2)
        listener.server.loop.call_soon_threadsafe(stage.event.set)
        assert (status(head), read_to_end(client)) == (200, b"end")


@pytest.mark.parametrize("target", ["/flood", "/large"])
def test_a_client_that_never_reads_is_dropped_and_costs_little(
        place: Path, serve: Serve, stage: Stage, poll: Poll, target: str) -> None:
    listener = serve(write_s=0.5)
    say(place, request())
    memory = psutil.Process().memory_info().rss
    clients = [connect(place) for _ in range(10 if target == "/flood" else 1)]
    for client in clients:
        client.sendall(request(target))
    poll(lambda: len(listener.server.server_state.connections) >= len(clients))
    assert status(say(place, request())) == 200
    poll(lambda: not listener.server.server_state.connections, what="the clients dropped")
    all_ended(listener, stage, poll)
    assert psutil.Process().memory_info().rss - memory < 40 << 20
    assert stage.sent < 20 * len(clients)
    for client in clients:
        assert not read_to_end(client).endswith((b"0\r\n\r\n", b'"}'))
        client.close()


@pytest.mark.parametrize("reads", [True, False])
def test_an_application_that_never_pauses_holds_up_nobody(place: Path, serve: Serve, poll: Poll, reads: bool) -> None:
    async def flood(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while scope["path"] == "/flood":
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"done"})

    listener = serve(flood)
    with connect(place) as client:
        client.sendall(request("/flood"))
        reader = threading.Thread(target=read_to_end, args=(client,))
        if reads:
            reader.start()
        else:
            client.recv(1000)
            client.close()
        asked = time.monotonic()
        assert b"done" in say(place, request())
        assert time.monotonic() - asked < 25
        if reads:
            client.shutdown(socket.SHUT_RDWR)
            reader.join(60)
    poll(lambda: not listener.server.server_state.tasks, what="the end of the stream")


# The end


def test_stop_ends_hung_connections_and_streams_in_time(
        place: Path, serve: Serve, stage: Stage, poll: Poll, caplog: pytest.LogCaptureFixture) -> None:
    files, listener = open_files(), serve()
    kinds = [b"", b"GET / HT", request("/echo", "Content-Length: 9", method="POST"), request("/waits"),
             request("/events"), request("/flood")]
    clients = [connect(place) for _ in range(102)]
    for number, client in enumerate(clients):
        client.sendall(kinds[number % len(kinds)])
    poll(lambda: (stage.waiting, stage.streams) == (17, 34), what="the requests in work")
    begun = time.monotonic()
    assert listener.stop(9)
    assert time.monotonic() - begun < 9
    assert not listener.alive
    for client in clients:
        read_to_end(client)
        client.close()
    assert stage.ended == 34
    assert open_files() <= files
    assert not place.exists()
    assert listener.stop()
    assert troubles(caplog) == []


def test_stop_lets_a_request_in_work_be_answered(place: Path, serve: Serve, stage: Stage, poll: Poll) -> None:
    listener = serve()
    with connect(place) as client:
        client.sendall(request("/blocks"))
        poll(lambda: stage.waiting)
        threading.Timer(0.2, stage.release.set).start()
        assert listener.stop(30)
        assert read_to_end(client).endswith(b'"blocked"')


def test_stop_does_not_wait_for_a_stream(place: Path, serve: Serve, stage: Stage) -> None:
    listener = serve()
    with connect(place) as client:
        client.sendall(request("/events"))
        read_until(client, b"data: first\n\n")
        begun = time.monotonic()
        assert listener.stop(60)
        assert time.monotonic() - begun < 50
        assert stage.ended == 1
        assert not read_to_end(client).endswith(b"0\r\n\r\n")  # cut, and not said to be complete


def test_stop_says_when_the_application_cannot_be_ended(place: Path, serve: Serve, stage: Stage, poll: Poll) -> None:
    async def blocks(scope: Any, receive: Any, send: Any) -> None:
        stage.blocks()  # and with it the loop

    listener = serve(blocks)
    with connect(place) as client:
        client.sendall(request())
        poll(lambda: stage.waiting)
        begun = time.monotonic()
        assert not listener.stop(0.3)
        assert time.monotonic() - begun < 30
        assert not place.exists()
        stage.release.set()
        poll(lambda: not listener.alive)


def test_stop_leaves_the_socket_of_a_successor(place: Path, serve: Serve) -> None:
    listener = serve()
    assert listener.alive
    place.unlink()
    with bind(place):
        assert listener.stop()
        connect(place).close()


def test_a_listener_that_never_started_cleans_up(place: Path, stage: Stage) -> None:
    listener = Listener(stage.app, bind(place), place)
    assert not listener.alive
    assert listener.stop()
    assert not place.exists()
