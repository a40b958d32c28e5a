"""A day of the service: people come and go, things are killed, and in the end it is as if nothing had happened."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_service import BUSY, QUIET, Running, running

from loops.starter import STARTER_GGUF
from state.check import violations

SPEED = 720.0  #: a day in two minutes
#: hours of the day at which the machine becomes quiet or busy
DAY = ((0.0, QUIET), (3.0, BUSY), (3.4, QUIET), (7.0, BUSY), (8.5, QUIET), (9.0, BUSY), (9.2, QUIET), (12.0, BUSY),
       (12.1, QUIET), (13.0, BUSY), (17.0, QUIET), (18.5, BUSY), (18.6, QUIET), (22.0, ""), (22.3, QUIET))
MODELS = ("alder", "birch", "cedar")
PLAN: dict[str, Any] = {"levels": ("Q8_0", "Q4_K_M"), "text_windows": 4, "first_scenarios": 4, "max_scenarios": 6}
SAME = ("--text-windows", "4", "--evaluation-prompts", "4", "--max-prompts", "6", "--levels", "Q8_0,Q4_K_M")


def _model(folder: Path, name: str) -> Path:
    """The starter with other low bits in a few weights: a model of its own."""
    content = bytearray(STARTER_GGUF.read_bytes())
    rng = random.Random(name)
    for _ in range(200):
        content[-2 * rng.randrange(1, 100_000)] ^= 1
    path = folder / f"{name}.gguf"
    path.write_bytes(bytes(content))
    return path


def _figures(nightpress: Any) -> dict[str, Any]:
    """What must not depend on what happened on the way, by model."""
    runs = {row["name"]: row for row in json.loads(nightpress("results", "--all", "--json").stdout)}
    found: dict[str, Any] = {}
    for name, row in runs.items():
        summary = json.loads(nightpress("results", str(row["id"]), "--json").stdout)
        found[name] = [summary["run"]["state"], summary["run"]["chosen_level"], *(
            (level["level"], level["state"], level["sha256"], level["degradation"], level["degradation_high"],
             {metric: value["value"] for metric, value in level["measurements"].items()})
            for level in summary["levels"])]
    releases = json.loads(nightpress("releases", "--json").stdout)
    found["releases"] = sorted((row["model"], row["number"], row["level"], row["sha256"], row["current"])
                               for row in releases)
    return found


def _add(service: Running, model: Path) -> None:
    from loops.pass1.plan import PressPlan

    plan = PressPlan(model=str(model), name=model.stem, blobs="", scratch="", **PLAN)
    with service.client() as client:
        client.ask("add", {"plan": plan.as_json()})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11])
def test_a_day_of_comings_and_kills_ends_as_an_undisturbed_one(
        nightpress: Any, new_nightpress: Any, tmp_path: Path, poll: Any, seed: int) -> None:
    models = [_model(tmp_path, name) for name in MODELS]
    (tmp_path / "undisturbed").mkdir()
    undisturbed = new_nightpress(tmp_path / "undisturbed")
    for model in models:
        undisturbed("run", str(model), *SAME)
    rng = random.Random(seed)
    with running(nightpress.base, SPEED, NIGHTPRESS_IDLE_AFTER_S="600", NIGHTPRESS_STALE_AFTER_S="3600",
                 NIGHTPRESS_YIELD_AFTER_S="900", NIGHTPRESS_RETRY_AFTER_S="600") as service:
        service.start()
        poll(lambda: service.status() is not None, 60, "the service's answer")
        for model in models:
            _add(service, model)
        kills = sorted(rng.uniform(1.0, 22.0) for _ in range(8))
        began, events = time.monotonic(), [*DAY]
        while (events or kills) and set(service.jobs().values()) != {"done"}:
            hour = (time.monotonic() - began) * SPEED / 3600
            while events and events[0][0] <= hour:
                service.feel(events.pop(0)[1])
            if kills and kills[0] <= hour:
                kills.pop(0)
                _kill(service, rng, poll)
            threading.Event().wait(0.1)
        service.feel(QUIET)
        poll(lambda: service.status() is not None, 60, "the service's answer")
        poll(lambda: set(service.jobs().values()) == {"done"}, 400, "the end of all jobs")
        assert service.end() == 0
    assert "Traceback" not in service.log()
    assert _figures(nightpress) == _figures(undisturbed)
    assert violations(nightpress.state, nightpress.deploy, deep=True) == []


def _kill(service: Running, rng: random.Random, poll: Any) -> None:
    """Kill the worker if there is one, or the service, which is started again at once."""
    workers = service.workers()
    if workers and rng.random() < 0.5:
        workers[0].kill()
        return
    service.kill()
    for worker in workers:
        poll(lambda worker=worker: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 2, "its end")
    service.start()
