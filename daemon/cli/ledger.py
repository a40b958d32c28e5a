"""`nightpress check`, `export`, `restore`, `quarantine`: looking after what is remembered."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.options import AsJson, DeployDir, StateDir, print_json


class ExportFormat(StrEnum):
    """How to export the ledger."""

    CSV = "csv"
    JSON = "json"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("check")(check)
    app.command("export")(export)
    app.command("restore")(restore)
    app.command("quarantine")(quarantine)


def check(
    deep: Annotated[bool, typer.Option("--deep", help="Hash every release and every finished level again.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Clean up as the next start would.")] = False,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Check that everything on disk is as it must be; exit with 4 when something is not."""
    from daemon.settings import Settings
    from state.check import notes, violations
    from state.check import repair as tidy_up

    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir)
    done = tidy_up(settings.state_dir, settings.deploy) if repair else []
    found = violations(settings.state_dir, settings.deploy, deep=deep)
    remarks = notes(settings.state_dir, settings.deploy)
    if json:
        print_json({"repaired": done, "violations": found, "notes": remarks})
    else:
        for sentence in (*done, *found, *remarks):
            typer.echo(sentence)
        if not found:
            typer.echo("Everything is as it must be.")
    if found:
        raise typer.Exit(4)


def export(
    form: Annotated[ExportFormat, typer.Option(
        "--format", help="One JSON document, or one CSV file per table.")] = ExportFormat.JSON,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="File for JSON, folder for CSV. Default: standard output, for JSON.",
        show_default=False)] = None,
    state_dir: StateDir = None,
) -> None:
    """Export the whole ledger."""
    from daemon.settings import Settings
    from state.export import export_ledger
    from state.ledger import Ledger

    if form is ExportFormat.CSV and output is None:
        raise typer.BadParameter("CSV is one file per table: name a folder with --output.", param_hint="--output")
    with Ledger.read(Settings.load(state_dir=state_dir).state_dir) as ledger:
        made = export_ledger(ledger, form.value, output)
    if isinstance(made, str):
        typer.echo(made, nl=False)
    else:
        for path in made:
            typer.echo(path)


def restore(
    backup: Annotated[Path | None, typer.Argument(
        help="A JSON backup; default: the newest.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Set a sound ledger aside; nothing is deleted.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Bring the ledger back from its JSON backup."""
    from daemon.settings import Settings
    from state.backup import restore_backup

    used = restore_backup(Settings.load(state_dir=state_dir).state_dir, backup, force=force)
    typer.echo(f"The ledger is restored from {used}.")


def quarantine(
    release: Annotated[str | None, typer.Option(
        metavar="KEY", help="Allow this one again.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """List what killed the engine twice and is not tried any more, or allow it again."""
    from daemon.client import Client
    from daemon.settings import Settings
    from state.ledger import Ledger

    settings = Settings.load(state_dir=state_dir)
    if release is not None:
        client = Client.find(settings)
        if client is not None:
            with client:
                typer.echo(client.ask("release_quarantine", key=release)["message"])
            return
        with Ledger.open(settings.state_dir, "nightpress quarantine") as ledger:
            known = ledger.release_quarantine(release)
        typer.echo(f"{release} is allowed again." if known else f"{release} is not in quarantine.")
        return
    with Ledger.read(settings.state_dir) as ledger:
        found = ledger.quarantined()
    if json:
        print_json(found)
    elif not found:
        typer.echo("Nothing is in quarantine.")
    for key, reason in ({} if json else found).items():
        typer.echo(f"{key}  {reason}")
