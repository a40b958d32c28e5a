"""The bench: builds levels and measures them, on the real engine.

Each method is a step: remembered under a fingerprint of everything that decides its result.
`loops.pass1.simulation` has the same methods without native work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from loops.answers.asking import Asker
from loops.answers.overlap import compare
from loops.answers.rows import Example
from loops.answers.speaker import EngineSpeaker
from loops.engine import generate, native, quantize
from loops.engine.chat import prompt_tokens
from loops.engine.gguf_check import CheckedModel
from loops.engine.levels import Level
from loops.engine.model import Model
from loops.engine.options import EngineOptions
from loops.engine.score import Likelihood, Question, score
from loops.evaluation import choices, eq_bench
from loops.evaluation.metrics import evaluate, identity, preference
from loops.evaluation.scenarios import Scenario
from loops.evaluation.text import EvaluationText
from loops.pass1.calibrate import Matrix, blank
from loops.pass1.gauge import Gauge
from loops.pass1.plan import PressPlan
from loops.pass1.recipe import Outcome, RecipeSearch
from loops.pass1.rig import Rig, Subject
from loops.pass1.steps import Emit, Result, Steps

ANSWER_TOKENS = 256  #: of a reply to a row of a dataset, at most
PART = 48  #: scenarios or questions of one step; what an interruption costs at most


class Bench(Rig):
    """Builds and measures with llama.cpp."""

    simulated = False

    def __init__(self, plan: PressPlan, model: CheckedModel, original: Subject, text: EvaluationText,
                 steps: Steps, emit: Emit) -> None:
        super().__init__(model, original, plan.options, Path(plan.scratch), plan.matrices, steps, emit)
        self.plan = plan
        self.sampling = generate.Sampling(max_tokens=plan.max_tokens)
        self.gauge = Gauge(self, text, plan.text_windows, plan.store_bytes)

    def _quantization(self, level: Level, matrix: Matrix | None) -> quantize.QuantizeSpec:
        return quantize.QuantizeSpec(
            self.model, level, self.plan.options, self.plan.allow_requantize,
            tool=Path(self.plan.tool) if self.plan.tool else None, imatrix=matrix.imatrix if matrix else None)

    def forecast(self, level: Level, matrix: Matrix | None = None) -> quantize.Forecast:
        """Return the exact size and types of a level, without building it."""
        return quantize.forecast(self._quantization(level, matrix))

    def forecast_with_any(self, level: Level) -> quantize.Forecast:
        """Return size and types of a level as an importance matrix that knows every tensor makes them."""
        return quantize.forecast(self._quantization(level, blank(self.model)))

    def build(self, level: Level, forecast: quantize.Forecast, matrix: Matrix | None = None) -> tuple[Subject, Result]:
        """Build a level into the blob store; return it and the facts of its file."""
        spec, blobs = self._quantization(level, matrix), Path(self.plan.blobs)
        report = self.report("quantize", level.name)

        def work() -> Result:
            self.release()
            made = quantize.quantize(spec, forecast, blobs, lambda share: report(share, 1.0))
            return {"sha256": made.sha256, "bytes": made.n_bytes, "fallbacks": made.fallbacks,
                    "tensor_types": dict(made.tensor_types), "built_s": made.seconds,
                    "imatrix": matrix.name if matrix else ""}

        def stands(result: Result) -> bool:
            file = blobs / f"{result['sha256']}.gguf"
            return file.is_file() and file.stat().st_size == result["bytes"]

        result = self.steps.run("quantize", level.name, work, stands, to=level.name,
                                model=self.original.sha256, tool=quantize.tool_identity(spec.tool),
                                imatrix=matrix.sha256 if matrix else None)
        return Subject(level.name, blobs / f"{result['sha256']}.gguf", result["sha256"]), result

    def recipe(self, name: str, budget: int, matrix: Matrix | None,
               text: EvaluationText) -> tuple[Subject, Result, Outcome]:
        """Find and build the best file within a budget; return it, its facts and what was tried.

        Args:
            name: that it goes by.
            budget: bytes of the file at most.
            matrix: importance of the columns.
            text: to measure on while searching.
        """
        self.release()
        started = time.monotonic()
        with RecipeSearch(self.model, self.options, matrix.imatrix if matrix else None, text, self.steps, self.scratch,
                          lambda stage, done, total: self.report(stage, name)(done, total),
                          sha256=self.original.sha256) as search:
            found = search.best(budget, Path(self.plan.blobs))
        types = {tensor.name: tensor.ggml_type for tensor in self.model.tensors} | dict(found.winner.recipe.types)
        facts = {"sha256": found.winner.sha256, "bytes": found.path.stat().st_size, "fallbacks": 0,
                 "tensor_types": types, "built_s": time.monotonic() - started, "imatrix": matrix.name if matrix else ""}
        return Subject(name, found.path, found.winner.sha256), facts, found

    def finish(self) -> None:
        """Free the model and the disk that only an unfinished run needs."""
        self.release()
        self.gauge.discard()

    def store_bytes(self) -> int:
        """Return the disk that the original's log-probabilities will take at most."""
        return self.gauge.store_bytes()

    def perplexity(self) -> Result:
        """Return the original's own perplexity; computing it fills the store."""
        return self.gauge.perplexity()

    def divergence(self, subject: Subject) -> Result:
        """Return every statistic of `Divergence` for a level or, as a check, for the original itself."""
        return self.gauge.divergence(subject)

    def forced_choice(self, subject: Subject, scenarios: Sequence[Scenario]) -> dict[str, Result]:
        """Return, per scenario id, the margin of the empathic reply in nats per token and its probability."""
        def prefer(part: Sequence[Scenario]) -> Result:
            model = self.loaded(subject)
            likelihoods = score(model, [_question(model, scenario) for scenario in part],
                                self.report("forced choice", subject.level))
            return {scenario.id: {"margin": empathic.mean - dismissive.mean,
                                  "forced_choice": preference(empathic.mean - dismissive.mean)}
                    for scenario, (empathic, dismissive) in zip(part, likelihoods, strict=True)}

        found: dict[str, Result] = {}
        for at in range(0, len(scenarios), PART):
            part = scenarios[at:at + PART]
            found |= self.steps.run("forced-choice", subject.level, partial(prefer, part), subject=subject.sha256,
                                    scenarios=[asdict(scenario) for scenario in part])
        return found

    def responses(self, subject: Subject, scenarios: Sequence[Scenario],
                  sampling: generate.Sampling | None = None) -> dict[str, Result]:
        """Return, per scenario id, the reply with its metrics; replies are greedy unless a sampling is given."""
        chosen = sampling or self.sampling
        said = self._say(subject, [(scenario.id, scenario.prompt) for scenario in scenarios], chosen)

        def judge() -> Result:
            import numpy as np

            model = self.loaded(self.original)
            likelihoods = score(model, [
                Question(prompt_tokens(model, scenario.prompt),
                         (np.asarray(said[scenario.id]["tokens"], dtype=np.int32),))
                for scenario in scenarios], self.report("fluency", subject.level))
            return {scenario.id: {
                **evaluate(scenario, said[scenario.id]["text"], likelihood.mean, ended=said[scenario.id]["ended"]),
                "mean_log_likelihood": likelihood.mean,
            } for scenario, (likelihood,) in zip(scenarios, likelihoods, strict=True)}

        judged = self.steps.run("judge-replies", subject.level, judge, subject=subject.sha256, metrics=identity(),
                                original=self.original.sha256, sampling=asdict(chosen),
                                scenarios=[asdict(scenario) for scenario in scenarios])
        return {name: {**judged[name], "text": said[name]["text"], "n_tokens": len(said[name]["tokens"])}
                for name in said}

    def _say(self, subject: Subject, prompts: Sequence[tuple[str, str]], sampling: generate.Sampling) -> Result:
        """Return text, tokens and whether it ended of the reply to each named prompt."""
        def speak() -> Result:
            model = self.loaded(subject)
            replies = generate.generate(model, [prompt_tokens(model, prompt) for _, prompt in prompts], sampling,
                                        self.report("replies", subject.level))
            return {name: {"text": reply.text, "tokens": list(reply.tokens), "ended": reply.ended}
                    for (name, _), reply in zip(prompts, replies, strict=True)}

        return self.steps.run("replies", subject.level, speak, subject=subject.sha256, sampling=asdict(sampling),
                              prompts=[prompt for _, prompt in prompts], ids=[name for name, _ in prompts])

    def eq_bench(self, subject: Subject, questions: Sequence[eq_bench.Question]) -> Result:
        """Return EQ-Bench's score, the share of answers that could be read, and per item 0 to 1."""
        sampling = replace(self.sampling, max_tokens=eq_bench.MAX_TOKENS)
        texts: list[str] = []
        for at in range(0, len(questions), PART):
            part = questions[at:at + PART]
            said = self._say(subject, [(question.id, eq_bench.request(question)) for question in part], sampling)
            texts += [said[question.id]["text"] for question in part]
        found = eq_bench.summarise(questions, texts)
        return {"score": found.score, "valid": found.valid, "parsed": found.n_parsed, "items": list(found.paired)}

    def multiple_choice(self, subject: Subject, questions: Sequence[choices.Choice]) -> Result:
        """Return the accuracy, by sum and per character, with intervals, and per item 0 or 1."""
        def answer(part: Sequence[choices.Choice]) -> Result:
            model = self.loaded(subject)
            return {"likelihoods": [[asdict(one) for one in likelihoods] for likelihoods in score(
                model, [_choices(model, question) for question in part],
                self.report("multiple choice", subject.level))]}

        rows: list[list[Likelihood]] = []
        for at in range(0, len(questions), PART):
            part = questions[at:at + PART]
            found = self.steps.run("multiple-choice", subject.level, partial(answer, part), subject=subject.sha256,
                                   questions=[asdict(question) for question in part])
            rows += [[Likelihood(**one) for one in likelihoods] for likelihoods in found["likelihoods"]]
        accuracy = choices.summarise(questions, rows)
        return {"acc": accuracy.acc, "acc_interval": list(accuracy.acc_interval), "acc_norm": accuracy.acc_norm,
                "acc_norm_interval": list(accuracy.acc_norm_interval),
                "items": [float(right) for right in accuracy.correct_norm]}

    def answers(self, subject: Subject, rows: Sequence[Example]) -> dict[str, Result]:
        """Return, per row of a dataset, the text metrics of the reply, and how likely the reference answer is.

        The scores of `loops.answers.overlap.compare`, `nll` and `tokens` of the reference, and `token_accuracy`, the
        share of its tokens that were the most probable. Rows that do not fit into the context are left out.
        """
        asker = Asker(lambda: EngineSpeaker(self.loaded(subject)), subject.level, self.emit, self.steps,
                      replace(self.sampling, max_tokens=ANSWER_TOKENS), {"subject": subject.sha256})
        likely = asker.likelihoods(rows)
        fitting = [row for row in rows if not likely[row.id].get("too_long")]
        said = asker.replies(fitting, "answers")
        return {row.id: {**compare(said[row.id]["text"], row.reference).scores,
                         "nll": likely[row.id]["nll"], "tokens": likely[row.id]["tokens"],
                         "token_accuracy": likely[row.id]["foreseen"] / max(1, likely[row.id]["tokens"])}
                for row in fitting}

    def speed(self, subject: Subject) -> float:
        """Return tokens per second of one chat; measured once per file, on whatever the machine then did."""
        def work() -> Result:
            return {"tokens_per_s": generate.measure_speed(self.loaded(subject))}

        return float(self.steps.run("speed", subject.level, work, subject=subject.sha256)["tokens_per_s"])


def _question(model: Model, scenario: Scenario) -> Question:
    return Question(prompt_tokens(model, scenario.prompt), tuple(
        model.tokenize(reply, add_bos=False, special=False) for reply in (scenario.empathic, scenario.dismissive)))


def _choices(model: Model, choice: choices.Choice) -> Question:
    """Cut prompt and answers where the tokens of the whole allow it, as lm-evaluation-harness does."""
    prompt = choices.prompt_of(choice)
    start = model.tokenize(prompt, add_bos=True, special=False)
    answers = []
    for text in choices.continuations(choice):
        whole = model.tokenize(prompt + text, add_bos=True, special=False)
        joined = len(whole) > len(start) and bool((whole[:len(start)] == start).all())
        answers.append(whole[len(start):] if joined else model.tokenize(text, add_bos=False, special=False))
    return Question(start, tuple(answers))


def engine_parts(options: EngineOptions) -> dict[str, Any]:
    """Return what of the engine enters every fingerprint: the build and how it runs."""
    return {"build": native.build().id, **asdict(options), "threads": options.thread_count}
