"""What a worker does of an evaluation: a model answers the rows, and is timed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from loops.answers.rows import Example, parts, read_rows
from loops.answers.speaker import EngineSpeaker, Speaker, answer_of, joined, prompt_of, windows_of
from loops.engine import native
from loops.engine.generate import Reply, Sampling
from loops.engine.gguf_check import check_model
from loops.engine.model import Tokens, load_model
from loops.engine.options import EngineOptions
from loops.engine.score import Likelihood, Question
from loops.evaluation import choices, eq_bench
from loops.events import Event, Progress
from loops.finetune.model_folder import PickledWeights, read_folder, stage
from loops.fingerprint import sha256_of_files
from loops.pass1.journal import journaling, read_journal
from loops.pass1.steps import Result, Steps
from state.faults import NightpressError

Emit = Callable[[Event], None]
PART = 16  #: rows of one step; what an interruption costs at most
TIMED_PROMPTS, TIMED_TOKENS = 8, 32  #: of one round of timing


class NothingToMeasure(NightpressError):
    """No row fits into the model's context; shorten the rows, or take a model with a larger one."""

    exit_code = 122


@dataclass
class Held:
    """A model that is loaded when it is first asked.

    Attributes:
        kind: `gguf` or `folder`.
        path: of it.
        name: for people.
        options: of the engine.
        emit: told how far loading is.
    """

    kind: str
    path: Path
    name: str
    options: EngineOptions
    emit: Emit
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _speaker: Speaker | None = None

    @classmethod
    @contextlib.contextmanager
    def of(cls, job: Mapping[str, Any], emit: Emit) -> Iterator[Held]:
        """Give the model of a job, and free it afterwards."""
        held = cls(job["kind"], Path(job["path"]), job["name"], EngineOptions(**job["options"]), emit)
        with held._stack:
            yield held

    def identity(self, steps: Steps) -> str:
        """Return the sha256 of what the model is, remembered while its files do not change."""
        if self.kind == "gguf":
            files = check_model(self.path).shards
        else:
            folder = read_folder(self.path)
            files = (*folder.safetensors, *(file for file in sorted(self.path.iterdir()) if file.is_file()
                                            and file.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken")))

        def work() -> Result:
            return {"sha256": sha256_of_files(tuple(files), lambda done, total: self.emit(
                Progress("hash", self.name, done, total)))}

        facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return str(steps.run("hash", self.name, work, files=facts)["sha256"])

    def speaker(self) -> Speaker:
        """Return it, loaded."""
        if self._speaker is None:
            self.emit(Progress("load", self.name, 0, 1))
            if self.kind == "gguf":
                self._speaker = EngineSpeaker(self._stack.enter_context(load_model(
                    self.path, self.options, lambda share: self.emit(Progress("load", self.name, share, 1)))))
            else:
                self._speaker = self._folder()
            self.emit(Progress("load", self.name, 1, 1))
        return self._speaker

    def _folder(self) -> Speaker:
        from loops.answers.transformer import load

        folder = read_folder(self.path)
        if folder.pickles:
            raise PickledWeights(f"The weights in {self.path} are pickled ({folder.pickles[0].name}), and a pickle can "
                                 "run code when it is read; `nightpress convert --allow-pickle` makes a GGUF of it.")
        # only what is data is in sight of the library
        own = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nightpress-evaluate-")))
        return load(read_folder(stage(self.path, own)), own / "cache")

    def engine(self) -> dict[str, Any]:
        """Return what computes: it enters every fingerprint."""
        if self.kind == "gguf":
            return {"name": "llama.cpp", "build": native.build().id, **asdict(self.options),
                    "threads": self.options.thread_count}
        return {"name": "transformers", **{library: metadata.version(library) for library in ("transformers", "torch")}}


def answer(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Have a model answer the rows of a split and the questions besides; finished parts come from the journal.

    Args:
        job: `kind`, `path`, `name` and `options` of the model; `dataset`, `split`, `limit` of the rows, or None;
            `sampling`; `multiple_choice` and `eq_bench`, files or None; `journal`, a file.
        emit: is told how far it is.

    Returns:
        `sha256`, `engine`, `template` whether it has one; `rows` by id: `nll`, `tokens`, `foreseen`, and of an answer
        `text`, `ended`, `n_tokens`; or `too_long`. `multiple_choice` and `eq_bench` where they were asked.

    Raises:
        NothingToMeasure: no row fits into the context.
        and what the engine or transformers raise.
    """
    rows = read_rows(Path(job["dataset"]), job["split"], job["limit"]) if job["dataset"] else ()
    file = Path(job["journal"])
    told, done = journaling(file, emit), read_journal(file)
    with Held.of(job, emit) as held:
        sha256, engine = held.identity(Steps(told, done)), held.engine()
        steps = Steps(told, done, model=sha256, engine=engine)
        asked = _Asked(held, steps, Sampling(**job["sampling"]))
        found = asked.likelihoods(rows)
        fitting = [row for row in rows if not found[row.id].get("too_long")]
        if rows and not fitting:
            raise NothingToMeasure(f"No row fits into the context of {held.name}; shorten the rows, or take a model "
                                   "with a larger one.")
        replies = asked.replies([row for row in fitting if row.answers], "replies")
        result: dict[str, Any] = {
            "sha256": sha256, "engine": engine, "template": steps.run(
                "template", held.name, lambda: {"there": bool(held.speaker().template)})["there"],
            "rows": {row.id: {**found[row.id], **replies.get(row.id, {})} for row in rows}}
        if job.get("multiple_choice"):
            result["multiple_choice"] = asked.multiple_choice(choices.read_choices(Path(job["multiple_choice"])))
        if job.get("eq_bench"):
            result["eq_bench"] = asked.eq_bench(eq_bench.read_questions(Path(job["eq_bench"])))
    return result


@dataclass
class _Asked:
    """Asks a model, in steps."""

    held: Held
    steps: Steps
    sampling: Sampling

    def _progress(self, stage: str, before: int, size: int, total: int) -> Callable[[int, int], None]:
        return lambda done, of: self.held.emit(Progress(
            stage, self.held.name, before + (size * done / of if of else 0), total))

    def likelihoods(self, rows: Sequence[Example]) -> dict[str, Result]:
        """Return, per row, how likely its reference is: `nll`, `tokens`, `foreseen`; or `too_long`."""
        found: dict[str, Result] = {}
        for part in parts(rows, PART):
            advance = self._progress("likelihoods", len(found), len(part), len(rows))
            found |= self.steps.run("likelihoods", self.held.name, partial(self._likelihoods, part, advance),
                                    rows=[row.as_json() for row in part])
        return found

    def _likelihoods(self, rows: Sequence[Example], advance: Callable[[int, int], None]) -> Result:
        speaker = self.held.speaker()
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
            found |= self.steps.run(stage, self.held.name, partial(self._replies, part, sampling, advance),
                                    sampling=asdict(sampling), ids=[row.id for row in part],
                                    prompts=[[dict(message) for message in row.prompt] for row in part])
        return found

    def _replies(self, rows: Sequence[Example], sampling: Sampling, advance: Callable[[int, int], None]) -> Result:
        speaker = self.held.speaker()
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
                speaker = self.held.speaker()
                return {"likelihoods": [[asdict(one) for one in each] for each in speaker.score(
                    [_choice(speaker, question) for question in part], advance)]}

            found = self.steps.run("multiple-choice", self.held.name, work,
                                   questions=[asdict(question) for question in part])
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


def measure_time(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Time a model on the first prompts, one at a time, after one that does not count.

    Args:
        job: `kind`, `path`, `name` and `options` of the model; `dataset`, `split`, `limit`.
        emit: is told how far it is.

    Returns:
        `timings`, each as `loops.answers.speaker.Timing`.
    """
    rows = read_rows(Path(job["dataset"]), job["split"], job["limit"])
    with Held.of(job, emit) as held:
        speaker = held.speaker()
        prompts: list[Tokens] = []
        for row in rows[:TIMED_PROMPTS]:
            whole = (prompt_of(speaker, row.prompt) if row.answers
                     else np.concatenate([windows_of(speaker, row.reference)[0].prompt,
                                          *windows_of(speaker, row.reference)[0].continuations]))
            prompts.append(whole[-max(1, speaker.context - TIMED_TOKENS):])
        speaker.time(prompts[0], TIMED_TOKENS)
        timings = []
        for done, prompt in enumerate(prompts, 1):
            timings.append(asdict(speaker.time(prompt, TIMED_TOKENS)))
            emit(Progress("speed", held.name, done, len(prompts)))
    return {"timings": timings}


JOBS: dict[str, Callable[[Mapping[str, Any], Emit], dict[str, Any]]] = {"answer": answer, "time": measure_time}
