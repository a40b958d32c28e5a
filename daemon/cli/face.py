"""What a status looks like: for `nightpress status` once, for `nightpress watch` again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daemon.cli.tables import megabytes
from daemon.watchdog import amount, duration

COLOURS = {"working": "green", "stopped": "yellow", "waiting": "yellow", "paused": "yellow", "idle": "green",
           "stopping": "red"}
_SENSOR_STYLES = {"busy": "yellow", "unknown": "red", "absent": "dim"}


def short_duration(seconds: float) -> str:
    """Return seconds as people say them, `40 s` to `3 d`."""
    return duration(seconds) if seconds < 172_800 else f"{int(seconds / 86_400)} d"


def local_time(text: str) -> str:
    """Return a moment of the ledger in local time, to the minute."""
    from datetime import datetime

    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")


def headline(status: Mapping[str, Any]) -> str:
    """Return what the service does in one line."""
    job = status["job"]
    if job is None:
        return f"{status['state']}: {status['reason']}"
    left = f", about {short_duration(job['left_s'])} left" if job["left_s"] is not None else ""
    return (f"{status['state']} on {job['name']}: {job['level'] or 'original'} {job['stage']}, "
            f"{100 * job['share']:.0f} %{left}; {status['reason']}")


def face(status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """Return everything a status tells, as a person wants to see it, and the last lines of the log below."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    state = status["state"]
    grid.add_row("service", Text.from_markup(f"[{COLOURS.get(state, '')}]{state}[/]: {escape(status['reason'])}"))
    if (job := status["job"]) is not None:
        grid.add_row("job", f"{job['id']}, {job['name']}" + (f", run {job['run_id']}" if job["run_id"] else "")
                     + (", asked for" if job["urgent"] else ""))
        left = "" if job["left_s"] is None else f", about {short_duration(job['left_s'])} of work left"
        grid.add_row("at", f"{job['level'] or 'original'}: {job['stage']} ({job['levels_done']} of {job['levels']} "
                     f"levels done, {short_duration(job['worked_s'])} worked{left})")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=job["share"], width=30), f"{100 * job['share']:.0f} %")
        grid.add_row("", bar)
    if status["job"] is not None:
        grid.add_row("machine", f"{status['verdict']} for {short_duration(status['verdict_for_s'])}")
    if (upcoming := status["next"]) is not None:
        later = f", not before {local_time(upcoming['not_before'])}" if upcoming["not_before"] else ""
        grid.add_row("next", f"{upcoming['name']} (job {upcoming['id']}{later}); {status['queued']} waiting")
    if (release := status["release"]) is not None:
        grid.add_row("release", f"{release['model']} {release['number']}: {release['level']}, "
                     f"{megabytes(release['bytes'])}, {local_time(release['promoted_at'])}")
    for sentence in status["conditions"].values():
        grid.add_row("[red]degraded[/]", escape(sentence))
    grid.add_row("process", f"{status['pid']}, up {short_duration(status['uptime_s'])}, version {status['version']}, "
                 f"state in {escape(status['state_dir'])}")
    told = [Text(f"{local_time(line['timestamp'])} {line['event']}", "dim", overflow="ellipsis", no_wrap=True)
            for line in lines]
    return Group(grid, sensors_table(status["sensors"]), *told)


def sensors_table(sensors: list[dict[str, Any]]) -> Table:
    """Return one row per sensor."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, justify in (("sensor", "left"), ("value", "right"), ("limit", "right"), ("state", "left"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=bool(name))  # type: ignore[arg-type]
    for found in sensors:
        style = _SENSOR_STYLES.get(found["state"], "")
        measured = ["" if found[name] is None or not found["unit"] else amount(found[name], found["unit"])
                    for name in ("value", "limit")]
        table.add_row(found["sensor"], *measured, f"[{style}]{found['state']}[/]" if style else found["state"],
                      escape(found["detail"]), style="dim" if found["state"] == "absent" else "")
    return table
