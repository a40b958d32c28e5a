"""Judging a run: a large model grades the replies of the original and of every level that passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from daemon.judge import Item, estimate_tokens, judge
from daemon.providers import DEFAULT_MODELS, Connection, JudgeSpec, Provider
from loops.events import Note, Progress
from loops.pass1.plan import PressPlan
from state.faults import NightpressError
from state.ledger import Ledger, LevelState, MeasurementRow

if TYPE_CHECKING:
    from daemon.grip import Grip
    from daemon.supervisor import Show
    from loops.pass1.criteria import Ruling


class UnknownJudge(NightpressError):
    """A judge is anthropic or openai, with or without the name of a model: openai:NAME."""

    exit_code = 61


def parse_judge(text: str) -> JudgeSpec:
    """Return who is to judge.

    Raises:
        UnknownJudge: the provider is neither.
    """
    provider, _, model = text.partition(":")
    for known in get_args(Provider):
        if provider == known:
            return JudgeSpec(known, model)
    raise UnknownJudge(f"{provider!r} is no judge. Those there are: {', '.join(DEFAULT_MODELS)}.")


def check_judge(text: str) -> None:
    """Make sure that the judge can be asked, before hours of work.

    Raises:
        UnknownJudge, JudgeExtraMissing, JudgeKeyMissing: see there.
    """
    with Connection(parse_judge(text)):
        pass


@dataclass
class _Kept:
    """Grades in the ledger, as steps of the run."""

    ledger: Ledger
    run_id: int
    level: str = ""

    def get(self, key: str) -> Mapping[str, Any] | None:
        return self.ledger.steps([f"judge-{key}"]).get(f"judge-{key}")

    def put(self, key: str, value: dict[str, Any]) -> None:
        self.ledger.record_step(f"judge-{key}", self.run_id, self.level, "judge", value)


def judge_run(ledger: Ledger, plan: PressPlan, run_id: int, show: Show, grip: Grip) -> None:
    """Grade the replies of a finished run; with a gate on the judge, levels it does not pass are not passed any more.

    Each level is compared with the original on the scenarios that both replied to.

    Raises:
        UnknownJudge, JudgeExtraMissing, JudgeKeyMissing, JudgeFailed, Interrupted: what was graded is kept.
    """
    from loops.evaluation.scenarios import read_scenarios
    from loops.pass1 import criteria

    spec = parse_judge(plan.judge or "")
    emotions = {scenario.id: scenario.emotion
                for scenario in read_scenarios(Path(plan.scenarios) if plan.scenarios else None)}
    levels = [row["level"] for row in ledger.candidates(run_id) if row["state"] == LevelState.PASSED]
    replies = {level: [Item(row["scenario_id"], row["prompt"], emotions[row["scenario_id"]], row["text"])
                       for row in ledger.responses(run_id, level)] for level in ("", *levels)}
    sent, received = estimate_tokens([item for items in replies.values() for item in items])
    show(Note(f"{spec.provider} ({spec.model}) grades {sum(map(len, replies.values()))} replies: about {sent:,} tokens "
              f"sent and {received:,} received."))
    gate = next((found for found in criteria.parse_gates(plan.gates, plan.max_degradation)
                 if found.name == criteria.JUDGE), None)
    scores: dict[str, dict[str, float]] = {}
    for level, items in replies.items():
        def tell(done: int, total: int, level: str = level) -> None:
            show(Progress("judge", level, done, total))

        grades = judge(spec, items, _Kept(ledger, run_id, level), tell, grip.ending)
        scores[level] = {grade.id: grade.score for grade in grades}
        ledger.record_measurements(run_id, level, [MeasurementRow(
            "judge", fmean(scores[level].values()), n=len(items), unit=f"0..1, by {spec.provider} {spec.model}")])
        if level:
            shared = [name for name in scores[level] if name in scores[""]]
            ruling = _rule(criteria.Gate(criteria.JUDGE, gate.limit if gate else 1.0), scores, level, shared, plan.seed)
            ledger.record_measurements(run_id, level, [MeasurementRow(
                "loss_judge", ruling.loss.value, ruling.loss.low, ruling.loss.high, n=ruling.loss.n)])
            if gate:
                _apply(ledger, plan, run_id, level, ruling)


def _rule(gate: Any, scores: Mapping[str, Mapping[str, float]], level: str, shared: list[str], seed: int) -> Ruling:
    from loops.pass1 import criteria
    from loops.pass1.gate import Look

    return criteria.rule(gate, [scores[""][name] for name in shared], [scores[level][name] for name in shared],
                         Look(len(shared)), seed)


def _apply(ledger: Ledger, plan: PressPlan, run_id: int, level: str, ruling: Ruling) -> None:
    """Add the judge's ruling to a level, and take its pass back where the ruling is none."""
    from loops.pass1.gate import Verdict
    from loops.pass1.wording import describe

    row = next(found for found in ledger.candidates(run_id) if found["level"] == level)
    gates = [found for found in row["gates"] if found["gate"] != ruling.gate]
    ledger.update_level(run_id, level, gates=[*gates, ruling.as_json()])
    undecided = ruling.verdict is Verdict.INCONCLUSIVE
    if ruling.verdict is Verdict.PASS or (undecided and plan.accept_inconclusive):
        return
    told = describe(ruling)
    reason = f"Undecided, which counts as not passed: {told}." if undecided else f"{told[0].upper()}{told[1:]}."
    ledger.update_level(run_id, level, LevelState.WORKING)
    ledger.update_level(run_id, level, LevelState(ruling.verdict.value), reason=reason)
    ledger.record_event("level.judged", run_id, level, {"state": ruling.verdict.value, "reason": reason})


def choose_again(ledger: Ledger, plan: PressPlan, run_id: int) -> tuple[str | None, str]:
    """Return the level to promote among those that still pass, and why."""
    from loops.pass1.ladder import Rung, choose

    score = next((row["value"] for row in ledger.measurements(run_id)
                  if row["metric"] == "score" and not row["level"]), 1.0)
    chosen, reason = choose(plan.prefer, [
        Rung(row["level"], row["state"], row["bytes"] or 0, score * (1 - (row["degradation"] or 0.0)))
        for row in ledger.candidates(run_id)])
    return (chosen.level if chosen else None), reason
