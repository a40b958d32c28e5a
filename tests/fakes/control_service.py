"""A real service and its control socket in this process, over scripted sensors."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from scripted_service import BUSY, ScriptedSensors

from daemon.client import Client
from daemon.control import application
from daemon.listening import Listener, bind
from daemon.logs import Logs, configure
from daemon.service import Service
from daemon.settings import Settings
from loops.pass1.plan import PressPlan
from state.ledger import Ledger


class Running:
    """A real service: its main loop in a thread, its socket in a folder of the test's own."""

    def __init__(self, base: Path) -> None:
        self.streams = contextlib.ExitStack()
        self.feel_at = base / "sensors"
        self.feel(BUSY)
        self.settings = Settings.load(tick_s=0.5, idle_after_s=0, hold_down_s=0, sensors=("cpu",), yield_after_s=600)
        self.logs: Logs = configure(stream=io.StringIO())
        self.ledger = Ledger.open(self.settings.state_dir, "test")
        self.service = Service(self.ledger, self.settings, ScriptedSensors(self.feel_at), self.logs,
                               reload=lambda: self.settings)
        self.path = self.settings.socket
        self.listener = Listener(application(self.service, self.logs), bind(self.path), self.path)
        self.thread = threading.Thread(target=self.service.run, args=(self.listener.start, self.listener.stop))
        self.thread.start()
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(self.path)), base_url="http://n", timeout=60)

    def feel(self, text: str) -> None:
        beside = self.feel_at.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.feel_at)

    def client(self) -> Client:
        return Client(self.path)

    def add(self, name: str, **facts: Any) -> int:
        plan = PressPlan(model=f"/{name}.gguf", name=name, blobs="", scratch="").as_json()
        with self.client() as client:
            return int(client.ask("add", {"plan": plan, **facts})["job"])

    def listen(self, path: str, **headers: str) -> Iterator[str]:
        answer = self.streams.enter_context(self.http.stream("GET", path, headers=headers))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        lines = answer.iter_lines()
        assert next(lines) == ": listening"
        return lines

    def close(self) -> None:
        self.streams.close()
        self.http.close()
        self.service.post_signal(15)
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.logs.close()
