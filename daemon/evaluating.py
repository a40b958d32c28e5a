"""How well models answer a dataset: each asked in a worker of its own, measured, compared, and written down."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.download import Show
from daemon.engine import engine_options
from daemon.grip import Grip
from daemon.settings import Settings
from daemon.subjects import Chosen, choose
from daemon.supervisor import run_job
from loops.answers.rows import SPLITS, Example, read_rows
from loops.events import Note
from state.faults import NightpressError
from state.files import explained, make_folder, sha256_file, write_atomic
from state.lock import Lock

if TYPE_CHECKING:
    from loops.answers.statistics import Measured, Metric

STEPS = ".steps.jsonl"  #: in the output folder: what was finished, so that it is not done again
ROUNDS = 3  #: in which every model is timed, one after the other


class EvaluationRefused(NightpressError):
    """This cannot be evaluated so; the message says why."""

    exit_code = 123


@dataclass(frozen=True)
class EvaluateSpec:
    """What to evaluate.

    Attributes:
        models: as `daemon.subjects.choose` reads them: files, folders, `starter`, releases, levels.
        output: folder for the results.
        dataset: folder of a dataset, or a file like one of its splits; None where only questions are asked.
        split: of it.
        limit: of so many rows the first; 0 for all.
        by_domain: measure each domain and class by itself too.
        benchmark_speed: time the models.
        compare: tell what differs between the models.
        max_tokens: of a reply.
        temperature: of the replies; 0 takes the most probable tokens.
        seed: of sampling, and of the bootstrap.
        multiple_choice: file of questions with choices.
        eq_bench: file of EQ-Bench v2 questions.
        embedding_model: a GGUF that tells how close replies and references are in meaning.
        judge: a provider, `anthropic` or `openai`, with or without `:MODEL`.
        rubric: file that tells the judge how to grade.
    """

    models: tuple[str, ...]
    output: Path
    dataset: Path | None = None
    split: str = "test"
    limit: int = 0
    by_domain: bool = False
    benchmark_speed: bool = False
    compare: bool = False
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    multiple_choice: Path | None = None
    eq_bench: Path | None = None
    embedding_model: Path | None = None
    judge: str | None = None
    rubric: Path | None = None


@dataclass(frozen=True)
class Evaluated:
    """What came out.

    Attributes:
        metrics: by model and name.
        document: what stands in metrics.json.
        comparison: what stands in model_comparison.json; None where it was not asked for.
        domains: what stands in domain_evaluation.json; None likewise.
        files: that were written.
    """

    metrics: Mapping[str, Mapping[str, Metric]]
    document: Mapping[str, Any]
    comparison: Mapping[str, Any] | None
    domains: Mapping[str, Any] | None
    files: tuple[Path, ...]


def evaluate(spec: EvaluateSpec, settings: Settings, grip: Grip, show: Show) -> Evaluated:
    """Evaluate models; interrupted, the same call goes on after the last finished rows.

    Args:
        spec: what.
        settings: where things lie.
        grip: by which the work is stopped or ended.
        show: is told how far it is.

    Raises:
        EvaluationRefused, ModelUnknown, RowsRefused, ChoicesRefused, EqBenchRefused: before any work.
        GgufRefused, NoModelFolder, PickledWeights, TrainExtraMissing: a model cannot be used.
        WorkerRefused: a worker's sentence and exit code: NothingToMeasure, FolderDoesNotLoad, OutOfMemory.
        JudgeExtraMissing, JudgeKeyMissing, JudgeFailed: of the judge, if any.
        Interrupted: the grip was asked to end it; what was finished is kept.
    """
    rows = _check(spec)
    models = choose(spec.models, settings)
    with explained(spec.output):
        make_folder(spec.output, 0o755)
        lock = Lock.acquire(spec.output / ".lock", "nightpress evaluate")
    with lock:
        work = _Work(spec, settings, grip, show, rows)
        found = {model.name: work.ask(model) for model in models}
        if spec.embedding_model is not None:
            work.compare_meanings(found)
        if spec.judge is not None:
            from daemon.grading import grade_answers

            grade_answers(spec, rows, found, show, grip)
        speeds = work.time(models) if spec.benchmark_speed else {}
        return _write(spec, rows, models, found, speeds)


def _check(spec: EvaluateSpec) -> tuple[Example, ...]:
    """Refuse what cannot be done, before any work; return the rows."""
    from loops.evaluation.choices import read_choices
    from loops.evaluation.eq_bench import read_questions

    if spec.split not in SPLITS:
        raise EvaluationRefused(f"{spec.split!r} is no split; there are {', '.join(SPLITS)}.")
    if spec.compare and len(spec.models) < 2:
        raise EvaluationRefused("--compare needs two models or more.")
    if (spec.judge is None) != (spec.rubric is None):
        raise EvaluationRefused("A judge needs a rubric, and a rubric a judge: give --judge and --rubric together.")
    if spec.dataset is None:
        if not (spec.multiple_choice or spec.eq_bench):
            raise EvaluationRefused("There is nothing to ask: give --dataset, --multiple-choice or --eq-bench.")
        needs = {"--benchmark-speed": spec.benchmark_speed, "--by-domain": spec.by_domain, "--compare": spec.compare,
                 "--judge": spec.judge, "--embedding-model": spec.embedding_model}
        if wrong := [option for option, given in needs.items() if given]:
            raise EvaluationRefused(f"{wrong[0]} needs --dataset.")
    rows = read_rows(spec.dataset, spec.split, spec.limit) if spec.dataset is not None else ()
    if (spec.judge or spec.embedding_model) and not any(row.answers for row in rows):
        raise EvaluationRefused("The rows are texts, which nobody answers: there is nothing to grade or compare.")
    if spec.multiple_choice is not None:
        read_choices(spec.multiple_choice)
    if spec.eq_bench is not None:
        read_questions(spec.eq_bench)
    if spec.embedding_model is not None:
        from loops.engine.gguf_check import check_model

        check_model(spec.embedding_model)
    if spec.judge is not None:
        from daemon.grading import read_rubric
        from daemon.judging import check_judge

        assert spec.rubric is not None  # noqa: S101 - checked above
        read_rubric(spec.rubric)
        check_judge(spec.judge)
    return rows


@dataclass
class _Work:
    """The jobs of an evaluation."""

    spec: EvaluateSpec
    settings: Settings
    grip: Grip
    show: Show
    rows: Sequence[Example]

    def _options(self) -> dict[str, Any]:
        return asdict(engine_options(self.settings, self.grip))

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        return dict(run_job(job, self.settings.state_dir, self.grip, self.show).result)

    def _job(self, kind: str, model: Chosen) -> dict[str, Any]:
        spec = self.spec
        return {"job": kind, "kind": model.kind, "path": str(model.path), "name": model.name,
                "options": self._options(), "split": spec.split, "limit": spec.limit,
                "dataset": str(spec.dataset.absolute()) if spec.dataset is not None else None}

    def ask(self, model: Chosen) -> dict[str, Any]:
        """Have a model answer; tell what a person should know."""
        from loops.engine.generate import Sampling

        spec = self.spec
        found = self._run({**self._job("answer", model), "journal": str((spec.output / STEPS).absolute()),
                           "sampling": asdict(Sampling(spec.temperature, 1.0, spec.seed, spec.max_tokens)),
                           "multiple_choice": str(spec.multiple_choice) if spec.multiple_choice else None,
                           "eq_bench": str(spec.eq_bench) if spec.eq_bench else None})
        long = sum(bool(row.get("too_long")) for row in found["rows"].values())
        if long:
            self.show(Note(f"{model.name}: {long} of {len(self.rows)} rows do not fit into its context and are left "
                           "out."))
        if not found["template"] and any(row.answers for row in self.rows):
            self.show(Note(f"{model.name} has no chat template; it is asked in plain text, as User: and Assistant:."))
        return found

    def compare_meanings(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Give every reply its similarity to the reference."""
        references = {row.id: row.reference for row in self.rows if row.answers}
        for name, one in found.items():
            said = {key: row["text"] for key, row in one["rows"].items() if "text" in row}
            result = self._run({"job": "similar", "model": str(self.spec.embedding_model), "name": name,
                                "options": self._options(), "journal": str((self.spec.output / STEPS).absolute()),
                                "pairs": [[text, references[key]] for key, text in said.items()]})
            for key, value in zip(said, result["similarities"], strict=True):
                one["rows"][key]["semantic_similarity"] = value

    def time(self, models: Sequence[Chosen]) -> dict[str, list[dict[str, Any]]]:
        """Return the timings of every model, taken in rounds, so that what else the machine does hits all alike."""
        timings: dict[str, list[dict[str, Any]]] = {model.name: [] for model in models}
        for number in range(ROUNDS):
            for model in models:
                found = self._run(self._job("time", model))
                timings[model.name] += [{**timing, "round": number} for timing in found["timings"]]
        return timings


def measure(rows: Sequence[Example], answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Measured]:
    """Return what a model did with each row that fitted, by id.

    Args:
        rows: that it was asked.
        answers: of the job `answer`, by id.
    """
    from loops.answers.overlap import compare
    from loops.answers.statistics import Measured

    return {row.id: Measured(one["nll"], one["tokens"], one["foreseen"],
                             compare(one["text"], row.reference) if "text" in one else None,
                             one.get("semantic_similarity"))
            for row in rows if not (one := answers[row.id]).get("too_long")}


def summarise_speed(timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians over the replies: tokens of the prompt and of the reply per second, and latency p50 and p95."""
    import numpy as np

    prompt, reply, latency = (np.asarray(values) for values in (
        [one["prompt_tokens"] / max(1e-9, one["prompt_s"]) for one in timings],
        [one["tokens"] / max(1e-9, one["reply_s"]) for one in timings],
        [one["prompt_s"] + one["reply_s"] for one in timings]))
    return {"prompt_tokens_per_s": float(np.median(prompt)), "generated_tokens_per_s": float(np.median(reply)),
            "latency_p50_s": float(np.quantile(latency, 0.5)), "latency_p95_s": float(np.quantile(latency, 0.95)),
            "replies": len(timings), "tokens_each": timings[0]["tokens"] + 1}


def machine() -> dict[str, Any]:
    """Return what the speeds were measured on."""
    import psutil

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "processors": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.machine()}"}


def _write(spec: EvaluateSpec, rows: Sequence[Example], models: Sequence[Chosen], found: Mapping[str, dict[str, Any]],
           speeds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Evaluated:
    from loops.answers.statistics import CONFIDENCE, RESAMPLES, summarise

    measured = {name: measure(rows, one["rows"]) for name, one in found.items()}
    metrics = {name: summarise(list(each.values()), seed=spec.seed) for name, each in measured.items()}
    document: dict[str, Any] = {
        "dataset": _origin(spec, rows), "seed": spec.seed, "max_tokens": spec.max_tokens,
        "temperature": spec.temperature, "confidence": CONFIDENCE, "resamples": RESAMPLES,
        "machine": machine() if speeds else None, "models": {}}
    for model in models:
        one = found[model.name]
        more: dict[str, Any] = {name: one[name] for name in ("multiple_choice", "eq_bench", "judge") if name in one}
        if model.name in speeds:
            more["speed"] = summarise_speed(speeds[model.name])
        document["models"][model.name] = {
            "path": str(model.path), "kind": model.kind, "sha256": one["sha256"], "engine": one["engine"],
            "chat_template": one["template"], "rows": len(measured[model.name]),
            "too_long": len(rows) - len(measured[model.name]),
            "metrics": {name: metric.as_json() for name, metric in metrics[model.name].items()},
            **more}
    comparison = _compare(spec, measured) if spec.compare else None
    domains = {name: _slices(rows, each, spec.seed) for name, each in measured.items()} if spec.by_domain else None
    written = {"predictions.json": _predictions(rows, found, measured) if rows else None, "metrics.json": document,
               "model_comparison.json": comparison, "domain_evaluation.json": domains}
    files = []
    with explained(spec.output):
        for name, content in written.items():
            if content is not None:
                files.append(spec.output / name)
                text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
                write_atomic(files[-1], text.encode(), mode=0o644)
            else:  # of an earlier evaluation, of which it would tell figures that are not of this one
                (spec.output / name).unlink(missing_ok=True)
    return Evaluated(metrics, document, comparison, domains, tuple(files))


def _origin(spec: EvaluateSpec, rows: Sequence[Example]) -> dict[str, Any] | None:
    if spec.dataset is None:
        return None
    file = spec.dataset / f"{spec.split}.json" if spec.dataset.is_dir() else spec.dataset
    return {"path": str(spec.dataset), "split": spec.split if spec.dataset.is_dir() else None, "rows": len(rows),
            "sha256": sha256_file(file)}


def _predictions(rows: Sequence[Example], found: Mapping[str, dict[str, Any]],
                 measured: Mapping[str, Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """Return, per row, what was asked, what is wanted, and what each model said and how good that is."""
    listed = []
    for row in rows:
        answers = {}
        for name, one in found.items():
            answer = dict(one["rows"][row.id])
            mine = measured[name].get(row.id)
            if mine is not None and mine.overlap is not None:
                answer |= {"sentence_bleu" if metric == "bleu" else metric: value
                           for metric, value in mine.overlap.scores.items()}
            answers[name] = answer
        asked: dict[str, Any] = {"prompt": [dict(message) for message in row.prompt]} if row.answers else {}
        listed.append({"id": row.id, "domain": row.domain, "label": row.label, **asked, "reference": row.reference,
                       "answers": answers})
    return listed


def _compare(spec: EvaluateSpec, measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """Return what differs between every two models, on the rows that both have, and the models in order."""
    from loops.answers.statistics import differ, summarise

    names, pairs = list(measured), []
    for at, first in enumerate(names):
        for second in names[at + 1:]:
            shared = [key for key in measured[first] if key in measured[second]]
            differences = differ([measured[first][key] for key in shared], [measured[second][key] for key in shared],
                                 seed=spec.seed)
            pairs.append({"first": first, "second": second, "rows": len(shared),
                          "differences": {name: one.as_json() for name, one in differences.items()}})
    everywhere = [key for key in measured[names[0]] if all(key in each for each in measured.values())]
    totals = {name: summarise([each[key] for key in everywhere], seed=spec.seed) for name, each in measured.items()}
    ranking = {metric: sorted(names, key=lambda name: _place(totals[name][metric])) for metric in totals[names[0]]}
    return {"pairs": pairs, "rows": len(everywhere), "ranking": ranking}


def _place(metric: Metric) -> float:
    return -metric.value if metric.higher_is_better else metric.value


def _slices(rows: Sequence[Example], measured: Mapping[str, Measured], seed: int) -> dict[str, Any]:
    """Return the metrics of every domain and of every class by itself."""
    from loops.answers.statistics import summarise

    def of(part: Callable[[Example], str]) -> dict[str, Any]:
        members: dict[str, list[Measured]] = {}
        for row in rows:
            if part(row) and row.id in measured:
                members.setdefault(part(row), []).append(measured[row.id])
        return {name: {"rows": len(each), "metrics": {
            metric: found.as_json() for metric, found in summarise(each, seed=seed).items()}}
            for name, each in sorted(members.items())}

    return {"domains": of(lambda row: row.domain), "labels": of(lambda row: row.label)}
