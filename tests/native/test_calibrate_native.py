"""A run's importance matrices: collected once, compared on text kept back, and used where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration_data.catalogue import Catalogue
from calibration_data.text import CalibrationRefused, Sample, write
from loops.engine.gguf_check import check_model
from loops.engine.imatrix import CalibrationTooShort
from loops.engine.imatrix_file import read_imatrix, write_imatrix
from loops.engine.options import EngineOptions
from loops.engine.windows import Windows
from loops.events import Event, StepDone
from loops.pass1 import calibrate
from loops.pass1.bench import engine_parts
from loops.pass1.calibrate import Calibration, Matrix, collect
from loops.pass1.loop import press
from loops.pass1.plan import PressPlan
from loops.pass1.prepared import prepare
from loops.pass1.rig import Rig, Subject
from loops.pass1.source import NONE, Source
from loops.pass1.steps import Steps
from loops.starter import STARTER_GGUF

Made = tuple[Rig, list[Event]]


@pytest.fixture
def rig(tmp_path: Path, options: EngineOptions) -> Callable[[dict[str, Any]], Made]:
    """Return a function that makes a rig which knows some steps already."""
    def make(done: dict[str, Any]) -> Made:
        told: list[Event] = []
        steps = Steps(told.append, done, engine=engine_parts(options))
        model = check_model(STARTER_GGUF)
        return Rig(model, Subject("", model.path, "0" * 64), options, tmp_path / "scratch", tmp_path / "imatrices",
                   steps, told.append), told

    return make


def some(domain: str, count: int) -> tuple[Sample, ...]:
    return Catalogue().load(domain)[:count]


def steps_of(told: list[Event], kind: str) -> dict[str, Any]:
    return {event.fingerprint: dict(event.result) for event in told
            if isinstance(event, StepDone) and event.kind == kind}


def test_a_matrix_is_collected_once_and_again_where_its_file_is_gone(rig: Callable[[dict[str, Any]], Made]) -> None:
    source = Source("medical", some("medical", 8), ())
    first, told = rig({})
    matrix = collect(first, source)
    done = steps_of(told, "imatrix")
    assert len(done) == 1
    again, told = rig(done)
    assert collect(again, source).sha256 == matrix.sha256
    assert steps_of(told, "imatrix") == {}
    (again.matrices / f"{matrix.sha256}.gguf").unlink()
    assert collect(again, source).sha256 == matrix.sha256
    assert len(steps_of(told, "imatrix")) == 1
    assert collect(again, Source("medical", some("medical", 9), ())).sha256 != matrix.sha256
    for each in (first, again):
        each.release()


def test_of_a_long_text_chunks_are_taken_from_everywhere() -> None:
    tokens = np.arange(10 * 512, dtype=np.int32).reshape(10, 512)
    kept = calibrate._spread(Windows(tokens, 4), 4)
    assert kept.tokens[:, 0].tolist() == [0, 2 * 512, 5 * 512, 7 * 512]
    assert kept.per_decode == 4
    for limit in (0, 10, 11):
        assert calibrate._spread(Windows(tokens, 4), limit).tokens.shape == (10, 512)


def test_too_little_text_is_refused_with_both_figures(rig: Callable[[dict[str, Any]], Made]) -> None:
    made, _ = rig({})
    with pytest.raises(CalibrationTooShort, match=r"\d+ tokens.*1024"):
        collect(made, Source("medical", some("medical", 1), ()))
    made.release()


def plan_of(tmp_path: Path, options: EngineOptions, **changes: Any) -> PressPlan:
    return replace(PressPlan(
        model=str(STARTER_GGUF), name="starter", blobs=str(tmp_path / "blobs"), scratch=str(tmp_path / "scratch"),
        levels=("IQ2_XXS",), first_scenarios=2, max_scenarios=2, text_windows=2, seeds=0, options=options), **changes)


def pressed(plan: PressPlan) -> list[Event]:
    told: list[Event] = []
    prepared = prepare(plan, told.append)
    press(prepared, {}, {}, told.append)
    return told


def kinds(told: list[Event], name: str) -> list[Any]:
    return [event for event in told if type(event).__name__ == name]


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate and compare with a few samples: what is compared is measured all the same."""
    whole = Catalogue.load
    monkeypatch.setattr(calibrate, "COMPARED_WINDOWS", 2)
    monkeypatch.setattr(Catalogue, "load", lambda self, name: whole(self, name)[:10])


@pytest.mark.usefixtures("short_texts")
def test_a_domain_is_compared_with_the_general_text_and_with_none_and_the_best_is_used(
        tmp_path: Path, options: EngineOptions) -> None:
    told = pressed(plan_of(tmp_path, options, levels=("Q4_K_M", "Q2_K"), domains=("medical",)))
    found, = kinds(told, "Calibrated")
    assert found.level == "Q2_K"
    assert {(row["matrix"], row["text"]) for row in found.rows} == {
        (matrix, text) for matrix in ("medical", "general", NONE) for text in ("medical", "general")}
    assert len({row["kld"] for row in found.rows}) == 6
    assert not [event for event in kinds(told, "Note") if "partial" in event.message]
    mine = {row["matrix"]: row["kld"] for row in found.rows if row["text"] == "medical"}
    assert found.used == min(mine, key=lambda name: mine[name])
    used = {event.level: event.columns["imatrix"] for event in kinds(told, "LevelMeasured")
            if event.columns.get("imatrix") is not None}
    assert used["Q4_K_M"] == ("" if found.used == NONE else found.used)
    assert all(event.state in {"passed", "failed", "inconclusive", "rejected"} for event in kinds(told, "LevelDone"))


@pytest.mark.usefixtures("short_texts")
def test_a_level_that_needs_a_matrix_gets_one_without_being_asked_and_others_get_none(
        tmp_path: Path, options: EngineOptions) -> None:
    told = pressed(plan_of(tmp_path, options, levels=("Q4_K_M", "IQ2_XXS")))
    assert any("general calibration text for IQ2_XXS" in event.message for event in kinds(told, "Note"))
    used = {event.level: event.columns["imatrix"] for event in kinds(told, "LevelMeasured")
            if "imatrix" in event.columns}
    assert used == {"Q4_K_M": "", "IQ2_XXS": "general"}
    assert kinds(told, "Calibrated") == []


@pytest.mark.usefixtures("short_texts")
def test_a_level_that_cannot_be_made_without_is_compared_with_two(tmp_path: Path, options: EngineOptions) -> None:
    told = pressed(plan_of(tmp_path, options, domains=("rag",)))
    found, = kinds(told, "Calibrated")
    assert {row["matrix"] for row in found.rows} == {"rag", "general"}
    assert "IQ2_XXS cannot be made without" in found.reason


@pytest.mark.usefixtures("short_texts")
def test_a_matrix_that_is_given_is_used_for_every_level(tmp_path: Path, options: EngineOptions,
                                                        rig: Callable[[dict[str, Any]], Made]) -> None:
    made, _ = rig({})
    file = tmp_path / "imatrices" / f"{collect(made, Source('medical', some('medical', 10), ())).sha256}.gguf"
    made.release()
    told = pressed(plan_of(tmp_path, options, levels=("Q3_K_S", "IQ2_XXS"), imatrix=str(file)))
    used = {event.level: event.columns["imatrix"] for event in kinds(told, "LevelMeasured")
            if "imatrix" in event.columns}
    assert used == {"Q3_K_S": file.name, "IQ2_XXS": file.name}
    assert prepare(plan_of(tmp_path, options), told.append).opened.plan_fingerprint != prepare(
        plan_of(tmp_path, options, imatrix=str(file)), told.append).opened.plan_fingerprint


def test_a_domain_whose_text_is_measured_on_is_refused_before_any_work(tmp_path: Path, options: EngineOptions) -> None:
    sample = Catalogue().load("medical")[0]
    (tmp_path / "mine.txt").write_text("\n\n".join([sample.text] * 3), encoding="utf-8")
    with pytest.raises(CalibrationRefused, match=r"medical overlaps .* the evaluation text"):
        prepare(plan_of(tmp_path, options, domains=("medical",), text=str(tmp_path / "mine.txt")), print)


@pytest.mark.parametrize("changes", [{"levels": ("IQ2_XXS",)}, {"levels": ("Q4_K_M",), "domains": ("medical",)},
                                     {"levels": ("Q4_K_M",), "strategy": "refine"}])
def test_general_text_that_is_measured_on_is_refused_before_any_work(
        changes: dict[str, Any], tmp_path: Path, options: EngineOptions) -> None:
    own = next(sample for sample in Catalogue().load("general") if sample.id not in {
        one.id for one in Catalogue().load("medical")})
    (tmp_path / "mine.txt").write_text("\n\n".join([own.text] * 3), encoding="utf-8")
    told: list[Event] = []
    prepared = prepare(plan_of(tmp_path, options, text=str(tmp_path / "mine.txt"), **changes), told.append)
    with pytest.raises(CalibrationRefused, match=r"general overlaps .* the evaluation text"):
        press(prepared, {}, {}, told.append)
    assert kinds(told, "StepDone") == []


@pytest.mark.usefixtures("short_texts")
def test_a_file_called_general_is_compared_with_the_general_text(tmp_path: Path, options: EngineOptions) -> None:
    file = tmp_path / "general"
    file.write_text(write(some("rag", 10)), encoding="utf-8")
    told = pressed(plan_of(tmp_path, options, levels=("Q2_K",), calibration=(str(file),)))
    found, = kinds(told, "Calibrated")
    klds = {row["matrix"]: row["kld"] for row in found.rows if row["text"] == "general"}
    assert klds.keys() == {"general (file)", "general", NONE}
    assert len(set(klds.values())) == 3


def test_a_matrix_is_known_by_its_text_and_not_by_its_name(
        rig: Callable[[dict[str, Any]], Made], tmp_path: Path, options: EngineOptions) -> None:
    made, _ = rig({})
    calibration = Calibration(plan_of(tmp_path, options), made, None)
    one, other = (calibration._collected(Source("mine", some(domain, 8), ())) for domain in ("medical", "rag"))
    assert one.sha256 != other.sha256
    assert calibration._collected(Source("mine", some("medical", 8), ())) is one
    made.release()


def without_one(file: Path) -> str:
    """Take a matrix of the model out of an importance matrix; return its name."""
    whole = read_imatrix(file)
    name = "blk.0.ffn_up.weight"
    write_imatrix(file, replace(whole, entries={one: entry for one, entry in whole.entries.items() if one != name}))
    return name


@pytest.mark.usefixtures("short_texts")
def test_a_run_says_what_its_matrix_does_not_know(
        rig: Callable[[dict[str, Any]], Made], tmp_path: Path, options: EngineOptions) -> None:
    first, told = rig({})
    source = Source("medical", some("medical", 10), Catalogue().held_out("medical"))
    file = first.matrices / f"{collect(first, source).sha256}.gguf"
    first.release()
    name = without_one(file)
    made, notes = rig(steps_of(told, "imatrix"))
    calibration = Calibration(plan_of(tmp_path, options), made, source)
    found = calibration.settle("Q8_0", lambda matrix: (
        (made.original, {"bytes": 1}) if matrix is not None and matrix.name == "medical" else None))
    assert (found.used, found.judged_on) == ("medical", "medical")
    note, = {event.message for event in kinds(notes, "Note")}
    assert note.startswith("The medical importance matrix is partial: 1 of ")
    assert name in note
    assert found.reason.endswith(note)
    made.release()
    told = pressed(plan_of(tmp_path, options, levels=("Q8_0",), imatrix=str(file)))
    assert [event.message for event in kinds(told, "Note") if f"The {file.name} importance matrix is partial: 1" in
            event.message and name in event.message]


def test_the_matrix_of_the_best_is_taken_for_levels_that_need_one_though_none_did_best(
        rig: Callable[[dict[str, Any]], Made], tmp_path: Path, options: EngineOptions) -> None:
    made, _ = rig({})
    matrix = collect(made, Source("medical", some("medical", 8), ()))
    calibration = Calibration(plan_of(tmp_path, options), made, None)
    calibration._compared = {"medical": matrix, "general": Matrix("general", matrix.imatrix), NONE: None}
    rows = tuple({"matrix": name, "text": "medical", "kld": kld} for name, kld in (
        ("medical", 0.3), ("general", 0.2), (NONE, 0.1)))
    calibration.compared = calibrate.Compared("Q2_K", rows, NONE, "medical", "")
    needed = calibration.matrix_for(needed=True)
    assert needed is not None
    assert needed.name == "general"
    assert calibration.matrix_for(needed=False) is None
    made.release()
    assert read_imatrix(made.matrices / f"{matrix.sha256}.gguf").datasets == ("medical",)
    assert write(some("medical", 1)).startswith("%% domain medical")
