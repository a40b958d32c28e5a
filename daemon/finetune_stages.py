"""The stages of a fine-tuning, in order, from `prepare` to `evaluate`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from calibration_data.text import Header, Sample, write
from daemon.converting import ConvertSpec, convert
from daemon.engine import engine_options
from daemon.errors import NothingPassed
from daemon.finetune_config import FinetuneRefused, options_of
from daemon.finetuning import Bench, Made, Stage
from loops.events import Note
from loops.finetune import prepare as making
from loops.finetune.cleaning import DEFAULT_STEPS, Cleaning, check_steps
from loops.finetune.faults import DatasetFaulty
from loops.finetune.near import NEAR, near_pairs
from loops.finetune.records import Row
from loops.finetune.sources import SPLITS, read_path
from loops.finetune.tokens import WORDS
from loops.finetune.validation import validate as find_faults
from state.files import explained, make_folder, write_atomic

TRAIN, VALIDATION, TEST = SPLITS


def _model(bench: Bench) -> Path:
    """Return the folder of the base."""
    from daemon.training import find_model

    return find_model(bench.spec.model, bench.settings)


def _fresh(folder: Path) -> Path:
    """Return a folder that is there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, 0o755)
    return folder


# prepare and validate

def _sources(bench: Bench) -> dict[str, Path]:
    data = bench.spec.dataset
    if data.folder is not None:
        files = [("dataset", data.folder)]
    else:
        files = [(f"source {number}", file) for number, file in enumerate(data.files, 1)]
    for _role, file in files:
        if not file.exists():
            raise FinetuneRefused(f"There is no file {file}, which [dataset] names.")
    return dict(files)


def _prepare(bench: Bench, work: Path) -> Made:
    from daemon.preparing import Wanted, load_rows

    data = bench.spec.dataset
    if data.folder is not None:
        if making.read_manifest(data.folder) is None:
            raise FinetuneRefused(f"{data.folder} is no dataset that `nightpress dataset prepare` made: it has no "
                                  "manifest. Name its files as files instead.")
        return Made({"dataset": data.folder})
    domain = data.domain or bench.spec.name
    steps = bench.settings.dataset_steps if data.steps is None else data.steps
    cleaning = Cleaning(WORDS, steps=() if steps == ("none",) else check_steps(steps or DEFAULT_STEPS),
                        min_tokens=data.min_tokens, max_tokens=data.max_tokens, near=data.near, seed=data.seed)
    rows, origins = load_rows(Wanted(domain, data.hub, (data.config, data.split, data.revision), data.files,
                                     data.num_samples, data.seed, data.format, data.map))
    prepared = making.prepare(rows, origins, making.Plan(
        domain, cleaning, None if data.sample else data.num_samples, data.shares, data.licence))
    manifest = making.write(prepared, _fresh(work))
    return Made({"dataset": work}, {"rows": {name: one["rows"] for name, one in manifest["splits"].items()},
                                    "licence": manifest["licence"], "seed": manifest["seed"]})


def _rows(dataset: Path) -> dict[str, list[Row]]:
    rows, _ = making.load(read_path(dataset))
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    return splits


def _validate(bench: Bench, work: Path) -> Made:
    dataset, data = bench.file("prepare", "dataset"), bench.spec.dataset
    manifest = making.read_manifest(dataset) or {}
    how = Cleaning(WORDS, steps=(), min_tokens=data.min_tokens, max_tokens=data.max_tokens, near=data.near)
    report = find_faults(_rows(dataset), how)
    report = replace(report, findings=(*making.check_files(dataset, manifest), *report.findings))
    file = _fresh(work) / "report.json"
    write_atomic(file, (json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n").encode(), mode=0o644)
    failing = report.findings if data.strict else report.errors
    if failing:
        raise DatasetFaulty(f"{dataset} has {len(failing)} fault{'s' * (len(failing) != 1)}: {failing[0].message} "
                            f"{file} tells all.")
    return Made({"report": file}, {"warnings": [one.message for one in report.findings]})


# train, merge, convert, parity

def _train_options(bench: Bench) -> dict[str, Any]:
    """Return the options that shape an adapter; where checkpoints are kept and such does not."""
    from loops.finetune.plan import TrainSpec

    given = options_of("train", bench.spec.train)
    whole = {one.name: given.get(one.name, one.default) for one in fields(TrainSpec)
             if one.default is not MISSING and one.metadata.get("shapes", True)}
    template = Path(str(whole.get("template") or ""))
    return {**whole, **({"template": template.read_text(encoding="utf-8")} if template.is_file() else {})}


def _train(bench: Bench, work: Path) -> Made:
    from daemon.training import train
    from loops.finetune.plan import TrainSpec

    given = {"threads": bench.settings.threads, **options_of("train", bench.spec.train)}
    done = train(TrainSpec(model=_model(bench), dataset=bench.file("prepare", "dataset"), output=work, **given),
                 bench.settings, bench.grip, bench.show)
    return Made({"adapter": done.adapter}, {one.name: getattr(done, one.name) for one in fields(done)
                                            if one.name not in ("adapter", "record", "was_there")})


def _merge(bench: Bench, work: Path) -> Made:
    from daemon.merging import MergeSpec, merge

    given = {"replace": True, **options_of("merge", bench.spec.merge)}
    make_folder(work, 0o755)
    done = merge(MergeSpec(base=_model(bench), adapters=((bench.file("train", "adapter"), 1.0),),
                           output=work / bench.spec.name, **given), bench.settings, bench.grip, bench.show)
    return Made({"merged": done.folder}, {"stages": done.stages, "notes": done.notes})


def _convert(bench: Bench, work: Path) -> Made:
    table = bench.spec.convert
    make_folder(work, 0o755)
    base, adapter = (_model(bench), bench.file("train", "adapter")) if table.parity else (None, None)
    done = convert(ConvertSpec(
        bench.file("merge", "merged"), work / f"{bench.spec.name}.gguf", table.outtype, base, adapter,
        table.llama_cpp, parity=table.parity, replace=True), bench.settings, bench.grip, bench.show)
    return Made({"gguf": done.path}, {"type": done.weight_type, "converter": done.converter, "stages": done.stages,
                                      "notes": done.notes})


def _parity(bench: Bench, work: Path) -> Made:
    """Keep what the comparisons of merging and conversion came to; a form that did not agree was never written."""
    found = bench.made["convert"].facts
    file = _fresh(work) / "parity.json"
    write_atomic(file, (json.dumps({"stages": list(found["stages"]), "notes": list(found["notes"])}, indent=2) + "\n"
                        ).encode(), mode=0o644)
    return Made({"parity": file}, {"stages": [
        {key: one[key] for key in ("stage", "tokens", "mean_kl", "max_kl", "same_top") if key in one}
        for one in found["stages"]]})


# calibrate, press, release

def _calibrate(bench: Bench, work: Path) -> Made:
    """Make calibration text of the training rows, and see whether a domain's own matrix can be judged with it.

    A matrix is compared on a part of the text that is kept back. Where rows share long runs of words, that part would
    not be new, so the matrix is used as it is.
    """
    from calibration_data.checks import overlaps
    from loops.pass1.source import read_source

    dataset, table = bench.file("prepare", "dataset"), bench.spec.calibrate
    splits = _rows(dataset)
    manifest = making.read_manifest(dataset) or {}
    clean = calibration_rows(splits)
    header = Header(str(manifest.get("domain") or bench.spec.name), licence=str(manifest.get("licence") or ""),
                    source=f"the training rows of {bench.spec.name}")
    file = _fresh(work) / f"{bench.spec.name}.txt"
    write_atomic(file, write(Sample(row.id, row.label or "train", row.spoken, header) for row in clean).encode(),
                 mode=0o644)
    left_out = len(splits[TRAIN]) - len(clean)
    facts: dict[str, Any] = {"rows": len(clean), "left_out": left_out, "matrix": table.matrix}
    source = read_source((), (str(file),), None)
    if table.matrix == "compare" and source is not None and source.held_out and overlaps(
            source.samples, {"kept back": "\n".join(sample.text for sample in source.held_out)}):
        facts |= {"matrix": "own", "why": "the training rows share runs of words, so no part of them is new to "
                                            "the rest"}
        bench.show(Note(f"The domain's own importance matrix is used without a comparison: {facts['why']}."))
    made = {"text": file}
    if facts["matrix"] == "own":
        made["matrix"] = _collect(bench, file, work / f"{bench.spec.name}-imatrix.gguf")
    return Made(made, facts)


def calibration_rows(splits: Mapping[str, list[Row]]) -> list[Row]:
    """Return the training rows that are no near-duplicates of a row to validate or test with."""
    others = [*splits.get(VALIDATION, ()), *splits.get(TEST, ())]
    rows = splits.get(TRAIN, [])
    if not rows:
        raise FinetuneRefused("The dataset has no training rows to calibrate with.")
    pairs = near_pairs([row.text for row in (*rows, *others)], NEAR)
    leaking = {pair.first for pair in pairs if pair.first < len(rows) <= pair.second}
    kept = [row for number, row in enumerate(rows) if number not in leaking]
    if not kept:
        raise FinetuneRefused("Every training row is near to one of validation or test, so nothing is left to "
                              "calibrate with; prepare the dataset with its near-duplicates kept together.")
    return kept


def _collect(bench: Bench, text: Path, output: Path) -> Path:
    from daemon.supervisor import run_job
    from loops.pass1.plan import SinglePlan

    state = bench.settings.state_dir.absolute()
    plan = SinglePlan(
        model=str(bench.file("convert", "gguf")), scratch=str(bench.settings.scratch),
        matrices=str(state / "imatrices"), journals=str(state / "journals"), output=str(output),
        stem=bench.spec.name, calibration=(str(text),),
        chunks=bench.spec.calibrate.chunks, replace=True, options=engine_options(bench.settings, bench.grip))
    run_job({"job": "imatrix", "plan": plan.as_json()}, bench.settings.state_dir, bench.grip, bench.show)
    return output


def _gates(bench: Bench) -> tuple[str, ...]:
    """Return the gates that are wanted, else those of the validation rows, where these have answers."""
    if bench.spec.press.gates is not None:
        return bench.spec.press.gates
    rows = json.loads((bench.file("prepare", "dataset") / f"{VALIDATION}.json").read_bytes())
    return ("f1", "answer_perplexity") if any("messages" in row for row in rows) else ()


def _press_inputs(bench: Bench) -> dict[str, Path]:
    found = {"gguf": bench.file("convert", "gguf"), **bench.made["calibrate"].files,
             "validation": bench.file("prepare", "dataset") / f"{VALIDATION}.json"}
    if bench.spec.press.text is not None:
        found["evaluation text"] = bench.spec.press.text
    return found


def _press(bench: Bench, work: Path) -> Made:
    from daemon.pressing import press
    from daemon.settings import config_dir
    from loops.engine.ladders import expand
    from loops.pass1.criteria import TEXTS, parse_gates
    from loops.pass1.plan import PressPlan, parse_size

    del work
    table, settings, made = bench.spec.press, bench.settings, bench.made["calibrate"]
    gates = _gates(bench)
    judged = {gate.name for gate in parse_gates(gates, table.max_degradation)} & set(TEXTS)
    text = (str(made.files["text"]),) if made.facts["matrix"] == "compare" else ()
    plan = PressPlan(
        model=str(bench.file("convert", "gguf")), name=bench.spec.name, blobs=str(settings.blobs),
        scratch=str(settings.scratch), levels=table.levels, target_bytes=parse_size(table.target_size),
        max_degradation=table.max_degradation, max_kld=table.max_kld, strategy=table.strategy, prefer=table.prefer,
        max_iterations=max(10, len(expand(table.levels))), first_scenarios=table.evaluation_prompts,
        max_scenarios=table.max_prompts, text=str(table.text) if table.text else None,
        text_windows=table.text_windows, gates=gates, seeds=table.seeds, calibration=text,
        accept_inconclusive=table.accept_inconclusive, user_domains=str(config_dir() / "calibration"),
        imatrix=str(made.files["matrix"]) if "matrix" in made.files else None,
        dataset=str(bench.file("prepare", "dataset") / f"{VALIDATION}.json") if judged else None,
        timeout_s=settings.level_timeout_s)
    run_id = press(bench.ledger, settings, plan, bench.show, bench.grip, promoting=False)
    levels = [{key: row[key] for key in ("level", "state", "bytes", "sha256", "degradation", "reason")}
              for row in bench.ledger.candidates(run_id)]
    return Made({}, {"chosen": bench.ledger.run(run_id)["chosen_level"], "levels": levels}, run_id)


def _release(bench: Bench, work: Path) -> Made:
    from daemon.promotion import promote

    del work
    found = bench.made["press"]
    chosen, run_id = found.facts["chosen"], found.run_id
    if chosen is None or run_id is None:
        raise NothingPassed(f"No level passed, so nothing was released. `nightpress results {run_id}` shows the "
                            "reasons.")
    made = promote(bench.ledger, bench.settings, run_id, chosen, engine_options(bench.settings, bench.grip), bench.grip)
    return Made({"model": made.model_path}, {"number": made.number, "level": chosen, "bytes": made.manifest.bytes},
                run_id)


# evaluate

def _to_evaluate(bench: Bench) -> dict[str, Path]:
    """Return the models to ask, by what they are."""
    found = {"base": _model(bench), "fine-tuned": bench.file("convert", "gguf")}
    released = bench.made["release"].files.get("model") if "release" in bench.made else None
    chosen = bench.made["press"].facts["chosen"]
    for row in bench.made["press"].facts["levels"]:
        blob = bench.settings.blobs / f"{row['sha256']}.gguf"
        if row["level"] == chosen and released is not None:
            found[f"{row['level']}, released"] = released
        elif row["sha256"] and blob.is_file():
            found[row["level"]] = blob
    return found


def _evaluate(bench: Bench, work: Path) -> Made:
    from daemon.evaluating import EvaluateSpec, evaluate

    table, models = bench.spec.evaluate, _to_evaluate(bench)
    with explained(work):
        make_folder(work, 0o755)
    done = evaluate(EvaluateSpec(tuple(map(str, models.values())), work, bench.file("prepare", "dataset"), table.split,
                                 table.limit, max_tokens=table.max_tokens),
                    bench.settings, bench.grip, bench.show)
    found = dict(zip(models, done.metrics.values(), strict=True))
    return Made({"metrics": work / "metrics.json", "predictions": work / "predictions.json"}, {"models": {
        name: {"bytes": sum(file.stat().st_size for file in ([models[name]] if models[name].is_file() else
                                                             models[name].glob("*.safetensors"))),
               **{metric: {key: value for key, value in asdict(one).items() if key != "higher_is_better"}
                  for metric, one in metrics.items()}} for name, metrics in found.items()}})


STAGES = (
    Stage("prepare", _sources, lambda bench: {
        **bench.spec.dataset.model_dump(mode="json", exclude={"folder", "files", "strict"}),
        "domain": bench.spec.dataset.domain or bench.spec.name, "usual_steps": bench.settings.dataset_steps}, _prepare),
    Stage("validate", lambda bench: {"dataset": bench.file("prepare", "dataset")}, lambda bench: bench.spec.dataset
          .model_dump(mode="json", include={"min_tokens", "max_tokens", "near", "strict"}), _validate),
    Stage("train", lambda bench: {"dataset": bench.file("prepare", "dataset"), "model": _model(bench)}, _train_options,
          _train),
    Stage("merge", lambda bench: {"adapter": bench.file("train", "adapter"), "model": _model(bench)},
          lambda bench: options_of("merge", bench.spec.merge), _merge),
    Stage("convert", lambda bench: {"merged": bench.file("merge", "merged"),
                                    "adapter": bench.file("train", "adapter"), "model": _model(bench)},
          lambda bench: bench.spec.convert.model_dump(mode="json"), _convert),
    Stage("parity", lambda bench: {"gguf": bench.file("convert", "gguf")}, lambda _bench: {}, _parity,
          lambda bench: bench.spec.convert.parity),
    Stage("calibrate", lambda bench: {"dataset": bench.file("prepare", "dataset"),
                                      "gguf": bench.file("convert", "gguf")},
          lambda bench: bench.spec.calibrate.model_dump(mode="json"), _calibrate),
    Stage("press", _press_inputs, lambda bench: bench.spec.press.model_dump(mode="json", exclude={"text", "release"}),
          _press),
    Stage("release", lambda _bench: {}, lambda bench: {
        "run": bench.made["press"].run_id, "chosen": bench.made["press"].facts["chosen"],
        "levels": {row["level"]: row["sha256"] for row in bench.made["press"].facts["levels"]}}, _release,
        lambda bench: bench.spec.press.release),
    Stage("evaluate", lambda bench: {"dataset": bench.file("prepare", "dataset"), **_to_evaluate(bench)},
          lambda bench: bench.spec.evaluate.model_dump(mode="json"), _evaluate,
          lambda bench: bench.spec.evaluate.enabled),
)
