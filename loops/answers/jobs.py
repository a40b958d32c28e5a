"""What a worker does of an evaluation: a model answers the rows, and is timed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from loops.answers.asking import Asker
from loops.answers.rows import read_rows
from loops.answers.speaker import EngineSpeaker, Speaker, prompt_of, windows_of
from loops.engine import native
from loops.engine.generate import Sampling
from loops.engine.gguf_check import check_model
from loops.engine.model import Tokens, load_model
from loops.engine.options import EngineOptions
from loops.evaluation import choices, eq_bench
from loops.events import Event, Progress
from loops.finetune.model_folder import PickledWeights, read_folder, stage
from loops.fingerprint import sha256_of_files
from loops.pass1.journal import journaling, read_journal
from loops.pass1.steps import Result, Steps
from state.faults import NightpressError

Emit = Callable[[Event], None]
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
        asked = Asker(held.speaker, held.name, emit, steps, Sampling(**job["sampling"]))
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


def similar(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Say how close texts are in meaning: the cosine of their vectors by an embedding model.

    Args:
        job: `model`, a GGUF, and `options`; `pairs` of texts; `name` of the model whose replies they are; `journal`.
        emit: is told how far it is.

    Returns:
        `similarities`, -1 to 1 each; 0 where a text is empty.
    """
    from loops.engine.embed import embed

    checked, file = check_model(Path(job["model"])), Path(job["journal"])
    steps = Steps(journaling(file, emit), read_journal(file))

    def report(done: int, total: int) -> None:
        emit(Progress("similarity", job["name"], done, total))

    def work() -> Result:
        texts = list(dict.fromkeys(text for pair in job["pairs"] for text in pair))
        with load_model(checked.path, EngineOptions(**job["options"])) as model:
            vectors = dict(zip(texts, embed(model, texts, report), strict=True))
        return {"similarities": [float(np.clip(vectors[first] @ vectors[second], -1, 1))
                                 for first, second in job["pairs"]]}

    return steps.run("similarity", job["name"], work, pairs=job["pairs"], build=native.build().id,
                     embedding=sha256_of_files(checked.shards))


JOBS: dict[str, Callable[[Mapping[str, Any], Emit], dict[str, Any]]] = {
    "answer": answer, "time": measure_time, "similar": similar}
