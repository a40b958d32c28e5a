"""Text metrics of a dataset are gates like others: a level is held to what the original answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from loops.answers.rows import Example, RowsRefused
from loops.engine.generate import Sampling
from loops.evaluation.names import METRICS
from loops.evaluation.scenarios import Scenario, read_scenarios
from loops.pass1.bench import Bench, Subject
from loops.pass1.criteria import PERPLEXITY, TEXTS, BadGate, Gate, parse_gates, rule, rule_on_answers, too_few_rows
from loops.pass1.examiner import Examiner, Findings, Instruments
from loops.pass1.gate import Look, Verdict
from loops.pass1.plan import PressPlan
from loops.pass1.report import level_rows
from loops.pass1.wording import describe

ROWS = tuple(Example(str(number), "legal", "", ({"role": "user", "content": f"What is {number}?"},), f"It is {number}.")
             for number in range(60))
SCENARIOS = read_scenarios()[:40]
PLAN = PressPlan(model="m.gguf", name="m", blobs="blobs", scratch="scratch")
ORIGINAL, LEVEL = (Subject(level, Path(), f"sha-{level}") for level in ("", "Q4_K_M"))


@dataclass
class AnsweringBench:
    """Every level answers as planned; what it replies to scenarios is as good as the original's."""

    score: Callable[[str, int], float]

    def responses(self, _subject: Subject, scenarios: Sequence[Scenario],
                  _sampling: Sampling | None = None) -> dict[str, dict[str, Any]]:
        return {one.id: {**dict.fromkeys(METRICS, 0.8), "text": "", "n_tokens": 1} for one in scenarios}

    def forced_choice(self, _subject: Subject, scenarios: Sequence[Scenario]) -> dict[str, dict[str, Any]]:
        return {one.id: {"margin": 1.0, "forced_choice": 0.9} for one in scenarios}

    def answers(self, subject: Subject, rows: Sequence[Example]) -> dict[str, dict[str, Any]]:
        return {row.id: {**dict.fromkeys(TEXTS, self.score(subject.level, at)), "tokens": 10,
                         "nll": 20 - 10 * self.score(subject.level, at)} for at, row in enumerate(rows)}


def examine(score: Callable[[str, int], float], *gates: str, rows: tuple[Example, ...] = ROWS) -> Findings:
    examiner = Examiner(replace(PLAN, gates=gates), SCENARIOS, cast("Bench", AnsweringBench(score)), ORIGINAL,
                        Instruments(rows=rows))
    examiner.measure_original()
    return examiner.examine(LEVEL, {}, 10.0, 10.0)


def losing(loss: float) -> Callable[[str, int], float]:
    return lambda level, at: (0.5 + 0.3 * (at % 7) / 7) * (1 - loss if level else 1)


def verdicts(found: Findings) -> dict[str, Verdict]:
    return {one.gate: one.verdict for one in found.rulings}


@pytest.mark.parametrize("name", TEXTS)
def test_a_level_that_answers_alike_passes_and_one_that_answers_worse_fails(name: str) -> None:
    assert verdicts(examine(losing(0.0), f"{name}:0.03"))[name] is Verdict.PASS
    found = examine(losing(0.2), f"{name}:0.03")
    assert verdicts(found)[name] is Verdict.FAIL
    assert found.verdict is Verdict.FAIL


def test_a_loss_that_sixty_rows_cannot_tell_is_undecided() -> None:
    chance = random.Random(1)
    noise = [chance.uniform(-0.3, 0.3) for _ in ROWS]
    found = examine(lambda level, at: 0.5 + (noise[at] if level else 0.0), "rougeL:0.03", "answer_perplexity:0.03")
    assert verdicts(found)["rougeL"] is verdicts(found)["answer_perplexity"] is Verdict.INCONCLUSIVE


def test_text_metrics_are_recorded_whether_they_are_gates_or_not() -> None:
    examiner = Examiner(PLAN, SCENARIOS, cast("Bench", AnsweringBench(losing(0.1))), ORIGINAL, Instruments(rows=ROWS))
    examiner.measure_original()
    found = examiner.examine(LEVEL, {}, 10.0, 10.0)
    assert not set(verdicts(found)) & set(TEXTS)
    rows = {row["metric"]: row for row in level_rows({}, examiner.scores[LEVEL.level], None)}
    assert set(TEXTS) <= set(rows)
    assert rows["rougeL"]["value"] == pytest.approx(sum(losing(0.1)("Q", at) for at in range(60)) / 60)
    assert rows[PERPLEXITY]["n"] == 60
    assert not set(TEXTS) & {row["metric"] for row in level_rows({}, replace(examiner.scores[""], answers={}), None)}


def test_the_growth_of_a_perplexity_is_that_of_all_tokens_together() -> None:
    base, level = [(10.0, 10), (60.0, 20), (5.0, 5)], [(11.0, 10), (62.0, 20), (6.0, 5)]
    loss = rule_on_answers(Gate(PERPLEXITY, 0.5), base, level).loss
    assert loss.value == pytest.approx(math.exp(79 / 35) / math.exp(75 / 35) - 1)
    assert loss.low < loss.value < loss.high
    same = rule_on_answers(Gate(PERPLEXITY, 0.0), base, base)
    assert (same.verdict, same.loss.low, same.loss.high) == (Verdict.PASS, 0, 0)
    assert rule_on_answers(Gate(PERPLEXITY, 0.5), base[:1], level[:1]).verdict is Verdict.INCONCLUSIVE  # of one row


@pytest.mark.parametrize("rows", [8, 60])
def test_the_interval_of_a_growth_holds_the_truth_as_often_as_it_says(rows: int) -> None:
    held = 0
    for seed in range(200):
        chance = random.Random(seed)
        tokens = [chance.randint(5, 60) for _ in range(rows)]
        base = [(count * chance.uniform(1, 3), count) for count in tokens]
        level = [(nll + count * chance.gauss(0.05, 0.2), count) for nll, count in base]
        loss = rule_on_answers(Gate(PERPLEXITY, 0.1), base, level).loss
        held += loss.low <= math.expm1(0.05) <= loss.high
    assert 180 <= held <= 199  # 95 % of 200 is 190, its standard deviation 3.1


def test_nothing_is_concluded_from_a_single_row() -> None:
    for level in ([0.0], [1.0]):
        assert rule(Gate("exact_match", 0.03), [1.0], level, Look(1), 0).verdict is Verdict.INCONCLUSIVE
    assert rule(Gate("exact_match", 0.03), [1.0] * 2, [1.0] * 2, Look(2), 0).verdict is Verdict.PASS


def test_rows_too_few_to_show_a_collapse_are_told() -> None:
    gates = parse_gates(["rougeL:0.03", "f1:0.05"], 0.07)
    least = math.ceil(math.log(0.025) / math.log(1 - 1.5 * 0.03))
    assert too_few_rows(gates, least) == ""
    told = too_few_rows(gates, least - 1)
    assert f"has {least - 1} rows" in told
    assert f"3 % could go unseen in fewer than {least}." in told
    assert too_few_rows(parse_gates(["empathy:0.01"], 0.07), 0) == ""  # of replies to scenarios, not to rows


def test_verdicts_in_words_say_what_a_perplexity_does() -> None:
    told = {ruling.gate: describe(ruling) for ruling in examine(losing(0.2), "answer_perplexity:0.03", "f1").rulings}
    assert told["answer_perplexity"].startswith("answer perplexity grew by ")
    assert told["f1"].startswith("f1 lost 20.0 % ")
    assert "n = 60, 7 % allowed" in told["f1"]


def test_limits_are_parsed_as_those_of_other_gates() -> None:
    assert parse_gates(["rougeL:0.03", "bleu", "overall:off", "forced_choice:off"], 0.07) == (
        Gate("rougeL", 0.03), Gate("bleu", 0.07))
    with pytest.raises(BadGate, match="Did you mean rougeL"):
        parse_gates(["rouge-L:0.03"], 0.07)


@pytest.mark.parametrize("name", TEXTS)
def test_a_gate_on_a_text_metric_needs_a_dataset(name: str) -> None:
    with pytest.raises(BadGate, match=f"The gate {name} needs --dataset"):
        Instruments.of(replace(PLAN, gates=(f"{name}:0.03",)))


def test_the_test_rows_that_can_be_answered_are_asked(tmp_path: Path) -> None:
    rows = [{"id": "1", "messages": [dict(ROWS[0].prompt[0]), {"role": "assistant", "content": "It is."}]},
            {"id": "2", "text": "A passage."}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    plan = replace(PLAN, dataset=str(tmp_path), gates=("f1:0.1",))
    assert [row.id for row in Instruments.of(plan).rows] == ["1"]
    (tmp_path / "test.json").write_text(json.dumps(rows[1:]), encoding="utf-8")
    with pytest.raises(RowsRefused, match="texts, which nobody answers"):
        Instruments.of(plan)
    assert plan.identity() == replace(plan, dataset="elsewhere").identity()  # the rows name it, not the place
