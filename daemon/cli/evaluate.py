"""`nightpress evaluate`: how well models answer a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, DeployDir, StateDir, print_json

if TYPE_CHECKING:
    from daemon.evaluating import Evaluated


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("evaluate")(evaluate)


def evaluate(
    models: Annotated[list[str], typer.Argument(
        metavar="MODEL...", help="A GGUF, a Hugging Face folder or the id of one that was pulled, starter, a deployed "
                                 "model as NAME or NAME@NUMBER, or a level as RUN:LEVEL.")],
    dataset: Annotated[Path | None, typer.Option(
        metavar="DIR", help="A dataset that `nightpress dataset prepare` made, or a file like one of its splits.",
        show_default=False)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("evaluation"),
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which rows.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="Only the first rows; 0 for all.")] = 0,
    by_domain: Annotated[bool, typer.Option("--by-domain", help="Each domain and class by itself too.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="What differs between models, and how surely.")] = False,
    benchmark_speed: Annotated[bool, typer.Option("--benchmark-speed", help="Time the models too.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the replies; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and of the intervals.")] = 0,
    multiple_choice: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Multiple-choice questions (JSONL: question, choices, answer), scored by likelihood.",
        show_default=False)] = None,
    eq_bench: Annotated[Path | None, typer.Option(
        metavar="FILE", help="EQ-Bench v2 questions (JSON as published).", show_default=False)] = None,
    embedding_model: Annotated[Path | None, typer.Option(
        metavar="FILE", help="An embedding model, GGUF, to tell how close replies and references are in meaning.",
        show_default=False)] = None,
    judge: Annotated[str | None, typer.Option(
        metavar="PROVIDER[:MODEL]", show_default=False,
        help="Let anthropic or openai grade the replies by --rubric. Needs nightpress[generate] and a key in the "
             "environment.")] = None,
    rubric: Annotated[Path | None, typer.Option(
        metavar="FILE", help="How the judge is to grade, as text.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(
        min=1, help="Threads of the engine. Default: one per processor.", show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Ask models the rows of a dataset and measure their answers, every figure with its 95 % interval.

    Perplexity of the reference answers, exact match, F1, ROUGE, BLEU and more, see docs/evaluation.md. A GGUF runs in
    the engine, a Hugging Face folder in transformers (nightpress[train]). Ctrl-C stops; the same command goes on where
    it was.
    """
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.evaluating import EvaluateSpec
    from daemon.evaluating import evaluate as measure
    from daemon.settings import Settings
    from daemon.workers import grip_of_signals

    def place(file: Path | None) -> Path | None:
        return file.expanduser().absolute() if file else None

    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir, threads=threads)
    spec = EvaluateSpec(
        tuple(models), output.expanduser().absolute(), place(dataset), split, limit, by_domain, benchmark_speed,
        compare, max_tokens, temperature, seed, place(multiple_choice), place(eq_bench), place(embedding_model), judge,
        place(rubric))
    with Stages(console(stderr=True)) as stages, grip_of_signals() as grip:
        found = measure(spec, settings, grip, stages.show)
    if json:
        print_json({**found.document, "comparison": found.comparison, "domains": found.domains,
                    "files": [str(file) for file in found.files]})
    else:
        _print(found)


def _interval(one: Mapping[str, Any], digits: str = ".3f") -> str:
    if abs(one["value"]) >= 1000:
        digits = digits.replace(".3f", ",.0f")
    text = format(one["value"], digits)
    return text if one["low"] is None else f"{text} [{one['low']:{digits}}, {one['high']:{digits}}]"


def _print(found: Evaluated) -> None:
    from daemon.cli.tables import console, plain_table

    out, models = console(), found.document["models"]
    rows = [(name.replace("_", " "), *(
        _interval(one["metrics"][name]) if name in one["metrics"] else "" for one in models.values()))
        for name in dict.fromkeys(name for one in models.values() for name in one["metrics"])]
    out.print(plain_table([("", "left"), *((name, "right") for name in models)], [*rows, *_more(models)]))
    if found.comparison is not None:
        for pair in found.comparison["pairs"]:
            clear = [f"{name.replace('_', ' ')} ({_interval(one, '+.3f')}, {pair[one['better']]})"
                     for name, one in pair["differences"].items() if one["clear"]]
            out.print(f"{pair['second']} less {pair['first']}, {pair['rows']} rows: "
                      + ("; ".join(clear) or "no clear difference") + ".", markup=False, soft_wrap=True)
    for model, parts in (found.domains or {}).items():
        for kind in ("domains", "labels"):
            if parts[kind]:
                chosen = [name for name in ("loss", "f1", "rougeL", "bleu") if name in models[model]["metrics"]]
                out.print(plain_table(
                    [(f"{model}, {kind}", "left"), ("rows", "right"), *((name, "right") for name in chosen)],
                    [(name, str(one["rows"]), *(_interval(one["metrics"][metric]) if metric in one["metrics"] else ""
                                                for metric in chosen)) for name, one in parts[kind].items()]))
    if found.document["machine"]:
        machine = found.document["machine"]
        out.print(f"Speed on {machine['cpu']}, {machine['processors']} processors, {machine['system']}.", markup=False)
    out.print(f"Wrote {', '.join(file.name for file in found.files)} into {found.files[0].parent}.", markup=False,
              soft_wrap=True)


def _more(models: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table for what only some evaluations have."""
    rows = []
    for title, part, name in (("multiple choice, acc", "multiple_choice", "acc"),
                              ("multiple choice, acc norm", "multiple_choice", "acc_norm")):
        if any(part in one for one in models.values()):
            rows.append((title, *(_interval({"value": one[part][name], "low": one[part][f"{name}_interval"][0],
                                             "high": one[part][f"{name}_interval"][1]}) for one in models.values())))
    if any("eq_bench" in one for one in models.values()):
        rows.append(("EQ-Bench", *(f"{one['eq_bench']['score']:.1f}" if one["eq_bench"]["valid"] else
                                   f"unreadable ({one['eq_bench']['parsed']} of {one['eq_bench']['n']})"
                                   for one in models.values())))
    if any("judge" in one for one in models.values()):
        rows.append(("judge", *(_interval(one["judge"]) for one in models.values())))
    for title, name, form in (("prompt tokens/s", "prompt_tokens_per_s", ",.0f"),
                              ("generated tokens/s", "generated_tokens_per_s", ",.1f"),
                              ("latency p50, s", "latency_p50_s", ".3f"), ("latency p95, s", "latency_p95_s", ".3f")):
        if any("speed" in one for one in models.values()):
            rows.append((title, *(format(one["speed"][name], form) for one in models.values())))
    return rows
