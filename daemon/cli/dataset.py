"""`nightpress dataset prepare|validate|recommend`: data to fine-tune with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, StateDir, print_json

if TYPE_CHECKING:
    from loops.finetune.prepare import Prepared
    from loops.finetune.records import Row
    from loops.finetune.tokens import Tokenizer

JOB_CHARACTERS = 16_000_000  #: of text that one worker counts the tokens of

Format = Annotated[str | None, typer.Option(
    "--format", metavar="FORMAT", show_default=False,
    help="alpaca (instruction, input, output), qa (question, context, answer), chat (messages) or text. Default: "
         "recognised by the columns.")]
Map = Annotated[list[str] | None, typer.Option(
    "--map", metavar="PART=COLUMN", show_default=False, help="The column of a part, such as answer=reply; repeat.")]
TokenizerOf = Annotated[Path | None, typer.Option(
    "--tokenizer", metavar="GGUF|FOLDER", show_default=False,
    help="Count lengths in the tokens of this model. Default: words.")]
MinTokens = Annotated[int, typer.Option(min=0, help="Of a row.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of a row.")]
Near = Annotated[float, typer.Option(min=0.05, max=1.0, help="Similarity from which rows are near-duplicates.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                        help="Prepare, check and find data to fine-tune with.")
    group.command("prepare")(prepare)
    group.command("validate")(validate)
    group.command("recommend")(recommend)
    app.add_typer(group, name="dataset")


def prepare(
    domain: Annotated[str, typer.Option(
        metavar="NAME", help="healthcare, legal, finance, or a name of yours.", show_default=False)],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write to.", show_default=False)],
    dataset_name: Annotated[str | None, typer.Option(
        metavar="HUB_ID", help="A dataset of the Hugging Face hub.", show_default=False)] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Its configuration.", show_default=False)] = None,
    dataset_split: Annotated[str | None, typer.Option(
        help="Its split. Default: all of them.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Its branch, tag or commit.", show_default=False)] = None,
    input_file: Annotated[list[Path] | None, typer.Option(
        metavar="FILE|FOLDER", show_default=False,
        help="JSON, JSON lines, CSV, TSV, Parquet or text, or a folder of them; repeat for more.")] = None,
    sample: Annotated[bool, typer.Option(
        "--sample", help="Synthetic rows; general ones for a domain but healthcare, legal and finance.")] = False,
    num_samples: Annotated[int | None, typer.Option(
        min=1, help="Rows to draw before cleaning. Default: all; with --sample 500.", show_default=False)] = None,
    form: Format = None,
    mapped: Map = None,
    steps: Annotated[str | None, typer.Option(
        metavar="STEP,...", show_default=False,
        help="Cleaning steps in order, or none. Default: `dataset_steps` of the settings.")] = None,
    tokenizer: TokenizerOf = None,
    min_tokens: MinTokens = 3,
    max_tokens: MaxTokens = 2048,
    near: Near = 0.7,
    shares: Annotated[str, typer.Option(help="Of train, validation and test.")] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(min=0, help="Another one draws and parts otherwise.")] = 0,
    licence: Annotated[str | None, typer.Option(
        help="Of the data, for the manifest. Default: what its card says.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a dataset that is there.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Make train.json, validation.json and test.json of data, cleaned, and a manifest of how.

    Near-duplicates, rows about the same context and rows with the same long answer are never parted between splits.
    The cleaning steps are turn_order, html_entities, special_tokens, control_characters, urls, emails, whitespace,
    empty_rows, length, duplicates, near_duplicates and statistics, and on request personal_data and balance.
    """
    from calibration_data.text import NAME
    from daemon.preparing import Wanted, load_rows
    from daemon.settings import Settings
    from loops.finetune import prepare as making
    from loops.finetune.cleaning import DEFAULT_STEPS, Cleaning, check_steps
    from loops.finetune.faults import DatasetRefused
    from loops.finetune.records import parse_map
    from loops.finetune.splits import parse_shares

    if not NAME.fullmatch(domain):
        raise DatasetRefused(f"{domain[:40]!r} is no name of a domain: letters, digits, _ and - are allowed, 64 at "
                             "most.")
    if (dataset_name is not None) + bool(input_file) + sample != 1:
        raise DatasetRefused("Name one source: --dataset-name, --input-file or --sample.")
    if dataset_name is None and (dataset_config or dataset_split or revision):
        raise DatasetRefused("--dataset-config, --dataset-split and --revision are of --dataset-name.")
    if min_tokens > max_tokens:
        raise DatasetRefused(f"--min-tokens {min_tokens} is more than --max-tokens {max_tokens}.")
    settings = Settings.load(state_dir=state_dir)
    named = settings.dataset_steps if steps is None else tuple(filter(None, map(str.strip, steps.split(","))))
    chosen = () if named == ("none",) else check_steps(named or DEFAULT_STEPS)
    folder, parts, columns = output_dir.expanduser(), parse_shares(shares), parse_map(mapped or [])
    making.check_folder(folder, force=force)
    cleaning = Cleaning(_tokenizer(tokenizer, settings.state_dir), chosen, min_tokens, max_tokens, near, seed)
    rows, origins = load_rows(Wanted(domain, dataset_name, (dataset_config, dataset_split, revision), input_file or [],
                                     num_samples, seed, form, columns))
    prepared = making.prepare(rows, origins, making.Plan(
        domain, cleaning, None if sample else num_samples, parts, " ".join((licence or "").split())))
    manifest = making.write(prepared, folder)
    if json:
        print_json({"output": str(folder), **manifest})
    else:
        _tell(prepared, manifest, folder)


def _tell(prepared: Prepared, manifest: dict[str, Any], folder: Path) -> None:
    from daemon.cli.tables import console, plain_table

    out = console()
    for origin in prepared.origins:
        out.print(f"{origin['name']}{' ' + origin['split'] if origin.get('split') else ''}: {origin['rows']:,} rows"
                  + (f", format {origin['format']}" if "format" in origin else ""), markup=False, soft_wrap=True)
    for change in prepared.changes:
        out.print(f"  {change.step:20}{change}", markup=False, soft_wrap=True)
    out.print(plain_table([("split", "left"), ("rows", "right"), ("sha256", "left")],
                          [(name, f"{one['rows']:,}", one["sha256"][:16]) for name, one in manifest["splits"].items()]))
    out.print(f"Licence: {prepared.licence or 'not said; look it up, and tell it with --licence'}. Wrote {folder}.",
              markup=False, soft_wrap=True)


def validate(
    data: Annotated[Path, typer.Argument(metavar="FOLDER|FILE", help="A prepared dataset, or a file.")],
    form: Format = None,
    mapped: Map = None,
    tokenizer: TokenizerOf = None,
    min_tokens: Annotated[int | None, typer.Option(
        min=0, help="Of a row. Default: as it was prepared, else 3.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(
        min=1, help="Of a row. Default: as it was prepared, else 2048.", show_default=False)] = None,
    near: Near = 0.7,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings fail too.")] = False,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Write the report as JSON there, too.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Check a dataset: order of turns, missing texts, duplicates, lengths, language, classes, personal data, leakage.

    Ends with code 92 where there are errors: rows that cannot be trained with, near-duplicates in two splits, files
    that are not as they were prepared. Warnings are told, and fail with --strict.
    """
    from dataclasses import replace
    from json import dumps

    from daemon.settings import Settings
    from loops.finetune import prepare as making
    from loops.finetune.cleaning import MAX_TOKENS, MIN_TOKENS, Cleaning
    from loops.finetune.faults import DatasetFaulty
    from loops.finetune.records import parse_map
    from loops.finetune.sources import read_path
    from loops.finetune.validation import validate as find_faults
    from state.files import explained, write_atomic

    place = data.expanduser()
    manifest = (making.read_manifest(place) or {}) if place.is_dir() else {}
    altered = making.check_files(place, manifest)
    counted = _tokenizer(tokenizer, Settings.load(state_dir=state_dir).state_dir)
    prepared = manifest if manifest.get("unit") == counted.unit else {}  # bounds in words say nothing of tokens
    how = Cleaning(counted, (), prepared.get("min_tokens", MIN_TOKENS) if min_tokens is None else min_tokens,
                   prepared.get("max_tokens", MAX_TOKENS) if max_tokens is None else max_tokens, near)
    rows, _ = making.load(read_path(place), form, parse_map(mapped or []))
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    report = find_faults(splits, how)
    report = replace(report, findings=(*altered, *report.findings))
    if output is not None:
        with explained(output):
            write_atomic(output.expanduser(), (dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n").encode(),
                         mode=0o644)
    if json:
        print_json(report.as_json())
    else:
        typer.echo("\n".join(report.lines()))
    failing = report.findings if strict else report.errors
    if failing:
        raise DatasetFaulty(f"{data} has {len(failing)} fault{'' if len(failing) == 1 else 's'}: "
                            f"{', '.join(dict.fromkeys(one.check for one in failing))}.")


def _tokenizer(named: Path | None, state_dir: Path) -> Tokenizer:
    """Return what lengths are counted in: words, a Hugging Face folder's tokens, or a GGUF's, counted by a worker."""
    from daemon.supervisor import run_job
    from loops.finetune.tokens import WORDS, Tokenizer, from_folder

    if named is None:
        return WORDS
    place = named.expanduser().absolute()
    if place.is_dir():
        return from_folder(place)

    def ask(texts: list[str]) -> dict[str, Any]:
        return dict(run_job({"job": "lengths", "model": str(place), "texts": texts}, state_dir).result)

    def count(texts: Any) -> list[int]:
        lengths: list[int] = []
        batch: list[str] = []
        for text in texts:
            if batch and sum(map(len, batch)) + len(text) > JOB_CHARACTERS:
                lengths += ask(batch)["lengths"]
                batch = []
            batch.append(text)
        return lengths + (ask(batch)["lengths"] if batch else [])

    return Tokenizer(place.name, "tokens", count, tuple(ask([])["special"]))


def recommend(
    domain: Annotated[str | None, typer.Argument(help="healthcare, legal or finance. Default: all.",
                                                 show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """List public datasets worth starting with: licence, size, and the options to prepare them with."""
    from dataclasses import asdict

    from daemon.cli.tables import console, plain_table
    from loops.finetune import recommended
    from loops.finetune.faults import DatasetRefused

    found = recommended.recommend(domain)
    if not found:
        known = ", ".join(dict.fromkeys(one.domain for one in recommended.RECOMMENDED))
        raise DatasetRefused(f"No dataset is recommended for {str(domain)[:40]!r}; there are some for {known}.")
    if json:
        print_json({"datasets": [asdict(one) for one in found]})
        return
    out = console()
    out.print(plain_table([("domain", "left"), ("dataset", "left"), ("licence", "left"), ("rows", "right"),
                           ("about", "left")],
                          [(one.domain, one.name, one.licence, f"{one.rows:,}", one.about) for one in found]))
    for one in found:
        out.print(f"nightpress dataset prepare --domain {one.domain} --dataset-name {one.name} {one.options}".rstrip()
                  + f" --output-dir {one.domain}", markup=False, soft_wrap=True)
