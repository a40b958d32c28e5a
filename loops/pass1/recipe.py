"""Recipes: every matrix gets its own type, under a budget of bytes, so that the measured KL divergence is lowest.

    measure   what each choice costs each matrix: the importance-weighted error of all, the divergence of each alone
    solve     the exact best allocation by these costs; what it rests on is measured more closely, and solved again
    best      the allocations and the stock levels that fit, on text that served for nothing else; then really made

The divergences of matrices rounded alone add up: on the starter, their sum foretold that of whole recipes within
10 % at every size from 3.4 to 5.9 bits per weight. So the costs are measured once for all budgets.

What it takes, calculated for 7 billion weights in F16 with a vocabulary of 32,000. Memory: the original without a
memory map (14 GB), a context of 2,048 tokens (1 GB with 32 layers of 4,096), logits (130 MB), and per thread 1 MiB
of weights in three forms. Disk: the original's log-probabilities, 0.4 GB. Time: at most 40 units twice and 48 looks of
4 windows, and about 8 candidates of 8, are 4.2 PFLOP of decoding, 35 minutes at 2 TFLOP/s; rounding takes 0.1 to
1.5 microseconds of a core per weight and type, for the candidates together about as long as quantizing the whole
model 8 times, most of it for the IQ types. Every measurement is a step that is never repeated, so the search can be
stopped at any point and taken up again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from loops.engine import ladders
from loops.engine.divergence import measure_divergence
from loops.engine.gguf_check import CheckedModel
from loops.engine.imatrix_file import Imatrix
from loops.engine.levels import UNQUANTIZED, level_named
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
from loops.engine.quantize import Forecast, QuantizeSpec, forecast, quantize
from loops.engine.weights import Choice
from loops.evaluation.text import EvaluationText
from loops.fingerprint import sha256_of_files
from loops.pass1.allocation import allocate
from loops.pass1.menu import Menu
from loops.pass1.sensitivity import (
    Costs,
    Effort,
    Probe,
    Report,
    State,
    Subject,
    doubtful,
    units_of,
)
from loops.pass1.steps import Result, Steps

_PROBED = ("Q3_K", "Q4_0", "Q8_0")  #: what a matrix is first measured at: the first of them that fits it
_PROBED_PLAIN = ("Q4_K", "Q4_0", "Q8_0")  #: and without its importance
#: levels that a recipe's file may be named after
_BASES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
#: levels that a recipe has to beat: all but those of models trained for them, and of mixtures of experts
_RIVALS = tuple(name for name in ladders.FULL if name not in {*ladders.TRAINED_FOR, "MXFP4_MOE"})
RIVALS_TRIED = 3  #: the largest that fit, each with the importance matrix and without
BATCH = 8  #: looks between two allocations


@dataclass(frozen=True)
class Recipe:
    """A type for every matrix.

    Attributes:
        types: by name of the matrix; all other tensors stay as they are.
        plain: matrices that are quantized without their importance, although it is known: it was measured to harm.
        level: whose name the file carries; the stock level that comes nearest in size.
        n_bytes: exact size of the file.
        predicted_kld: in nats per token on the text that costs were measured on; None for a stock level.
    """

    types: Mapping[str, str]
    plain: tuple[str, ...]
    level: str
    n_bytes: int
    predicted_kld: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return a dict that json can write."""
        return {**asdict(self), "types": dict(self.types), "plain": list(self.plain)}

    def importance(self, imatrix: Imatrix | None) -> Imatrix | None:
        """Return the importance matrix without what this recipe leaves out; None where nothing is left."""
        if imatrix is None:
            return None
        left = {name: entry for name, entry in imatrix.entries.items() if name not in set(self.plain)}
        return Imatrix(left, imatrix.datasets, imatrix.chunks, imatrix.chunk_size) if left else None

    def spec(self, model: CheckedModel, options: EngineOptions, imatrix: Imatrix | None) -> QuantizeSpec:
        """Return how to make the file; imatrix is the one that the recipe was found with."""
        return QuantizeSpec(model, level_named(self.level), options, imatrix=self.importance(imatrix),
                            types=self.types)


@dataclass(frozen=True)
class Candidate:
    """A recipe, or a stock level written as one, and how it did.

    Attributes:
        name: `recipe`, or the level's with `, imatrix` where it was made with it.
        recipe: what it is.
        estimate: KL divergence in memory, without rounded activations, on the selection windows.
        kld: of the file really made, on the same; None where it was not made.
        sha256: of that file, '' where it was not made.
    """

    name: str
    recipe: Recipe
    estimate: float
    kld: float | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Outcome:
    """The best file within the budget: what it is, where, and every candidate, those with a file first, best first."""

    winner: Candidate
    path: Path
    tried: tuple[Candidate, ...]


class RecipeSearch:
    """Looks for recipes of one model. Use it in a `with` block, which frees the model."""

    def __init__(self, model: CheckedModel, options: EngineOptions, imatrix: Imatrix | None, text: EvaluationText,
                 steps: Steps, scratch: Path, report: Report, *, effort: Effort | None = None,
                 sha256: str = "") -> None:
        """Prepare; nothing is loaded before something has to be measured.

        Args:
            model: an F32, F16 or BF16 original.
            options: of the engine.
            imatrix: its importance matrix, if there is one.
            text: to measure on; not what will be reported on.
            steps: what was measured before; the engine's identity must be common to all.
            scratch: for the original's log-probabilities.
            report: told a stage, what is done and of how much.
            effort: how closely to look.
            sha256: of the model's files; computed where it is not given.

        Raises:
            AlreadyQuantized, NothingToQuantize, ImatrixRefused: the model or the matrix cannot be used.
        """
        self.model, self.options, self.imatrix = model, options, imatrix
        self.steps, self.scratch, self.report = steps, scratch, report
        self.effort = effort or Effort.for_weights(model.n_parameters)
        self.menu = Menu(model, options, imatrix, self.effort.types)
        self.matrices, self.choices, self.sizes = self.menu.matrices, self.menu.choices, self.menu.sizes
        self._parts: dict[str, Any] = {
            "model": sha256 or sha256_of_files(model.shards), "imatrix": imatrix.sha256 if imatrix else None,
            "text": text.sha256, "special": text.special, "store_bytes": self.effort.store_bytes,
            "windows": [self.effort.windows, self.effort.selection_windows]}
        self._probe = Probe(Subject(self.matrices, text, self.effort, self._parts), steps, scratch, report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_problem: object) -> None:
        self._probe.release()

    # --- measuring

    @cached_property
    def _costs(self) -> Costs:
        errors: dict[str, dict[Choice, float]] = {}
        for count, (name, choices) in enumerate(self.choices.items(), 1):
            errors[name] = self._probe.errors(name, choices)
            self.report("errors", count, len(self.choices))
        costs, units = Costs(errors), units_of(list(self.choices), self.effort.units)
        for count, unit in enumerate(units, 1):
            for state in self._first(unit):
                found = self._probe.divergence(state)
                if not found:
                    continue  # nothing reads it, such as heads for several tokens at once: it is taken for average
                if len(unit) == 1:
                    costs.single.setdefault(unit[0], {})[state[unit[0]]] = found
                else:
                    costs.units.append((state, found))
            self.report("sensitivity", count, len(units))
        return costs

    def _first(self, unit: tuple[str, ...]) -> list[State]:
        """Return how a unit is first measured: with its importance and, where there is any, without as well."""
        known = {name for name in unit if name in self.matrices.importance}

        def nearest(name: str, probed: tuple[str, ...], weighted: bool) -> Choice:
            return min(self.choices[name], key=lambda choice: (
                choice.weighted != weighted, (*probed, choice.ggml_type).index(choice.ggml_type)))

        with_it = {name: nearest(name, _PROBED, name in known) for name in unit}
        return [with_it, {name: nearest(name, _PROBED_PLAIN, False) for name in unit}] if known else [with_it]

    def measure(self) -> Costs:
        """Measure what every choice costs: all errors, and the divergence of every unit at one or two.

        Raises:
            NotFinite: the model is damaged.
            TextTooShort: the text is not enough for four windows.
        """
        return self._costs

    # --- solving

    def _allocate(self, costs: Costs, budget: int) -> tuple[dict[str, Choice], float]:
        table = {name: costs.of(name) for name in self.choices}
        groups = [([self.sizes[name][choice] for choice in choices], [table[name][choice] for choice in choices])
                  for name, choices in self.choices.items()]
        found = allocate(groups, budget - self.menu.fixed_bytes)
        return {name: choices[place] for (name, choices), place
                in zip(self.choices.items(), found.chosen, strict=True)}, found.cost

    def solve(self, budget: int) -> list[Recipe]:
        """Return candidates within budget: the first by what `measure` found, the last by the closest look.

        What carries most of the cost of an allocation is measured at the very choices that come into question,
        and the allocation is repeated, until nothing is in doubt or all looks are used up. It does not depend on
        what was solved before.

        Args:
            budget: of the whole file in bytes.

        Raises:
            BudgetImpossible: the budget is too small or too large.
        """
        self.menu.check(budget)
        costs, looked = deepcopy(self._costs), 0
        state, cost = self._allocate(costs, budget)
        found = [self._recipe(state, cost)]
        while wanted := doubtful(costs, state, self.sizes, min(BATCH, self.effort.looks - looked)):
            for name, choice in wanted:
                costs.single.setdefault(name, {})[choice] = self._probe.divergence({name: choice})
                looked += 1
                self.report("refine", looked, self.effort.looks)
            state, cost = self._allocate(costs, budget)
        last = self._recipe(state, cost)
        return found if (last.types, last.plain) == (found[0].types, found[0].plain) else [*found, last]

    def _recipe(self, state: State, cost: float | None) -> Recipe:
        types = {name: choice.ggml_type for name, choice in state.items()}
        n_bytes = self.menu.fixed_bytes + sum(self.matrices.n_bytes(*item) for item in types.items())
        plain = tuple(name for name, choice in state.items() if name in self.matrices.importance
                      and not choice.weighted and choice.ggml_type not in UNQUANTIZED)
        level = min(_BASES, key=lambda base: abs(self._stock(base, weighted=False).n_bytes - n_bytes))
        return Recipe(types, plain, level, n_bytes, cost)

    # --- verifying

    def _stock(self, level: str, *, weighted: bool) -> Forecast:
        key = (level, weighted)
        if key not in self._forecasts:
            self._forecasts[key] = forecast(QuantizeSpec(self.model, level_named(level), self.options,
                                                         imatrix=self.imatrix if weighted else None))
        return self._forecasts[key]

    @cached_property
    def _forecasts(self) -> dict[tuple[str, bool], Forecast]:
        return {}

    def _rivals(self, budget: int) -> dict[str, Recipe]:
        """Return the largest stock levels within budget, with the importance matrix and without, as recipes."""
        stock = {level: self._stock(level, weighted=False) for level in _RIVALS}
        fitting = sorted((level for level, made in stock.items() if made.n_bytes <= budget
                          and (self.imatrix or not made.needs_imatrix)), key=lambda level: -stock[level].n_bytes)
        found: dict[str, Recipe] = {}
        for level in fitting[:RIVALS_TRIED]:
            for weighted in (False, True) if self.imatrix else (False,):
                made = self._stock(level, weighted=weighted)
                if made.needs_imatrix or made.n_bytes > budget:
                    continue
                types = {name: made.tensor_types[name] for name in self.matrices.tensors}
                found[level + (" with imatrix" if weighted else "")] = Recipe(
                    types, () if weighted else tuple(self.matrices.importance), level, made.n_bytes)
        return found

    def _state(self, recipe: Recipe) -> State:
        return {name: Choice(ggml_type, name in self.matrices.importance and name not in recipe.plain
                             and ggml_type not in UNQUANTIZED) for name, ggml_type in recipe.types.items()}

    def best(self, budget: int, blobs: Path) -> Outcome:
        """Return the best file within budget, verified and measured, in the blob store.

        Recipes and stock levels are compared in memory on the selection windows; the best of either is really
        made and measured on them. Where the stock level does no worse, it is the answer.

        Args:
            budget: of the whole file in bytes.
            blobs: where the file will be, named by its sha256.

        Raises:
            BudgetImpossible: the budget is too small or too large.
            DiskFull: what was measured is kept.
        """
        named = [("recipe", recipe) for recipe in self.solve(budget)] + list(self._rivals(budget).items())
        tried = []
        for count, (name, recipe) in enumerate(named, 1):
            tried.append(Candidate(name, recipe, self._probe.divergence(self._state(recipe), "selection")))
            self.report("compare", count, len(named))
        tried.sort(key=lambda one: one.estimate)
        finalists = [next(one for one in tried if one.name == "recipe")]
        finalists += [one for one in tried if one.name != "recipe"][:1]
        before = {file.name for file in blobs.glob("*.gguf")}
        made = [self._made(one, blobs) for one in finalists]
        winner = min(reversed(made), key=lambda one: one.kld or 0.0)  # of equals the stock level, which comes last
        path = blobs / f"{winner.sha256}.gguf"
        if not path.is_file():  # it was measured in an earlier run
            self._make(winner.recipe, blobs)
        for one in made:  # what is left behind where this is killed is a blob like others, under the disk budget
            if one.sha256 != winner.sha256 and f"{one.sha256}.gguf" not in before:
                (blobs / f"{one.sha256}.gguf").unlink(missing_ok=True)
        rest = [one for one in tried if one not in finalists]
        return Outcome(winner, path, tuple(sorted(made, key=lambda one: one.kld or 0.0) + rest))

    def _make(self, recipe: Recipe, folder: Path) -> tuple[Path, str]:
        self._probe.release()
        spec = recipe.spec(self.model, self.options, self.imatrix)
        made = quantize(spec, forecast(spec), folder, lambda share: self.report("quantize", share, 1.0))
        return made.path, made.sha256

    def _made(self, candidate: Candidate, folder: Path) -> Candidate:
        """Return candidate with the divergence of its file."""
        def work() -> Result:
            store = self._probe.store("selection")
            path, sha256 = self._make(candidate.recipe, folder)
            rows = self.scratch / self.steps.name("recipe-rows", sha256=sha256, **self._parts)
            with load_model(path, self.options) as model:
                found = measure_divergence(model, store, rows, lambda done, total: self.report("verify", done, total))
            shutil.rmtree(rows, ignore_errors=True)
            return {"sha256": sha256, "kld": found.kld}

        recipe = replace(candidate.recipe, predicted_kld=None)
        found = self.steps.run("recipe-file", candidate.name, work, recipe=recipe.as_json(), **self._parts)
        return replace(candidate, kld=float(found["kld"]), sha256=str(found["sha256"]))
