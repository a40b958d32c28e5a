"""Pass 1: baseline, forecast, ladder, gate, choice.

`loops.pass1.prepared` finds out whether the run can be done at all; `press` does it. Neither knows a database or
a process: what happens is told through events, and what is done already is handed in.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from loops.engine import native
from loops.engine.levels import Level
from loops.engine.quantize import Forecast
from loops.events import (
    Calibrated,
    Finished,
    LevelDone,
    LevelMeasured,
    LevelPlanned,
    LevelStarted,
    Note,
)
from loops.pass1.bench import Bench, engine_parts
from loops.pass1.calibrate import Calibration, Matrix
from loops.pass1.criteria import too_few_rows
from loops.pass1.examiner import Examiner, Findings
from loops.pass1.forecast import check_disk, check_memory, check_time
from loops.pass1.gate import Verdict
from loops.pass1.ladder import PASSED, Rung, choose, gap_to_refine, next_level, next_size
from loops.pass1.plan import TargetImpossible
from loops.pass1.prepared import Prepared
from loops.pass1.report import Scores, baseline_rows, level_rows, response_rows
from loops.pass1.rig import Subject
from loops.pass1.simulation import SimulatedBench
from loops.pass1.source import general, refuse_overlap
from loops.pass1.steps import Emit, Result, Steps
from loops.pass1.wording import describe
from state.faults import NightpressError
from state.files import DiskFull, StateUnwritable

TOLD_TRUNCATION = 0.01  #: a truncation that hides more than this share of a divergence is told


class Press:
    """One run under way."""

    def __init__(self, prepared: Prepared, done: Mapping[str, Result],
                 settled: Mapping[str, Mapping[str, str]], emit: Emit) -> None:
        """Set up a run.

        Args:
            prepared: what to do.
            done: finished steps by fingerprint.
            settled: levels not to be tried, each with `state` and `reason`: those that killed the
                worker, ran out of time or are quarantined.
            emit: told every event.
        """
        self.prepared, self.plan, self.emit, self.settled = prepared, prepared.plan, emit, settled
        self.steps = Steps(emit, done, engine=engine_parts(prepared.plan.options))
        self.original = Subject("", prepared.model.path, prepared.opened.model_sha256)
        self.bench: Bench | SimulatedBench = (
            SimulatedBench(self.plan, prepared.model, self.original) if self.plan.simulate else
            Bench(self.plan, prepared.model, self.original, prepared.text, self.steps, emit))
        self.calibration = (Calibration(self.plan, self.bench, prepared.source)
                            if isinstance(self.bench, Bench) else None)
        self.needing: set[str] = set()  # levels that cannot be made without an importance matrix
        self.examiner = Examiner(self.plan, prepared.scenarios, self.bench, self.original, prepared.instruments)
        self.rungs: list[Rung] = []

    def run(self) -> None:
        """Press the model; ends with a `Finished` event.

        Raises:
            TargetImpossible: every level is larger than the target.
            CannotFinish, DiskFull: the forecast says so.
        """
        forecasts = self._forecast()
        order = [name for name, found in sorted(forecasts.items(), key=lambda item: -item[1].n_bytes)
                 if found.n_bytes <= self.plan.target_bytes]
        self._refuse_impossible(forecasts, order)
        if self.calibration is not None and self.calibration.reads_general(needed=bool(self.needing & set(order))):
            refuse_overlap(general(), self.prepared.text, self.prepared.scenarios)
        if isinstance(self.bench, Bench):
            check_memory(self.prepared.model, ignore=self.plan.ignore_forecast)
            check_disk(Path(self.plan.blobs), [forecasts[name].n_bytes for name in order], self.bench.store_bytes(),
                       compared=3 * forecasts[order[-1]].n_bytes if self.prepared.source else 0)
        seconds = self._baseline()
        note = check_time(self.plan, self.prepared.model.file_bytes, seconds,
                          min(len(order), self.plan.max_iterations))
        for told in filter(None, (note, too_few_rows(self.examiner.gates, len(self.prepared.instruments.rows)))):
            self.emit(Note(told))
        self._calibrate(order)
        ended: dict[str, str] = {}
        built = 0
        while (name := next_level(self.plan.strategy, order, ended)) is not None:
            if built >= self.plan.max_iterations:
                break
            if name in self.settled:
                self._end(name, self.settled[name]["state"], self.settled[name]["reason"], forecasts[name].n_bytes)
            else:
                built += 1
                self._level(self._level_of(name), forecasts[name])
            ended[name] = self.rungs[-1].state
        for name in order:
            if name not in ended:
                why = (f"The limit of {self.plan.max_iterations} levels was reached."
                       if built >= self.plan.max_iterations else "It cannot change the choice any more.")
                self._end(name, "skipped", why, forecasts[name].n_bytes)
        if self.plan.strategy == "refine":
            self._refine()
        self._report_baseline()  # later looks measured more of the original
        self.bench.finish()
        chosen, reason = choose(self.plan.prefer, self.rungs)
        self.emit(Finished(chosen.level if chosen else None, reason, {
            "looks": list(self.examiner.sizes), "reused_steps": self.steps.reused, "simulated": self.plan.simulate}))

    def _level_of(self, name: str) -> Level:
        return next(level for level in self.prepared.ladder if level.name == name)

    def _forecast(self) -> dict[str, Forecast]:
        forecasts = {}
        for ordinal, level in enumerate(self.prepared.ladder):
            try:
                found = self._first_forecast(level)
            except native.EngineFailed as problem:
                self.emit(LevelPlanned(level.name, ordinal, 0, 0.0, 0, {}))
                self.emit(LevelDone(level.name, "error", str(problem)))
                continue
            bits = 8 * found.n_bytes / self.prepared.model.n_parameters
            self.emit(LevelPlanned(level.name, ordinal, found.n_bytes, bits, found.fallbacks,
                                   dict(found.tensor_types)))
            if found.needs_imatrix:
                self.emit(LevelDone(level.name, "skipped", f"The importance matrix that was given does not know "
                                    f"{found.unknown}, which {level.name} needs."))
                continue
            if found.n_bytes > self.plan.target_bytes:
                self.emit(LevelDone(level.name, "oversize", self._oversize(found)))
            forecasts[level.name] = found
        return forecasts

    def _first_forecast(self, level: Level) -> Forecast:
        """Return what a level will be, before there is any matrix but one that the user gave."""
        if self.calibration is not None and self.calibration.given is not None:
            return self.bench.forecast(level, self.calibration.given)
        found = self.bench.forecast(level)
        if found.needs_imatrix:
            self.needing.add(level.name)
        return self.bench.forecast_with_any(level) if found.needs_imatrix or self.prepared.source else found

    def _oversize(self, found: Forecast) -> str:
        return f"{found.n_bytes:,} bytes are over the target of {self.plan.target_bytes:,}."

    def _calibrate(self, order: list[str]) -> None:
        """Find out which importance matrix does best at the lowest level that is to be tried."""
        if self.calibration is None or self.calibration.given is not None:
            return
        if self.prepared.source is None:
            if self.needing & set(order):
                self.emit(Note("An importance matrix is made from the general calibration text for "
                               f"{', '.join(name for name in order if name in self.needing)}; --domain takes another."))
            return
        for name in reversed(order):
            if name in self.settled:
                continue
            self.emit(LevelStarted(name))
            try:
                found = self.calibration.settle(name, partial(self._built, name))
            except native.EngineFailed as problem:
                self.emit(Note(f"Importance matrices could not be compared at {name}: {problem}"))
                continue
            self.emit(Calibrated(found.level, found.used, found.reason, found.rows))
            self.emit(Note(found.reason))
            return

    def _built(self, name: str, matrix: Matrix | None) -> tuple[Subject, Result] | None:
        """Build a level with a matrix; None where it cannot be made so."""
        level = self._level_of(name)
        forecast = self.bench.forecast(level, matrix)
        return None if forecast.needs_imatrix else self.bench.build(level, forecast, matrix)

    def _refuse_impossible(self, forecasts: Mapping[str, Forecast], order: list[str]) -> None:
        if order:
            return
        if not forecasts:
            raise TargetImpossible("None of the levels asked for can be built: the engine refuses each, or the "
                                   "importance matrix does not know enough for it. Ask for others with --levels.")
        smallest = min(forecasts.values(), key=lambda found: found.n_bytes)
        raise TargetImpossible(
            f"No level is small enough: the smallest, {smallest.level}, takes {smallest.n_bytes / 1e6:,.1f} MB, and "
            f"the target is {self.plan.target_bytes / 1e6:,.1f} MB. Raise --target-size or ask for smaller levels.")

    def _baseline(self) -> float:
        """Measure the original on the first look; return the seconds that took."""
        started, reused = time.monotonic(), self.steps.reused
        self.bench.perplexity()
        self.examiner.measure_original()
        seconds = time.monotonic() - started
        self._report_baseline()
        self.emit(LevelMeasured("", self.examiner.sample_original()))
        return 0.0 if self.steps.reused > reused else seconds

    def _report_baseline(self) -> None:
        self._report(self.original, baseline_rows(
            self.bench.perplexity(), self.examiner.scores[""], self.bench.speed(self.original)))

    def _report(self, subject: Subject, rows: tuple[Result, ...], columns: Mapping[str, Any] | None = None) -> None:
        scored = self.examiner.scores.get(subject.level)
        said = response_rows(self.prepared.scenarios, scored) if scored else ()
        self.emit(LevelMeasured(subject.level, rows, said, columns or {}))

    def _end(self, name: str, state: str, reason: str, n_bytes: int, score: float = 0.0,
             columns: Mapping[str, Any] | None = None) -> None:
        self.rungs.append(Rung(name, state, n_bytes, score))
        self.emit(LevelDone(name, state, reason, columns or {}))

    def _level(self, level: Level, forecast: Forecast) -> None:
        """Build and measure one level; an engine that refuses costs this level only."""
        self.emit(LevelStarted(level.name))
        started = time.monotonic()
        with self._surviving(level.name, forecast.n_bytes):
            matrix = self.calibration.matrix_for(needed=level.name in self.needing) if self.calibration else None
            forecast = self.bench.forecast(level, matrix) if matrix is not None or self.prepared.source else forecast
            if forecast.n_bytes > self.plan.target_bytes:
                self._end(level.name, "oversize", self._oversize(forecast), forecast.n_bytes)
                return
            self._examine(*self.bench.build(level, forecast, matrix), started)

    @contextmanager
    def _surviving(self, name: str, n_bytes: int) -> Iterator[None]:
        """Let what goes wrong cost the level of this name only, but for a disk that is full."""
        try:
            yield
        except (DiskFull, StateUnwritable):
            raise
        except NightpressError as problem:
            self._end(name, "error", str(problem), n_bytes)

    def _examine(self, subject: Subject, facts: Result, started: float) -> None:
        """Measure what was built, rule on it, and tell."""
        name = subject.level
        facts = {**facts, "bits_per_weight": 8 * facts["bytes"] / self.prepared.model.n_parameters}
        self._report(subject, (), facts)
        divergence = self.bench.divergence(subject)
        speed = self.bench.speed(subject)
        missing = divergence.get("kld_truncation", 0.0)
        if missing > TOLD_TRUNCATION * divergence["kld"]:
            self.emit(Note(f"The KL divergence of {name} is about {missing:.2g} nats too low: the original's "
                           "log-probabilities were cut to fit --baseline-disk."))
        if divergence["kld"] > self.plan.max_kld:
            self._report(subject, level_rows(divergence, Scores(), None), {"tokens_per_s": speed})
            self._end(name, "rejected", f"Its KL divergence of {divergence['kld']:.3f} nats is over "
                      f"{self.plan.max_kld:g}, so nothing was generated.", facts["bytes"])
            return
        measured = {row["metric"]: row for row in level_rows(divergence, Scores(), None)}
        found = self.examiner.examine(subject, measured, speed, self.bench.speed(self.original))
        loss = found.loss
        columns = {"degradation": loss.value, "degradation_low": loss.low, "degradation_high": loss.high,
                   "n_scenarios": loss.n, "tokens_per_s": speed, "measured_s": time.monotonic() - started,
                   "gates": [ruling.as_json() for ruling in found.rulings]}
        self._report(subject, level_rows(divergence, self.examiner.scores[name], loss, found.rulings), columns)
        self._end(name, *self._verdict(found), facts["bytes"], found.score)

    def _refine(self) -> None:
        """Try recipes between the smallest level that passed and the largest below it that did not."""
        gap = gap_to_refine(self.rungs)
        if not isinstance(self.bench, Bench) or self.calibration is None or gap is None:
            self.emit(Note("There is nothing to refine: no level passed with one below it that did not."))
            return
        tried: list[tuple[int, bool]] = []
        while (budget := next_size(gap, tried)) is not None:
            state = self._recipe(budget, len(self.prepared.ladder) + len(tried))
            if state is None:
                return
            tried.append((budget, state == PASSED))

    def _recipe(self, budget: int, ordinal: int) -> str | None:
        """Find, build and measure the best recipe of a size; return how it ended, None where a level does as well."""
        assert isinstance(self.bench, Bench)  # noqa: S101 - nothing is refined in a simulation
        assert self.calibration is not None  # noqa: S101
        bits = 8 * budget / self.prepared.model.n_parameters
        name = f"RECIPE-{bits:.3f}"
        self.emit(LevelPlanned(name, ordinal, budget, bits, 0, {}))
        if name in self.settled:
            self._end(name, self.settled[name]["state"], self.settled[name]["reason"], budget)
            return self.rungs[-1].state
        self.emit(LevelStarted(name))
        started = time.monotonic()
        with self._surviving(name, budget):
            matrix = self.calibration.matrix_for(needed=True)
            subject, facts, found = self.bench.recipe(name, budget, matrix, self.calibration.text_to_measure())
            if found.winner.name != "recipe":
                self._end(name, "skipped", f"No recipe of {budget:,} bytes does better than {found.winner.name}.",
                          budget)
                return None
            self._examine(subject, facts, started)
        return self.rungs[-1].state

    def _verdict(self, found: Findings) -> tuple[str, str]:
        """Return the state and the reason: the gates that decided it."""
        deciding = [ruling for ruling in found.rulings if ruling.verdict is found.verdict]
        told = "; ".join(map(describe, deciding))
        if found.verdict is Verdict.INCONCLUSIVE and self.plan.accept_inconclusive:
            return "passed", f"Undecided, and accepted on request: {told}."
        if found.verdict is Verdict.INCONCLUSIVE:
            return found.verdict.value, f"Undecided, which counts as not passed: {told}."
        return found.verdict.value, f"{told[0].upper()}{told[1:]}."


def press(prepared: Prepared, done: Mapping[str, Result], settled: Mapping[str, Mapping[str, str]],
          emit: Emit) -> None:
    """Carry out a prepared run; see `Press`."""
    try:
        Press(prepared, done, settled, emit).run()
    finally:
        _forget_stores(Path(prepared.plan.scratch), older_than_s=7 * 86_400)


def _forget_stores(scratch: Path, older_than_s: float) -> None:
    """Remove checkpoints that no run has touched for a week."""
    now = time.time()
    for folder in scratch.glob("*"):
        if folder.is_dir() and now - folder.stat().st_mtime > older_than_s:
            shutil.rmtree(folder, ignore_errors=True)
