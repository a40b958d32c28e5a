"""`nightpress status`, `watch`, `health`, `events`, `logs`, `metrics`: what the service does and did."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, StateDir, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from daemon.client import Client
    from daemon.settings import Settings

_LEVELS = ("debug", "info", "warning", "error", "critical")
_SHOWN = {"timestamp", "level", "action", "event"}


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (status, watch, health, events, logs, metrics):
        app.command(command.__name__)(command)


def status(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Say what the service does, why, and how far it is; without a service, what the ledger knows."""
    from daemon.cli.tables import console
    from daemon.client import Client
    from daemon.settings import Settings

    settings = Settings.load(state_dir=state_dir)
    client = Client.find(settings)
    if client is None:
        _without_service(settings, json)
        return
    with client:
        found = client.status()
    if json:
        print_json({"running": True, **found})
    else:
        from daemon.cli.face import face

        console().print(face(found))


def _without_service(settings: Settings, as_json: bool) -> None:
    from daemon.cli.face import local_time
    from daemon.cli.tables import console, megabytes
    from state.damage import degraded
    from state.ledger import Ledger, LedgerMissing

    known: dict[str, Any] = {"running": False, "state_dir": str(settings.state_dir), "queue": [], "run": None,
                             "release": None, "degraded": degraded(settings.state_dir)}
    try:
        with Ledger.read(settings.state_dir) as ledger:
            known["queue"] = [{key: value for key, value in row.items() if key != "spec"}
                              for row in ledger.jobs(waiting=True)]
            known["run"] = next(iter(ledger.runs(1)), None)
            known["release"] = next((row for row in ledger.releases() if row["rolled_back_at"] is None), None)
    except LedgerMissing:
        pass
    if as_json:
        print_json(known)
        return
    out = console()
    out.print("No service runs. `nightpress daemon` starts one, `nightpress service install` lets it start by itself.",
              markup=False)
    if (run := known["run"]) is not None:
        out.print(f"last run  {run['id']}, {run['name']}: {run['state']}. {run['reason']}", markup=False)
    if (release := known["release"]) is not None:
        out.print(f"release   {release['model']} {release['number']}: {release['level']}, "
                  f"{megabytes(release['bytes'])}, {local_time(release['promoted_at'])}", markup=False)
    waiting = known["queue"]
    if waiting:
        out.print(f"waiting   {', '.join(row['name'] for row in waiting)}", markup=False)
    if known["degraded"]:
        out.print(f"degraded  {known['degraded']}", markup=False)


def _client(state_dir: Path | None) -> Client:
    from daemon.client import Client
    from daemon.settings import Settings

    return Client.of(Settings.load(state_dir=state_dir))


def watch(
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks.")] = 1.0,
    state_dir: StateDir = None,
) -> None:
    """Watch the service live until Ctrl-C; where the output is no terminal, a line per change."""
    from threading import Event

    from daemon.cli.face import face, headline
    from daemon.cli.tables import console

    out = console()
    with _client(state_dir) as client:
        client.status()
        try:
            if not out.is_terminal:
                before = ""
                while True:
                    now = headline(client.status())
                    if now != before:
                        print(now, flush=True)
                    before = now
                    Event().wait(every)
            from rich.live import Live

            def look() -> RenderableType:
                return face(client.status(), client.ask("logs", query={"n": 8}))

            with Live(look(), console=out, screen=True, auto_refresh=False) as live:
                while True:
                    Event().wait(every)
                    live.update(look(), refresh=True)
        except KeyboardInterrupt:
            return


def health(state_dir: StateDir = None, json: AsJson = False) -> None:
    """Say whether all is well with the service: exit status 0 if so, 12 when none runs, 17 when not."""
    from daemon.errors import Unwell

    with _client(state_dir) as client:
        found = client.ask("health")
    if json:
        print_json(found)
    elif found["healthy"]:
        typer.echo("All is well.")
    if not found["healthy"]:
        raise Unwell(" ".join(found["conditions"].values()))


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those to come, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("-n", min=1, help="Most of the past to show.")] = 50,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Print what happened: the ledger's events, and on request the service's as they come."""
    from daemon.settings import Settings
    from state.ledger import Ledger, LedgerMissing

    settings = Settings.load(state_dir=state_dir)
    try:
        with Ledger.read(settings.state_dir) as ledger:
            rows = ledger.rows("SELECT * FROM (SELECT * FROM event ORDER BY id DESC LIMIT ?) ORDER BY id", (limit,))
    except LedgerMissing:
        rows = []
    if json and not follow:
        print_json(rows)
        return
    for row in rows:
        _print_event(row["at"], row["action"], {**row["data"], **({"run": row["run_id"]} if row["run_id"] else {}),
                                                **({"level": row["level"]} if row["level"] else {})}, json)
    if follow:
        with _client(state_dir) as client:
            try:
                for kind, data in client.stream("events"):
                    if kind != "press":
                        _print_event(data.pop("at"), str(data.pop("action", kind)), data, json)
            except KeyboardInterrupt:
                return


def _print_event(at: str, action: str, data: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        import json as encoder

        print(encoder.dumps({"at": at, "action": action, **data}, ensure_ascii=False), flush=True)
        return
    told = dict(data)
    message = str(told.pop("message", ""))
    facts = " ".join(f"{name}={value}" for name, value in told.items() if value not in (None, "", {}, []))
    print(f"{at[:19].replace('T', ' ')}  {action:20} {message} {facts}".rstrip(), flush=True)


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with lines to come, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines of the past.")] = 100,
    level: Annotated[str, typer.Option(help="Least severe level: debug, info, warning, error.")] = "debug",
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Print the service's log, from the service itself or from its file."""
    from daemon.client import Client
    from daemon.settings import Settings

    if level not in _LEVELS:
        raise typer.BadParameter(f"{level!r} is not one of {', '.join(_LEVELS)}.", param_hint="--level")
    settings = Settings.load(state_dir=state_dir)
    client = Client.find(settings)
    try:
        for line in _lines(settings, client, lines, follow):
            if _LEVELS.index(line.get("level", "info")) >= _LEVELS.index(level):
                _print_line(line, json)
    except KeyboardInterrupt:
        return
    finally:
        if client is not None:
            client.close()


def _lines(settings: Settings, client: Client | None, count: int, follow: bool) -> Iterator[dict[str, Any]]:
    import json

    from daemon.boot import LOG_FILE
    from daemon.errors import ServiceMissing

    if client is not None:
        if follow:
            yield from (data for _, data in client.stream("logs", n=count, follow=True))
        else:
            yield from client.ask("logs", query={"n": count})
        return
    file = settings.state_dir / LOG_FILE
    if follow or not file.is_file():
        where = "." if file.is_file() else (f", and there is no log {file}; under systemd `journalctl --user -u "
                                            "nightpress` has it.")
        raise ServiceMissing(f"No service runs{where}")
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in deque(stream, count):
            try:
                yield json.loads(text)
            except ValueError:
                yield {"timestamp": "", "level": "info", "event": text.strip()}


def _print_line(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json as encoder

        print(encoder.dumps(line, ensure_ascii=False), flush=True)
        return
    facts = " ".join(f"{name}={value}" for name, value in line.items()
                     if name not in _SHOWN | {"at"} and value not in (None, "", {}, []))
    print(f"{line.get('timestamp', '')[:19].replace('T', ' ')} {line.get('level', ''):8} {line.get('event', '')} "
          f" {line.get('action', '')} {facts}".rstrip(), flush=True)


def metrics(state_dir: StateDir = None) -> None:
    """Print the service's figures in Prometheus's text format."""
    with _client(state_dir) as client:
        typer.echo(client.ask("metrics"), nl=False)
