"""Hooks tell once, in time, and to nobody else; whatever they do, the daemon goes on."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.hooks import (
    DELAYS_S,
    OUTPUT_BYTES,
    SESSION,
    HookOutcome,
    Hooks,
    HookWrong,
    _Talk,
    check_hooks,
    fill,
    run_hooks,
)
from daemon.workers import ENVIRONMENT

FACTS = {"model": "qwen", "path": "/models/a b;c.gguf", "level": "Q4_K_M", "release": "r7", "reason": "It holds."}
LONG_S = 30.0  #: only a hook that is broken takes so long
QUICK = (0.01, 0.01)


def python(code: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs a piece of Python; braces in it are doubled."""
    return (sys.executable, "-c", code.replace("{", "{{").replace("}", "}}"), *arguments)


def run_one(hooks: Hooks, kind: Any = "promote", facts: Any = FACTS, **how: Any) -> HookOutcome:
    [outcome] = run_hooks(hooks, kind, facts, **how)
    return outcome


def all_gone(pids: Path) -> bool:
    """Whether the processes that the file names are dead; nobody may be there to reap them."""
    numbers = set(map(int, pids.read_text().split()))
    return not any(process.pid in numbers and process.info["status"] != psutil.STATUS_ZOMBIE
                   for process in psutil.process_iter(["status"]))


def test_a_command_gets_its_arguments_without_a_shell() -> None:
    outcome = run_one(Hooks(on_promote=python("import sys; print(sys.argv[1:])", "{model}", "{path}!", "$HOME; `id`",
                                              "{{x}}", "{level}-{release}")))
    assert outcome.worked
    assert outcome.output.strip() == str(["qwen", "/models/a b;c.gguf!", "$HOME; `id`", "{x}", "Q4_K_M-r7"])
    assert (outcome.hook, outcome.target, outcome.status) == ("on_promote", sys.executable, 0)


def test_a_value_is_not_read_for_placeholders_again() -> None:
    assert fill("{reason}", {"reason": "{model} {0.__class__}", "model": "secret"}) == "{model} {0.__class__}"


def test_a_missing_or_odd_fact_leaves_an_argument_that_can_be_passed() -> None:
    assert [fill("{model}", {}), fill("{model}", {"model": None}), fill("{model}", {"model": 7})] == ["", "", "7"]
    assert fill("{model}", {"model": "a\0b"}) == "ab"
    assert run_one(Hooks(on_promote=python("", "{model}")), facts={"model": "x" * 3_000_000}).worked


def test_a_command_gets_the_facts_as_json() -> None:
    hooks = Hooks(on_failure=python("import sys; print(sys.stdin.read())"))
    told = json.loads(run_one(hooks, "failure", {**FACTS, "deep": [{"n": 1}], "path": Path("/m")}).output)
    assert (told["event"], told["at"][-1]) == ("failure", "Z")
    assert (told["model"], told["path"], told["deep"]) == ("qwen", "/m", [{"n": 1}])
    odd = run_one(hooks, "failure", {"kld": float("nan"), "model": "qwen"}).output
    assert json.loads(odd, parse_constant=pytest.fail)["model"] == "qwen"


def test_the_facts_are_whole_when_they_are_large() -> None:
    code = "import json, sys; print(len(json.load(sys.stdin)['reason']))"
    assert run_one(Hooks(on_promote=python(code)), facts={"reason": "x" * 1_000_000}).output.strip() == "1000000"


def test_a_command_that_does_not_read_is_no_failure() -> None:
    hooks = Hooks(on_promote=python("import os; os.close(0); print('fine')"))
    outcome = run_one(hooks, facts={"reason": "x" * 1_000_000})
    assert (outcome.worked, outcome.output) == (True, "fine\n")


def test_a_command_sees_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "geheim")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    outcome = run_one(Hooks(on_failure=python("import json, os; print(json.dumps(dict(os.environ)))")), "failure")
    seen = json.loads(outcome.output)
    assert seen["NIGHTPRESS_EVENT"] == "failure"
    assert seen["PATH"] == os.environ["PATH"]
    assert set(seen) <= {*ENVIRONMENT, *SESSION, "NIGHTPRESS_EVENT"}


def test_only_the_hook_of_the_event_runs(tmp_path: Path) -> None:
    hooks = Hooks(on_promote=("touch", str(tmp_path / "promote")), on_failure=("touch", str(tmp_path / "failure")))
    assert [outcome.hook for outcome in run_hooks(hooks, "promote", FACTS)] == ["on_promote"]
    assert [path.name for path in tmp_path.iterdir()] == ["promote"]
    assert run_hooks(Hooks(), "failure", FACTS) == []


def test_of_a_long_output_the_end_is_kept() -> None:
    code = "import sys; print('x' * 1_000_000, flush=True); print('the end', file=sys.stderr)"
    output = run_one(Hooks(on_promote=python(code))).output
    assert (len(output), output[-12:]) == (OUTPUT_BYTES, "xxx\nthe end\n")


def test_what_was_printed_just_before_the_end_is_kept() -> None:
    process = subprocess.Popen(("echo", "late"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    process.wait(LONG_S)
    talk = _Talk(process, b"")
    assert talk.go_on(time.monotonic() + LONG_S, threading.Event()) == ""
    assert talk.rest() == "late\n"


@pytest.mark.parametrize(("code", "status", "detail"), [
    ("raise SystemExit(3)", 3, "Exited with status 3."),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, "Died of SIGTERM."),
])
def test_a_failing_command_is_told(code: str, status: int, detail: str) -> None:
    outcome = run_one(Hooks(on_promote=python(code)))
    assert (outcome.worked, outcome.status, outcome.detail) == (False, status, detail)


#: starts a child in its group and one in a session of its own, names all three, and waits for ever
FAMILY = ("import os, subprocess, sys; from pathlib import Path; wait = ['sleep', '600']; "
          "pids = [os.getpid(), subprocess.Popen(wait).pid, subprocess.Popen(wait, start_new_session=True).pid]; "
          "new = Path(sys.argv[1] + '.new'); new.write_text(' '.join(map(str, pids))); new.rename(sys.argv[1]); "
          "print('started', flush=True); ")


def test_at_its_time_limit_a_command_and_all_its_children_die(tmp_path: Path, poll: Any) -> None:
    code = FAMILY + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    outcome = run_one(Hooks(on_promote=python(code, str(tmp_path / "pids")), timeout_s=3))
    assert (outcome.worked, outcome.detail) == (False, "Killed after the 3 s that a hook may run.")
    assert outcome.output == "started\n"
    assert 3 <= outcome.took_s < LONG_S
    poll(lambda: all_gone(tmp_path / "pids"), LONG_S, "the end of the hook's family")


def test_a_stop_ends_a_command_at_once(tmp_path: Path, poll: Any) -> None:
    stop, pids = threading.Event(), tmp_path / "pids"
    hooks = Hooks(on_promote=python(FAMILY + "import signal; signal.pause()", str(pids)), timeout_s=600)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_hooks, hooks, "promote", {"reason": "never read" * 100_000}, stop=stop)
        poll(pids.exists, LONG_S, "the start of the hook")
        stop.set()
        [outcome] = running.result(LONG_S)
    assert (outcome.worked, outcome.detail) == (False, "Killed: the service is stopping.")
    poll(lambda: all_gone(pids), LONG_S, "the end of the hook's family")


def test_what_a_command_leaves_behind_in_its_group_ends_with_it(tmp_path: Path, poll: Any) -> None:
    outcome = run_one(Hooks(on_promote=("sh", "-c", f"sleep 600 & echo $! > {tmp_path / 'pid'}; echo done")))
    assert outcome.worked
    assert outcome.output == "done\n"
    assert outcome.took_s < LONG_S, "it waited for the child that holds the pipe"
    poll(lambda: all_gone(tmp_path / "pid"), LONG_S, "the end of the child")


def test_a_command_that_is_not_there_is_told() -> None:
    outcome = run_one(Hooks(on_promote=("/nowhere/at-all",)))
    assert (outcome.worked, outcome.status, outcome.tries) == (False, None, 0)
    assert "No such file" in outcome.detail


def test_facts_that_cannot_be_shown_keep_no_hook_from_running() -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    circle: dict[str, Any] = {}
    circle["circle"] = circle
    for facts in ({"model": Odd()}, {"reason": circle}, {("a", 1): 2}, {"reason": {("a",): 1}}):
        outcome = run_one(Hooks(on_promote=python("import json, sys; json.load(sys.stdin)", "{model}")), facts=facts)
        assert outcome.worked, outcome


def test_after_a_stop_nothing_is_started(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    outcomes = run_hooks(Hooks(on_promote=("touch", str(tmp_path / "x")), webhook="http://127.0.0.1:9/"), "promote",
                         FACTS, stop=stop)
    assert [(outcome.worked, outcome.tries) for outcome in outcomes] == [(False, 0)] * 2
    assert list(tmp_path.iterdir()) == []


def test_hooks_that_can_work_are_let_through(tmp_path: Path) -> None:
    program = tmp_path / "hook"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    check_hooks(Hooks())
    check_hooks(Hooks(on_promote=(str(program), "{model}", "{{}}"), on_failure=("sh", "-c", "true {reason}"),
                      webhook="https://user:pass@example.org:8443/x?y=z"))


@pytest.mark.parametrize("argument", ["{modle}", "{model.__class__}", "{model[0]}", "{0}", "{model!r}", "{", "}}}"])
def test_an_unknown_placeholder_is_refused(argument: str) -> None:
    for hooks in (Hooks(on_promote=("sh", argument)), Hooks(on_failure=("sh", argument))):
        with pytest.raises(HookWrong, match="no placeholder"):
            check_hooks(hooks)
        outcomes = run_hooks(hooks, "promote", FACTS) + run_hooks(hooks, "failure", FACTS)
        assert [outcome.worked for outcome in outcomes] == [False]


def test_a_program_that_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")  # nobody may execute it
    for name in ("hook", "{path}"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.chdir(tmp_path)
    for program in ("/nowhere/at-all", "no-such-program-anywhere", str(tmp_path / "plain"), str(tmp_path), "", "./hook",
                    f"{tmp_path}/{{path}}", "s\0h"):
        with pytest.raises(HookWrong, match="on_failure") as refused:
            check_hooks(Hooks(on_failure=(program, "x")))
        assert refused.value.exit_code == 9


@pytest.mark.parametrize("url", ["ftp://example.org/x", "file:///etc/hosts", "example.org", "http://", "https:///x", "",
                                 "http://a:99999/geheim", "http://[::1/geheim", "http://a/ geheim", "http://a/\ngeheim"])
def test_an_address_that_cannot_be_called_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(HookWrong) as refused:
        check_hooks(Hooks(webhook=url))
    assert "geheim" not in str(refused.value)
    outcome = run_one(Hooks(webhook=url))
    assert (outcome.worked, outcome.tries) == (False, 0)
    assert "geheim" not in str(outcome)


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_time_limit_must_leave_time(limit: float) -> None:
    with pytest.raises(HookWrong):
        check_hooks(Hooks(timeout_s=limit))


class Site(ThreadingHTTPServer):
    """A real server that answers as it was told: a status, `hang`, or `drop`; then 200."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers: list[int | str] = []
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.over = threading.Event()

    def url(self, rest: str = "/told") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{rest}"


class Answer(BaseHTTPRequestHandler):
    server: Site

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        if answer == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif answer == "hang":
            self.server.over.wait(LONG_S)
            self.close_connection = True
        else:
            self.send_response(int(answer))
            if 300 <= int(answer) < 400:
                self.send_header("Location", self.server.url("/elsewhere"))
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "*")
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join(LONG_S)


def test_the_address_gets_the_facts(site: Site) -> None:
    outcome = run_one(Hooks(webhook=site.url()), "failure")
    assert (outcome.hook, outcome.worked, outcome.status, outcome.tries) == ("webhook", True, 200, 1)
    [(path, headers, body)] = site.asked
    assert path == "/told"
    assert headers["Content-Type"] == "application/json"
    told = json.loads(body)
    assert told["event"] == "failure"
    assert FACTS.items() <= told.items()


def test_a_command_and_the_address_are_both_told(site: Site) -> None:
    outcomes = run_hooks(Hooks(on_promote=("false",), webhook=site.url()), "promote", FACTS)
    assert [(outcome.hook, outcome.worked) for outcome in outcomes] == [("on_promote", False), ("webhook", True)]


@pytest.mark.parametrize("answer", [500, 503, 429, "drop"])
def test_trouble_that_may_pass_is_tried_again(site: Site, answer: int | str) -> None:
    site.answers = [answer]
    outcome = run_one(Hooks(webhook=site.url()), delays_s=QUICK)
    assert (outcome.worked, outcome.status, outcome.tries, len(site.asked)) == (True, 200, 2, 2)


@pytest.mark.parametrize("answer", [400, 401, 404, 410, 302, 307, 308])
def test_an_answer_that_will_not_change_is_not_tried_again(site: Site, answer: int) -> None:
    site.answers = [answer]
    outcome = run_one(Hooks(webhook=site.url()), delays_s=QUICK)
    assert (outcome.worked, outcome.status, outcome.tries) == (False, answer, 1)
    assert [path for path, _headers, _body in site.asked] == ["/told"]
    assert str(answer) in outcome.detail


def test_three_tries_are_all(site: Site) -> None:
    site.answers = [500, "drop", 502, 200]
    outcome = run_one(Hooks(webhook=site.url()), delays_s=(0.2, 0.3))
    assert (outcome.worked, outcome.status, outcome.tries, len(site.asked)) == (False, 502, 3, 3)
    assert outcome.took_s >= 0.5
    assert DELAYS_S == (1.0, 4.0)


def test_a_server_that_hangs_is_left_in_time(site: Site) -> None:
    site.answers = ["hang", "hang"]
    outcome = run_one(Hooks(webhook=site.url()), delays_s=(0.01,), answer_s=0.3)
    assert (outcome.worked, outcome.status, outcome.tries) == (False, None, 2)
    assert outcome.detail == "No answer within 0.3 s. Given up after 2 tries."
    assert 0.6 <= outcome.took_s < LONG_S


def test_a_server_that_drips_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then must not push the limit out, as it does where each read has its own."""
    monkeypatch.setenv("NO_PROXY", "*")
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _address = listener.accept()
        with connection:
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000:
                try:
                    connection.send(bytes([byte]))
                except OSError:
                    return
                if over.wait(0.05):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(drip, listener)
        outcome = run_one(Hooks(webhook=f"http://127.0.0.1:{listener.getsockname()[1]}/"), delays_s=(), answer_s=0.5)
        over.set()
        dripping.result(LONG_S)
    assert (outcome.worked, outcome.tries) == (False, 1)
    assert outcome.took_s < LONG_S


def test_nobody_at_the_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcome = run_one(Hooks(webhook=f"http://127.0.0.1:{port}/"), delays_s=QUICK)
    assert (outcome.worked, outcome.tries) == (False, 3)
    assert outcome.detail == "No answer (ConnectError). Given up after 3 tries."


@pytest.mark.parametrize("answer", [500, "hang"])
def test_a_stop_ends_the_waiting_for_an_address(site: Site, poll: Any, answer: int | str) -> None:
    site.answers = [answer]
    stop = threading.Event()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_hooks, Hooks(webhook=site.url()), "promote", FACTS, stop=stop, delays_s=(600, 600),
                              answer_s=600)
        poll(lambda: site.asked, LONG_S, "the first try")
        stop.set()
        [outcome] = running.result(LONG_S)
    assert (outcome.worked, outcome.tries) == (False, 1)
    assert "stopping" in outcome.detail
    assert time.monotonic() - began < LONG_S


@pytest.mark.parametrize("answers", [[], [404], [302], [500, "drop", 500], ["hang", 404]], ids=str)
def test_nothing_secret_in_the_address_is_shown(
        site: Site, answers: list[int | str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="httpx")
    site.answers = answers
    host = site.url("").removeprefix("http://")
    hooks = Hooks(webhook=f"http://nutzer:pass9@{host}/services/geheim1?key=geheim2")
    outcome = run_one(hooks, delays_s=QUICK, answer_s=1.0)
    assert site.asked[0][0] == "/services/geheim1?key=geheim2"
    assert site.asked[0][1]["Authorization"].startswith("Basic ")
    assert outcome.target == f"http://{host}"
    for secret in ("nutzer", "pass9", "geheim1", "geheim2"):
        assert secret not in str(outcome) + caplog.text
