"""The examiner: has the original and each level scored, as far as its gates ask, and rules on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from loops.answers.rows import Example, RowsRefused, read_rows
from loops.engine.generate import Sampling
from loops.evaluation.choices import Choice, read_choices
from loops.evaluation.eq_bench import Question, read_questions
from loops.evaluation.metrics import overall
from loops.evaluation.scenarios import Scenario
from loops.pass1 import criteria, gate
from loops.pass1.bench import Bench
from loops.pass1.criteria import Gate, Ruling
from loops.pass1.gate import Interval, Look, Verdict
from loops.pass1.plan import PressPlan
from loops.pass1.report import Scores, seed_rows
from loops.pass1.rig import Subject
from loops.pass1.simulation import SimulatedBench
from loops.pass1.steps import Result

TEMPERATURE, TOP_P = 0.8, 0.95  #: of the samples that tell the noise between seeds


@dataclass(frozen=True)
class Instruments:
    """The questions that a plan names besides scenarios."""

    eq_bench: tuple[Question, ...] = ()
    multiple_choice: tuple[Choice, ...] = ()
    rows: tuple[Example, ...] = ()

    @classmethod
    def of(cls, plan: PressPlan) -> Instruments:
        """Read them.

        Raises:
            EqBenchRefused, ChoicesRefused, RowsRefused: a file cannot be read.
            BadGate: a gate is on a metric that nothing measures.
        """
        for file, name, option in ((plan.eq_bench, "eq_bench", "--eq-bench"), (plan.judge, "judge", "--judge"),
                                   (plan.multiple_choice, "multiple_choice", "--multiple-choice")):
            if file is None and any(found.name == name for found in _gates(plan)):
                raise criteria.BadGate(f"The gate {name} needs {option}.")
        texts = [found.name for found in _gates(plan) if found.name in criteria.TEXTS]
        if texts and plan.dataset is None:
            raise criteria.BadGate(f"The gate {texts[0]} needs --dataset.")
        rows = tuple(row for row in read_rows(Path(plan.dataset)) if row.answers) if plan.dataset else ()
        if plan.dataset and not rows:
            raise RowsRefused(f"The test rows of {plan.dataset} are texts, which nobody answers; conversations are "
                              "needed.")
        return cls(read_questions(Path(plan.eq_bench)) if plan.eq_bench else (),
                   read_choices(Path(plan.multiple_choice)) if plan.multiple_choice else (), rows)


def _gates(plan: PressPlan) -> tuple[Gate, ...]:
    return criteria.parse_gates(plan.gates, plan.max_degradation)


@dataclass(frozen=True)
class Findings:
    """What the examination of a level came to.

    Attributes:
        rulings: of each gate that was ruled on.
        verdict: of all together.
        loss: of the overall score, whether it is a gate or not.
        score: the original's on the first look less the loss, 0 to 1.
    """

    rulings: tuple[Ruling, ...]
    verdict: Verdict
    loss: Interval
    score: float


@dataclass
class Examiner:
    """Scores and rules for one run.

    Attributes:
        plan: with gates, weights and caps.
        scenarios: all that may be used, in order.
        bench: measures.
        original: what everything is compared with.
        instruments: questions besides the scenarios.
        scores: what was scored so far, by level; '' is the original.
    """

    plan: PressPlan
    scenarios: Sequence[Scenario]
    bench: Bench | SimulatedBench
    original: Subject
    instruments: Instruments
    scores: dict[str, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gates = tuple(found for found in _gates(self.plan) if found.name != criteria.JUDGE)
        self.sizes = gate.look_sizes(self.plan.first_scenarios, len(self.scenarios), self.plan.max_scenarios)
        self.fail_tail = gate.ERROR_RATE / max(1, len(self.gates))
        limits = [found.limit for found in self.gates if found.name in (*criteria.REPLIES, criteria.WORST_SLICE)]
        strictest = min(limits, default=self.plan.max_degradation)
        self.looks = gate.plan_looks(self.sizes, strictest, gates=max(1, len(self.gates)))

    def measure_original(self) -> None:
        """Score the original on everything but later looks."""
        self._answer(self.original)
        self._speak(self.original, self.looks[0].size)

    def sample_original(self) -> tuple[Result, ...]:
        """Return rows that tell the original's noise from seed to seed; none for fewer than two seeds."""
        if self.plan.seeds < 2:
            return ()
        part, per_seed = self.scenarios[:self.looks[0].size], []
        for seed in range(1, self.plan.seeds + 1):
            sampling = Sampling(TEMPERATURE, TOP_P, seed, self.plan.max_tokens)
            found = self.bench.responses(self.original, part, sampling)
            per_seed.append([overall(found[scenario.id], self.plan.weights) for scenario in part])
        return seed_rows(per_seed)

    def examine(self, subject: Subject, measured: Mapping[str, Mapping[str, Any]], speed: float,
                original_speed: float) -> Findings:
        """Score a level and rule on it.

        What needs no text comes first; a level that fails by it is still heard on the first look, so
        that its replies can be read, but asked no more.

        Args:
            subject: the level.
            measured: its statistics as rows by metric.
            speed: its tokens per second.
            original_speed: the original's.
        """
        once = {found.name: criteria.rule_on_statistic(found, measured, speed, original_speed, self.fail_tail)
                for found in self.gates if found.name in criteria.STATISTICS}
        self._answer(subject)
        for found in self.gates:
            if found.name in ("forced_choice", "multiple_choice", *criteria.TEXTS):
                once[found.name] = self._rule_on_items(found, subject)
        spoken: dict[str, Ruling] = {}
        for look in self.looks:
            self._speak(self.original, look.size)
            self._speak(subject, look.size)
            spoken = {found.name: self._rule_on_replies(found, subject, look) for found in self.gates
                      if found.name in (*criteria.REPLIES, criteria.WORST_SLICE)}
            verdict = gate.combine([ruling.verdict for ruling in (*once.values(), *spoken.values())])
            settled = all(ruling.verdict is not Verdict.INCONCLUSIVE for ruling in spoken.values())
            if verdict is Verdict.FAIL or settled:
                break
        if verdict is not Verdict.FAIL and self.instruments.eq_bench:
            self._ask(subject)
            once |= {found.name: self._rule_on_items(found, subject) for found in self.gates
                     if found.name == "eq_bench"}
        rulings = {**once, **spoken}
        base, mine = self._paired("overall", subject)
        loss = spoken["overall"].loss if "overall" in spoken else criteria.rule(
            Gate("overall", 1.0), base, mine, look, self.plan.seed).loss
        ordered = tuple(rulings[found.name] for found in self.gates if found.name in rulings)
        first = list(self._have(self.original).replies.values())[:self.sizes[0]]
        score = fmean(one["overall"] for one in first) * (1 - loss.value)  # comparable, however many were asked
        return Findings(ordered, gate.combine([ruling.verdict for ruling in ordered]), loss, score)

    def _have(self, subject: Subject) -> Scores:
        return self.scores.get(subject.level, Scores())

    def _speak(self, subject: Subject, size: int) -> None:
        """Have replies to the first scenarios, adding to what earlier looks had."""
        replies = dict(self._have(subject).replies)
        for start, end in zip((0, *self.sizes), self.sizes, strict=False):
            part = self.scenarios[start:end]
            if end <= size and part[0].id not in replies:
                found = self.bench.responses(subject, part)
                replies |= {name: {**one, "overall": overall(one, self.plan.weights)} for name, one in found.items()}
        have = self._have(subject)
        self.scores[subject.level] = replace(have, replies=replies)

    def _answer(self, subject: Subject) -> None:
        """Have the preferences on all scenarios, the choices of questions, and the answers to the rows of a dataset."""
        have, asked = self._have(subject), self.scenarios[:self.sizes[-1]]
        choices = (self.bench.multiple_choice(subject, self.instruments.multiple_choice)
                   if self.instruments.multiple_choice else {})
        answers = self.bench.answers(subject, self.instruments.rows) if self.instruments.rows else {}
        self.scores[subject.level] = replace(have, preferences=self.bench.forced_choice(subject, asked),
                                             multiple_choice=choices, answers=answers)

    def _ask(self, subject: Subject) -> None:
        """Have EQ-Bench answered by the original, once, and by the subject."""
        for one in (self.original, subject):
            have = self._have(one)
            if not have.eq_bench:
                self.scores[one.level] = replace(have, eq_bench=self.bench.eq_bench(one, self.instruments.eq_bench))

    def _paired(self, name: str, subject: Subject) -> tuple[list[float], list[float]]:
        """Return the original's and the subject's scores of the scenarios that the subject replied to."""
        base, mine = self._have(self.original).replies, self._have(subject).replies
        both = [scenario.id for scenario in self.scenarios if scenario.id in mine]
        return [base[each][name] for each in both], [mine[each][name] for each in both]

    def _rule_on_replies(self, found: Gate, subject: Subject, look: Look) -> Ruling:
        if found.name == criteria.WORST_SLICE:
            base, mine = self._paired("overall", subject)
            look = replace(look, may_pass=look is self.looks[-1])  # earlier ones lack the small slices
            return criteria.rule_on_slices(found, self.scenarios[:look.size], base, mine, look, self.plan.seed)
        return criteria.rule(found, *self._paired(found.name, subject), look, self.plan.seed)

    def _rule_on_items(self, found: Gate, subject: Subject) -> Ruling:
        base, mine = self._have(self.original), self._have(subject)
        if found.name == criteria.PERPLEXITY:
            losses = [[(one.answers[name]["nll"], one.answers[name]["tokens"]) for name in base.answers]
                      for one in (base, mine)]
            return criteria.rule_on_answers(found, losses[0], losses[1], self.fail_tail)
        if found.name in criteria.TEXTS:
            pair = ([one[found.name] for one in base.answers.values()],
                    [mine.answers[name][found.name] for name in base.answers])
        elif found.name == "forced_choice":
            pair = ([one["forced_choice"] for one in base.preferences.values()],
                    [mine.preferences[name]["forced_choice"] for name in base.preferences])
        else:
            pair = (getattr(base, found.name)["items"], getattr(mine, found.name)["items"])
        look = Look(len(pair[0]), self.fail_tail)
        return criteria.rule(found, *pair, look, self.plan.seed)
