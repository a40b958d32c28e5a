"""`nightpress daemon`, which is also `nightpressd`: the service itself, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.options import DeployDir, StateDir


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("daemon")(daemon)


def daemon(
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    socket: Annotated[Path | None, typer.Option(
        help="Control socket. Default: nightpressd.sock in $RUNTIME_DIRECTORY, else in $XDG_RUNTIME_DIR/nightpress.",
        show_default=False)] = None,
    log_level: Annotated[str | None, typer.Option(
        help="Least severe line to log: debug, info, warning or error.", show_default=False)] = None,
) -> None:
    """Run the service: wait until nobody needs this machine, then press the models of the queue.

    It stays in the foreground, as service managers want it; `nightpress service install` writes a unit for
    them. SIGTERM and Ctrl-C stop it within seconds, SIGHUP loads the settings anew.
    """
    from daemon.boot import serve
    from daemon.settings import Settings

    serve(lambda: Settings.load(state_dir=state_dir, deploy_dir=deploy_dir, socket_path=socket, log_level=log_level))


def nightpressd() -> None:
    """Run the service; every error is one sentence on standard error and a distinct exit code."""
    from daemon.cli import guarded

    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
    alone.command()(daemon)
    guarded(alone)
