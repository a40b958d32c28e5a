"""`nightpress imatrix` and `nightpress quantize`: single files, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import MODEL, AsJson, Calibration, Domain, ImatrixFile, StateDir, Threads, absolute, print_json

if TYPE_CHECKING:
    from daemon.settings import Settings
    from loops.pass1.plan import SinglePlan

Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]

SHOWN = 12  #: tensors and layers that --stats prints


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("imatrix")(imatrix)
    app.command("quantize")(quantize)


def imatrix(
    model: Annotated[Path, typer.Argument(
        help=f"{MODEL} With --stats alone also an importance matrix, GGUF or .dat.")],
    domain: Domain = None,
    calibration: Calibration = None,
    merge: Annotated[list[Path] | None, typer.Option(
        metavar="FILE", show_default=False,
        help="Add up with this importance matrix of the same model; repeat for more. Without --domain and "
             "--calibration nothing is collected.")] = None,
    chunks: Annotated[int, typer.Option(
        min=0, help="Most pieces of 512 tokens to read, taken from all of the text; 0 for all.")] = 128,
    stats: Annotated[bool, typer.Option("--stats", help="Print which tensors and layers matter most.")] = False,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Where to write. Default: MODEL-imatrix.gguf in this folder.",
        show_default=False)] = None,
    force: Force = False,
    threads: Threads = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Collect an importance matrix: what flows into each weight matrix while the model reads calibration text.

    Without a domain the general text is read. Ctrl-C stops; the same command again goes on where it was.
    llama.cpp's own tools read the file.
    """
    from daemon.cli.folders import gguf_of
    from daemon.intake import name_of
    from daemon.settings import Settings

    settings = Settings.load(state_dir=state_dir, threads=threads)
    path = model.expanduser().absolute()
    if stats and not (domain or calibration or merge or output) and _is_matrix(path):
        found = _run({"job": "imatrix", "file": str(path)}, settings)
    else:
        with gguf_of(model, settings) as path:
            target = (output or Path(f"{name_of(path)}-imatrix.gguf")).expanduser().absolute()
            plan = _plan(settings, path, target, domain, calibration, replace=force, chunks=chunks,
                         merge=tuple(map(absolute, merge or ())))
            found = _run({"job": "imatrix", "plan": plan.as_json()}, settings)
    if json:
        print_json(found)
        return
    if found.get("coverage"):
        typer.echo(f"Wrote {found['path']}: {found['entries']} matrices, {found['chunks']} chunks of "
                   f"{found['chunk_size']} tokens of {', '.join(found['datasets'])}. {found['coverage']}")
    else:
        typer.echo(f"{found['path']}: {found['entries']} matrices, {found['chunks']} chunks of {found['chunk_size']} "
                   f"tokens of {', '.join(found['datasets']) or 'an unnamed text'}.")
    if stats:
        _print_statistics(found)


def _is_matrix(path: Path) -> bool:
    """Tell whether a file is rather an importance matrix than a model."""
    from loops.engine.gguf_format import read_header
    from state.faults import NightpressError

    try:
        return read_header(path).metadata.get("general.type") == "imatrix"
    except NightpressError:
        return path.suffix == ".dat"


def _print_statistics(found: dict[str, Any]) -> None:
    from daemon.cli.tables import DASH, console, percent, plain_table

    out = console()
    out.print(plain_table(
        [("tensor", "left"), ("share", "right"), ("mean square", "right"), ("active", "right"), ("evenness", "right"),
         ("outliers", "right"), ("like the layer before", "right")],
        [(row["name"], percent(row["share"]), f"{row['mean']:.4g}", percent(row["active"]), f"{row['evenness']:.2f}",
          percent(row["outliers"]), DASH if row["likeness"] is None else f"{row['likeness']:.2f}")
         for row in found["tensors"][:SHOWN]]))
    out.print(plain_table([("layer", "right"), ("share", "right"), ("outliers", "right")],
                          [(str(row["layer"]), percent(row["share"]), percent(row["outliers"]))
                           for row in found["layers"][:SHOWN]]))
    hidden = len(found["tensors"]) - SHOWN
    if hidden > 0:
        out.print(f"{hidden} more tensors; --json prints all.", markup=False)


def quantize(
    model: Annotated[Path, typer.Argument(help=MODEL)],
    level: Annotated[list[str] | None, typer.Option(
        "--level", metavar="LEVEL", show_default=False,
        help="Such as Q4_K_M or IQ2_XS; repeat, or give several with commas. Default: Q4_K_M.")] = None,
    target_size: Annotated[str | None, typer.Option(
        help="Instead of a level, the best file of this size: every matrix gets its own type. 2.9GB, 800MB.",
        show_default=False)] = None,
    target_bpw: Annotated[float | None, typer.Option(
        metavar="BITS", min=0.5, max=16.0, help="The same, in bits per weight: 4.5.", show_default=False)] = None,
    domain: Domain = None,
    calibration: Calibration = None,
    imatrix: ImatrixFile = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path(),
    force: Force = False,
    allow_requantize: Annotated[bool, typer.Option(
        "--allow-requantize", help="Accept a model that is already quantized.")] = False,
    quant_tool: Annotated[Path | None, typer.Option(
        help="An external llama-quantize to use instead of the built-in engine.", show_default=False)] = None,
    threads: Threads = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Quantize a model to a level, or to several, without measuring it.

    A level that needs an importance matrix gets one of the general calibration text, unless --domain,
    --calibration or --imatrix says otherwise; then all levels are made with that. Each file is verified: it
    loads, and computes finite numbers. `nightpress run` measures what a level costs.

    With --target-size or --target-bpw it measures how sensitive each matrix is, gives each its own type, and
    compares the file with the levels of that size; the best is written. Ctrl-C stops, and the same command goes
    on where it was.
    """
    from loops.pass1.plan import parse_size

    if sum(given is not None for given in (level, target_size, target_bpw)) > 1:
        raise typer.BadParameter("Give one of --level, --target-size and --target-bpw.")
    from daemon.cli.folders import gguf_of
    from daemon.cli.tables import console, megabytes, plain_table
    from daemon.settings import Settings

    settings = Settings.load(state_dir=state_dir, threads=threads)
    wanted = tuple(part.strip() for one in level or ["Q4_K_M"] for part in one.split(",") if part.strip())
    with gguf_of(model, settings) as path:
        plan = _plan(settings, path, output.expanduser().absolute(), domain, calibration, replace=force, levels=wanted,
                     target_bytes=parse_size(target_size) if target_size else 0, target_bits=target_bpw or 0.0,
                     imatrix=absolute(imatrix) if imatrix else None, tool=absolute(quant_tool) if quant_tool else None,
                     allow_requantize=allow_requantize)
        files = _run({"job": "quantize", "plan": plan.as_json()}, settings)["files"]
    if json:
        print_json(files)
        return
    console().print(plain_table(
        [("level", "left"), ("size", "right"), ("bits/weight", "right"), ("importance matrix", "left"),
         ("fallbacks", "right"), ("file", "left")],
        [(row["level"], megabytes(row["bytes"]), f"{row['bits_per_weight']:.3f}", row["imatrix"] or "none",
          str(row.get("fallbacks") or ""), row["path"]) for row in files]))
    if "tried" in files[0]:
        _print_tried(files[0])


def _print_tried(found: dict[str, Any]) -> None:
    from daemon.cli.tables import DASH, console, plain_table

    out = console()
    out.print(plain_table(
        [("tried", "left"), ("bytes", "right"), ("KL divergence, estimated", "right"), ("of the file", "right")],
        [(row["name"], f"{row['bytes']:,}", f"{row['estimate']:.5f}", DASH if row["kld"] is None else
          f"{row['kld']:.5f}") for row in found["tried"]]))
    out.print(f"{found['level']} has the lowest KL divergence, in nats per token on calibration text that the search "
              "kept back; `nightpress recipe show` prints the types of a file.", markup=False)


def _plan(settings: Settings, model: Path, output: Path, domain: list[str] | None, calibration: list[Path] | None,
          **further: Any) -> SinglePlan:
    """Return the plan of a single file, its engine options completed by what the probe found."""
    from daemon.engine import engine_options
    from daemon.intake import name_of
    from daemon.settings import config_dir
    from loops.engine.gguf_check import check_model
    from loops.pass1.plan import SinglePlan

    check_model(model)  # before anything is started
    options = engine_options(settings)
    return SinglePlan(
        model=str(model), scratch=str(settings.scratch), matrices=str(settings.blobs.parent / "imatrices"),
        journals=str(settings.state_dir / "journals"), output=str(output), stem=name_of(model),
        domains=tuple(domain or ()), calibration=tuple(map(absolute, calibration or ())),
        user_domains=str(config_dir() / "calibration"), options=options, **further)


def _run(job: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Run a job and show how far it is; Ctrl-C ends it, and what was finished is kept."""
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.supervisor import run_job
    from daemon.workers import grip_of_signals

    with Stages(console(stderr=True)) as stages, grip_of_signals() as grip:
        return dict(run_job(job, settings.state_dir, grip, stages.show).result)
