"""`nightpress pause`, `resume`, `reload`, `backup`, `reevaluate`, `stop`: telling the service what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.cli.options import AsJson, StateDir, print_json

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (pause, resume, reload, backup, reevaluate, stop):
        app.command(command.__name__)(command)


def _ask(state_dir: Path | None, as_json: bool, verb: str, body: dict[str, Any] | None = None) -> None:
    from daemon.client import Client
    from daemon.settings import Settings

    with Client.of(Settings.load(state_dir=state_dir)) as client:
        answer = client.ask(verb, body)
    if as_json:
        print_json(answer)
    else:
        typer.echo(answer["message"])


def _seconds(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*(s|min|m|h|d)\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration; write 90s, 45min, 2h or 1d.", param_hint="--for")
    return float(found[1]) * _UNITS_S[found[2]]


def pause(
    span: Annotated[str | None, typer.Option(
        "--for", metavar="DURATION", help="Such as 45min or 2h. Default: until `nightpress resume`.",
        show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Do no work, now and after a restart; what is in work stops at once and goes on later."""
    _ask(state_dir, json, "pause", {"for_s": _seconds(span)} if span else {})


def resume(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Work again when the machine is idle."""
    _ask(state_dir, json, "resume")


def reload(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Load the settings anew; wrong ones are refused, and the old ones stay."""
    _ask(state_dir, json, "reload")


def backup(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Write the ledger as JSON into the folder of backups."""
    from daemon.client import Client
    from daemon.settings import Settings
    from state.backup import write_backup
    from state.ledger import Ledger

    settings = Settings.load(state_dir=state_dir)
    client = Client.find(settings)
    if client is not None:
        client.close()
        _ask(state_dir, json, "backup")
        return
    with Ledger.read(settings.state_dir) as ledger:
        path = write_backup(ledger, settings.keep_backups)
    if json:
        print_json({"state": "written", "message": f"Backed the ledger up to {path}.", "detail": {"path": str(path)}})
    else:
        typer.echo(f"Backed the ledger up to {path}.")


def reevaluate(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Queue a check of every deployed model: its file, whether it answers, and its figures anew if anything changed."""
    _ask(state_dir, json, "reevaluate")


def stop(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Stop the service; the job in work goes on where it was when a service runs again."""
    _ask(state_dir, json, "stop")
