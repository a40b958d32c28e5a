"""The control socket answers for a real service: every verb, truthfully, whatever is asked and whatever goes on."""

from __future__ import annotations

import ast
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_service import Running
from gguf_files import tiny_llama
from scripted_service import BUSY, QUIET

from daemon import control
from daemon.cli import GROUPS
from daemon.client import Client
from daemon.control import MOST_STREAMS
from daemon.errors import ServiceMissing, ServiceRefused
from daemon.logs import say
from daemon.settings import Settings
from daemon.verbs import VERBS
from state.ledger import JobState

Poll = Callable[..., Any]
HUGE = 10**30


def fault(answer: httpx.Response) -> tuple[int, str, int]:
    error = answer.json()["error"]
    assert error["message"]
    return answer.status_code, error["code"], error["exit_code"]


def test_every_verb_is_described_once_and_nothing_else_is(running: Running) -> None:
    paths = running.http.get("/openapi.json").json()["paths"]
    assert {(verb.path, verb.method.lower(), verb.name, verb.summary) for verb in VERBS.values()} == {
        (path, method, operation["operationId"], operation["summary"])
        for path, operations in paths.items() for method, operation in operations.items()}
    assert all(verb.changes is (verb.method != "GET") for verb in VERBS.values())


def test_every_verb_is_asked_by_some_command() -> None:
    asked = set()
    for group in GROUPS:
        for node in ast.walk(ast.parse(Path(group.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                asked |= {argument.value for argument in node.args[:3] if isinstance(argument, ast.Constant)
                          if name in ("ask", "_ask", "stream")}
                asked |= {name} if ast.unparse(node.func).endswith("client.status") else set()
    assert set(VERBS) - asked <= {"runs"}, "`nightpress results` reads the ledger itself"
    assert asked <= set(VERBS)


def test_every_verb_has_an_answer(running: Running, tmp_path: Path) -> None:
    """Each asked once over the client, in an order that makes sense; only `stop` ends something."""
    model = tiny_llama().write(tmp_path / "mine-f16.gguf")
    with running.client() as client:
        def state(verb: str, body: dict[str, Any] | None = None, **named: Any) -> str:
            return str(client.ask(verb, body, **named)["state"])

        def refused(verb: str, body: dict[str, Any], **named: Any) -> int:
            with pytest.raises(ServiceRefused) as told:
                client.ask(verb, body, **named)
            return told.value.exit_code

        assert {
            "add": [state("add", {"path": str(model), "levels": ["Q8_0"]}), state("add", {"path": str(model)})],
            "move": [state("move", {"place": 1}, job_id=2)], "remove": [state("remove", job_id=2) for _ in range(2)],
            "cancel": [state("cancel"), state("cancel", {"job": 2})], "pause": [state("pause"), state("pause")],
            "resume": [state("resume"), state("resume")], "reload": [state("reload")], "backup": [state("backup")],
            "reevaluate": [state("reevaluate")], "release_quarantine": [state("release_quarantine", key="k")],
        } == {
            "add": ["queued"] * 2, "move": ["moved"], "remove": ["removed", "already_cancelled"],
            "cancel": ["nothing_in_work", "already_cancelled"], "pause": ["paused", "already_paused"],
            "resume": ["resumed", "already_resumed"], "reload": ["reloaded"], "backup": ["written"],
            "reevaluate": ["nothing_deployed"], "release_quarantine": ["already_released"]}
        (row,) = client.ask("queue")
        assert (row["name"], row["model"], "spec" in row) == ("mine", str(model), False)
        assert [row["id"] for row in client.ask("queue", query={"every": True})] == [1, 2]
        assert (refused("promote", {}), refused("rollback", {})) == (45, 15)
        assert (client.ask("health"), client.ask("runs")) == ({"healthy": True, "conditions": {}}, [])
        assert "nightpress_queue_jobs 1.0" in client.ask("metrics")
        assert "service.ready" in [line["action"] for line in client.ask("logs")]
        assert state("run_now", {"job": 1}) == "started"
        assert state("stop") == "stopping"
    running.thread.join(60)
    assert not running.path.exists()
    with running.client() as client, pytest.raises(ServiceMissing):
        client.status()


def test_a_condition_makes_it_unwell(running: Running, poll: Poll) -> None:
    running.service.report("disk", "The disk is odd.")
    poll(lambda: running.http.get("/v1/health").status_code == 503, 60, "the condition")
    with running.client() as client:
        assert client.ask("health") == {"healthy": False, "conditions": {"disk": "The disk is odd."}}


UNKNOWN, WRONG, REFUSED = (404, "UnknownJob", 14), (422, "Misunderstood", 2), (409, "OrderRefused", 15)
REFUSALS: list[tuple[str, str, Any, tuple[int, str, int]]] = [
    ("DELETE", "/v1/queue/0", None, UNKNOWN), ("DELETE", "/v1/queue/-1", None, UNKNOWN),
    ("DELETE", "/v1/queue/one", None, WRONG), ("GET", "/v1/runs/0", None, (404, "UnknownRun", 52)),
    ("GET", "/v1/runs?limit=0", None, WRONG), ("GET", "/v1/events?after=x", None, WRONG),
    ("GET", "/v1/logs?n=-1", None, WRONG), ("POST", "/v1/queue/1/move", {"place": 1}, UNKNOWN),
    ("POST", "/v1/queue/1/move", {"place": 0}, WRONG), ("POST", "/v1/queue/1/move", {}, WRONG),
    ("POST", "/v1/run-now", {"job": 0}, UNKNOWN), ("POST", "/v1/run-now", {}, UNKNOWN),
    ("POST", "/v1/run-now", {"job": "x"}, WRONG), ("POST", "/v1/cancel", {"job": -1}, UNKNOWN),
    ("POST", "/v1/cancel", {"jobs": 1}, WRONG), ("POST", "/v1/cancel", [], WRONG), ("POST", "/v1/cancel", None, WRONG),
    ("POST", "/v1/pause", {"for_s": 0}, WRONG), ("POST", "/v1/pause", {"for_s": -1}, WRONG),
    ("POST", "/v1/pause", {"for_s": "1h"}, WRONG), ("POST", "/v1/queue", {}, REFUSED),
    ("POST", "/v1/queue", {"path": "m"}, REFUSED), ("POST", "/v1/queue", {"path": "/none.gguf"}, REFUSED),
    ("POST", "/v1/queue", {"path": "/dev/null/x\0"}, REFUSED), ("POST", "/v1/queue", {"plan": {"model": 1}}, REFUSED),
    ("POST", "/v1/queue", {"path": "/m", "speed": 1}, WRONG), ("POST", "/v1/queue", {"priority": 1001}, WRONG),
    ("POST", "/v1/rollback", {"model": "../x"}, (409, "BadName", 44)),
    ("POST", "/v1/promote", {"run": 7}, (404, "UnknownRun", 52))]


def test_a_wrong_request_is_refused_with_a_sentence_and_an_exit_code(running: Running) -> None:
    for method, path, body, expected in REFUSALS:
        answer = running.http.request(method, path, **({} if body is None else {"json": body}))
        assert fault(answer) == expected, (method, path, body)
    assert running.ledger.jobs() == []
    assert running.service.foreman.paused is None


def test_what_is_no_verb_has_an_exit_code_too(running: Running) -> None:
    assert fault(running.http.get("/v1/nothing"))[0] == 404


@pytest.mark.parametrize(("method", "path", "body"), [
    ("DELETE", f"/v1/queue/{HUGE}", None), ("GET", f"/v1/runs/{HUGE}", None), ("POST", "/v1/cancel", {"job": HUGE}),
    ("POST", "/v1/promote", {"run": HUGE}), ("POST", "/v1/queue", {"plan": {}})])
def test_no_request_makes_the_service_fail(running: Running, method: str, path: str, body: Any) -> None:
    answer = running.http.request(method, path, **({} if body is None else {"json": body}))
    running.http.get("/v1/status")  # a failure is in the log by then: Python 3.11 bears no two tracebacks at a time
    assert answer.status_code in (404, 409, 422)


def test_a_body_that_is_no_json_is_refused(running: Running) -> None:
    for content in (b"{", b"\xff\xfe", b'{"for_s": NaN}', b"[" * 5000):
        answer = running.http.post("/v1/pause", content=content, headers={"Content-Type": "application/json"})
        assert (answer.is_client_error, answer.json()["error"]["message"] != "") == (True, True), content
    assert running.service.foreman.paused is None


def test_what_is_no_verb_is_told(running: Running) -> None:
    for method, path in (("GET", "/v1/nothing"), ("GET", "/docs"), ("POST", "/v1/status"), ("GET", "/v1/queue/1"),
                         ("GET", "/v1/../etc/passwd"), ("DELETE", "/v1/quarantine/a/b")):
        answer = running.http.request(method, path)
        assert answer.status_code in (404, 405), path
        assert answer.json()["error"]["code"] in ("Unknown", "Refused")


def test_the_status_says_in_every_state_what_is_done_and_why(running: Running, poll: Poll) -> None:
    def at(state: str) -> dict[str, Any]:
        poll(lambda: running.http.get("/v1/status").json()["state"] == state, 60, f"the state {state}")
        return dict(running.http.get("/v1/status").json())

    poll(lambda: running.http.get("/v1/status").json()["sensors"], 60, "the first look at the machine")
    status = at("idle")
    assert (status["reason"], status["job"], status["next"], status["queued"]) == ("nothing waits", None, None, 0)
    assert status["sensors"] == [
        {"sensor": "cpu", "state": "busy", "value": 80, "limit": 15, "unit": "%", "detail": ""}]
    assert (status["pid"], status["state_dir"]) == (os.getpid(), str(running.settings.state_dir))
    number = running.add("mine")
    status = at("waiting")
    assert (status["reason"], status["next"]["id"], status["queued"]) == ("busy: cpu 80 % > 15 %", number, 1)
    running.feel(QUIET)
    poll(lambda: (running.http.get("/v1/status").json()["job"] or {}).get("run_id"), 60, "its run")
    status = at("working")
    assert status["reason"].startswith("idle for ")
    assert {name: status["job"][name] for name in ("id", "name", "stage", "run_id", "stopped", "urgent")} == {
        "id": number, "name": "mine", "stage": "starting", "run_id": 1, "stopped": False, "urgent": False}
    running.feel(BUSY)
    status = at("stopped")
    assert (status["reason"], status["job"]["stopped"]) == ("busy: cpu 80 % > 15 %", True)
    worked_s = status["job"]["worked_s"]
    assert running.http.get("/v1/status").json()["job"]["worked_s"] == worked_s >= 0
    running.http.post("/v1/run-now", json={}).raise_for_status()
    assert (at("working")["reason"], at("working")["job"]["urgent"]) == ("asked for", True)
    running.http.post("/v1/pause", json={}).raise_for_status()
    assert at("paused")["reason"] == "paused on request"
    poll(lambda: running.http.get("/v1/status").json()["job"]["stopped"], 60, "its stop")
    running.http.post("/v1/pause", json={"for_s": 3600}).raise_for_status()
    assert at("paused")["reason"] == f"paused until {at('paused')['paused_until']}"
    running.http.post("/v1/cancel", json={}).raise_for_status()
    poll(lambda: running.http.get("/v1/status").json()["job"] is None, 60, "its end")
    assert running.ledger.job(number)["state"] == "cancelled"


def test_a_job_that_waits_for_its_time_says_so(running: Running, poll: Poll) -> None:
    number, later = running.add("mine"), "2999-01-01T00:00:00.000Z"

    def put_off() -> None:
        running.ledger.begin_job(number)
        running.ledger.end_job(number, JobState.QUEUED, "The disk is full.", not_before=later)
        running.service.foreman.refresh()

    running.service.ask(put_off)
    running.feel(QUIET)
    words = f"the next job may start at {later}"
    poll(lambda: running.http.get("/v1/status").json()["reason"] == words, 60, "the reason")


def test_the_status_answers_while_another_thread_holds_the_ledger(running: Running) -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with running.ledger._guard:
            held.set()
            over.wait(60)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        assert held.wait(60)
        began = time.monotonic()
        for _ in range(5):
            assert running.http.get("/v1/status", timeout=30).status_code == 200
        assert (time.monotonic() - began < 30, holding.is_alive()) == (True, True)
    finally:
        over.set()
        holding.join(60)


def test_a_client_finds_the_service_of_its_state_folder_only(running: Running, tmp_path: Path) -> None:
    found = Client.find(Settings.load())
    assert found is not None
    found.close()
    assert Client.find(Settings.load(state_dir=tmp_path)) is None
    assert Client.find(Settings.load(socket_path=tmp_path / "none.sock")) is None


def test_the_log_is_shown_from_its_end_and_can_be_followed(running: Running) -> None:
    for number in range(5):
        say("test.line", f"Line {number}.", number=number)
    assert [line["number"] for line in running.http.get("/v1/logs", params={"n": 3}).json()] == [2, 3, 4]
    assert running.http.get("/v1/logs", params={"n": 0}).json() == []
    assert len(running.http.get("/v1/logs").json()) > 5
    lines = running.listen("/v1/logs?follow=true&n=1")
    say("test.line", "One more.", number=5)
    assert [data["number"] for _, _, data in messages(lines, 2)] == [4, 5]


def messages(lines: Iterator[str], count: int) -> list[tuple[int, str, dict[str, Any]]]:
    """Number, kind and data of the next messages of a stream."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    part, end = dict[str, str](), time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < end, f"only {found} came"
        name, _, value = next(lines).partition(": ")
        if name:
            part[name] = value
        elif "data" in part:
            found.append((int(part["id"]), part["event"], json.loads(part["data"])))
            part = {}
    return found


def test_a_stream_begins_after_a_number_and_goes_on(running: Running) -> None:
    hub = running.service.hub
    start = hub.last
    for name in ("a", "b", "c"):
        hub.publish("test", {"name": name})
    streams = [running.listen(f"/v1/events?after={start + 1}"),
               running.listen("/v1/events", **{"Last-Event-ID": str(start + 1)}),
               running.listen(f"/v1/events?after={start + 1}", **{"Last-Event-ID": "0"})]
    fresh = running.listen("/v1/events")
    hub.publish("test", {"name": "d"})
    for stream in streams:
        assert [(number, kind, data["name"]) for number, kind, data in messages(stream, 3)] == [
            (start + 2, "test", "b"), (start + 3, "test", "c"), (start + 4, "test", "d")]
    assert [data["name"] for _, _, data in messages(fresh, 1)] == ["d"]


def test_a_stream_of_one_job_leaves_out_the_others(running: Running) -> None:
    stream = running.listen("/v1/events?job=1")
    for facts in ({"job": 2, "n": 1}, {"job": 1, "n": 2}, {"n": 3}, {"job": 3, "n": 4}, {"job": 1, "n": 5}):
        running.service.hub.publish("test", facts)
    assert [data["n"] for _, _, data in messages(stream, 3)] == [2, 3, 5]


def test_who_listens_too_late_is_told_how_much_was_missed(running: Running) -> None:
    for number in range(1100):
        running.service.hub.publish("test", {"n": number})
    first, second = messages(running.listen("/v1/events?after=1"), 2)
    assert (first[1], first[2]["lost"]) == ("lagged", second[0] - 2)


def test_there_are_so_many_streams_and_no_more(running: Running) -> None:
    lines = [running.listen("/v1/events" if number % 2 else "/v1/logs?follow=true") for number in range(MOST_STREAMS)]
    with running.http.stream("GET", "/v1/events") as answer:
        assert (answer.status_code, len(lines)) == (503, MOST_STREAMS)
    with running.client() as client, pytest.raises(ServiceRefused, match="streams open"):
        next(client.stream("events"))


def test_a_client_that_goes_makes_room_whatever_was_on_its_way_and_before_memory_is_collected(
        running: Running, poll: Poll) -> None:
    over = threading.Event()

    def publish() -> None:
        while not over.wait(0.0005):
            running.service.hub.publish("test", {})

    def listened() -> bool:
        with running.http.stream("GET", "/v1/events?after=0") as answer:
            return answer.status_code == 200 and next(answer.iter_lines()) != ""

    publishing = threading.Thread(target=publish)
    publishing.start()
    gc.disable()
    try:
        for _ in range(4 * MOST_STREAMS):
            poll(listened, 30, "a place")
    finally:
        gc.enable()
        over.set()
        publishing.join()


def test_a_quiet_stream_shows_that_it_lives(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "KEEP_ALIVE_S", 0.05)
    lines = running.listen("/v1/events?job=99")
    assert [next(lines) for _ in range(5)] == ["", ": still here", "", ": still here", ""]


def test_streams_end_with_the_service(running: Running) -> None:
    with running.client() as client:
        running.service.hub.publish("test", {})
        stream = client.stream("events", after=0)
        next(stream)
        running.service.post_signal(15)
        list(stream)  # ends, and raises nothing
