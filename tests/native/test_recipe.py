"""Recipes: what is tried in memory is what the file will hold, the search goes on where it was killed, and it pays."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, dequantize
from numpy.typing import NDArray
from tiny_models import TinyModel

from loops.engine.divergence import BaselineStore, measure_baseline, measure_divergence
from loops.engine.gguf_check import check_model
from loops.engine.imatrix import collect_imatrix, cut_chunks
from loops.engine.imatrix_file import Entry, Imatrix, ImatrixRefused, write_imatrix
from loops.engine.levels import level_named
from loops.engine.model import NotFinite, load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import AlreadyQuantized, QuantizeSpec, forecast, quantize
from loops.engine.tensors import ggml
from loops.engine.weights import Choice, Matrices, NothingToQuantize, Weights, open_weights
from loops.engine.windows import TextTooShort, cut_windows
from loops.evaluation.text import EvaluationText
from loops.events import StepDone
from loops.pass1.calibrate import blank
from loops.pass1.menu import BudgetImpossible, Menu
from loops.pass1.recipe import RecipeSearch
from loops.pass1.sensitivity import Effort
from loops.pass1.steps import Steps
from loops.starter import STARTER_GGUF
from loops.starter.corpus import dialogue, render

FEW = Effort(units=6, looks=4, windows=2, selection_windows=2, types=("Q2_K", "Q4_K", "Q6_K", "Q4_0"))
EXPERTS = 2


class TinyExperts(TinyModel):
    """Two experts per layer, both used for every token."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in super().shapes().items():
            if name.endswith(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")):
                found[name.replace(".weight", "_exps.weight")] = (EXPERTS, *shape)
                found[f"{name[:name.index('ffn')]}ffn_gate_inp.weight"] = (EXPERTS, self.width)
            else:
                found[name] = shape
        return found

    def _describe(self, writer: GGUFWriter) -> None:
        super()._describe(writer)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(EXPERTS)


def dialogues(seed: int, count: int) -> EvaluationText:
    rng = random.Random(seed)
    return EvaluationText("".join("<s>" + render(dialogue(rng).turns) for _ in range(count)), True, "dialogues")


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    return dialogues(778, 60)


MakeTiny = Callable[[str], tuple[Path, Imatrix]]
MODELS = {"plain": TinyModel(layers=2, feed_forward=256, vocabulary=512),
          "single": TinyModel(layers=1, feed_forward=256, vocabulary=512, dtype="F32"),
          "experts": TinyExperts(layers=1, feed_forward=256, vocabulary=512, seed=4),
          "narrow": TinyModel(layers=1, width=192, heads=6, vocabulary=512, dtype="BF16", untied=True)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, options: EngineOptions, text: EvaluationText) -> MakeTiny:
    """Return a model by name and its importance matrix, its output included; each is made once."""
    folder, made = tmp_path_factory.mktemp("tiny"), dict[str, tuple[Path, Imatrix]]()

    def make(name: str) -> tuple[Path, Imatrix]:
        if name not in made:
            path = MODELS[name].write(folder / f"{name}.gguf")
            with load_model(path, options) as model:
                chunks = cut_chunks(model, text.text, special=True, limit=2)
                made[name] = path, collect_imatrix(model, chunks, folder / name, with_output=True)
        return made[name]

    return make


def search(path: Path, imatrix: Imatrix | None, text: EvaluationText, options: EngineOptions, folder: Path,
           effort: Effort = FEW, steps: Steps | None = None) -> RecipeSearch:
    return RecipeSearch(check_model(path), options, imatrix, text, steps or Steps(lambda _event: None, {}),
                        folder / "scratch", lambda *_told: None, effort=effort)


def held(weights: Weights, name: str) -> NDArray[Any]:
    """Return the matrix as it lies in the engine's memory, shape (rows, columns)."""
    kinds = {"F16": np.float16, "F32": np.float32}
    place, kind = next(iter(weights.places[name])), kinds[weights.matrices.tensors[name].ggml_type]
    found = np.empty(ggml().n_bytes(place) // np.dtype(kind).itemsize, dtype=kind)
    ggml().read(place, found.ctypes.data_as(ctypes.c_void_p), 0, found.nbytes)
    return found.reshape(-1, weights.matrices.shape(name)[2])


STATE = {"attn_q": Choice("Q4_K", True), "attn_k": Choice("Q4_K", False), "attn_v": Choice("IQ3_XXS", True),
         "attn_output": Choice("Q2_K", True), "ffn_down": Choice("Q2_K", True), "ffn_up": Choice("Q2_K", False),
         "ffn_down_exps": Choice("IQ3_XXS", True), "ffn_up_exps": Choice("IQ4_XS", True)}


@pytest.mark.parametrize("name", ["plain", "single", "experts"])
def test_what_is_tried_in_memory_is_what_the_file_holds(
        name: str, tiny: MakeTiny, options: EngineOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loops.engine.weights.SLAB_WEIGHTS", 20_000)  # a matrix is rounded in several parts
    path, imatrix = tiny(name)
    checked = check_model(path)
    state = {f"blk.0.{kind}.weight": choice for kind, choice in STATE.items()
             if any(tensor.name == f"blk.0.{kind}.weight" for tensor in checked.tensors)}
    kept = {one: entry for one, entry in imatrix.entries.items() if one not in state or state[one].weighted}
    spec = QuantizeSpec(checked, level_named("Q8_0"), options, imatrix=Imatrix(kept, (), 2, 512),
                        types={one: choice.ggml_type for one, choice in state.items()})
    made = quantize(spec, forecast(spec), tmp_path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(made.path).tensors}
    with open_weights(Matrices(checked, options, imatrix)) as weights:
        before = {one: held(weights, one) for one in weights.matrices.tensors}
        weights.become(state)
        for one in state:
            tensor, mine = tensors[one], held(weights, one)
            stored = dequantize(tensor.data, tensor.tensor_type).reshape(mine.shape).astype(mine.dtype)
            np.testing.assert_array_equal(mine, stored, err_msg=one)
            assert (mine != before[one]).any()
        weights.become({})
        assert all((held(weights, one) == values).all() for one, values in before.items())


def test_the_divergence_in_memory_is_that_of_the_file(
        options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    """But for the activations, which a file's matrices meet in 8 bits."""
    with search(STARTER_GGUF, None, text, options, tmp_path) as found:
        rivals = found._rivals(4_100_000)
        foretold = {name: found._probe.divergence(found._state(rivals[name])) for name in ("Q3_K_L", "Q3_K_M")}
        store = found._probe.store("costs")
        for name, estimate in foretold.items():
            path, _ = found._make(rivals[name], tmp_path)
            with load_model(path, options) as model:
                measured = measure_divergence(model, store, tmp_path / name).kld
            assert estimate == pytest.approx(measured, rel=0.15)
            assert measured > 0.002


def test_a_model_as_it_is_has_no_divergence(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny("plain")
    with search(path, imatrix, text, options, tmp_path) as found:
        assert found._probe.divergence({"blk.0.ffn_up.weight": Choice("Q2_K", True)}) > 1e-4
        assert found._probe.divergence({}) == pytest.approx(0, abs=1e-9)
        costs, selection = (found._probe.windows[purpose].tokens for purpose in ("costs", "selection"))
        assert not (costs[:, None] == selection[None]).all(axis=2).any()


@pytest.mark.parametrize("name", ["plain", "narrow", "experts"])
def test_a_recipe_takes_the_bytes_it_says_and_the_stock_file_is_the_stock_file(
        name: str, tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny(name)
    with search(path, imatrix, text, options, tmp_path) as found:
        whole = forecast(QuantizeSpec(found.model, level_named("Q8_0"), options)).n_bytes
        for budget in (whole * 2 // 3, whole * 4 // 3):  # the larger one has room for some in the original's type
            for recipe in found.solve(budget):
                assert forecast(recipe.spec(found.model, options, imatrix)).n_bytes == recipe.n_bytes <= budget
                assert budget - recipe.n_bytes < 0.05 * budget
        level, rival = next(iter(found._rivals(whole).items()))
        spec = QuantizeSpec(found.model, level_named(level), options)
        assert found._make(rival, tmp_path)[1] == quantize(spec, forecast(spec), tmp_path).sha256


def test_only_types_that_can_be_made_are_choices(tiny: MakeTiny, options: EngineOptions) -> None:
    types = ("IQ2_XS", "Q4_K", "Q4_0", "F16")
    path, imatrix = tiny("plain")
    name, checked = "blk.0.ffn_up.weight", check_model(path)
    assert Matrices(checked, options, imatrix).choices(name, types) == [
        Choice("IQ2_XS", True), Choice("Q4_K", True), Choice("Q4_K", False), Choice("Q4_0", True),
        Choice("Q4_0", False), Choice("F16", False)]
    assert Matrices(checked, options, None).choices(name, types) == [
        Choice("Q4_K", False), Choice("Q4_0", False), Choice("F16", False)]
    narrow, _ = tiny("narrow")
    assert Matrices(check_model(narrow), options, None).choices("blk.0.attn_q.weight", types) == [
        Choice("Q4_0", False), Choice("F16", False)]


def test_the_stock_level_is_the_answer_where_no_recipe_does_better(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny("plain")
    budget = forecast(QuantizeSpec(check_model(path), level_named("Q4_K_M"), options)).n_bytes
    poor = Effort(units=6, looks=0, windows=2, selection_windows=2, types=("Q2_K",))  # and Q8_0: a bad mixture
    with search(path, imatrix, text, options, tmp_path, poor) as found:
        outcome = found.best(budget, tmp_path / "blobs")
    assert outcome.winner.name.startswith(outcome.winner.recipe.level)
    assert outcome.path == tmp_path / "blobs" / f"{outcome.winner.sha256}.gguf"
    assert [file for file in (tmp_path / "blobs").rglob("*") if file.is_file()] == [outcome.path]
    assert outcome.tried[0] == outcome.winner
    losers = [one.kld for one in outcome.tried if one.name == "recipe"]
    assert losers[0] is not None
    assert outcome.winner.kld is not None
    assert outcome.winner.kld <= losers[0]
    level = outcome.winner.recipe.level
    spec = QuantizeSpec(check_model(path), level_named(level), options,
                        imatrix=imatrix if "imatrix" in outcome.winner.name else None)
    assert quantize(spec, forecast(spec), tmp_path / "stock").sha256 == outcome.winner.sha256


SEARCH = """
import json, sys
from pathlib import Path
from loops.engine.gguf_check import check_model
from loops.engine.imatrix_file import read_imatrix
from loops.engine.options import EngineOptions
from loops.evaluation.text import EvaluationText
from loops.pass1.recipe import RecipeSearch
from loops.pass1.sensitivity import Effort
from loops.pass1.steps import Steps
model, matrix, text, folder, budget = *map(Path, sys.argv[1:5]), int(sys.argv[5])
journal = folder / "steps.jsonl"
lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
with journal.open("a") as log:
    def emit(event):
        log.write(json.dumps([event.fingerprint, event.result]) + "\\n")
        log.flush()
    effort = Effort(units=6, looks=4, windows=2, selection_windows=2, types=("Q2_K", "Q4_K", "Q6_K"))
    with RecipeSearch(check_model(model), EngineOptions(threads=1, extra_buffers=False), read_imatrix(matrix),
                      EvaluationText(text.read_text(), True, ""), Steps(emit, dict(lines)), folder / "scratch",
                      lambda *_told: None, effort=effort) as search:
        outcome = search.best(budget, folder / "blobs")
print(json.dumps([outcome.winner.recipe.as_json(), outcome.winner.kld, outcome.winner.sha256, outcome.path.exists(),
                  [[one.name, one.estimate, one.kld] for one in outcome.tried]]))
"""


def search_in_child(tiny: MakeTiny, text: EvaluationText, folder: Path, fault: str = "") -> tuple[int, str]:
    path, imatrix = tiny("plain")
    folder.mkdir(exist_ok=True)
    write_imatrix(folder / "matrix.gguf", imatrix)
    (folder / "text.txt").write_text(text.text, encoding="utf-8")
    budget = forecast(QuantizeSpec(check_model(path), level_named("Q4_K_M"), EngineOptions(threads=1))).n_bytes
    environment = {**os.environ, "NIGHTPRESS_TESTING": "1", "NIGHTPRESS_FAILPOINT": fault}
    done = subprocess.run([sys.executable, "-c", SEARCH, path, folder / "matrix.gguf", folder / "text.txt", folder,
                           str(budget)], capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout


def test_a_search_killed_at_any_point_goes_on_and_comes_to_the_same(
        tiny: MakeTiny, text: EvaluationText, tmp_path: Path) -> None:
    whole = search_in_child(tiny, text, tmp_path / "at once")
    for fault in ("recipe.measured@3:kill", "recipe.measured@12:kill", "quantize.renamed@2:kill"):
        assert search_in_child(tiny, text, tmp_path / "killed", fault)[0] == -signal.SIGKILL, fault
    assert search_in_child(tiny, text, tmp_path / "killed") == whole
    steps = (tmp_path / "killed" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)[0] for line in steps]
    assert len(names) == len(set(names))  # nothing was measured twice
    kept = {file.name for file in (tmp_path / "killed" / "blobs").rglob("*") if file.is_file()}
    assert f"{json.loads(whole[1])[2]}.gguf" in kept
    assert len(kept) <= 2  # the other may stay where the search was killed before it could be taken away


def test_a_budget_that_cannot_be_met_is_refused_with_both_figures(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny("plain")
    with search(path, imatrix, text, options, tmp_path) as found:
        smallest = found.menu.smallest
        with pytest.raises(BudgetImpossible, match=rf"^1,000 bytes are too few .* takes {smallest:,}\. ") as caught:
            found.solve(1000)
        with pytest.raises(BudgetImpossible, match=f"{path.stat().st_size:,}"):
            found.solve(path.stat().st_size)
        assert found.solve(smallest)[-1].n_bytes == smallest
    assert caught.value.exit_code == 79


@pytest.mark.parametrize("name", ["plain", "narrow", "experts"])
def test_the_smallest_size_is_known_before_a_matrix_is_collected(
        name: str, tiny: MakeTiny, options: EngineOptions) -> None:
    path, imatrix = tiny(name)
    model = check_model(path)
    known, foreseen = (Menu(model, options, one, Effort().types).smallest
                       for one in (imatrix, blank(model, with_output=True).imatrix))
    assert foreseen == known


def broken(path: Path, tensor: str, value: float) -> Path:
    next(one for one in GGUFReader(path, "r+").tensors if one.name == tensor).data[-1, -1] = value
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_found_wherever_it_lies(
        value: float, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path = broken(TinyModel(layers=1, vocabulary=512).write(tmp_path / "m.gguf"), "token_embd.weight", value)
    with search(path, None, text, options, tmp_path) as found, pytest.raises(NotFinite, match=r"token_embd\.weight"):
        found.measure()


def test_what_cannot_be_searched_is_refused_in_a_sentence(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny("plain")
    spec = QuantizeSpec(check_model(path), level_named("Q4_0"), options)
    made = quantize(spec, forecast(spec), tmp_path)
    with pytest.raises(AlreadyQuantized):
        search(made.path, None, text, options, tmp_path)
    other = Imatrix({"blk.9.x": Entry(np.ones(4, dtype=np.float32), np.ones(1, dtype=np.int64))}, (), 1, 512)
    with pytest.raises(ImatrixRefused, match="another model"):
        search(path, other, text, options, tmp_path)
    short = EvaluationText(text.text[:3000], True, "")
    with search(path, imatrix, short, options, tmp_path) as found, pytest.raises(TextTooShort, match="at least"):
        found.measure()
    tiny_rows = TinyModel(layers=1, width=8, heads=1, feed_forward=8, vocabulary=512).write(tmp_path / "rows.gguf")
    with pytest.raises(NothingToQuantize, match=r"rows\.gguf has no matrix"):
        search(tiny_rows, None, text, options, tmp_path)


def test_the_output_matrix_is_collected_when_asked_for_and_changes_no_other(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    for name, output in (("plain", "token_embd.weight"), ("narrow", "output.weight")):
        path, whole = tiny(name)
        with load_model(path, options) as model:
            chunks = cut_chunks(model, text.text, special=True, limit=2)
            without = collect_imatrix(model, chunks, tmp_path / name)
        assert set(whole.entries) - set(without.entries) == {output}
        assert all((whole.entries[one].sums == entry.sums).all() for one, entry in without.entries.items())
        assert whole.entries[output].counts.tolist() == [2 * 512]
        assert 0.5 < float(whole.entries[output].weights().mean()) < 2  # it meets what a norm of weights 1 leaves


def test_the_number_of_threads_changes_no_recipe(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText) -> None:
    path, imatrix = tiny("plain")
    found = []
    for threads in (1, 2):
        with search(path, imatrix, text, replace(options, threads=threads), tmp_path / str(threads)) as one:
            found.append(one.solve(path.stat().st_size // 3))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_recipe_beats_stock_of_the_same_size_on_text_it_never_saw(options: EngineOptions, tmp_path: Path) -> None:
    checked = check_model(STARTER_GGUF)
    with load_model(STARTER_GGUF, options) as model:
        chunks = cut_chunks(model, dialogues(777, 60).text, special=True)
        imatrix = collect_imatrix(model, chunks, tmp_path / "matrix", with_output=True)
        windows = cut_windows(model, dialogues(779, 60).text, special=True)
        store = BaselineStore(tmp_path / "held-out", windows, model.n_vocab, 1 << 30)
        measure_baseline(model, store)

    def measured(path: Path) -> float:
        with load_model(path, options) as model:
            return measure_divergence(model, store, tmp_path / path.stem).kld

    stock = []
    for matrix in (None, imatrix):
        spec = QuantizeSpec(checked, level_named("Q3_K_L"), options, imatrix=matrix)
        made = quantize(spec, forecast(spec), tmp_path / "stock")
        stock.append(measured(made.path))
    coarse = Effort(units=24, looks=8, windows=2, selection_windows=4,
                    types=("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"))
    with search(STARTER_GGUF, imatrix, dialogues(778, 60), options, tmp_path, coarse) as found:
        outcome = found.best(made.n_bytes, tmp_path / "blobs")
    assert outcome.winner.name == "recipe"
    assert outcome.path.stat().st_size <= made.n_bytes
    assert measured(outcome.path) < 0.6 * min(stock)


def test_every_measurement_is_a_step_and_a_finished_search_loads_nothing(
        tiny: MakeTiny, options: EngineOptions, tmp_path: Path, text: EvaluationText,
        monkeypatch: pytest.MonkeyPatch) -> None:
    path, imatrix = tiny("plain")
    told: list[StepDone] = []
    steps = Steps(lambda event: told.append(event) if isinstance(event, StepDone) else None, {})
    budget = path.stat().st_size // 3
    with search(path, imatrix, text, options, tmp_path, steps=steps) as found:
        first = found.best(budget, tmp_path / "blobs")
    done: Mapping[str, Any] = {event.fingerprint: event.result for event in told}
    monkeypatch.setattr("loops.pass1.sensitivity.open_weights", None)
    monkeypatch.setattr("loops.pass1.recipe.load_model", None)
    with search(path, imatrix, text, options, tmp_path, steps=Steps(lambda _event: None, done)) as again:
        assert again.best(budget, tmp_path / "blobs") == first
