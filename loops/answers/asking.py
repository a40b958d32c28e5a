"""Asking a model: how likely the reference answers are, what it replies, which choice it prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from loops.answers.rows import Example, parts
from loops.answers.speaker import Speaker, answer_of, joined, prompt_of, windows_of
from loops.engine.generate import Reply, Sampling
from loops.engine.score import Likelihood, Question
from loops.evaluation import choices, eq_bench
from loops.events import Progress
from loops.pass1.steps import Emit, Result, Steps

PART = 16  #: rows of one step; what an interruption costs at most


@dataclass
class Asker:
    """Asks a model, in steps: each part of the rows is one, remembered with everything that decides it.

    Attributes:
        speaker: gives the model; called when there is something to ask.
        name: of it, for people.
        emit: told how far it is.
        steps: finished work.
        sampling: of the replies.
        parts: what names the model in the fingerprint of a step, where the steps do not.
    """

    speaker: Callable[[], Speaker]
    name: str
    emit: Emit
    steps: Steps
    sampling: Sampling
    parts: Mapping[str, Any] = field(default_factory=dict)

    def _progress(self, stage: str, before: int, size: int, total: int) -> Callable[[int, int], None]:
        return lambda done, of: self.emit(Progress(
            stage, self.name, before + (size * done / of if of else 0), total))

    def likelihoods(self, rows: Sequence[Example]) -> dict[str, Result]:
        """Return, per row, how likely its reference is: `nll`, `tokens`, `foreseen`; or `too_long`."""
        found: dict[str, Result] = {}
        for part in parts(rows, PART):
            advance = self._progress("likelihoods", len(found), len(part), len(rows))
            found |= self.steps.run("likelihoods", self.name, partial(self._likelihoods, part, advance),
                                    rows=[row.as_json() for row in part], **self.parts)
        return found

    def _likelihoods(self, rows: Sequence[Example], advance: Callable[[int, int], None]) -> Result:
        speaker = self.speaker()
        asked: dict[str, list[Question]] = {}
        for row in rows:
            questions = ([answer_of(speaker, row.prompt, row.reference)] if row.answers
                         else windows_of(speaker, row.reference))
            if all(question.cells <= speaker.context for question in questions):
                asked[row.id] = questions
        scored = iter(speaker.score([question for questions in asked.values() for question in questions], advance))
        found: Result = {row.id: {"too_long": True} for row in rows}
        for name, questions in asked.items():
            each: list[Likelihood] = [next(scored)[0] for _ in questions]
            found[name] = {"nll": -sum(one.total for one in each), "tokens": sum(one.tokens for one in each),
                           "foreseen": sum(one.foreseen for one in each)}
        return found

    def replies(self, rows: Sequence[Example], stage: str, max_tokens: int = 0) -> dict[str, Result]:
        """Return the reply to each row: `text`, `ended`, `n_tokens`."""
        sampling = Sampling(**{**asdict(self.sampling), **({"max_tokens": max_tokens} if max_tokens else {})})
        found: dict[str, Result] = {}
        for part in parts(rows, PART):
            advance = self._progress(stage, len(found), len(part), len(rows))
            found |= self.steps.run(stage, self.name, partial(self._replies, part, sampling, advance),
                                    sampling=asdict(sampling), ids=[row.id for row in part],
                                    prompts=[[dict(message) for message in row.prompt] for row in part], **self.parts)
        return found

    def _replies(self, rows: Sequence[Example], sampling: Sampling, advance: Callable[[int, int], None]) -> Result:
        speaker = self.speaker()
        prompts = [prompt_of(speaker, row.prompt) for row in rows]
        by_room: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):  # a reply ends with the context; only long prompts come into that
            by_room.setdefault(max(0, min(sampling.max_tokens, speaker.context - len(prompt))), []).append(at)
        said: dict[int, Reply] = {}
        for room, places in by_room.items():
            how = Sampling(**{**asdict(sampling), "max_tokens": room})
            replies = (speaker.generate([prompts[at] for at in places], how, advance) if room
                       else [Reply("", (), ended=False) for _ in places])
            said |= dict(zip(places, replies, strict=True))
        return {row.id: {"text": said[at].text, "ended": said[at].ended, "n_tokens": len(said[at].tokens)}
                for at, row in enumerate(rows)}

    def multiple_choice(self, questions: Sequence[choices.Choice]) -> Result:
        """Return the accuracy, by sum and by character, with intervals, and what counts of each question."""
        likelihoods: list[list[Likelihood]] = []
        for at in range(0, len(questions), PART):
            part = questions[at:at + PART]
            advance = self._progress("multiple choice", at, len(part), len(questions))

            def work(part: Sequence[choices.Choice] = part, advance: Callable[[int, int], None] = advance) -> Result:
                speaker = self.speaker()
                return {"likelihoods": [[asdict(one) for one in each] for each in speaker.score(
                    [_choice(speaker, question) for question in part], advance)]}

            found = self.steps.run("multiple-choice", self.name, work,
                                   questions=[asdict(question) for question in part], **self.parts)
            likelihoods += [[Likelihood(**{**one, "per_token": tuple(one["per_token"])}) for one in each]
                            for each in found["likelihoods"]]
        accuracy = choices.summarise(questions, likelihoods)
        return {"acc": accuracy.acc, "acc_interval": list(accuracy.acc_interval), "acc_norm": accuracy.acc_norm,
                "acc_norm_interval": list(accuracy.acc_norm_interval), "n": accuracy.n,
                "correct": list(accuracy.correct), "correct_norm": list(accuracy.correct_norm)}

    def eq_bench(self, questions: Sequence[eq_bench.Question]) -> Result:
        """Return EQ-Bench's score, whether enough could be read, and the score of each question."""
        rows = [Example(question.id, "", "", ({"role": "user", "content": eq_bench.request(question)},), "")
                for question in questions]
        said = self.replies(rows, "eq-bench", eq_bench.MAX_TOKENS)
        found = eq_bench.summarise(questions, [said[question.id]["text"] for question in questions])
        return {"score": found.score, "valid": found.valid, "parsed": found.n_parsed, "n": found.n,
                "scores": list(found.scores)}


def _choice(speaker: Speaker, choice: choices.Choice) -> Question:
    """Return a question in plain text, as lm-evaluation-harness asks it."""
    prompt = choices.prompt_of(choice)
    start = speaker.tokenize(prompt, add_bos=speaker.adds_bos, special=False)
    return Question(start, tuple(joined(speaker, start, prompt, text, add_bos=speaker.adds_bos, special=False)
                                 for text in choices.continuations(choice)))
