"""`nightpress config show|check|init`: the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.cli.options import AsJson, print_json


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, check or begin the settings.")
    group.command("show")(show)
    group.command("check")(check)
    group.command("init")(init)
    app.add_typer(group, name="config")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


def show(json: AsJson = False) -> None:
    """Print every setting, its value, and where it was set."""
    from daemon.cli.tables import console, plain_table
    from daemon.settings import Settings, settings_file

    settings, sources = Settings.load_with_sources()
    if json:
        print_json({"file": str(settings_file()), "settings": settings.model_dump(mode="json"), "sources": sources})
        return
    out = console()
    out.print(f"Settings file: {settings_file()}{'' if settings_file().exists() else ' (not there)'}", markup=False)
    out.print(plain_table(
        [("setting", "left"), ("value", "left"), ("from", "left"), ("what", "left")],
        [(name, _shown(getattr(settings, name)), sources.get(name, "default"), field.description or "")
         for name, field in Settings.model_fields.items()]))


def check(json: AsJson = False) -> None:
    """Say whether the settings are sound, as the service would take them."""
    from daemon.boot import check_settings
    from daemon.settings import Settings, settings_file

    settings = check_settings(Settings.load())
    missing = [str(entry.path) for entry in settings.models if not entry.path.is_file()]
    if json:
        print_json({"sound": True, "file": str(settings_file()), "missing_models": missing})
        return
    typer.echo("The settings are sound.")
    for path in missing:
        typer.echo(f"There is no file {path}; its model is queued once there is.")


def init(
    force: Annotated[bool, typer.Option("--force", help="Replace a settings file that is there.")] = False,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Where to write. Default: the settings file.", show_default=False)] = None,
) -> None:
    """Write a settings file with every setting, its default and what it means, all commented out."""
    from daemon.errors import SettingsWrong
    from daemon.settings import settings_file, template
    from state.files import explained, make_folder, write_atomic

    path = output or settings_file()
    if path.exists() and not force:
        raise SettingsWrong(f"{path} is there already; --force replaces it.")
    with explained(path):
        make_folder(path.absolute().parent, 0o700)
        write_atomic(path, template().encode(), mode=0o600)
    typer.echo(f"Wrote {path}.")
