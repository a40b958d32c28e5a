"""`nightpress releases`, `promote`, `rollback`: what is deployed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from daemon.cli.options import AsJson, DeployDir, StateDir, print_json


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("releases")(releases)
    app.command("promote")(promote)
    app.command("rollback")(rollback)


def _only_model(models: list[str]) -> str:
    if len(models) == 1:
        return models[0]
    raise typer.BadParameter(f"Say which model: {', '.join(models) or 'none is deployed'}.", param_hint="MODEL")


def releases(
    model: Annotated[str | None, typer.Argument(
        help="Name of a deployed model; default: all.", show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """List the releases; the deployed one is marked."""
    from daemon.cli.tables import console, megabytes, percent, plain_table
    from daemon.settings import Settings
    from state import releases as store

    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir)
    found = store.list_releases(settings.deploy, model)
    deployed = {}
    for name in {release.model for release in found}:
        now = store.current(settings.deploy, name)
        deployed[name] = now.number if now else None
    if json:
        print_json([{**asdict(release.manifest), "path": str(release.path),
                     "current": deployed[release.model] == release.number} for release in found])
        return
    if not found:
        typer.echo(f"Nothing is deployed in {settings.deploy}.")
        return
    console().print(plain_table(
        [("model", "left"), ("release", "right"), ("level", "left"), ("size", "right"), ("degradation", "right"),
         ("promoted", "left")],
        [(("▸ " if deployed[one.model] == one.number else "  ") + one.model, str(one.number), one.manifest.level,
          megabytes(one.manifest.bytes), percent(one.manifest.verdict.get("degradation")),
          one.manifest.created_at[:19].replace("T", " ")) for one in found]))
    for name, number in sorted(deployed.items()):
        if number is not None:
            typer.echo(f"{name}: {settings.deploy / name / 'current' / 'model.gguf'} is release {number}")


def promote(
    run: Annotated[int | None, typer.Argument(help="Number of the run; default: the last.", show_default=False)] = None,
    level: Annotated[str | None, typer.Argument(
        help="Level that passed; default: the chosen one.", show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Release a level that passed: its file is verified, loaded and asked before the pointer moves."""
    from daemon.client import Client
    from daemon.engine import engine_options
    from daemon.promotion import promote as release_level
    from daemon.settings import Settings
    from state.ledger import Ledger, LedgerMissing
    from state.manifest import NotPromotable

    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir)
    if (client := Client.find(settings)) is not None:
        with client:
            _tell_answer(client.ask("promote", {"run": run, "level": level}), json)
        return
    with Ledger.open(settings.state_dir, "nightpress promote") as ledger:
        number = run if run is not None else ledger.latest_run_id(include_simulated=False)
        if number is None:
            raise LedgerMissing
        wanted = level or ledger.run(number)["chosen_level"]
        if wanted is None:
            raise NotPromotable(f"Run {number} chose no level. Name one that passed.")
        made = release_level(ledger, settings, number, wanted, engine_options(settings, gpu=False))
    _tell(made, json, "is deployed")


def rollback(
    model: Annotated[str | None, typer.Argument(help="Name of the deployed model; not needed when there is one.",
                                                show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Go back to the release that was deployed before; works without the ledger."""
    from daemon.settings import Settings
    from state import releases as store

    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir)
    if settings.socket_to_ask.is_socket():  # without a service, a rollback must not wait for imports
        from daemon.client import Client

        if (client := Client.find(settings)) is not None:
            with client:
                _tell_answer(client.ask("rollback", {"model": model}), json)
            return
    name = model or _only_model(store.models(settings.deploy))
    before = store.current_number(settings.deploy, name)
    made = store.rollback(settings.deploy, name)
    _remember_rollback(settings.state_dir, name, before)
    _tell(made, json, "is deployed again")


def _remember_rollback(state_dir: Any, model: str, number: int | None) -> None:
    """Tell the ledger, if there is one and it is free; the pointer is the truth and has moved already."""
    from state.damage import LEDGER
    from state.faults import NightpressError

    if number is None or not (state_dir / LEDGER).is_file():
        return
    try:
        from state.ledger import Ledger

        with Ledger.open(state_dir, "nightpress rollback") as ledger:
            ledger.mark_rolled_back(model, number)
    except NightpressError as problem:
        typer.echo(f"nightpress: rolled back, but the ledger could not be told: {problem}", err=True)


def _tell_answer(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer["detail"])
    else:
        typer.echo(f"{answer['message'].rstrip('.')}: {answer['detail']['path']}/model.gguf")


def _tell(release: Any, as_json: bool, what: str) -> None:
    if as_json:
        print_json({**asdict(release.manifest), "path": str(release.path)})
    else:
        typer.echo(f"Release {release.number} of {release.model} ({release.manifest.level}) {what}: "
                   f"{release.model_path}")
