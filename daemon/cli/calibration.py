"""`nightpress calibration list|show|export|combine|check|generate`: the texts that models are calibrated with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.generate import generate
from daemon.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from calibration_data.catalogue import Catalogue, Facts
    from calibration_data.text import Sample

SourceName = Annotated[str, typer.Argument(
    metavar="DOMAIN|FILE", help="Name of a domain, else a file of text. A file with the name of a domain: ./NAME.")]
HeldOut = Annotated[bool, typer.Option("--held-out", help="The part that is never calibrated with.")]
ForModel = Annotated[Path | None, typer.Option(
    "--model", metavar="GGUF", show_default=False, help="Count the tokens that this model reads in it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                        help="List, show, combine, check and generate the texts that models are calibrated with.")
    group.command("list")(list_domains)
    group.command("show")(show)
    group.command("export")(export)
    group.command("combine")(combine)
    group.command("check")(check)
    group.command("generate")(generate)
    app.add_typer(group, name="calibration")


def _catalogue() -> Catalogue:
    from calibration_data.catalogue import Catalogue
    from daemon.settings import config_dir

    return Catalogue(config_dir() / "calibration")


def list_domains(model: ForModel = None, json: AsJson = False) -> None:
    """List the domains: how many samples and words, how many of them held out, licence and source.

    With a model also how many tokens and chunks of 512 tokens it calibrates with, through its own chat template.

    A file of yours that cannot be used is named, and the command ends with an error.
    """
    from calibration_data.catalogue import describe
    from calibration_data.text import CalibrationRefused
    from daemon.cli.tables import console, plain_table

    catalogue = _catalogue()
    rows: list[dict[str, Any]] = []
    problems = list(catalogue.misplaced())
    for name in catalogue.names():
        try:
            facts, kept = describe(catalogue.load(name)), describe(catalogue.held_out(name))
        except CalibrationRefused as problem:
            problems += [problem] if str(problem) not in map(str, problems) else []
            continue
        file = catalogue.file(name)
        rows.append({"name": name, **_as_json(facts), "held_out_samples": kept.samples, "held_out_words": kept.words,
                     "built_in": file is None, "file": str(file) if file else None})
    if model is not None:
        found = _count_tokens(model, catalogue, [row["name"] for row in rows])
        rows = [row | found["counts"][row["name"]] for row in rows]
    if json:
        print_json({"domains": rows, "folder": str(catalogue.folder), "problems": [str(one) for one in problems]})
    else:
        out = console()
        out.print(plain_table(
            [("domain", "left"), ("samples", "right"), ("words", "right"), ("held out", "right"),
             *([("tokens", "right"), ("chunks", "right")] if model else []), ("licence", "left"), ("source", "left")],
            [(row["name"], str(row["samples"]), f"{row['words']:,}", f"{row['held_out_words']:,}",
              *((f"{row['tokens']:,}", f"{row['chunks']:,}") if model else ()),
              _said(row["licences"]), _said(row["sources"])) for row in rows]))
        out.print(f"Your own: text files in {catalogue.folder}", markup=False, soft_wrap=True)
    if problems:
        raise CalibrationRefused(" ".join(map(str, problems)))


def show(
    source: SourceName,
    sample: Annotated[str | None, typer.Option(help="Only the sample of this id.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many samples; 0 for all.")] = 3,
    held_out: HeldOut = False,
    json: AsJson = False,
) -> None:
    """Print samples of a domain or a file."""
    from calibration_data.catalogue import describe
    from calibration_data.text import CalibrationRefused, write

    name, samples = _open(source, held_out)
    chosen = [one for one in samples if sample in (None, one.id)]
    if not chosen:
        raise CalibrationRefused(f"{name} has no sample {str(sample)[:80]!r}.")
    shown = chosen[:limit or None]
    facts = describe(samples)
    if json:
        print_json({"name": name, **_as_json(facts), "shown": [_sample_as_json(one) for one in shown]})
        return
    typer.echo(f"{name}: {_told(facts)}\n\n{write(shown)}")
    if len(shown) < len(chosen):
        typer.echo(f"{len(chosen) - len(shown)} more; --limit 0 shows all.")


def export(
    source: SourceName,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Where to write. Default: standard output.", show_default=False)] = None,
    plain: Annotated[bool, typer.Option(
        "--plain", help="Text alone, with the names of the roles, for other programs.")] = False,
    held_out: HeldOut = False,
    force: Force = False,
) -> None:
    """Write the text of a domain to a file, to change it or for other programs."""
    from calibration_data.render import render
    from calibration_data.text import write

    name, samples = _open(source, held_out)
    text = "\n\n".join(render(samples)) + "\n" if plain else write(samples)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_text(output, text, force=force)
    typer.echo(f"Wrote {len(samples)} samples of {name} to {output}.")


def combine(
    sources: Annotated[list[str], typer.Argument(
        metavar="DOMAIN|FILE...", help="Two or more domains or files.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.", show_default=False)],
    weights: Annotated[str | None, typer.Option(
        help="Shares of the words, one per text, such as 2,1. Default: the same of each.", show_default=False)] = None,
    max_words: Annotated[int | None, typer.Option(
        "--words", min=1, help="End at so many words. Default: where the scarcest text ends.",
        show_default=False)] = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Make one text of several, interleaved and balanced by words; nothing is repeated, the scarcest text decides."""
    from dataclasses import asdict

    from calibration_data.combine import Source
    from calibration_data.combine import combine as mix
    from calibration_data.text import write
    from daemon.cli.tables import console, plain_table

    shares = _weights(weights, len(sources))
    catalogue = _catalogue()
    made = mix([Source(*catalogue.open(source), weight) for source, weight in zip(sources, shares, strict=True)],
               max_words)
    write_text(output, write(made.samples), force=force)
    if json:
        print_json({"output": str(output), "samples": len(made.samples), "words": sum(one.words for one in made.taken),
                    "taken": [asdict(one) for one in made.taken]})
        return
    out = console()
    out.print(plain_table(
        [("text", "left"), ("samples", "right"), ("of", "right"), ("words", "right"), ("of", "right")],
        [(one.name, str(one.samples), str(one.of_samples), f"{one.words:,}", f"{one.of_words:,}")
         for one in made.taken]))
    out.print(f"Wrote {len(made.samples)} samples to {output}.", markup=False, soft_wrap=True)


def check(
    source: SourceName,
    against: Annotated[list[Path] | None, typer.Option(
        help="Another text that models are judged by; repeat for more.", show_default=False)] = None,
    model: ForModel = None,
    json: AsJson = False,
) -> None:
    """Check a text: amount, near-duplicates, language, and overlap with what models are judged by.

    With a model also how many tokens it reads in it, and which share of its vocabulary they are. Overlap with
    evaluation text, scenarios or held-out parts is an error, and so are too few tokens; the rest is told.
    """
    from dataclasses import asdict

    from calibration_data import checks
    from calibration_data.catalogue import describe
    from calibration_data.text import CalibrationRefused

    catalogue = _catalogue()
    name, samples = catalogue.open(source)
    facts = describe(samples)
    repeated = checks.near_duplicates(samples)
    foreign = checks.in_other_languages(samples)
    shared = checks.overlaps(samples, judged_by(catalogue, against or []))
    counted = _count_tokens(model, catalogue, [source]) if model is not None else None
    tokens = counted.pop("counts").popitem()[1] | counted if counted else None
    told, problems = _judge_tokens(name, tokens) if tokens else ([], [])
    if shared:
        problems.append(f"{name} overlaps with text that models are judged by, so figures after calibrating with it "
                        f"would mean nothing; take out {', '.join(_ids(shared))}.")
    if json:
        print_json({"name": name, **_as_json(facts), "enough_words": facts.words >= checks.ENOUGH_WORDS,
                    "near_duplicates": [asdict(one) for one in repeated], "near_duplicate_from": checks.NEAR,
                    "samples_by_language": checks.count_languages(samples),
                    "in_other_languages": [one.id for one in foreign],
                    "overlaps": [asdict(one) for one in shared], "usable": not problems, "tokens": tokens})
    else:
        lines = [f"{name}: {_told(facts)}"]
        if facts.words < checks.ENOUGH_WORDS:
            lines.append(f"That is little: {checks.ENOUGH_WORDS:,} words or more calibrate well.")
        lines += told
        lines.append(f"Near-duplicates ({checks.NEAR:g} or more of their runs of {checks.SHINGLE} words in common): "
                     f"{len(repeated) or 'none'}")
        lines += [f"  {one.id} is like {one.like}: {one.similarity:.2f}" for one in repeated]
        lines.append(f"In another language than the header says, or than English: {len(foreign) or 'none'}")
        lines += [f"  {one.id}: {checks.guess_language(one.text)}" for one in foreign]
        lines.append(f"Overlaps with what models are judged by (runs of {checks.RUN} words): {len(shared) or 'none'}")
        lines += [f"  {one.id} shares {one.words} words with {one.other}: {one.excerpt}" for one in shared]
        typer.echo("\n".join(lines))
    if problems:
        raise CalibrationRefused(" ".join(problems))


def _count_tokens(model: Path, catalogue: Catalogue, sources: list[str]) -> dict[str, Any]:
    """Have a worker count what calibrating a model with domains or files would read; see `count_sources`.

    Raises:
        WorkerRefused: with what is wrong with the model.
    """
    from daemon.settings import Settings
    from daemon.supervisor import run_job

    job = {"job": "count", "model": str(model.expanduser().absolute()), "folder": str(catalogue.folder),
           "sources": sources}
    return dict(run_job(job, Settings.load().state_dir).result)


def _judge_tokens(name: str, found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what to say of the tokens of a text, and what is wrong with them."""
    tokens = f"{found['tokens']:,} tokens"
    told = [(f"For {found['model']}: {tokens}, {found['chunks']:,} chunks of 512; {found['distinct']:,} different "
             f"tokens, {found['share']:.1%} of its vocabulary")]
    if found["plain"]:
        told.append(f"Its chat template does not take {found['plain']:,} of the samples; they are read as plain text."
                    if found["chat_template"] else "It has no chat template; conversations are read as plain text.")
    if found["chunks"] < found["least_chunks"]:
        return told, [(f"{name} has {tokens} for {found['model']}, and an importance matrix needs at least "
                       f"{512 * found['least_chunks']:,}; give more text.")]
    if found["chunks"] < found["enough_chunks"]:
        told.append(f"That is little: {found['enough_chunks']} chunks or more calibrate well.")
    return told, []


def judged_by(catalogue: Catalogue, files: list[Path]) -> dict[str, str]:
    """Return by name what calibration text must not contain: built-in evaluation text and scenarios, held-out parts.

    Raises:
        CalibrationRefused: one of the user's held-out parts or files cannot be used.
    """
    from calibration_data.text import read
    from loops.evaluation import scenarios, text

    others = {"the evaluation text": text.BUILT_IN.read_text(encoding="utf-8")}
    for one in scenarios.read_scenarios():
        others[f"scenario {one.id}"] = f"{one.prompt}\n{one.empathic}\n{one.dismissive}"
    for sample in catalogue.every_held_out():
        name = f"held-out {sample.id}"  # ids of the user's need not differ between files
        others[name] = "\n".join(filter(None, (others.get(name), sample.text)))
    for file in files:
        others[str(file)] = "\n".join(sample.text for sample in read(file.expanduser()))
    return others


def _ids(found: list[Any]) -> list[str]:
    ids = list(dict.fromkeys(one.id for one in found))
    return ids if len(ids) <= 5 else [*ids[:5], f"and {len(ids) - 5} more"]


def _open(source: str, held_out: bool) -> tuple[str, tuple[Sample, ...]]:
    """Return a name and its samples.

    Raises:
        UnknownDomain: there is no such domain or file.
        CalibrationRefused: the text cannot be used, or has no held-out part.
    """
    from calibration_data.text import CalibrationRefused

    catalogue = _catalogue()
    if not held_out:
        return catalogue.open(source)
    samples = catalogue.held_out(source)
    if not samples:
        raise CalibrationRefused(f"{source} has no held-out part; it would be {source}.txt in the folder "
                                 f"{catalogue.folder}/held_out.")
    return f"{source}, held out", samples


def _weights(given: str | None, count: int) -> list[float]:
    """Return one weight per text.

    Raises:
        CalibrationRefused: they are not as many, or no numbers.
    """
    from calibration_data.text import CalibrationRefused

    if given is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in given.split(",")]
    except ValueError:
        raise CalibrationRefused(f"--weights is {given[:80]!r}: numbers with commas between, such as 2,1.") from None
    if len(weights) != count:
        raise CalibrationRefused(f"--weights has {len(weights)} numbers for {count} texts.")
    return weights


def check_output(output: Path, *, force: bool) -> Path:
    """Return where a file can be written.

    Raises:
        CalibrationRefused: it is there already, is no file, or its folder is missing.
        StateUnwritable: it cannot be looked at.
    """
    from calibration_data.text import CalibrationRefused
    from state.files import explained

    path = output.expanduser()
    with explained(path):
        if not path.parent.is_dir():
            raise CalibrationRefused(f"There is no folder {path.parent}.")
        if path.exists() and (not force or not path.is_file()):
            raise CalibrationRefused(f"{output} is there already{'; --force replaces it' if path.is_file() else ''}.")
    return path


def write_text(output: Path, text: str, *, force: bool) -> None:
    """Write a file, whole or not at all.

    Raises:
        CalibrationRefused: see `check_output`.
        DiskFull, StateUnwritable: it cannot be written.
    """
    from state.files import explained, write_atomic

    path = check_output(output, force=force)
    with explained(path):
        write_atomic(path, text.encode(), mode=0o644)


def _as_json(facts: Facts) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(facts)


def _sample_as_json(sample: Sample) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(sample)


def _said(values: tuple[str, ...]) -> str:
    return "; ".join(values) or "not said"


def _told(facts: Facts) -> str:
    return (f"{facts.samples} samples, {facts.words:,} words, licence {_said(facts.licences)}, "
            f"source {_said(facts.sources)}.")
