"""A job that the service does is followed to its end, also by one who was not listening when it ended."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest
from control_service import Running

from daemon.cli.following import follow, refuse_own
from daemon.errors import ServiceRefused
from loops import events
from loops.pass1.plan import PressPlan

PLAN = PressPlan(model="/one.gguf", name="one", blobs="", scratch="").as_json()


class Watching:
    """Shows events when it may."""

    def __init__(self) -> None:
        self.entered, self.may, self.shown = threading.Event(), threading.Event(), list[events.Event]()

    def __enter__(self) -> Self:
        self.entered.set()
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def show(self, event: events.Event) -> None:
        self.shown.append(event)
        assert self.may.wait(120)


@pytest.mark.parametrize("lost", [False, True])
def test_a_job_is_followed_to_its_end_even_if_that_was_missed(running: Running, poll: Any, lost: bool) -> None:
    watching, hub = Watching(), running.service.hub
    if not lost:
        watching.may.set()

    def flood() -> None:
        for _ in range(5000 * lost):
            hub.publish("other", {"job": 1, "pad": "x" * 2000})

    with running.client() as client, ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, client, {"plan": PLAN}, watching, urgent=False)
        try:
            assert watching.entered.wait(60)
            hub.publish("press", {"job": 1, "line": events.to_line(events.Note("Hello."))})
            hub.publish("press", {"job": 2, "line": events.to_line(events.Note("Not this one's."))})
            poll(lambda: watching.shown, 20, "an event")
            flood()
            with running.client() as other:
                other.ask("remove", job_id=1)
            flood()
        finally:
            watching.may.set()
        with pytest.raises(ServiceRefused, match="Removed"):
            following.result(120)
    assert watching.shown == [events.Note("Hello.")]


def test_options_that_would_change_the_services_settings_are_refused_by_name() -> None:
    refuse_own({"--threads": None})
    with pytest.raises(ServiceRefused, match="leave --deploy-dir and --threads out"):
        refuse_own({"--deploy-dir": "x", "--threads": 1, "--output-dir": None})
