"""Promises 5, 6, 8 and 26: the worker does its job, tells it in events, dies with its parent, and resumes."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel
from worker_driver import Ended, press, run_job, small_plan, worker

from loops.engine.probe import PROBED
from loops.events import Failed, Finished, LevelDone, LevelMeasured, LevelPlanned, LevelStarted, Opened, Progress
from loops.starter import STARTER_GGUF
from state.files import sha256_file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return press(small_plan(STARTER_GGUF, tmp_path_factory.mktemp("undisturbed")))


def failed(ended: Ended) -> Failed:
    (event,) = ended.of(Failed)
    assert ended.events[-1] is event
    assert ended.status == event.exit_code
    assert not any("Traceback" in line for line in ended.lines)
    return event  # type: ignore[no-any-return]


# --- jobs ---

def test_the_engine_is_named() -> None:
    ended = run_job({"job": "engine"})
    (told,) = ended.of(Finished)
    assert ended.status == 0
    assert len(told.result["id"]) == 16
    assert told.result["version"]
    assert "CPU" in told.result["features"]
    assert told.result["gpu"] in (True, False)


def test_the_probe_answers_or_dies_of_the_answer(tmp_path: Path) -> None:
    """With AMX the worker dies here, and that is the answer; anywhere else every level was tried."""
    ended = run_job({"job": "probe", "folder": str(tmp_path)})
    if ended.status < 0:
        assert ended.of(Finished) == []
        return
    (told,) = ended.of(Finished)
    assert told.result["levels"] == list(PROBED)
    assert 0 <= told.result["largest_difference"] < 0.25
    assert list(tmp_path.rglob("*.gguf")) == []


def test_a_crash_in_the_probe_is_seen_as_its_signal(tmp_path: Path) -> None:
    ended = run_job({"job": "probe", "folder": str(tmp_path)}, "probe.level@2:segv")
    assert ended.status == -signal.SIGSEGV
    assert ended.of(Finished) == []


def test_a_model_is_described(starter: Path) -> None:
    (told,) = run_job({"job": "inspect", "model": str(starter)}).of(Finished)
    assert told.result["architecture"] == "llama"
    assert told.result["type"] == "F16"
    assert told.result["quantized"] is False
    assert told.result["parameters"] > 7_000_000
    assert told.result["chat_template"] is True


def test_a_level_is_asked_before_it_is_deployed(pressed: Any) -> None:
    made = pressed("Q4_K_M")
    job = {"job": "smoke", "model": str(made.path), "sha256": made.sha256,
           "options": {"threads": 1, "extra_buffers": False}}
    (told,) = run_job(job).of(Finished)
    assert told.result["reply"]
    assert failed(run_job({**job, "sha256": "0" * 64})).kind == "SmokeFailed"


@pytest.mark.parametrize("job", [{"job": "launch"}, {}, {"job": None}])
def test_an_unknown_job_is_refused(job: dict[str, Any]) -> None:
    assert failed(run_job(job)).kind == "JobRefused"


def test_the_worker_lowers_its_own_priority(tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path, simulate=True)
    with worker({"job": "press", "plan": plan.as_json(), "demote": True}) as started:
        started.wait_for(Opened)  # it waits for an answer
        assert os.getpriority(os.PRIO_PROCESS, started.process.pid) == 19


# --- bad input ---

def hostile(folder: Path, kind: str) -> Path:
    path = folder / "m.gguf"
    raw = STARTER_GGUF.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        count = b"llama.block_count\x04\0\0\0"
        path.write_bytes({"no GGUF": b"hello" * 100, "truncated": raw[:-4096], "empty": b"",
                          "no blocks": raw.replace(count + b"\x08", count + b"\0")}[kind])
    return path


@pytest.mark.parametrize(("kind", "code"), [
    ("missing", 20), ("folder", 21), ("no GGUF", 22), ("empty", 22), ("truncated", 24), ("no blocks", 23)])
@pytest.mark.parametrize("job", ["inspect", "press"])
def test_a_hostile_model_is_refused_with_its_own_code(job: str, kind: str, code: int, tmp_path: Path) -> None:
    path = hostile(tmp_path, kind)
    told = failed(press(small_plan(path, tmp_path)) if job == "press" else run_job({"job": job, "model": str(path)}))
    assert told.exit_code == code
    assert "m.gguf" in told.message


def test_a_path_that_is_no_utf8_is_refused_like_any_other(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")
    assert failed(run_job({"job": "inspect", "model": path})).exit_code == 20


@pytest.mark.parametrize(("changes", "code"), [
    ({"levels": ("Q9_9",)}, 32), ({"target_bytes": 1000}, 66), ({"scenarios": "NONE"}, 28), ({"text": "NONE"}, 29),
    ({"text": "SHORT"}, 27), ({"tool": "NONE"}, 38), ({"domains": ("medicine",)}, 19),
    ({"imatrix": str(STARTER_GGUF)}, 8)])
def test_a_plan_that_cannot_be_carried_out_is_refused_with_its_own_code(changes: dict[str, Any], code: int,
                                                                       tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    places = {"NONE": str(tmp_path / "none"), "SHORT": str(tmp_path / "short.txt")}
    plan = small_plan(STARTER_GGUF, tmp_path, **{name: places.get(value, value) if isinstance(value, str) else value
                                                for name, value in changes.items()})
    assert failed(press(plan)).exit_code == code


def test_an_original_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    path = TinyModel(layers=1, damaged=("blk.0.ffn_up.weight",)).write(tmp_path / "m.gguf")
    assert failed(press(small_plan(path, tmp_path, text_windows=2))).kind == "NotFinite"


def test_a_level_that_cannot_be_built_costs_only_itself(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\nimport sys; print('no room'); sys.exit(3)\n")
    tool.chmod(0o755)
    ended = press(small_plan(STARTER_GGUF, tmp_path, tool=str(tool), text_windows=2))
    assert ended.status == 0
    assert ended.ends() == {"Q8_0": "error", "Q4_K_M": "error"}
    assert all("no room" in event.reason for event in ended.of(LevelDone))
    assert ended.of(Finished)[0].chosen is None


# --- the leash ---

def test_the_worker_ends_when_its_leash_is_let_go_in_the_middle_of_work(tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path, text_windows=0)
    with worker({"job": "press", "demote": False, "plan": plan.as_json()}) as started:
        started.wait_for(Opened)
        started.send_line(json.dumps({"steps": {}, "settled": {}}))
        started.wait_for(LevelPlanned)
        started.let_go()
        assert started.process.wait(10) == -signal.SIGKILL


def test_the_worker_ends_when_its_leash_is_let_go_before_any_job() -> None:
    with worker({"job": "press", "plan": small_plan(STARTER_GGUF, Path("unused")).as_json()}) as started:
        started.wait_for(Opened)
        started.let_go()
        assert started.process.wait(10) == -signal.SIGKILL


def test_what_the_worker_started_ends_with_it(tmp_path: Path, poll: Any) -> None:
    tool, mark = tmp_path / "tool", tmp_path / "pid"
    tool.write_text(f"#!{sys.executable}\nimport os, pathlib, signal\n"
                    f"pathlib.Path({str(mark) + '.new'!r}).write_text(str(os.getpid()))\n"
                    f"os.rename({str(mark) + '.new'!r}, {str(mark)!r})\nsignal.pause()\n")
    tool.chmod(0o755)
    plan = small_plan(STARTER_GGUF, tmp_path, tool=str(tool), text_windows=2, first_scenarios=1, max_scenarios=1)
    with worker({"job": "press", "demote": False, "plan": plan.as_json()}) as started:
        started.wait_for(Opened)
        started.send_line(json.dumps({"steps": {}, "settled": {}}))
        poll(mark.exists, 30, "the tool")
        pid = int(mark.read_text())
        started.let_go()
        started.process.wait(10)
        poll(lambda: not running(pid), 2, "the end of the tool")


def running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- pressing ---

def test_a_run_measures_decides_and_chooses(undisturbed: Ended) -> None:
    assert undisturbed.status == 0
    assert set(undisturbed.ends()) == {"Q8_0", "Q4_K_M"}
    assert undisturbed.of(LevelStarted)[0].level == "Q8_0"
    (finished,) = undisturbed.of(Finished)
    passed = [name for name, state in undisturbed.ends().items() if state == "passed"]
    assert finished.chosen == (passed[-1] if passed else None)
    assert undisturbed.ends()["Q8_0"] == "passed"
    assert {metric["metric"] for metric in undisturbed.numbers()["Q8_0"][0]} >= {
        "kl_divergence", "perplexity", "same_top_token", "score", "degradation", "response_fluency"}


def test_the_file_of_a_level_is_what_was_announced(undisturbed: Ended) -> None:
    planned = {event.level: event.forecast_bytes for event in undisturbed.of(LevelPlanned)}
    for event in undisturbed.of(LevelMeasured):
        if "sha256" in event.columns:
            assert event.columns["bytes"] == planned[event.level]


def test_no_line_holds_what_json_cannot(undisturbed: Ended) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in undisturbed.lines:
        json.loads(line, parse_constant=refuse)


POINTS = ["baseline.group@2", "divergence.group@1", "divergence.group@4", "quantize.renamed"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_resumed_the_numbers_are_those_of_an_undisturbed_run(point: str, undisturbed: Ended,
                                                                                tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path)
    cut = press(plan, fail_at=f"{point}:kill")
    assert cut.status == -signal.SIGKILL
    assert cut.of(Finished) == []
    assert bool(cut.steps()) == (point != "baseline.group@2")  # what was finished before was told before
    whole = press(plan, cut.steps())
    assert whole.status == 0
    assert whole.numbers() == undisturbed.numbers()
    assert whole.ends() == undisturbed.ends()
    assert whole.of(Finished)[0].chosen == undisturbed.of(Finished)[0].chosen
    assert not set(whole.steps()) & set(cut.steps())


def test_a_group_that_was_kept_is_not_computed_again(tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path, levels=("Q8_0",), text_windows=8)
    press(plan, fail_at="baseline.group@1:kill")
    again = press(plan, fail_at="baseline.group@1:kill")
    assert [event.done for event in again.of(Progress) if event.stage == "baseline"] == []
    third = press(plan)
    assert [event for event in third.of(Progress) if event.stage == "baseline"] == []
    assert third.status == 0


def test_a_finished_run_does_nothing_again(undisturbed: Ended, tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path)
    first = press(plan)
    again = press(plan, first.steps())
    assert again.steps() == {}
    assert again.numbers() == first.numbers() == undisturbed.numbers()
    assert again.of(Finished)[0].result["reused_steps"] >= len(first.steps())
    assert {event.stage for event in again.of(Progress)} <= {"hash", "load"}


def test_a_level_whose_file_is_gone_is_built_again(tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path, levels=("Q8_0",), text_windows=2)
    first = press(plan)
    (file,) = (tmp_path / "blobs").glob("*.gguf")
    file.unlink()
    again = press(plan, first.steps())
    assert [step["sha256"] for step in again.steps().values()] == [sha256_file(file)]


def test_a_settled_level_is_not_built(tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path, text_windows=2)
    ended = press(plan, settled={"Q8_0": {"state": "crashed", "reason": "SIGSEGV, twice."}})
    assert [event.level for event in ended.of(LevelStarted)] == ["Q4_K_M"]
    assert ("Q8_0", "crashed", "SIGSEGV, twice.") in [(event.level, event.state, event.reason)
                                                      for event in ended.of(LevelDone)]
    assert len(list((tmp_path / "blobs").glob("*.gguf"))) == 1


def test_a_simulation_leaves_no_file_and_is_marked_throughout(tmp_path: Path) -> None:
    """Promise 4."""
    ended = press(small_plan(STARTER_GGUF, tmp_path, simulate=True))
    assert ended.status == 0
    assert ended.of(Finished)[0].result["simulated"] is True
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    measured = ended.of(LevelMeasured)
    assert {event.level for event in measured} == {"", "Q8_0", "Q4_K_M"}
    assert all(event.columns.get("sha256") is None for event in measured)
    assert {row["text"] for event in measured for row in event.responses} == {"(simulated)"}


def test_a_simulation_is_another_run_than_the_real_one(undisturbed: Ended, tmp_path: Path) -> None:
    plan = small_plan(STARTER_GGUF, tmp_path)
    with worker({"job": "press", "demote": False, "plan": replace(plan, simulate=True).as_json()}) as started:
        simulated = started.wait_for(Opened)
    assert simulated.plan_fingerprint != undisturbed.of(Opened)[0].plan_fingerprint
    assert simulated.model_sha256 == undisturbed.of(Opened)[0].model_sha256
