"""The way of a fine-tuning: done once, done again from what changed, gone on with after any death."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_pipeline import Way, spec

from calibration_data.text import Turn
from daemon.course import StagedCourse
from daemon.errors import Interrupted, WorkerRefused
from daemon.finetune_config import FinetuneRefused
from daemon.finetune_stages import calibration_rows
from daemon.finetuning import describe_path, state_of, superseded
from daemon.grip import Grip
from daemon.intake import Order
from daemon.lineage import LineageUnknown, trace
from daemon.runner import Outcome, Runner
from daemon.settings import Settings
from loops.events import Progress
from loops.finetune.faults import ColumnsWrong
from loops.finetune.records import Row
from state.check import repair, violations
from state.ledger import JobSpec, Ledger
from state.lock import Lock, StateBusy

SCRIPT = Path(__file__).parents[1] / "fakes" / "finetune_pipeline.py"
ALL = ["read", "count", "tell"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "rows.txt").write_text("one\ntwo\nthree\n")
    return tmp_path


def states(base: Path) -> list[tuple[str, str]]:
    with Ledger.read(base / "state") as ledger:
        return [(row["name"], row["state"]) for row in ledger.stages("shop")]


def told(base: Path) -> str:
    with Ledger.read(base / "state") as ledger:
        last = [row for row in ledger.stages("shop") if row["name"] == "tell" and row["state"] == "finished"][-1]
        return Path(last["outputs"]["files"]["tell"]["path"]).read_text()


def test_every_stage_is_recorded_with_the_hashes_of_what_it_was_given_and_made(base: Path) -> None:
    way = Way()
    done = way.walk(base)
    assert (way.done, told(base)) == (ALL, "1 rows")
    assert [one.again for one in done.stages] == [False] * 3
    rows = [one.row for one in done.stages]
    assert [row["state"] for row in rows] == ["finished"] * 3
    given = rows[0]["inputs"]["files"]["rows"]
    assert given == {"path": str(base / "rows.txt"), "bytes": 14, "sha256": describe_path(base / "rows.txt")["sha256"]}
    for before, after, role in ((rows[0], rows[1], "read"), (rows[1], rows[2], "count")):
        assert before["outputs"]["files"][role] == after["inputs"]["files"][role]
    assert rows[1]["inputs"]["options"] == {"min": 3}
    assert json.loads(json.dumps(done.as_json()))["stages"][2]["reused"] is False


def test_what_is_finished_is_not_done_again(base: Path) -> None:
    way = Way()
    way.walk(base)
    done = way.walk(base)
    assert way.done == []
    assert [one.again for one in done.stages] == [True] * 3
    assert len(states(base)) == 3


def test_a_changed_key_does_again_what_it_touches_and_what_comes_after(base: Path) -> None:
    way = Way()
    way.walk(base)
    way.walk(base, dataset={"min_tokens": 1})
    assert (way.done, told(base)) == (["count", "tell"], "3 rows")
    way.walk(base)
    assert way.done == []  # what was made before the change is still there


def test_a_changed_source_does_everything_again(base: Path) -> None:
    way = Way()
    way.walk(base)
    (base / "rows.txt").write_text("one\n" * 6)
    way.walk(base)
    assert (way.done, told(base)) == (ALL, "2 rows")


def test_a_change_that_changes_nothing_ends_there(base: Path) -> None:
    way = Way()
    way.walk(base)
    (base / "rows.txt").write_text("eins\nzwei\ndrei\n")
    way.walk(base)
    assert way.done == ["read", "count"]  # there are still as many rows


def test_what_other_configurations_left_is_superseded_but_for_what_is_used(base: Path) -> None:
    way = Way()

    def found(*used: Path, **changes: Any) -> list[str]:
        with Ledger.open(base / "state", "test") as ledger:
            folders = superseded(spec(base, **changes), ledger, Settings(state_dir=base / "state"), used,
                                 stages=way.stages())
        assert all(folder.is_dir() and folder.parent == base / "work" for folder in folders)
        return [folder.name.partition("-")[0] for folder in folders]

    first = way.walk(base)
    assert found() == []
    (base / "work" / "notes-00000000").mkdir()  # no stage's
    way.walk(base, dataset={"min_tokens": 1})
    assert (found(dataset={"min_tokens": 1}), found()) == (["count", "tell"], ["count", "tell"])
    counted = Path(first.stages[1].row["outputs"]["files"]["count"]["path"])
    assert found(counted, dataset={"min_tokens": 1}) == ["tell"]
    assert found(dataset={"min_tokens": 2}) == ["count", "count", "tell", "tell"]
    way.fail = "count"
    with pytest.raises(WorkerRefused):
        way.walk(base, dataset={"min_tokens": 2})
    assert found(dataset={"min_tokens": 2}) == ["count", "count", "tell", "tell"]  # not the one that is to go on


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_stage_whose_files_are_not_as_they_were_is_done_again(base: Path, harm: str) -> None:
    way = Way()
    done = way.walk(base)
    entry = done.stages[1].row["outputs"]["files"]["count"]
    made = Path(entry["path"])
    if harm == "gone":
        shutil.rmtree(made.parent)
    else:
        made.write_text("7")
    assert state_of(entry) == harm
    way.walk(base)
    assert way.done == ["count"]
    assert state_of(entry) == "unchanged"


def test_a_stage_that_failed_is_recorded_and_goes_on_where_it_was(base: Path) -> None:
    way = Way(fail="count")
    with pytest.raises(WorkerRefused, match="count broke") as problem:
        way.walk(base)
    assert problem.value.exit_code == 35
    assert states(base) == [("read", "finished"), ("count", "failed")]
    way.fail = ""
    way.walk(base)
    assert way.done == ["count again", "tell"]
    assert states(base) == [(name, "finished") for name in ALL]


def test_a_stage_that_is_ended_on_request_waits_interrupted(base: Path) -> None:
    grip = Grip()
    way = Way(grip=grip)
    before = way.count

    def ended(*arguments: object) -> object:
        before(*arguments)  # type: ignore[arg-type]
        grip.end("Made room.")
        raise Interrupted(grip.reason)

    way.count = ended  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted, match="Made room"):
        way.walk(base)
    assert states(base)[1] == ("count", "interrupted")
    with pytest.raises(Interrupted):  # what was ended begins nothing
        way.walk(base)
    again = Way()
    again.walk(base)
    assert again.done == ["count again", "tell"]


@pytest.mark.parametrize(("point", "left"), [
    ("finetune.stage_made@2", ["count again", "tell"]), ("finetune.stage_recorded@2", ["tell"]),
    ("stage.beginning@2", ["count", "tell"]), ("stage.ending@3", ["tell again"])])
def test_killed_at_any_moment_it_goes_on_and_nothing_finished_is_lost(base: Path, point: str, left: list[str]) -> None:
    killed = subprocess.run([sys.executable, str(SCRIPT), str(base)], timeout=60, env={
        **os.environ, "NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": f"{point}:kill"})
    assert killed.returncode == -signal.SIGKILL
    repair(base / "state", base / "deploy")
    assert violations(base / "state", base / "deploy") == []
    way = Way()
    way.walk(base)
    assert (way.done, told(base)) == (left, "1 rows")
    assert [state for _name, state in states(base)] == ["finished"] * 3


def test_one_fine_tuning_is_not_done_twice_at_once(base: Path) -> None:
    (base / "work").mkdir()
    with Lock.acquire(base / "work" / ".lock", "another"), pytest.raises(StateBusy, match="another"):
        Way().walk(base)


def test_the_hash_of_a_folder_is_over_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = describe_path(folder)
    (folder / ".lock").write_text("2")
    (folder / "checkpoints").mkdir()
    assert describe_path(folder) == first
    (folder / "a").rename(folder / "b")
    assert describe_path(folder)["sha256"] != first["sha256"]
    (folder / "b").rename(folder / "a")
    (folder / "a").write_text("3")
    assert describe_path(folder)["sha256"] != first["sha256"]


def test_of_an_adapter_counts_what_belongs_to_it(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        (tmp_path / name).write_text(name)
    assert set(describe_path(tmp_path)["parts"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_from_a_file_its_way_back_is_told(base: Path) -> None:
    done = Way().walk(base)
    settings = Settings(state_dir=base / "state")
    made = Path(done.stages[2].row["outputs"]["files"]["tell"]["path"])
    found = trace(str(made), settings)
    assert [(one.kind, one.state) for one in found] == [
        ("tell", "unchanged"), ("count", "unchanged"), ("read", "unchanged"), ("rows", "unchanged")]
    assert trace(found[0].sha256, settings) == found
    assert found[3].path == str(base / "rows.txt")
    (base / "rows.txt").write_text("other")
    Path(found[1].path).unlink()
    assert [one.state for one in trace(str(made), settings)] == ["unchanged", "gone", "unchanged", "changed"]


def test_the_way_back_is_of_the_file_as_it_was_made_not_of_what_was_made_since(base: Path) -> None:
    way = Way()
    first = way.walk(base).stages[2].row["outputs"]["files"]["tell"]["sha256"]
    way.walk(base, dataset={"min_tokens": 1})
    settings = Settings(state_dir=base / "state")
    options = [one.facts["options"] for one in trace(first, settings) if one.kind == "count"]
    assert options == [{"min": 3}]


def test_what_is_not_known_is_refused(base: Path) -> None:
    Way().walk(base)
    settings = Settings(state_dir=base / "state")
    for name in ("nobody", "0" * 64, str(SCRIPT)):
        with pytest.raises(LineageUnknown):
            trace(name, settings)
    with pytest.raises(LineageUnknown):
        trace("0" * 64, Settings(state_dir=base / "empty"))


def test_the_order_of_a_fine_tuning_survives_the_queue(base: Path) -> None:
    wanted = spec(base, press={"levels": ["Q8_0"]}).as_json()
    order = Order.of(json.loads(json.dumps(Order(None, finetune=wanted).as_json())), Settings(state_dir=base / "state"))
    assert order.finetune == wanted
    assert (order.name, order.plan) == ("shop", None)


def test_the_service_does_a_fine_tuning_and_tells_how_it_ended(base: Path, poll: Any) -> None:
    settings = Settings(state_dir=base / "state")
    outcomes: list[Outcome] = []
    with Ledger.open(base / "state", "test") as ledger:
        runner = Runner(ledger, lambda _number, _event: None, outcomes.append)
        wanted = spec(base, dataset={"format": "qa"}).as_json()
        number = ledger.add_job(JobSpec("shop", "command", Order(None, finetune=wanted).as_json()))
        ledger.begin_job(number)
        work = runner.start(ledger.job(number), Order.of(ledger.job(number)["spec"], settings), settings)
        poll(lambda: outcomes, 60, "the job to come back")
        assert runner.finish(10)
    assert (outcomes[0].job_id, outcomes[0].exit_code) == (number, ColumnsWrong.exit_code)
    assert work.place.stage == "prepare"
    assert states(base) == [("prepare", "failed")]


def test_the_course_of_a_fine_tuning_counts_stages(base: Path) -> None:
    course = StagedCourse()
    course.begin("train", 2, 4)
    assert (course.place.share, course.place.stage) == (0.5, "train")
    course.take(Progress("steps", "", 5, 10), 1.0)
    assert (course.place.share, course.place.stage, course.place.left_s) == (0.625, "train: steps", None)
    course.take(Progress("checking", "", 0, 0), 1.0)
    assert course.place.share == 0.625
    course.begin("merge", 3, 4)
    assert course.place.share == 0.75


def test_the_calibration_text_holds_nothing_near_to_what_is_judged_by() -> None:
    def row(number: int, split: str, text: str) -> Row:
        return Row(f"r:{number}", (Turn("user", text), Turn("assistant", "It is so.")), split=split)

    same = "How do we open the green door of the old museum when it rains on Monday"
    splits = {"train": [row(1, "train", same), row(2, "train", "Where is the bakery that Bruno told us about?")],
              "test": [row(3, "test", f"{same} or Tuesday")]}
    assert [one.id for one in calibration_rows(splits)] == ["r:2"]
    with pytest.raises(FinetuneRefused, match="Every training row is near"):
        calibration_rows({**splits, "train": splits["train"][:1]})
