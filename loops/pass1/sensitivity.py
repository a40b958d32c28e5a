"""What rounding a matrix costs: first its importance-weighted error, then, where it decides, the KL divergence.

The divergence of a model with one matrix rounded grows about linearly with that matrix's squared error, but from
matrix to matrix by factors that span three orders of magnitude, so the factor is measured. And two types of about
the same error may differ twofold in divergence, so for the matrices that carry most of it the types that come into
question are measured one by one. `Costs` holds what is known and answers for the rest; `Probe` measures.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from loops.engine.divergence import BaselineStore, measure_baseline
from loops.engine.model import Context, ContextSpec, Model, open_context
from loops.engine.weights import Choice, Matrices, Weights, open_weights
from loops.engine.windows import FIRST_SCORED, ROWS, WINDOW, TextTooShort, Windows, tokens_in_windows
from loops.evaluation.text import EvaluationText
from loops.pass1.steps import Result, Steps
from state.faults import failpoint

Report = Callable[[str, float, float], None]
State = Mapping[str, Choice]  #: matrices that are rounded, and how; all others are the original's

#: The types that a recipe chooses from. Measured on the starter's 57 matrices, error against bytes: IQ4_XS, Q5_K, Q6_K
#: and Q8_0 are worth their bytes in all, IQ2_XXS to IQ3_S in 50 or more, Q4_K in 13, Q2_K in 5. Q3_K is in none, but
#: is what remains without an importance matrix. Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL are in none and left out.
TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
#: for rows that 256 does not divide
NARROW_TYPES = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_LAYER = re.compile(r"^blk\.(\d+)\.")
_LEAST = 1e-12  #: divergence, and error, below which nothing can be told apart
DECIDES = 0.004  #: share of all cost from which on a choice is measured rather than foretold
WEIGHS = 0.015  #: and from which on its alternatives are
LARGE = 1_000_000_000  #: weights
LEAST_WINDOWS = 4  #: of the text: some to measure costs on, others to compare candidates on
SAME_SIZE = 0.07  #: relative difference in bytes


def as_text(choice: Choice) -> str:
    """Return a choice as `Q4_K` or, without its importance, `Q4_K plain`."""
    return choice.ggml_type + ("" if choice.weighted else " plain")


def from_text(text: str) -> Choice:
    """Return the choice that `as_text` wrote."""
    ggml_type, _, plain = text.partition(" ")
    return Choice(ggml_type, not plain)


def kind_of(name: str) -> str:
    """Return a matrix's name without the number of its layer: `blk.3.ffn_up.weight` is an `ffn_up`."""
    return _LAYER.sub("", name).removesuffix(".weight")


def units_of(names: Sequence[str], limit: int) -> tuple[tuple[str, ...], ...]:
    """Group matrices that are to be measured together: each alone while there are at most `limit`.

    Beyond it the matrices of a kind are cut into bands of neighbouring layers, the first and the last layer
    being bands of their own: they are unlike the others in every model measured so far.

    Args:
        names: of all matrices, in any order.
        limit: most units wanted; there are never fewer than one per kind.
    """
    if len(names) <= limit:
        return tuple((name,) for name in names)
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = _LAYER.match(name)
        kinds.setdefault(kind_of(name), []).append((int(match[1]) if match else -1, name))
    layered = [kind for kind, members in kinds.items() if len(members) > 1]
    bands = max(1, (limit - len(kinds) + len(layered)) // max(1, len(layered)))
    units: list[tuple[str, ...]] = []
    for members in kinds.values():
        row = [name for _, name in sorted(members)]
        inner, count = row[1:-1], bands - 2
        if len(row) == 1 or count < 1:
            units.append(tuple(row))
            continue
        cuts = [round(place * len(inner) / min(count, len(inner))) for place in range(min(count, len(inner)) + 1)]
        units += [(row[0],), *(tuple(inner[first:last]) for first, last in pairwise(cuts)),
                  (row[-1],)]
    return tuple(units)


@dataclass
class Costs:
    """KL divergence, in nats per token, of each matrix alone at each choice: measured, else foretold.

    Attributes:
        errors: relative importance-weighted error per matrix and choice; 0 for the original's own type.
        units: how units of several were rounded, and their divergence.
        single: divergence of a matrix alone.
    """

    errors: Mapping[str, Mapping[Choice, float]]
    units: list[tuple[State, float]] = field(default_factory=list)
    single: dict[str, dict[Choice, float]] = field(default_factory=dict)

    def is_known(self, name: str, choice: Choice) -> bool:
        """Tell whether the divergence was measured, or is none."""
        return not self.errors[name][choice] or choice in self.single.get(name, {})

    def _ratios(self, name: str, weighted: bool | None = None) -> list[tuple[float, float]]:
        """Return log error and log divergence per error where they were measured, by rising error.

        Args:
            name: of the matrix; what was measured of it alone counts, else of its unit.
            weighted: only with its importance, or only without; None for both.
        """
        errors = self.errors[name]
        found = [(errors[choice], cost) for choice, cost in self.single.get(name, {}).items()
                 if weighted in (None, choice.weighted)]
        for state, cost in self.units if not self.single.get(name) else ():
            if name in state and weighted in (None, state[name].weighted):
                whole = sum(self.errors[member][choice] for member, choice in state.items())
                found.append((errors[state[name]], cost * errors[state[name]] / max(whole, _LEAST)))
        return sorted((math.log(max(error, _LEAST)), math.log(max(cost, _LEAST) / max(error, _LEAST)))
                      for error, cost in found)

    def of(self, name: str) -> dict[Choice, float]:
        """Return the cost of every choice of a matrix.

        Between two measured choices the divergence per error is interpolated in the logarithms, outside of
        them it is that of the nearest; of choices with the importance and without it apart, where both were
        measured. A matrix that nothing is known of has the median of the others.
        """
        every = self._ratios(name)
        if not every:
            others = [ratio for other in self.errors if other != name for _, ratio in self._ratios(other)]
            every = [(0.0, float(np.median(others)) if others else 0.0)]
        curves = {weighted: self._ratios(name, weighted) or every for weighted in (False, True)}
        known, costs = self.single.get(name, {}), {}
        for choice, error in self.errors[name].items():
            places, heights = zip(*curves[choice.weighted], strict=True)
            height = float(np.interp(math.log(max(error, _LEAST)), places, heights))
            costs[choice] = known.get(choice, error * math.exp(height)) if error else 0.0
        return costs


def doubtful(costs: Costs, state: State, n_bytes: Mapping[str, Mapping[Choice, int]],
             most: int) -> list[tuple[str, Choice]]:
    """Return what to measure next, at most `most`: what the allocation rests on and nobody has measured.

    That is each chosen one that carries more than its share of doubt (DECIDES of all cost), and of those that
    carry much (WEIGHS) the alternatives of about the same size, and the next ones up and down.
    """
    table = {name: costs.of(name) for name in state}
    whole = sum(table[name][choice] for name, choice in state.items()) or 1.0
    wanted: list[tuple[float, str, Choice]] = []
    for name, choice in state.items():
        share, mine = table[name][choice] / whole, n_bytes[name]
        if share >= DECIDES and not costs.is_known(name, choice):
            wanted.append((share + 1, name, choice))
        if share < WEIGHS:
            continue
        near = [other for other in mine if other != choice and abs(mine[other] / mine[choice] - 1) <= SAME_SIZE]
        below = [other for other in mine if mine[other] < mine[choice] * (1 - SAME_SIZE)]
        above = [other for other in mine if mine[other] > mine[choice] * (1 + SAME_SIZE)]
        near += sorted(below, key=lambda other: (-mine[other], table[name][other]))[:2]
        near += sorted(above, key=lambda other: (mine[other], table[name][other]))[:2]
        wanted += [(share, name, other) for other in near if not costs.is_known(name, other)]
    return [(name, choice) for _, name, choice in sorted(wanted, key=lambda entry: (-entry[0], *entry[1:]))[:most]]


class Meter:
    """Measures how far a model in memory is from its original. Use `open_meter`."""

    def __init__(self, context: Context, store: BaselineStore) -> None:
        self._context, self._store = context, store

    def divergence(self) -> float:
        """Return the mean KL divergence in nats per token over the scored half of all windows.

        Raises:
            NotFinite: the model is damaged.
        """
        windows, total = self._store.windows, 0.0
        mark = np.zeros(WINDOW, dtype=np.bool_)
        mark[FIRST_SCORED:WINDOW - 1] = True
        for index in range(windows.groups):
            group = windows.group(index)
            self._context.clear()
            logits = self._context.decode(
                group.ravel(), np.tile(np.arange(WINDOW, dtype=np.int32), len(group)),
                [(sequence,) for sequence in range(len(group)) for _ in range(WINDOW)], np.tile(mark, len(group)))
            total += float(self._store.compare(index, logits, group[:, FIRST_SCORED + 1:].ravel())[:, 2].sum())
        return max(0.0, total / windows.scored)


@contextmanager
def open_meter(model: Model, store: BaselineStore) -> Iterator[Meter]:
    """Make what measuring takes, and free it afterwards.

    Raises:
        OutOfMemory: the context cannot be made.
    """
    size = min(store.windows.per_decode, len(store.windows.tokens))
    with open_context(model, ContextSpec(size, size * WINDOW, shared=False)) as context:
        yield Meter(context, store)


@dataclass(frozen=True)
class Effort:
    """How closely to look.

    Attributes:
        units: most groups of matrices whose divergence is measured apart, twice where an importance is known; up to as
            many matrices are measured singly.
        looks: most further measurements per budget, of what the allocation rests on.
        windows: of 512 tokens, that costs are measured on.
        selection_windows: others, that candidates are compared on.
        types: that matrices may get. Types whose names begin with IQ decode more slowly on a CPU; leave them out
            where speed matters more than size.
        store_bytes: disk for the original's log-probabilities of each of the two texts.
    """

    units: int = 80
    looks: int = 48
    windows: int = 8
    selection_windows: int = 16
    types: tuple[str, ...] = TYPES + NARROW_TYPES
    store_bytes: int = 1 << 31

    @classmethod
    def for_weights(cls, count: int) -> Self:
        """Return what suits a model of so many weights: of large ones fewer windows."""
        return cls() if count < LARGE else cls(units=40, windows=4, selection_windows=8)


@dataclass(frozen=True)
class Subject:
    """What is measured, and on which text.

    Attributes:
        matrices: of the original.
        text: to be cut into windows.
        effort: how much of the text to use.
        parts: what all of it comes to in a fingerprint.
    """

    matrices: Matrices
    text: EvaluationText
    effort: Effort
    parts: Mapping[str, Any]


class Probe:
    """Measures errors and divergences, each once; the model is loaded when the first is not known yet."""

    def __init__(self, subject: Subject, steps: Steps, scratch: Path, report: Report) -> None:
        self.subject, self.steps, self.scratch, self.report = subject, steps, scratch, report
        self._held = ExitStack()
        self._meters: dict[str, Meter] = {}
        self._stores: dict[str, BaselineStore] = {}

    def release(self) -> None:
        """Free the model that is in memory, if any."""
        self._held.close()
        self._meters.clear()
        self.__dict__.pop("_weights", None)

    @cached_property
    def _weights(self) -> Weights:
        return self._held.enter_context(open_weights(self.subject.matrices))

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """The text in windows, by purpose: `costs` and `selection`, which have none in common.

        Raises:
            TextTooShort: there are fewer than four.
        """
        wanted, others = self.subject.effort.windows, self.subject.effort.selection_windows
        cut, _ = tokens_in_windows(self._weights.model, self.subject.text.text, special=self.subject.text.special,
                                   limit=0, outputs=ROWS)
        count = len(cut.tokens)
        if count < LEAST_WINDOWS:
            raise TextTooShort(f"The text for measuring has {count} windows of {WINDOW} tokens, and a recipe needs at "
                               f"least {LEAST_WINDOWS}; give more text.")
        share = min(wanted, max(2, round(count * wanted / (wanted + others))), count - 2)
        # neighbours in a text tend to be alike, so both are taken from all of it
        first = [place * count // share for place in range(share)]
        rest = [place for place in range(count) if place not in first]
        kept = min(others, len(rest))
        return {"costs": Windows(cut.tokens[first], cut.per_decode),
                "selection": Windows(cut.tokens[[rest[place * len(rest) // kept] for place in range(kept)]],
                                     cut.per_decode)}

    def store(self, purpose: str) -> BaselineStore:
        """Return the original's log-probabilities, computed where they are missing."""
        if purpose in self._stores:
            return self._stores[purpose]
        windows = self.windows[purpose]
        tokens = hashlib.sha256(windows.tokens.tobytes()).hexdigest()
        folder = self.scratch / self.steps.name("recipe-baseline", tokens=tokens, **self.subject.parts)
        store = BaselineStore(folder, windows, self._weights.model.n_vocab, self.subject.effort.store_bytes)
        if not all(store.has(index) for index in range(windows.groups)):
            self._weights.become({})
            measure_baseline(self._weights.model, store, lambda done, total: self.report("baseline", done, total))
        self._stores[purpose] = store
        return store

    def _meter(self, purpose: str) -> Meter:
        if purpose not in self._meters:
            self._meters[purpose] = self._held.enter_context(open_meter(self._weights.model, self.store(purpose)))
        return self._meters[purpose]

    def divergence(self, state: State, purpose: str = "costs") -> float:
        """Return the divergence in nats per token with these matrices rounded, on the windows of a purpose."""
        def work() -> Result:
            meter = self._meter(purpose)
            self._weights.become(state)
            return {"kld": meter.divergence()}

        found = self.steps.run("recipe-divergence", "", work, purpose=purpose, **self.subject.parts,
                               state={name: as_text(choice) for name, choice in sorted(state.items())})
        failpoint("recipe.measured")
        return float(found["kld"])

    def errors(self, name: str, choices: list[Choice]) -> dict[Choice, float]:
        """Return the relative error of each choice of a matrix, all of whose weights are finite numbers.

        Raises:
            NotFinite: they are not.
        """
        def work() -> Result:
            self.subject.matrices.check(name)
            return {as_text(choice): error for choice, error in self.subject.matrices.errors(name, choices).items()}

        found = self.steps.run("recipe-errors", "", work, matrix=name, choices=[as_text(one) for one in choices],
                               **self.subject.parts)
        return {from_text(text): float(error) for text, error in found.items()}
