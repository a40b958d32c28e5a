"""`nightpress inspect`, `levels`, `engine`: models and levels before any pressing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.options import AsJson, StateDir, print_json


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
        help="Sizes for this model. Default: the starter.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """List every level the installed engine knows, with its exact size for a model."""
    from daemon.cli.tables import console, megabytes, plain_table
    from daemon.settings import Settings
    from daemon.supervisor import run_job

    settings = Settings.load(state_dir=state_dir)
    path = str(model.expanduser().absolute()) if model else None
    found = run_job({"job": "levels", "model": path}, settings.state_dir).result["levels"]
    if json:
        print_json(found)
        return
    console().print(plain_table(
        [("level", "left"), ("size", "right"), ("bytes", "right"), ("bits/weight", "right"), ("fallbacks", "right"),
         ("", "left")],
        [(row["level"], megabytes(row["bytes"]), f"{row['bytes']:,}", f"{row['bits_per_weight']:.3f}",
          str(row["fallbacks"] or ""), "needs an importance matrix" if row["needs_imatrix"] else
          "" if row["quantized"] else "not quantized") for row in found]))


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
