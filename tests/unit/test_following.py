"""A job that the service does is followed to its end, also by one who was not listening when it ended."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
from control_service import Running

from daemon.cli.finetune import _do
from daemon.cli.following import follow, refuse_own
from daemon.errors import ServiceRefused
from daemon.finetune_config import FinetuneSpec
from daemon.settings import Settings
from loops import events
from loops.pass1.plan import PressPlan
from state.ledger import Ledger
from state.records import StageSpec

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


def test_a_fine_tuning_whose_end_was_missed_is_told_from_the_ledger(
        isolated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = FinetuneSpec.of({"name": "shop", "dataset": {"sample": True}})
    settings = Settings.load()
    with Ledger.open(settings.state_dir, "test") as ledger:
        ledger.begin_stage(StageSpec("shop", "prepare", "f" * 64, {"files": {}, "options": {}}))
    monkeypatch.setattr("daemon.client.Client.find", lambda _settings: contextlib.nullcontext())
    monkeypatch.setattr("daemon.cli.following.follow", lambda *_given, **_more: {"made": None})
    _do(spec, settings, {}, queue=False, force=False, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], [row["name"] for row in told["stages"]]) == ("shop", ["prepare"])
