"""`nightpress add`, `queue`, `remove`, `move`, `run-now`, `cancel`: the models that wait for an idle machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from daemon.cli.options import MODEL, AsJson, StateDir, print_json

if TYPE_CHECKING:
    from daemon.client import Client
    from daemon.settings import Settings

JobId = Annotated[int, typer.Argument(metavar="JOB", help="Number of the job, from `nightpress queue`.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("add")(add)
    app.command("queue")(queue)
    app.command("remove")(remove)
    app.command("move")(move)
    app.command("run-now")(run_now)
    app.command("cancel")(cancel)


def _open(state_dir: Path | None) -> tuple[Settings, Client | None]:
    from daemon.client import Client
    from daemon.settings import Settings

    settings = Settings.load(state_dir=state_dir)
    return settings, Client.find(settings)


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        typer.echo(answer["message"])


def add(
    model: Annotated[Path, typer.Argument(help=f"{MODEL} Or the configuration of a fine-tuning, CONFIG.toml.")],
    target_size: Annotated[str, typer.Option(help="Levels larger than this are not built: 20GB, 800MB.")] = "24GB",
    max_degradation: Annotated[float, typer.Option(
        min=0.0, max=1.0, help="Largest loss of the score that passes, as a share.")] = 0.07,
    levels: Annotated[str | None, typer.Option(
        help="Levels such as Q8_0,Q4_K_M, or a ladder: original, full, iq, knees. Default: original.",
        show_default=False)] = None,
    gate: Annotated[list[str] | None, typer.Option(
        metavar="NAME:LIMIT", help="As of `nightpress run`; repeat for more.", show_default=False)] = None,
    domain: Annotated[list[str] | None, typer.Option(
        metavar="NAME", help="As of `nightpress run`; repeat for more.", show_default=False)] = None,
    strategy: Annotated[Literal["walk", "bisect", "refine"], typer.Option(help="As of `nightpress run`.")] = "walk",
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="Higher is done first.")] = 0,
    name: Annotated[str | None, typer.Option(
        help="Name of the model in the deploy folder. Default: from its file.", show_default=False)] = None,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Release the chosen level.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Do it at once, whatever the load.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Queue a model for the service; without one it waits in the ledger until a service runs."""
    from calibration_data.catalogue import Catalogue
    from daemon.cli.folders import find
    from daemon.intake import Order, name_of, plan_for
    from daemon.settings import ModelEntry, config_dir
    from loops.engine.gguf_check import check_model
    from state.ledger import JobSpec, Ledger
    from state.manifest import check_name

    if model.suffix.lower() == ".toml":
        from daemon.cli.finetune import enqueue
        from daemon.finetune_config import FinetuneSpec
        from daemon.settings import Settings

        enqueue(FinetuneSpec.read(model.expanduser().absolute()), Settings.load(state_dir=state_dir), urgent=force,
                priority=priority, as_json=json)
        return
    settings, client = _open(state_dir)
    path = find(model, settings)
    if path.is_file() or not path.exists():
        check_model(path)
    for one in domain or ():
        Catalogue(config_dir() / "calibration").load(one)
    wanted = [part.strip() for part in (levels or "").split(",") if part.strip()]
    named = check_name(name) if name else name_of(path)
    entry = ModelEntry(path=path, name=named, target_size=target_size, max_degradation=max_degradation,
                       levels=tuple(wanted), gates=tuple(gate or ()), domains=tuple(domain or ()), strategy=strategy,
                       priority=priority)
    order = Order(plan_for(settings, entry), promoting=promote)
    if client is not None:
        with client:
            _tell(client.ask("add", {"plan": order.as_json()["plan"], "promoting": promote, "priority": priority,
                                     "urgent": force}), json)
        return
    with Ledger.open(settings.state_dir, "nightpress add") as ledger:
        number = ledger.add_job(JobSpec(named, "command", order.as_json(), priority=priority, urgent=force))
    _tell({"state": "queued", "job": number, "running": False,
           "message": f"Queued {named} as job {number}; it is done once a service runs: `nightpress daemon`."}, json)


def queue(
    every: Annotated[bool, typer.Option("--all", help="Those that ended too.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """List the jobs in the order they will be done."""
    from daemon.cli.tables import DASH, console, plain_table
    from state.ledger import Ledger, LedgerMissing

    settings, client = _open(state_dir)
    if client is not None:
        with client:
            rows = client.ask("queue", query={"every": every})
    else:
        try:
            with Ledger.read(settings.state_dir) as ledger:
                rows = ledger.jobs(waiting=not every)
        except LedgerMissing:
            rows = []
        for row in rows:
            row["model"] = (row.pop("spec").get("plan") or {}).get("model")
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo("Nothing waits. `nightpress add MODEL` queues a model.")
        return
    console().print(plain_table(
        [("job", "right"), ("model", "left"), ("state", "left"), ("priority", "right"), ("from", "left"),
         ("attempts", "right"), ("run", "right"), ("reason", "left")],
        [(str(row["id"]), row["name"], row["state"] + (" (now)" if row["urgent"] else ""), str(row["priority"]),
          row["source"], str(row["attempts"]), str(row["run_id"] or DASH),
          row["reason"] + (f" Not before {row['not_before']}." if row["not_before"] else "")) for row in rows]))


def remove(job: JobId, state_dir: StateDir = None, json: AsJson = False) -> None:
    """Take a waiting job off the queue."""
    from state.ledger import JobState, Ledger

    settings, client = _open(state_dir)
    if client is not None:
        with client:
            _tell(client.ask("remove", job_id=job), json)
        return
    with Ledger.open(settings.state_dir, "nightpress remove") as ledger:
        state = ledger.job(job)["state"]
        if state == JobState.QUEUED:
            ledger.end_job(job, JobState.CANCELLED, "Removed on request.")
    removed = state == JobState.QUEUED
    _tell({"state": "removed" if removed else f"already_{state}", "job": job,
           "message": f"Job {job} is off the queue." if removed else f"Job {job} was {state} before."}, json)


def move(
    job: JobId,
    place: Annotated[int, typer.Argument(min=1, help="Place of the queue, 1 for the next to be done.")],
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Move a waiting job to another place; it takes the priority of the job whose place it takes."""
    from state.ledger import Ledger

    settings, client = _open(state_dir)
    if client is not None:
        with client:
            _tell(client.ask("move", {"place": place}, job_id=job), json)
        return
    with Ledger.open(settings.state_dir, "nightpress move") as ledger:
        got = ledger.move_job(job, place)
    _tell({"state": "moved", "job": job, "message": f"Job {job} is number {got} of the queue."}, json)


def run_now(
    job: Annotated[int | None, typer.Argument(help="Number of the job. Default: the next.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Do a job at once, whatever the load; one that failed, was cancelled or set aside is tried again."""
    from daemon.client import Client
    from daemon.settings import Settings

    with Client.of(Settings.load(state_dir=state_dir)) as client:
        _tell(client.ask("run_now", {"job": job}), json)


def cancel(
    job: Annotated[int | None, typer.Argument(
        help="Number of the job. Default: the one in work.", show_default=False)] = None,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """End the job in work for good; what was measured stays, and adding the model again goes on from there."""
    from daemon.client import Client
    from daemon.settings import Settings

    with Client.of(Settings.load(state_dir=state_dir)) as client:
        _tell(client.ask("cancel", {"job": job}), json)
