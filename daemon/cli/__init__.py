"""The command line: one file per group of commands, everything heavy imported inside them."""

from __future__ import annotations

import sys

import typer

from daemon.cli import (
    calibration,
    config,
    control,
    convert,
    daemon,
    dataset,
    engine,
    evaluate,
    explain,
    feelings,
    finetune,
    ledger,
    make,
    merge,
    queue,
    recipe,
    releases,
    results,
    run,
    service,
    status,
    train,
)
from state.faults import NightpressError

app = typer.Typer(
    name="nightpress", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Press language models: quantize level by level, measure each against the original, promote the smallest "
         "that holds.")

GROUPS = (run, results, explain, releases, daemon, status, queue, control, config, service, make, recipe, dataset,
          convert, train, merge, evaluate, finetune, calibration, feelings, ledger, engine)
for group in GROUPS:
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"nightpress {metadata.version('nightpress')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Take the options that come before the command."""
    del version


def main() -> None:
    """Run the command line; every error is one sentence on standard error and a distinct exit code."""
    guarded(app)


def guarded(program: typer.Typer) -> None:
    """Run a program of ours to its end, errors told as `main` does."""
    try:
        program()
    except NightpressError as problem:
        typer.echo(f"nightpress: {problem}", err=True)
        sys.exit(problem.exit_code)
