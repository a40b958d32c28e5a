"""From settings to a running service, and back: what `nightpressd` does around the main loop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from daemon.clock import Clock
from daemon.errors import SettingsWrong
from daemon.foreman import hooks_of
from daemon.hooks import check_hooks
from daemon.intake import declared
from daemon.listening import Listener, bind
from daemon.logs import configure, say
from daemon.notify import Notifier
from daemon.sensors import all_sensors, own_tree, parse_hours
from daemon.service import Sensors, Service
from daemon.settings import Settings
from daemon.supervisor import worker_log
from daemon.workers import end_leftover
from state.faults import NightpressError
from state.files import explained, make_folder
from state.ledger import Ledger

OWNER = "nightpressd"
LOG_FILE = Path("logs/nightpressd.log")


def check_settings(settings: Settings) -> Settings:
    """Return the settings after making sure of what only a running service needs.

    Raises:
        SettingsWrong: hours, hooks or a declared model are wrong.
    """
    try:
        parse_hours(settings.hours)
        check_hooks(hooks_of(settings))
        list(declared(settings))
    except NightpressError as problem:
        raise SettingsWrong(str(problem)) from problem
    return settings


def log_file(settings: Settings) -> Path | None:
    """Return where the log goes besides standard error; nowhere under a service manager, which keeps it itself."""
    if os.environ.get("INVOCATION_ID") or os.environ.get("JOURNAL_STREAM"):
        return None
    return settings.state_dir / LOG_FILE


def serve(load: Callable[[], Settings], *, clock: Clock | None = None,
          sensors: Callable[[Settings], Sensors] | None = None) -> None:
    """Run the service until it is told to stop.

    Args:
        load: returns the settings, now and at every reload.
        clock: the machine's unless given.
        sensors: this machine's unless given.

    Raises:
        SettingsWrong: nothing was started.
        StateBusy, SocketBusy: another service or command has the state; the message names it.
        NightpressError: the state cannot be opened.
    """
    def checked() -> Settings:
        return check_settings(load())

    settings = checked()
    file = log_file(settings)
    if file is not None:
        with explained(file.parent):
            make_folder(file.parent.parent, 0o700)
            make_folder(file.parent, 0o700)
    logs = configure(file=file, stream=sys.stderr, level=settings.log_level)
    try:
        with Ledger.open(settings.state_dir, OWNER) as ledger:
            if end_leftover(worker_log(settings.state_dir)):
                say("worker.leftover", "Ended a worker whose service was killed.", level="warning")
            measuring = sensors(settings) if sensors else all_sensors(settings.limits, own_tree)
            try:
                _run(Service(ledger, settings, measuring, logs, reload=checked, clock=clock,
                             notifier=Notifier.from_environment()))
            finally:
                measuring.close()
    except Exception as problem:
        if not isinstance(problem, NightpressError):
            say("service.bug", f"A bug: {problem}. Please report it.", level="critical", exc_info=problem)
        raise
    finally:
        logs.close()


def _run(service: Service) -> None:
    from daemon.control import application

    path = service.settings.socket
    bound = bind(path)
    listener = Listener(application(service, service.logs), bound, path)

    def begin() -> None:
        listener.start()
        _prove(path)

    found = {number: signal.signal(number, lambda received, _frame: service.post_signal(received))
             for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        service.run(begin, lambda: None if listener.stop() else say(
            "control.slow", "A request did not end in time.", level="warning"))
    finally:
        listener.stop()
        for number, handler in found.items():
            signal.signal(number, handler)


def _prove(path: Path) -> None:
    """Ask the own socket for the status, as anybody will; only then the service is ready.

    Raises:
        RuntimeError: the answer is not one.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(10)
        asking.connect(str(path))
        asking.sendall(b"GET /v1/status HTTP/1.1\r\nHost: nightpress\r\nConnection: close\r\n\r\n")
        with asking.makefile("rb") as answer:
            first = answer.readline()
    if b" 200 " not in first:
        raise RuntimeError(f"the control socket answers {first!r}")
