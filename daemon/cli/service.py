"""`nightpress service`: the daemon as a service of systemd or launchd."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.options import AsJson, print_json

if TYPE_CHECKING:  # the commands load it when they run
    from daemon.units import Kind, Outcome

System = Annotated[bool | None, typer.Option(
    "--system/--user", help="One for the machine, or your own. Default: --system for root, else --user.",
    show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(no_args_is_help=True, help="Run the daemon as a service of systemd or launchd.")
    group.command("install")(install)
    group.command("uninstall")(uninstall)
    group.command("status")(status)
    app.add_typer(group, name="service")


def install(
    system: System = None,
    program: Annotated[Path | None, typer.Option(
        "--program", help="The program to start. Default: `nightpressd` beside this one.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that was changed by hand.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file; write nothing.")] = False,
) -> None:
    """Write the file of the service, and print the commands that start it.

    Nothing is started, and no service manager is called: the commands are yours to run. A file
    that you changed is kept unless --force is given; put changes into a drop-in
    (`systemctl edit nightpress`) instead.
    """
    from daemon import units

    kind = _kind(system)
    found = _program(program, must_exist=not dry_run)
    if dry_run:
        typer.echo(units.render(kind, found), nl=False)
        return
    units.require_manager(kind)
    with _as_root(kind):
        outcome = units.install(kind, found, force=force)
    if kind is units.Kind.SYSTEM and (closed := units.closed_folder(found)) is not None:
        typer.echo(f"{closed} is closed to the account nightpress, which must read it to start the program; open it, "
                   "or install Nightpress elsewhere.", err=True)
    path = units.where(kind)
    typer.echo({units.Outcome.INSTALLED: f"Installed: {path}", units.Outcome.REPLACED: f"Replaced: {path}"}
               .get(outcome, f"Already installed: {path}"))
    _print_commands("To start it:" if outcome is not units.Outcome.REPLACED else "To let it take effect:",
                    after_install(kind, outcome, account_exists=_account_exists()))


def uninstall(
    system: System = None,
    force: Annotated[bool, typer.Option("--force", help="Remove a file that was changed by hand too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name the file; remove nothing.")] = False,
) -> None:
    """Remove the file of the service, and print the commands that stop it.

    Drop-ins, the state and the releases stay.
    """
    from daemon import units

    kind = _kind(system)
    path = units.where(kind)
    if dry_run:
        typer.echo(f"Would remove: {path}")
        return
    with _as_root(kind):
        outcome = units.uninstall(kind, force=force)
    if outcome is units.Outcome.ALREADY_REMOVED:
        typer.echo(f"Not installed: {path}")
        return
    typer.echo(f"Removed: {path}")
    _print_commands("If it still runs, stop it:", after_uninstall(kind))


def status(system: System = None, json: AsJson = False) -> None:
    """Say whether the service is installed, unchanged, enabled and active."""
    from dataclasses import asdict

    from daemon import units

    found = units.status(_kind(system))
    if json:
        print_json(asdict(found))
        return
    seals = {units.Seal.UNCHANGED: "yes", units.Seal.CHANGED: "yes, changed by hand",
             units.Seal.FOREIGN: "no; another file has its name"}
    rows = {"file": str(found.path), "installed": seals[found.seal] if found.seal else "no",
            "enabled": found.enabled, "active": found.active, "detail": found.detail,
            "process": found.main_pid, "restarts": found.restarts, "note": found.note}
    for name, value in rows.items():
        if value is not None:
            typer.echo(f"{name:10} {value}")


def after_install(kind: Kind, outcome: Outcome, *, account_exists: bool) -> list[str]:
    """Return the commands to run after the file was written."""
    from daemon import units

    replaced = outcome is units.Outcome.REPLACED
    path = shlex.quote(str(units.where(kind)))
    if kind is units.Kind.LAUNCHD:
        stop = [f"launchctl bootout gui/$(id -u)/{units.LABEL}"] if replaced else []
        return [*stop, f"launchctl bootstrap gui/$(id -u) {path}", f"launchctl print gui/$(id -u)/{units.LABEL}",
                "tail -f ~/Library/Logs/nightpress.log"]
    account = ("useradd --system --user-group --home-dir /var/lib/nightpress --no-create-home "
               "--shell /usr/sbin/nologin nightpress")
    user = " --user" if kind is units.Kind.USER else ""
    return [
        *([account] if kind is units.Kind.SYSTEM and not account_exists else []),
        f"systemctl{user} daemon-reload",
        f"systemctl{user} restart {units.UNIT}" if replaced else f"systemctl{user} enable --now {units.UNIT}",
        *(["loginctl enable-linger    # lets it run while you are logged out"] if user and not replaced else []),
        f"journalctl{user} --unit {units.UNIT} --follow",
    ]


def after_uninstall(kind: Kind) -> list[str]:
    """Return the commands to run after the file was removed."""
    from daemon import units

    if kind is units.Kind.LAUNCHD:
        return [f"launchctl bootout gui/$(id -u)/{units.LABEL}"]
    user = " --user" if kind is units.Kind.USER else ""
    return [f"systemctl{user} disable --now {units.UNIT}", f"systemctl{user} daemon-reload"]


def _print_commands(title: str, commands: list[str]) -> None:
    typer.echo(title)
    for command in commands:
        typer.echo(f"  {command}")


def _kind(system: bool | None) -> Kind:
    import os
    import sys

    from daemon import units

    root = os.geteuid() == 0 and sys.platform != "darwin"
    return units.platform_kind(system=root if system is None else system)


def _program(given: Path | None, *, must_exist: bool) -> Path:
    """Return the absolute path of the daemon, as it was installed beside this command."""
    import os
    import shutil
    import sys

    beside = Path(sys.executable).with_name("nightpressd")
    if given is not None:
        found = given.expanduser().absolute()
    else:
        found = beside if beside.exists() else Path(shutil.which("nightpressd") or beside).absolute()
    if must_exist and not (found.is_file() and os.access(found, os.X_OK)):
        raise typer.BadParameter(f"{found} is not a program; name it with --program.", param_hint="--program")
    return found


@contextlib.contextmanager
def _as_root(kind: Kind) -> Iterator[None]:
    """Say what to do when the folder of the system service is closed to us."""
    from daemon import units
    from state.files import StateUnwritable

    try:
        yield
    except StateUnwritable as problem:
        if kind is not units.Kind.SYSTEM:
            raise
        raise StateUnwritable(f"{problem} Only root installs a system service: repeat with sudo, or take "
                              "--user.") from problem


def _account_exists() -> bool:
    import pwd

    try:
        pwd.getpwnam("nightpress")
    except KeyError:
        return False
    return True
