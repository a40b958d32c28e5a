"""The log: one honest line for each thing that happens, no secret in it, and no full disk that stops it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon import logs as logs_module
from daemon.errors import SettingsWrong
from daemon.logs import HIDDEN, Logs, configure, logger, say

NewLogs = Callable[..., Logs]
LONG_S = 30.0  #: only a log that is broken takes so long
HELD = "s3cr3t/+\"ü\nline"


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def new_logs(stream: io.StringIO) -> Iterator[NewLogs]:
    """Configure a log that is closed after the test, by default on `stream`."""
    yield lambda **how: configure(**{"stream": stream, **how})
    for logs in tuple(logs_module._current):
        logs.close()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_a_line_has_its_parts(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs()
    say("run.started", "A run begins: 100 % of %s.", level="warning", model="qwen", tokens=512, size_bytes=7)
    [line] = lines(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {"level": "warning", "action": "run.started", "event": "A run begins: 100 % of %s.",
                    "model": "qwen", "tokens": 512, "size_bytes": 7}


def test_below_the_level_nothing_is_written(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs(level="warning")
    for level in ("debug", "info", "warning", "error", "critical"):
        say("x.y", level, level=level)  # type: ignore[arg-type]
    assert [line["event"] for line in lines(stream.getvalue())] == ["warning", "error", "critical"]
    with pytest.raises(SettingsWrong, match="loud"):
        configure(level="loud")


def test_libraries_come_the_same_way_from_warning_on(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs(level="debug")
    names = ("uvicorn.error", "uvicorn.access", "apscheduler.scheduler", "httpx", "asyncio")
    for name in names:
        library = logging.getLogger(name)
        found, passed_on = library.level, library.propagate
        library.propagate = True  # a server without access log, in another test, turns it off for good
        library.setLevel(logging.DEBUG)  # as uvicorn sets its own
        library.info("Chatter from %s", name)
        library.warning("Trouble in %s", name)
        library.setLevel(found)
        library.propagate = passed_on
    assert [(line["logger"], line["action"], line["level"], line["event"]) for line in lines(stream.getvalue())] == [
        (name, "library", "warning", f"Trouble in {name}") for name in names]


def test_a_broken_line_is_told_of(new_logs: NewLogs, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    new_logs()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[-1:])  # without pytest's
        logging.getLogger("odd").warning("%d", "no number")
    [line] = lines(stream.getvalue())
    assert (line["action"], line["from"], line["format"]) == ("log.unreadable", "odd", "%d")


def test_structlogs_own_loggers_come_the_same_way(new_logs: NewLogs, stream: io.StringIO) -> None:
    import structlog

    early = logger("web")
    new_logs()
    early.info("Asked.", action="web.asked", path="/x")
    structlog.get_logger("nightpress").bind(run=3).warning("Odd.", action="run.odd")
    first, second = lines(stream.getvalue())
    assert (first["action"], first["logger"], first["path"]) == ("web.asked", "nightpress.web", "/x")
    assert (second["action"], second["run"], second["level"]) == ("run.odd", 3, "warning")


def test_any_fact_becomes_json(new_logs: NewLogs, stream: io.StringIO) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    circle: dict[str, Any] = {}
    circle["circle"] = circle
    new_logs()
    say("x.y", "Odd.", path=Path("/m"), nan=float("nan"), big=10**5000, odd=Odd(), circle=circle,
        nested={"a": [1, (2,)]}, raw=b"\0", error=ValueError("v"), event="e", action="a", self=1, facts=2,
        exception="x", method_name=3)
    [line] = lines(stream.getvalue())
    assert (line["path"], line["nan"], line["nested"], line["raw"]) == ("/m", "nan", {"a": [1, [2]]}, "b'\\x00'")
    assert str(line["circle"]).count("circle") == logs_module.DEPTH
    assert (line["odd"], line["error"]) == ("<Odd: RuntimeError>", "ValueError: v")
    assert (line["event"], line["action"], line["event_"], line["action_"]) == ("Odd.", "x.y", "e", "a")
    assert (line["self"], line["facts"], line["exception_"], line["method_name"]) == (1, 2, "x", 3)


def test_no_line_is_longer_than_the_journal_takes(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs()
    try:
        raise ValueError("ü" * 100_000)
    except ValueError:
        say("x.y", "家" * 100_000, exc_info=True, wide={str(n): ["家" * 9] * 200 for n in range(2000)}, last="家" * 9)
    assert len(stream.getvalue().encode()) < 48 * 1024
    [line] = lines(stream.getvalue())
    assert line["event"].endswith("…")


def test_nothing_can_forge_a_line(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs()
    forged = 'x\n{"action": "forged"}\r\n\x1b[2J\u2028\x85\x00\u202e\udcff'
    say("x.y", forged, fact=forged, nested={forged: [forged]})
    logging.getLogger("lib\n").warning(forged[:-1])  # what captures the record beside us bears no half characters
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 2
    first, second = lines(stream.getvalue())
    assert first["event"] == first["fact"] == second["event"] + "\\udcff"
    assert first["event"].startswith('x\\n{"action": "forged"}\\r\\n\\x1b[2J\\u2028\\x85')


@pytest.mark.parametrize("name", ["SOME_API_KEY", "HF_TOKEN", "AWS_SECRET", "DB_PASSWORD", "hf_token"])
def test_the_values_of_secrets_are_hidden_everywhere(
        new_logs: NewLogs, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    logs = new_logs()
    monkeypatch.setenv(name, HELD)
    try:
        raise ValueError(f"with {HELD}") from KeyError(HELD)
    except ValueError as error:
        say("x.y", f"a {HELD} b", exc_info=True, fact=HELD, nested={"k": [f"={HELD}="], HELD: 1}, error=error,
            path=Path(HELD), quoted=repr(HELD), dumped=json.dumps(HELD))
        logging.getLogger("lib").warning("got %s", HELD, exc_info=True)
    logging.getLogger("lib").warning("http://x/?k=s3cr3t%2F%2B%22%C3%BC%0Aline")
    assert "s3cr3t" not in stream.getvalue() + str(logs.tail(9))
    first = lines(stream.getvalue())[0]
    assert (first["event"], first["fact"]) == (f"a {HIDDEN} b", HIDDEN)


def test_short_values_are_no_secrets(new_logs: NewLogs, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    new_logs()
    monkeypatch.setenv("SOME_TOKEN", "abcde")
    say("x.y", "abcdefg")
    assert lines(stream.getvalue())[0]["event"] == "abcdefg"


def test_values_under_telling_names_are_hidden(new_logs: NewLogs, stream: io.StringIO) -> None:
    new_logs()
    told = {"password": "geheim", "headers": {"Authorization": "geheim", "X-Api-Key": ["geheim"]},
            "hf_token": "geheim", "client_secret": {"a": "geheim"}, "tokens": 9, "token_embd": "Q6", "a_token": None}
    say("x.y", "https://me:geheim@host/x", **told)
    assert "geheim" not in stream.getvalue()
    line = json.loads(stream.getvalue())
    assert (line["event"], line["password"]) == (f"https://{HIDDEN}@host/x", HIDDEN)
    assert (line["tokens"], line["token_embd"], line["a_token"]) == (9, "Q6", None)


def test_other_handlers_see_no_secret_either(
        new_logs: NewLogs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    new_logs()
    monkeypatch.setenv("SOME_TOKEN", "geheim9")
    say("x.y", "a geheim9", level="error", fact="geheim9")
    assert [HIDDEN in caplog.text, "geheim9" in caplog.text] == [True, False]


def test_a_terminal_gets_prose(monkeypatch: pytest.MonkeyPatch, new_logs: NewLogs) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        new_logs(stream=terminal)
        try:
            raise ValueError("one\n2026-01-01T00:00:00.000Z [info] forged")
        except ValueError:
            say("x.y", "It\x1b[2J failed.", level="error", exc_info=True, n=1)
        shown = screen.read(65536).decode().replace("\r\n", "\n")
    assert "\x1b[2J" not in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain != shown
    first, *others = plain.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\S+Z \[error\s*\] It\\x1b\[2J failed\.", first)
    assert {"action=x.y", "n=1"} <= set(first.split())
    assert {line[:4] for line in others} == {"  | "}


def test_the_journal_gets_the_level_before_each_line(
        monkeypatch: pytest.MonkeyPatch, new_logs: NewLogs, tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+", encoding="utf-8") as journal:
        found = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        new_logs(stream=journal, level="debug")
        for level in ("debug", "info", "warning", "error", "critical"):
            say("x.y", "Hello.", level=level)  # type: ignore[arg-type]
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        new_logs(stream=journal)
        say("x.y", "Not the journal.")
    *written, other = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in written] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert json.loads(written[0][3:])["event"] == "Hello."
    assert json.loads(other)["event"] == "Not the journal."


def test_a_stream_that_cannot_say_it_gets_an_escape(new_logs: NewLogs) -> None:
    logs = new_logs(stream=io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", write_through=True))
    say("x.y", "ü")
    assert json.loads(raw.getvalue())["event"] == "ü"
    assert logs.problem is None


def test_a_stream_that_is_gone_hurts_nobody(new_logs: NewLogs, stream: io.StringIO, tmp_path: Path) -> None:
    logs = new_logs(file=tmp_path / "log")
    stream.close()
    say("x.y", "Hello.")
    assert "stream" in str(logs.problem)
    assert lines((tmp_path / "log").read_text())[0]["event"] == "Hello."


def test_before_configure_a_line_goes_to_pythons_own_logging(caplog: pytest.LogCaptureFixture) -> None:
    say("x.y", "Quiet.")
    say("x.y", "Loud.", level="warning", n=1)
    assert caplog.messages == ["Loud. [x.y] n=1"]


def test_the_module_loads_nothing_heavy() -> None:
    code = ("import sys, daemon.hooks, daemon.logs, daemon.notify; daemon.logs.say('x.y', 'Quiet.'); "
            "print(*sorted({'structlog', 'asyncio', 'httpx', 'rich'} & set(sys.modules)))")
    assert run_python(code).stdout.split() == []


def test_closing_leaves_logging_as_it_was(stream: io.StringIO) -> None:
    import structlog

    root, ours = logging.getLogger(), logging.getLogger("nightpress")

    def state() -> tuple[Any, ...]:
        return root.level, list(root.handlers), ours.level, structlog.is_configured()

    before = state()
    first = configure(stream=stream, level="debug")
    second = configure(stream=stream, level="error")
    assert state() != before
    assert len(root.handlers) == len(before[1]) + 1
    for logs in (first, second, second):
        logs.close()
    assert state() == before
    assert not structlog.is_configured()


def test_the_file_is_for_its_owner_only(new_logs: NewLogs, tmp_path: Path) -> None:
    file = tmp_path / "new" / "log"
    new_logs(file=file)
    say("x.y", "Hello.")
    assert [path.stat().st_mode & 0o777 for path in (file, file.parent)] == [0o600, 0o700]
    file.chmod(0o644)
    new_logs(file=file)
    say("x.y", "Again.")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [line["event"] for line in lines(file.read_text())] == ["Hello.", "Again."]


def test_the_file_keeps_to_its_size_and_loses_the_oldest(tmp_path: Path) -> None:
    file = logs_module._LogFile(tmp_path / "log", 1000, 3)
    for n in range(100):
        file.write(json.dumps({"n": n, "text": "x" * 80}))
    file.close()
    kept = sorted(tmp_path.iterdir(), reverse=True)
    assert [path.name for path in kept] == ["log.2", "log.1", "log"]
    assert all(500 < path.stat().st_size <= 1000 for path in kept[:2])
    numbers = [line["n"] for path in kept for line in lines(path.read_text())]
    assert numbers == list(range(100 - len(numbers), 100))
    assert (logs_module.FILE_BYTES, logs_module.FILES) == (2_000_000, 5)


def test_a_file_that_was_moved_away_is_made_anew(new_logs: NewLogs, tmp_path: Path) -> None:
    logs = new_logs(file=tmp_path / "log")
    say("x.y", "One.")
    (tmp_path / "log").rename(tmp_path / "away")
    say("x.y", "Two.")
    assert lines((tmp_path / "log").read_text())[0]["event"] == "Two."
    assert logs.problem is None


@pytest.mark.parametrize("spoil", [
    lambda file: file.mkdir(), lambda file: file.symlink_to(file.parent / "elsewhere"),
    lambda file: os.mkfifo(file) or os.open(file, os.O_RDONLY | os.O_NONBLOCK),
    lambda file: file.parent.rmdir() or file.parent.touch()], ids=["folder", "link", "pipe", "no folder"])
def test_a_file_that_cannot_be_written_hurts_nobody(
        new_logs: NewLogs, stream: io.StringIO, tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    file = tmp_path / "folder" / "log"
    file.parent.mkdir()
    reader = spoil(file)
    logs = new_logs(file=file)
    say("x.y", "Hello.")
    if reader is not None:
        os.close(reader)
    assert str(file) in str(logs.problem)
    assert lines(stream.getvalue())[0]["event"] == logs.tail(1)[0]["event"] == "Hello."


FULL = """
import json, resource, sys
from pathlib import Path
from daemon.logs import configure, say

file, problems = Path(sys.argv[1]), []
logs = configure(file=file)
say("x.y", "Before.")
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 50, resource.RLIM_INFINITY))
for n in range(3):
    say("x.y", "While it is full.", n=n)
    problems.append(logs.problem)
full = file.read_text()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
say("x.y", "After.")
problems.append(logs.problem)
print(json.dumps({"problems": problems, "full": full, "tail": [line["event"] for line in logs.tail(9)]}))
"""


def test_a_full_disk_loses_no_more_than_the_lines_of_the_file(tmp_path: Path) -> None:
    done = run_python(FULL, str(tmp_path / "log"))
    told, everything = json.loads(done.stdout), ["Before.", *["While it is full."] * 3, "After."]
    *while_full, after = told["problems"]
    assert all("cannot be written" in problem for problem in while_full)
    assert after is None
    assert told["full"].endswith("}\n"), "half a line stayed behind"
    assert [line["event"] for line in lines(done.stderr)] == told["tail"] == everything
    written = lines((tmp_path / "log").read_text())
    assert [line["event"] for line in written] == ["Before.", "Lines missing here: 3.", "After."]
    assert written[1]["action"] == "log.gap"


def test_the_last_lines_can_be_read(new_logs: NewLogs) -> None:
    logs = new_logs(ring_lines=3)
    for n in range(5):
        say("x.y", str(n))
    assert [line["event"] for line in logs.tail(2)] == ["3", "4"]
    assert [line["event"] for line in logs.tail(99)] == ["2", "3", "4"]
    assert logs.tail(0) == []


def test_lines_of_many_threads_are_whole_and_can_be_followed(new_logs: NewLogs, tmp_path: Path) -> None:
    logs, threads, each = new_logs(file=tmp_path / "log"), 4, 50

    async def follow() -> list[str]:
        with logs.subscribe() as subscription, ThreadPoolExecutor(threads) as pool:
            for thread in range(threads):
                pool.submit(lambda thread=thread: [say("x.y", f"{thread}.{n}", text="x" * 300) for n in range(each)])
            async with asyncio.timeout(LONG_S):
                return [(await anext(subscription)).data["event"] for _ in range(threads * each)]

    followed = asyncio.run(follow())
    written = [line["event"] for line in lines((tmp_path / "log").read_text())]
    expected = sorted(f"{thread}.{n}" for thread in range(threads) for n in range(each))
    assert sorted(followed) == sorted(written) == expected


def test_a_line_said_while_the_hub_is_held_does_not_hang(new_logs: NewLogs) -> None:
    """A destructor may log in a thread that holds the hub's lock, while another thread writes a line."""
    logs = new_logs()

    def write() -> None:
        for _ in range(300):
            say("x.y", "Other.")

    def destruct() -> None:
        for _ in range(300):
            with logs.lines._lock:
                say("x.y", "Destructor.")

    both = [threading.Thread(target=target, daemon=True) for target in (write, destruct)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(LONG_S)
    assert not any(thread.is_alive() for thread in both)
