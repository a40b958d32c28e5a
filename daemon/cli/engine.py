"""`nightpress inspect`, `levels`, `engine`: models and levels before any pressing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import MODEL, AsJson, StateDir, print_json

if TYPE_CHECKING:
    from daemon.settings import Settings

MAX_CONTEXT = 1 << 22  #: tokens; more than any model was trained for, and to plan one takes 8 bytes per token of it
RUNS = 100  #: newest runs whose measurements are looked through


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("inspect")(inspect)
    app.command("levels")(levels)
    app.command("engine")(engine)


def inspect(
    model: Annotated[Path, typer.Argument(help="A GGUF, or the first of its shards.")],
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Check a GGUF without loading it, and say what it is."""
    from daemon.settings import Settings
    from daemon.supervisor import run_job

    settings = Settings.load(state_dir=state_dir)
    found = run_job({"job": "inspect", "model": str(model.expanduser().absolute())}, settings.state_dir).result
    if json:
        print_json(found)
        return
    for key, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        typer.echo(f"{key.replace('_', ' '):16} {shown}")


def levels(
    model: Annotated[Path | None, typer.Argument(
        help=f"Sizes for this model: {MODEL} Default: the starter.", show_default=False)] = None,
    context: Annotated[int | None, typer.Option(
        min=1, max=MAX_CONTEXT, show_default=False,
        help="Tokens of context to have room for. Default: 8192, or what the model was trained for.")] = None,
    ram: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False,
        help="Memory of the machine that is to run it, such as 16GB, of which a quarter is taken to be in use. "
             "Default: this machine, as it is now.")] = None,
    task: Annotated[str | None, typer.Option(
        "--for", metavar="TASK", show_default=False,
        help="Recommend a level for chat, code or commands, and say why.")] = None,
    ladder: Annotated[str | None, typer.Option(
        metavar="LADDER|LEVELS", show_default=False,
        help="Only these: original, knees, iq, full, or a list.")] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """List the levels: exact size for a model, memory with a context, whether that fits, and what each is good for.

    The ladders, which --levels takes too: `original` has the six of the first tool, `full` everything there is, `iq`
    the IQ types, and `knees` the levels that no other beats in both size and quality.
    """
    import psutil

    from daemon.cli.folders import gguf_of
    from daemon.settings import Settings
    from daemon.supervisor import run_job
    from loops.pass1.plan import parse_size
    from loops.starter import STARTER_GGUF

    settings = Settings.load(state_dir=state_dir)
    size, now = parse_size(ram) if ram else None, psutil.virtual_memory()
    room = {"total": size} if size else {"total": now.total, "free": now.available}
    with gguf_of(model or STARTER_GGUF, settings) as path:
        found = dict(run_job({"job": "levels", "model": str(path), "survey": {
            "room": room, "cells": context or 0, "ladder": ladder, "task": task,
            "measured": _measured(settings, path)}}, settings.state_dir).result)
    if json:
        print_json(found)
    else:
        _print_levels(found, own=size is None)


def _measured(settings: Settings, path: Path) -> dict[str, dict[str, Any]]:
    """Return what the newest real runs of this very file measured, by level; see `loops.engine.inspection.Measured`."""
    import math

    from state.ledger import Ledger, LedgerMissing

    try:
        with Ledger.read(settings.state_dir) as ledger:
            sha256 = ledger.cached_hash(path) if path.is_file() else None
            found: dict[str, dict[str, Any]] = {}
            for run in ledger.runs(RUNS) if sha256 else ():
                if run["model_sha256"] != sha256 or run["simulated"]:
                    continue
                rows = {(row["level"], row["metric"]): row["value"] for row in ledger.measurements(run["id"])}
                perplexity = rows.get(("", "perplexity")) or 1.0
                for level in ledger.candidates(run["id"]):
                    kld = rows.get((level["level"], "kl_divergence"))
                    if kld is not None and level["bytes"] and perplexity > 1:
                        found.setdefault(level["level"], {
                            "run": run["id"], "kld": kld, "share": kld / math.log(perplexity),
                            "n_bytes": level["bytes"], "state": level["state"]})
            return found
    except LedgerMissing:
        return {}


def _print_levels(found: dict[str, Any], *, own: bool) -> None:
    from daemon.cli.tables import console, megabytes, plain_table

    out, rows = console(), found["levels"]
    wide, measured = out.width >= 130, any("measured" in row for row in rows)
    context, room = found["context"], found["room"]
    table = plain_table(
        [("level", "left"), *([("size", "right")] if wide else []), ("bytes", "right"), ("bits/weight", "right"),
         ("memory", "right"), ("fits", "left"), *([("KL divergence", "right")] if measured else []), ("matrix", "left"),
         *([("ladders", "left")] if wide else []), ("use", "left")],
        [(row["level"], *((megabytes(row["bytes"]),) if wide else ()), f"{row['bytes']:,}",
          f"{row['bits_per_weight']:.3f}", megabytes(row["memory"]), row["fits"],
          *((_told(row.get("measured")),) if measured else ()), "needed" if row["needs_imatrix"] else "",
          *((" ".join(row["ladders"]),) if wide else ()), row["use"]) for row in rows])
    table.columns[-1].no_wrap = False  # in a narrow terminal it gives way, and no figure does
    out.print(table)
    lines = [
        f"Memory is the file, {megabytes(context['cache'])} of cache for {context['cells']:,} tokens of context, "
        f"{megabytes(context['compute'])} to compute in and {megabytes(context['process'])} of the program. "
        + (f"This machine has {megabytes(room['total'])}, of which {megabytes(room['free'])} are free." if own else
           f"Of {megabytes(room['total'])} a quarter is taken to be in use."), *found["notes"]]
    if any(row["fallbacks"] for row in rows):
        lines.append("Some rows of this model do not fit the blocks of every level; they are stored in larger types.")
    if len(found["knees_measured"]) > 1:
        lines.append("Of the levels measured here, no other is better in both size and KL divergence than "
                     f"{', '.join(found['knees_measured'])}.")
    if found["recommendation"]:
        lines.append(f"For {found['recommendation']['task']}: {found['recommendation']['reason']}")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _told(measured: dict[str, Any] | None) -> str:
    return f"{measured['kld']:.5f} (run {measured['run']})" if measured else ""


def engine(
    again: Annotated[bool, typer.Option("--again", help="Probe this CPU again.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Say which engine this is and whether its extra buffers survive this CPU."""
    from daemon.engine import FILE, probe
    from daemon.settings import Settings
    from daemon.supervisor import run_job

    settings = Settings.load(state_dir=state_dir)
    build = dict(run_job({"job": "engine"}, settings.state_dir).result)
    if again:
        (settings.state_dir / FILE).unlink(missing_ok=True)
    probed = probe(settings.state_dir)
    if json:
        print_json({**build, "probe": asdict(probed)})
        return
    for key, value in build.items():
        typer.echo(f"{key:14} {value}")
    typer.echo(f"{'extra buffers':14} {'on' if probed.extra_buffers else 'off'}: {probed.reason}")
