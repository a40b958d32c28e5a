"""`nightpress finetune`, `lineage` and `starter`: from raw rows to a released model, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, DeployDir, StateDir, print_json

if TYPE_CHECKING:
    from daemon.finetune_config import FinetuneSpec
    from daemon.settings import Settings

STATES = {"unchanged": "there, unchanged", "changed": "CHANGED since", "gone": "gone"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("finetune")(finetune)
    app.command("lineage")(lineage)
    app.command("starter")(starter)


def finetune(
    config: Annotated[Path | None, typer.Argument(
        metavar="CONFIG.toml", help="What to do; --init writes one.", show_default=False)] = None,
    init: Annotated[bool, typer.Option(
        "--init", help="Write a configuration with every key, its default and what it is, and stop.")] = False,
    model: Annotated[str | None, typer.Option(
        metavar="DIR|HUB_ID|starter", help="Instead of the configuration's.", show_default=False)] = None,
    input_file: Annotated[list[Path] | None, typer.Option(
        metavar="FILE|FOLDER", help="Rows, instead of the configuration's [dataset]; repeat for more.",
        show_default=False)] = None,
    name: Annotated[str | None, typer.Option(
        help="Of the model, instead of the configuration's.", show_default=False)] = None,
    queue: Annotated[bool, typer.Option("--queue", help="Queue it for the service and return at once.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Let the service begin at once, whatever the load.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only show how far it is.")] = False,
    tidy: Annotated[bool, typer.Option(
        "--tidy", help="Only show what other configurations of it left that no release was made of, and ask whether "
        "to remove it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --tidy: remove it without asking.")] = False,
    threads: Annotated[int | None, typer.Option(
        min=1, help="Threads to work with. Default: one per processor.", show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Fine-tune a model and press it: prepare, validate, train, merge, convert, compare, calibrate, press, release.

    Each stage is recorded with the hashes of what it was given and made. Ctrl-C stops; the same command goes on at the
    same stage and step, and does again only what a change touches. Where a service runs, it does the work when the
    machine is idle; Ctrl-C then only ends the watching.
    """
    from daemon.finetune_config import FinetuneRefused, FinetuneSpec, template
    from daemon.settings import Settings

    if init:
        _init(config, template())
        return
    if config is None and not (input_file and name):
        raise FinetuneRefused("Name a configuration, which `nightpress finetune --init` writes, or give --name and "
                              "--input-file.")
    spec = FinetuneSpec.read(config.expanduser()) if config else FinetuneSpec.of(
        {"name": name, "dataset": {"files": [str(file.expanduser().absolute()) for file in input_file or ()]}},
        "The command line", Path.cwd())
    changes: dict[str, Any] = {key: value for key, value in (("model", model), ("name", name)) if value is not None}
    if input_file:
        changes["dataset"] = {**spec.dataset.model_dump(mode="json"), "folder": None, "hub": None, "sample": False,
                              "files": [str(file.expanduser().absolute()) for file in input_file]}
    if changes:
        spec = FinetuneSpec.of(spec.as_json() | changes, "The command line", Path.cwd())
    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir, threads=threads)
    if status:
        _status(spec, settings, as_json=json)
    elif tidy:
        _tidy(spec, settings, removing=yes, as_json=json)
    else:
        own = {"--deploy-dir": deploy_dir, "--threads": threads}
        _do(spec, settings, own, queue=queue, force=force, as_json=json)


def _init(config: Path | None, text: str) -> None:
    from loops.pass1.single import OutputThere
    from state.files import explained, write_atomic

    place = (config or Path("finetune.toml")).expanduser()
    if place.exists():
        raise OutputThere(f"{place} is there already; name another file.")
    with explained(place):
        write_atomic(place, text.encode(), mode=0o644)
    typer.echo(f"Wrote {place}. Name your rows in [dataset], then: nightpress finetune {place}")


def _do(spec: FinetuneSpec, settings: Settings, own: dict[str, Any], *, queue: bool, force: bool,
        as_json: bool) -> None:
    from daemon.cli.display import Stages
    from daemon.cli.following import follow, refuse_own
    from daemon.cli.tables import console
    from daemon.client import Client
    from daemon.errors import NothingPassed

    client = Client.find(settings)
    if client is not None:
        refuse_own(own)
    if queue:
        enqueue(spec, settings, urgent=force, as_json=as_json)
        return
    if client is not None:
        with client:
            end = follow(client, {"finetune": spec.as_json()}, Stages(console(stderr=True)), urgent=force)
        if end is None:
            return
        if end["made"] is None:  # it was not listened to all the time, but the ledger knows
            _status(spec, settings, as_json=as_json)
            return
        found = end["made"]
    else:
        found = _do_here(spec, settings)
    if as_json:
        print_json(found)
    else:
        _tell(found)
    if found["run"] is not None and found["chosen"] is None:
        raise NothingPassed(f"No level passed. `nightpress results {found['run']}` shows the reasons.")


def _do_here(spec: FinetuneSpec, settings: Settings) -> dict[str, Any]:
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.finetuning import finetune as work
    from daemon.workers import grip_of_signals
    from state.ledger import Ledger

    errors = console(stderr=True)
    with (Ledger.open(settings.state_dir, "nightpress finetune") as ledger, grip_of_signals() as grip,
          Stages(errors) as stages):
        if ledger.degraded:
            errors.print(f"nightpress: {ledger.degraded}", markup=False)
        return work(spec, ledger, settings, grip, stages.show).as_json()


def enqueue(spec: FinetuneSpec, settings: Settings, *, urgent: bool = False, priority: int = 0,
            as_json: bool = False) -> None:
    """Queue a fine-tuning, by the service where one runs, and tell."""
    from daemon.client import Client
    from daemon.intake import Order
    from state.ledger import JobSpec, Ledger

    client = Client.find(settings)
    if client is not None:
        with client:
            answer = client.ask("add", {"finetune": spec.as_json(), "urgent": urgent, "priority": priority})
    else:
        order = Order(None, finetune=spec.as_json())
        with Ledger.open(settings.state_dir, "nightpress finetune --queue") as ledger:
            number = ledger.add_job(JobSpec(spec.name, "command", order.as_json(), priority=priority, urgent=urgent))
        answer = {"state": "queued", "job": number,
                  "message": f"Queued {spec.name} as job {number}; it is done once `nightpress daemon` runs."}
    if as_json:
        print_json(answer)
    else:
        typer.echo(f"{answer['message']} `nightpress status` shows it, `nightpress finetune --status` its stages.")


def _status(spec: FinetuneSpec, settings: Settings, *, as_json: bool) -> None:
    from daemon.cli.tables import console, plain_table
    from daemon.finetuning import shown
    from state.ledger import Ledger, LedgerMissing

    try:
        with Ledger.read(settings.state_dir) as ledger:
            rows = [shown(row) for row in ledger.stages(spec.name)]
    except LedgerMissing:
        rows = []
    if as_json:
        print_json({"name": spec.name, "stages": rows})
    elif not rows:
        typer.echo(f"Nothing of {spec.name} was begun.")
    else:
        console().print(plain_table(
            [("stage", "left"), ("state", "left"), ("began", "left"), ("ended", "left"), ("reason", "left")],
            [(row["name"], row["state"], row["started_at"], row["ended_at"] or "", row["reason"]) for row in rows]))


def _tidy(spec: FinetuneSpec, settings: Settings, *, removing: bool, as_json: bool) -> None:
    import shutil

    from daemon.cli.tables import megabytes
    from daemon.finetuning import folder_of, superseded
    from daemon.lineage import trace
    from state import releases
    from state.files import explained, make_folder
    from state.ledger import Ledger
    from state.lock import Lock

    home = folder_of(spec, settings)
    with explained(home):
        make_folder(home, 0o755)
    with (Ledger.open(settings.state_dir, "nightpress finetune --tidy") as ledger,
          Lock.acquire(home / ".lock", "nightpress finetune --tidy")):
        used = [Path(station.path) for release in releases.list_releases(settings.deploy)
                for station in trace(f"{release.model}@{release.number}", settings) if station.path]
        found = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                 for folder in superseded(spec, ledger, settings, used)}
        if not as_json:
            for folder, n_bytes in found.items():
                typer.echo(f"{megabytes(n_bytes):>12}  {folder}")
            typer.echo(f"{len(found)} of other configurations, {megabytes(sum(found.values()))}." if found else
                       "There is nothing to remove.")
        removing = bool(found) and (removing or (not as_json and typer.confirm("Remove them?")))
        for folder in found if removing else ():
            with explained(folder):
                shutil.rmtree(folder)
    if as_json:
        print_json({"name": spec.name, "removed": removing,
                    "folders": [{"path": str(folder), "bytes": n_bytes} for folder, n_bytes in found.items()]})


def _tell(found: dict[str, Any]) -> None:
    from daemon.cli.tables import console, megabytes, plain_table

    out = console()
    out.print(plain_table([("stage", "left"), ("", "left"), ("made", "left")], [
        (row["name"], "done before" if row["reused"] else "done",
         ", ".join(entry["path"] for entry in row["outputs"]["files"].values())) for row in found["stages"]]))
    facts = {row["name"]: row["outputs"]["facts"] for row in found["stages"]}
    models = facts.get("evaluate", {}).get("models", {})
    shown = [name for name in ("f1", "exact_match", "rougeL", "loss", "perplexity")
             if any(name in one for one in models.values())]
    if models:
        out.print(plain_table(
            [("model", "left"), ("size", "right"), *((name, "right") for name in shown)],
            [(name, megabytes(one["bytes"]), *(_with_interval(one.get(metric)) for metric in shown))
             for name, one in models.items()]))
    train = facts.get("train", {})
    if train.get("validation_loss") is not None:
        out.print(f"Loss on the validation rows: {train['validation_loss_before']:.3f} before, "
                  f"{train['validation_loss']:.3f} after {train['steps']} steps.", markup=False)
    if found["release"]:
        out.print(f"Released {found['chosen']}: {found['release']}", markup=False, soft_wrap=True)
        out.print(f"`nightpress lineage {found['name']}` prints the way back to the data.", markup=False)


def _with_interval(metric: dict[str, Any] | None) -> str:
    if metric is None or metric.get("value") is None:
        return ""
    low, high = metric.get("low"), metric.get("high")
    return f"{metric['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def lineage(
    what: Annotated[str, typer.Argument(
        metavar="RELEASE|MODEL|FILE", help="A deployed model, MODEL@RELEASE, a file or folder, or the sha256 of a "
                                           "file.")],
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Print the way back from a deployed file to its data, each with its hash and whether it is still as it was."""
    from dataclasses import asdict

    from daemon.cli.tables import console
    from daemon.lineage import trace
    from daemon.settings import Settings

    stations = trace(what, Settings.load(state_dir=state_dir, deploy_dir=deploy_dir))
    if json:
        print_json({"stations": [asdict(one) for one in stations]})
        return
    out = console()
    for one in stations:
        out.print(f"{one.kind:<14}{one.what}", markup=False, soft_wrap=True)
        if one.path:
            out.print(f"{'':14}{one.path} ({STATES.get(one.state, one.state)})", markup=False, soft_wrap=True)
        if one.sha256:
            out.print(f"{'':14}sha256 {one.sha256}", markup=False, soft_wrap=True)
        for source in one.facts.get("sources", ()):
            told = [str(source[key]) for key in ("kind", "licence", "revision") if source.get(key)]
            out.print(f"{'':14}from {source['name']}: {source['rows']:,} rows, {', '.join(told)}"
                      + (f", sha256 {source['sha256']}" if source.get("sha256") else ""), markup=False, soft_wrap=True)
        if one.facts.get("steps") and isinstance(one.facts["steps"], list):
            out.print(f"{'':14}cleaned by {', '.join(step['step'] for step in one.facts['steps'])}", markup=False,
                      soft_wrap=True)


def starter(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    json: AsJson = False,
) -> None:
    """Write the starter model as a Hugging Face folder: the same weights, bit by bit, and the same tokenizer."""
    from loops.starter.folder import write_folder

    made = write_folder(output.expanduser().absolute())
    if json:
        print_json({"folder": str(made)})
    else:
        typer.echo(f"Wrote {made}.")
