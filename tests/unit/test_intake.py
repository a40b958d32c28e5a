"""What becomes a job: a declared model, a new file in a watched folder, a deployed model; each once, by its name."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import GGML_F16, GGML_Q8_0, split, tiny_llama

from daemon.errors import OrderRefused
from daemon.intake import Folders, Order, declared, name_of, plan_for, reevaluations
from daemon.settings import ModelEntry, Settings
from loops.pass1.plan import BadSize, PressPlan
from state.faults import NightpressError
from state.manifest import BadName
from state.records import JobSpec

SETTLE_S = 60.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """One watched folder, `models`, and places of our own beside it."""
    (tmp_path / "models").mkdir()
    return Settings(state_dir=tmp_path / "state", deploy_dir=tmp_path / "deploy", watch=(tmp_path / "models",),
                    watch_settle_s=SETTLE_S)


@pytest.fixture
def watched(settings: Settings) -> Path:
    return settings.watch[0]


def original(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny_llama().write(path)


def quantized(path: Path) -> Path:
    fake = tiny_llama()
    fake.tensors = [replace(one, kind=GGML_Q8_0) if one.kind == GGML_F16 else one for one in fake.tensors]
    return fake.write(path)


def found(folders: Folders, settings: Settings, now_s: float) -> list[str]:
    return [spec.name for spec in folders.scan(settings, now_s)]


# --- names ---


@pytest.mark.parametrize(("file", "name"), [
    ("Llama-3-8B-Instruct-f16.gguf", "Llama-3-8B-Instruct"), ("tiny.BF16.gguf", "tiny"), ("tiny_FP32.gguf", "tiny"),
    ("tiny-f32-00001-of-00012.gguf", "tiny"), ("a/b c (d)-F16.gguf", "b-c-d"), ("f16.gguf", "f16"),
    ("-f16.gguf", "model"), ("tiny-f16-it.gguf", "tiny-f16-it"), ("..gguf", "model"), ("模型.gguf", "model"),
    ("x" * 200 + ".gguf", "x" * 80)])
def test_a_model_goes_by_the_name_of_its_file(file: str, name: str) -> None:
    assert name_of(Path("/models") / file) == name


def test_a_declared_name_is_taken_and_one_that_leads_elsewhere_refused(settings: Settings) -> None:
    assert plan_for(settings, ModelEntry(path=Path("/m.gguf"), name="mine")).name == "mine"
    for name in ("../x", "/x", "", "x\n", "x" * 81, "x\0"):
        with pytest.raises(BadName):
            plan_for(settings, ModelEntry(path=Path("/m.gguf"), name=name or " "))


def test_a_plan_has_what_was_declared_and_the_folders_of_the_settings(settings: Settings) -> None:
    entry = ModelEntry(path=Path("~/m-f16.gguf"), target_size="800MB", max_degradation=0.1, levels=("Q4_K_M",),
                       gates=("empathy:0.05",))
    plan = plan_for(settings, entry)
    assert (plan.model, plan.name) == (str(Path.home() / "m-f16.gguf"), "m")
    assert (plan.target_bytes, plan.max_degradation, plan.levels, plan.gates) == (
        800_000_000, 0.1, ("Q4_K_M",), ("empathy:0.05",))
    assert (plan.blobs, plan.scratch, plan.timeout_s) == (
        str(settings.blobs), str(settings.scratch), settings.level_timeout_s)


@pytest.mark.parametrize("wrong", [{"target_size": "huge"}, {"gates": ("luck:0.1",)}, {"gates": ("empathy:lots",)}])
def test_a_wrong_entry_is_refused_in_a_sentence(settings: Settings, wrong: dict[str, Any]) -> None:
    with pytest.raises(NightpressError):
        plan_for(settings, ModelEntry(path=Path("/m.gguf"), **wrong))


# --- orders ---


def test_an_order_comes_back_from_its_row(settings: Settings) -> None:
    plan = plan_for(settings, ModelEntry(path=Path("/m.gguf"), levels=("Q8_0",), gates=("empathy:0.05",)))
    for order in (Order(plan), Order(plan, promoting=False, fresh=True), Order(plan, deployed="m"),
                  Order(None, promoting=False, deployed="m")):
        assert Order.of(json.loads(json.dumps(order.as_json())), settings) == order


def test_an_order_goes_to_the_folders_of_these_settings_not_of_its_writers(settings: Settings) -> None:
    plan = PressPlan(model="/m.gguf", name="m", blobs="/elsewhere", scratch="/elsewhere")
    here = Order.of(Order(plan).as_json(), settings).plan
    assert here is not None
    assert (here.blobs, here.scratch) == (str(settings.blobs), str(settings.scratch))


@pytest.mark.parametrize("spec", [
    {"plan": {"model": "/m.gguf"}}, {"plan": {"model": "/m.gguf", "name": "m", "blobs": "", "scratch": "", "new": 1}},
    {"plan": [1]}, {"plan": "m.gguf"}, {"plan": 5}, {"plan": {"model": "/m", "name": 5, "blobs": "", "scratch": ""}},
    {"plan": {"model": "/m", "name": "m", "blobs": "", "scratch": "", "options": {"speed": 1}}},
    {"plan": {"model": "/m", "name": "m", "blobs": "", "scratch": "", "levels": 5}}])
def test_what_is_no_order_is_refused_as_one(settings: Settings, spec: dict[str, Any]) -> None:
    with pytest.raises(OrderRefused):
        Order.of(spec, settings)


def test_names_and_gates_of_an_order_are_checked(settings: Settings) -> None:
    plan = PressPlan(model="/m.gguf", name="m", blobs="", scratch="")
    for wrong in (replace(plan, name="../m"), replace(plan, gates=("luck:0.1",))):
        with pytest.raises(NightpressError) as told:
            Order.of(Order(wrong).as_json(), settings)
        assert not isinstance(told.value, OrderRefused)


def test_an_order_without_anything_is_one_without_a_plan(settings: Settings) -> None:
    assert Order.of({}, settings) == Order(None)


@pytest.mark.parametrize("wrong", [{"model": 5}, {"target_bytes": "much"}, {"levels": "Q8_0"}, {"text_windows": "all"}])
def test_an_order_with_values_of_other_types_is_refused(settings: Settings, wrong: dict[str, Any]) -> None:
    plan = PressPlan(model="/m.gguf", name="m", blobs="", scratch="").as_json()
    with pytest.raises(OrderRefused):
        Order.of({"plan": {**plan, **wrong}}, settings)


# --- declared models ---


def the_one(specs: Any) -> JobSpec:
    (spec,) = specs
    assert isinstance(spec, JobSpec)
    return spec


def test_a_declared_model_is_a_job_once_its_file_is_there(settings: Settings, tmp_path: Path) -> None:
    entry = ModelEntry(path=tmp_path / "m-f16.gguf", priority=7)
    chosen = settings.model_copy(update={"models": (entry,)})
    assert list(declared(chosen)) == []
    original(entry.path)
    spec = the_one(declared(chosen))
    assert (spec.name, spec.source, spec.priority, spec.urgent) == ("m", "settings", 7, False)
    assert Order.of(spec.spec, chosen) == Order(plan_for(chosen, entry))
    assert the_one(declared(chosen)) == spec, "asked again, it is the same job"


def test_a_changed_file_or_entry_is_another_job_and_another_priority_is_not(settings: Settings, tmp_path: Path) -> None:
    path = original(tmp_path / "m.gguf")

    def key(**facts: Any) -> str:
        return the_one(declared(settings.model_copy(update={"models": (ModelEntry(path=path, **facts),)}))).key

    first = key()
    assert key(priority=9) == first
    assert key(levels=("Q8_0",)) != first
    os.utime(path, ns=(1, 1))
    touched = key()
    assert touched != first
    with path.open("ab") as file:
        file.write(b"\0")
    os.utime(path, ns=(1, 1))
    assert key() not in (first, touched)


def test_a_folder_in_place_of_the_file_is_no_job(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    assert list(declared(settings.model_copy(update={"models": (ModelEntry(path=tmp_path / "m.gguf"),)}))) == []


def test_a_wrong_entry_is_told_even_without_its_file(settings: Settings, tmp_path: Path) -> None:
    entry = ModelEntry(path=tmp_path / "none.gguf", target_size="huge")
    with pytest.raises(BadSize):
        list(declared(settings.model_copy(update={"models": (entry,)})))


# --- deployed models ---


def test_a_deployed_model_is_verified_and_measured_again_but_never_promoted(settings: Settings,
                                                                           tmp_path: Path) -> None:
    here = PressPlan(model=str(original(tmp_path / "m.gguf")), name="m", blobs="", scratch="")
    gone, judged = replace(here, model="/none.gguf"), replace(here, judge="anthropic")
    specs = list(reevaluations({"m": {**here.as_json(), "facts": {"license": "mit"}}, "gone": gone.as_json(),
                                "judged": judged.as_json(), "unknown": None}))
    orders = [Order.of(spec.spec, settings) for spec in specs]
    assert [(spec.name, spec.source, spec.priority, spec.key) for spec in specs] == [
        (name, "reevaluation", -100, "") for name in ("m", "gone", "judged", "unknown")]
    assert [order.plan is not None for order in orders] == [True, False, False, False]
    assert [order.deployed for order in orders] == ["m", "gone", "judged", "unknown"]
    assert not any(order.promoting for order in orders)


def test_a_plan_of_another_version_does_not_keep_a_deployed_model_from_being_verified() -> None:
    assert [spec.name for spec in reevaluations({"m": {"model": "/m.gguf", "bygone": 1}})] == ["m"]


# --- watched folders ---


def test_a_new_file_is_queued_once_when_it_has_settled(settings: Settings, watched: Path) -> None:
    folders, path = Folders(), original(watched / "deep" / "er" / "mine-f16.gguf")
    assert found(folders, settings, 1000) == []
    assert found(folders, settings, 1000 + SETTLE_S - 1) == []
    spec = the_one(folders.scan(settings, 1000 + SETTLE_S))
    assert (spec.name, spec.source, spec.priority, spec.urgent) == ("mine", "folder", 0, False)
    assert Order.of(spec.spec, settings) == Order(plan_for(settings, ModelEntry(path=path)))
    assert found(folders, settings, 10_000) == []


def test_a_growing_file_is_waited_for(settings: Settings, watched: Path) -> None:
    folders, whole = Folders(), tiny_llama().to_bytes()
    path = watched / "mine.gguf"
    for part in range(1, 5):
        path.write_bytes(whole[:len(whole) * part // 4])
        assert found(folders, settings, 1000 + part * SETTLE_S) == []
    assert found(folders, settings, 1000 + 5 * SETTLE_S - 1) == []
    assert found(folders, settings, 1000 + 5 * SETTLE_S) == ["mine"]


def test_a_file_that_is_written_anew_is_another_job(settings: Settings, watched: Path) -> None:
    folders, path = Folders(), original(watched / "mine.gguf")
    keys = []
    for stamp in (1, 2):
        os.utime(path, ns=(stamp, stamp))
        assert found(folders, settings, 1000 * stamp) == []
        keys += [spec.key for spec in folders.scan(settings, 1000 * stamp + SETTLE_S)]
    assert len(set(keys)) == 2


def test_after_a_restart_the_same_file_has_the_same_key(settings: Settings, watched: Path) -> None:
    original(watched / "mine.gguf")
    keys = []
    for _ in range(2):
        folders = Folders()
        list(folders.scan(settings, 0))
        keys += [spec.key for spec in folders.scan(settings, SETTLE_S)]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_the_key_of_a_watched_file_is_not_that_of_the_declared_model(settings: Settings, watched: Path) -> None:
    path, folders = original(watched / "mine.gguf"), Folders()
    both = settings.model_copy(update={"models": (ModelEntry(path=path),)})
    list(folders.scan(both, 0))
    assert the_one(folders.scan(both, SETTLE_S)).key != the_one(declared(both)).key


def test_quantized_broken_and_unfinished_files_are_passed_over(settings: Settings, watched: Path) -> None:
    whole = tiny_llama().to_bytes()
    quantized(watched / "small-q8_0.gguf")
    (watched / "broken.gguf").write_bytes(whole[:5000])
    (watched / "noise.gguf").write_bytes(b"\xff" * 5000)
    (watched / "empty.gguf").touch()
    (watched / "folder.gguf").mkdir()
    for name in (".hidden.gguf", "mine.part.gguf", "mine.tmp.gguf", "mine.download.gguf", "mine.gguf.part", "mine.bin"):
        (watched / name).write_bytes(whole)
    folders = Folders()
    assert found(folders, settings, 0) == []
    assert found(folders, settings, SETTLE_S) == []
    original(watched / "mine.gguf")
    assert found(folders, settings, 2 * SETTLE_S) == []
    assert found(folders, settings, 3 * SETTLE_S) == ["mine"]


def test_of_a_model_in_shards_the_first_stands_for_all(settings: Settings, watched: Path, tmp_path: Path) -> None:
    split(original(tmp_path / "whole-f16.gguf"), watched, 3)
    folders = Folders()
    assert found(folders, settings, 0) == []
    spec = the_one(folders.scan(settings, SETTLE_S))
    assert (spec.name, Path(spec.spec["plan"]["model"]).name) == ("whole", "whole-f16-00001-of-00003.gguf")


def test_shards_that_arrive_one_after_the_other_are_queued_when_all_are_there(
        settings: Settings, watched: Path, tmp_path: Path) -> None:
    shards = split(original(tmp_path / "whole-f16.gguf"), tmp_path, 3)
    folders, queued = Folders(), []
    for hour, shard in enumerate(shards):
        shutil.move(shard, watched)
        queued += found(folders, settings, 3600.0 * hour)
        queued += found(folders, settings, 3600.0 * hour + SETTLE_S)
    queued += found(folders, settings, 3600.0 * 9)
    assert queued == ["whole"]


def test_what_lies_in_our_own_folders_is_never_queued(settings: Settings, tmp_path: Path) -> None:
    everything = settings.model_copy(update={"watch": (tmp_path,)})
    for place in (settings.deploy / "m" / "releases" / "1", settings.blobs / "incoming", settings.scratch,
                  settings.state_dir / "models"):
        original(place / "ours.gguf")
    original(tmp_path / "theirs.gguf")
    folders = Folders()
    list(folders.scan(everything, 0))
    assert found(folders, everything, SETTLE_S) == ["theirs"]


def test_our_own_folders_are_known_by_another_path_too(settings: Settings, watched: Path, tmp_path: Path) -> None:
    original(settings.deploy / "m" / "ours.gguf")
    link = tmp_path / "link"
    link.symlink_to(settings.deploy)
    linked = settings.model_copy(update={"watch": (link,)})
    folders = Folders()
    list(folders.scan(linked, 0))
    assert found(folders, linked, SETTLE_S) == []


def test_a_link_counts_as_the_file_it_leads_to(settings: Settings, watched: Path, tmp_path: Path) -> None:
    (watched / "mine.gguf").symlink_to(original(tmp_path / "elsewhere.gguf"))
    (watched / "nowhere.gguf").symlink_to(tmp_path / "none.gguf")
    (watched / "round.gguf").symlink_to(watched / "round.gguf")
    (watched / "loop").symlink_to(watched, target_is_directory=True)
    folders = Folders()
    list(folders.scan(settings, 0))
    assert found(folders, settings, SETTLE_S) == ["mine"]


def test_a_folder_that_is_gone_or_comes_later_does_no_harm(settings: Settings, watched: Path, tmp_path: Path) -> None:
    both = settings.model_copy(update={"watch": (tmp_path / "later", tmp_path / "a-file", watched)})
    (tmp_path / "a-file").touch()
    original(watched / "mine.gguf")
    folders = Folders()
    assert found(folders, both, 0) == []
    assert found(folders, both, SETTLE_S) == ["mine"]
    original(tmp_path / "later" / "other.gguf")
    assert found(folders, both, 2 * SETTLE_S) == []
    assert found(folders, both, 3 * SETTLE_S) == ["other"]


def test_a_file_that_vanishes_and_comes_back_has_to_settle_again(settings: Settings, watched: Path) -> None:
    folders, path = Folders(), original(watched / "mine.gguf")
    list(folders.scan(settings, 0))
    path.unlink()
    assert found(folders, settings, SETTLE_S) == []
    original(path)
    os.utime(path, ns=(5, 5))
    assert found(folders, settings, SETTLE_S + 1) == []
    assert found(folders, settings, 2 * SETTLE_S + 1) == ["mine"]
