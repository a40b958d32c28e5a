"""Who writes calibration text for the server of `provider_server`, and how a test gets to it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from provider_server import Provider, message_of

from calibration_data.briefs import Brief
from daemon.generating import Order
from daemon.providers import DEFAULT_MODELS, KEYS

PROVIDERS = ("anthropic", "openai")
KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"
BRIEF = Brief("bees", "advice for people who keep bees")


class Author:
    """Writes as many samples as a request asks for, all of them new, in the order of the requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.written = 0

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = int(message_of(body).split()[1])
        with self._lock:
            first = self.written
            self.written += asked
        return {"samples": [self.sample(number) for number in range(first, first + asked)]}

    @staticmethod
    def sample(number: int) -> dict[str, Any]:
        said = " ".join(f"word{number}x{place}" for place in range(12))
        return {"topic": f"topic {number}", "turns": [{"role": "user", "content": f"{said}?"},
                                                      {"role": "assistant", "content": f"Sample {number} of {said}."}]}


def order_from(name: str, server: Provider, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Let both libraries ask the server, without pauses between failures; return an order of twelve samples."""
    pytest.importorskip(name, reason=f"the extra nightpress[generate] is not installed: {name} is missing")
    server.write = Author()
    monkeypatch.setattr("daemon.generating.PAUSE_S", 0.001)
    for provider, key in KEYS.items():
        monkeypatch.setenv(key, KEY)
        monkeypatch.setenv(f"{provider.upper()}_BASE_URL", server.url)
        monkeypatch.delenv(f"{provider.upper()}_LOG", raising=False)
    return Order(BRIEF, 12, name, DEFAULT_MODELS[name], 3)  # type: ignore[index]  # one of the two
