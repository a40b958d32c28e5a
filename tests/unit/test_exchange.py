"""Requests on the control socket: what is refused, and how."""

from __future__ import annotations

import logging
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hostile_clients import (
    AS_ROOT,
    STRANGER,
    Poll,
    Serve,
    Stage,
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
    permitted,
)

# Who may speak


def test_only_our_user_and_root_are_permitted() -> None:
    assert [permitted(uid, 1000) for uid in (1000, 0, 1001, STRANGER, 2**32 - 1)] == [True, True, False, False, False]
    assert not permitted(1000, 0)


@AS_ROOT
@pytest.mark.parametrize("user", [0, STRANGER])
def test_a_stranger_is_closed_before_a_byte_is_parsed(place: Path, serve: Serve, user: int) -> None:
    serve()
    for opened, bits in ((place.parent.parent, 0o755), (place.parent, 0o755), (place, 0o666)):
        opened.chmod(bits)
    code = ("import os, socket, sys; os.setuid(int(sys.argv[3]))\n"
            "client = socket.socket(socket.AF_UNIX); client.connect(sys.argv[1])\n"
            "try: client.sendall(sys.argv[2].encode()); print(client.recv(9))\n"
            "except (BrokenPipeError, ConnectionResetError): print(b'')")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(place), request().decode(), str(user)],
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("b''" if user else "b'HTTP/1.1 '", "")


# What is refused


@pytest.mark.parametrize(("words", "told"), [
    (request("/", "Origin: http://localhost"), (403, "browser_refused")),
    (request("/", "referer: x"), (403, "browser_refused")),
    (request("/", "Connection: Upgrade", "Upgrade: websocket", close=False), (400, "upgrade_refused")),
    (request(method="BREW"), (501, "method_unknown")),
    (request("localhost:80", method="CONNECT"), (501, "method_unknown")),
    (request("http://localhost/"), (400, "bad_target")),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505, "http_version")),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), (400, "bad_request")),
    (b"hello\r\n\r\n", (400, "bad_request")),
    (b"GET / HTTP/1.1\r\n\r\n", (400, "bad_request")),
    (request("/", "Content-Length: -1"), (400, "bad_request")),
    (request("/", "Transfer-Encoding: gzip"), (501, "bad_request")),
    (request("/", "Transfer-Encoding: chunked") + b"zz\r\n", (400, "bad_request")),
    (request("/", "Cookie: " + "x" * 300_000), (431, "bad_request")),
])
def test_what_is_no_request_for_us_is_refused_in_json(
        place: Path, serve: Serve, caplog: pytest.LogCaptureFixture, words: bytes, told: tuple[int, str]) -> None:
    serve()
    assert fault(say(place, words)) == told
    assert troubles(caplog) == []


def test_random_bytes_end_in_an_answer_or_a_close(
        place: Path, serve: Serve, poll: Poll, caplog: pytest.LogCaptureFixture) -> None:
    serve(request_s=0.2, linger_s=0.2)
    chance = random.Random(20_240_229)
    say(place, request())
    before = open_files()
    for number in range(150):
        words = chance.randbytes(chance.randrange(1, 3000))
        if number % 3 == 1:
            words = request()[:chance.randrange(5, 30)] + words
        elif number % 3 == 2:
            good = bytearray(request("/echo", method="POST", body=b"x" * 50))
            good[chance.randrange(len(good))] = chance.randrange(256)
            words = bytes(good)
        with connect(place) as client:
            client.sendall(words)
            client.shutdown(socket.SHUT_WR)
            answer = read_to_end(client)
        assert not answer or status(answer) in (200, 400, 404, 405, 408, 413, 431, 501, 505), answer
    poll(lambda: open_files() <= before, what="the connections closed")
    assert troubles(caplog) == []


@pytest.mark.parametrize("form", ["length", "chunked", "one chunk", "length, sent after the answer"])
def test_a_large_body_is_refused_without_being_kept(
        place: Path, serve: Serve, stage: Stage, caplog: pytest.LogCaptureFixture, form: str) -> None:
    serve(linger_s=30)
    say(place, request())
    block, before = bytes(1 << 20), psutil.Process().memory_info().rss
    head = request("/echo", f"Content-Length: {10 << 20}" if "length" in form else "Transfer-Encoding: chunked",
                   method="POST")
    pieces = {"length": [block] * 10, "chunked": [b"10000\r\n", block[:65536], b"\r\n"] * 160,
              "one chunk": [b"a00000\r\n", *[block] * 10]}.get(form, [])
    for _ in range(5):
        with connect(place) as client:
            for piece in (head, *pieces):  # all of it can be sent: no reset keeps a client from reading why
                client.sendall(piece)
            assert fault(read_to_end(client)) == (413, "body_too_large")
    assert psutil.Process().memory_info().rss - before < 12 << 20
    assert stage.bodies == []
    assert troubles(caplog) == []


def test_a_body_of_just_the_limit_is_taken(place: Path, serve: Serve, stage: Stage) -> None:
    serve(body_bytes=100_000)
    assert status(say(place, request("/echo", method="POST", body=bytes(100_000)))) == 200
    assert status(say(place, request("/echo", "Transfer-Encoding: chunked", method="POST"),
                      b"186a0\r\n", bytes(100_000), b"\r\n0\r\n\r\n")) == 200
    assert fault(say(place, request("/echo", method="POST", body=bytes(100_001))))[0] == 413
    assert stage.bodies == [100_000, 100_000]


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(place: Path, serve: Serve) -> None:
    serve()
    with connect(place) as client:
        client.sendall(request("/echo", "Expect: 100-continue", "Content-Length: 3", method="POST"))
        assert status(read_until(client, b"\r\n\r\n")) == 100
        client.sendall(b"abc")
        assert read_to_end(client).endswith(b"\r\n\r\n3")


@pytest.mark.parametrize("later", [False, True])
def test_only_the_first_of_pipelined_requests_is_answered(
        place: Path, serve: Serve, stage: Stage, poll: Poll, caplog: pytest.LogCaptureFixture, later: bool) -> None:
    listener = serve(idle_s=60)
    with connect(place) as client:
        client.sendall(request("/waits", close=False) + request(close=False) * (0 if later else 50))
        poll(lambda: stage.waiting)
        client.sendall(request(close=False) * (50 if later else 0))
        threading.Event().wait(0.2)
        listener.server.loop.call_soon_threadsafe(stage.event.set)
        answer = read_to_end(client)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.endswith(b'"waited"')
    assert troubles(caplog) == []


def test_a_refused_client_that_stays_is_closed(place: Path, serve: Serve, poll: Poll) -> None:
    listener = serve(linger_s=0.1)
    with connect(place) as client:
        client.sendall(request("/", "Origin: x", method="HEAD"))
        assert read_to_end(client).endswith(b"\r\n\r\n")
        poll(lambda: not listener.server.server_state.connections)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_exception_is_told_to_the_log_and_not_to_the_client(
        place: Path, serve: Serve, stage: Stage, poll: Poll, caplog: pytest.LogCaptureFixture,
        method: str) -> None:
    stage.app.head("/fails")(stage.fails)
    serve()
    answer = say(place, request("/fails", method=method))
    assert status(answer) == 500
    assert method == "HEAD" or fault(answer) == (500, "internal_error")
    assert b"inside" not in answer
    assert b"Traceback" not in answer
    poll(lambda: troubles(caplog), what="the line in the log")
    assert [(record.name, bool(record.exc_info)) for record in caplog.records
            if record.levelno >= logging.WARNING] == [("nightpress.control", True)]
    assert status(say(place, request())) == 200


def test_an_answer_that_fails_midway_is_cut(place: Path, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    serve()
    answer = say(place, request("/fails-midway"))
    assert b"begun" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert "/fails-midway" in caplog.text


