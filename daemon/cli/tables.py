"""Tables and sentences for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loops.pass1.wording import signed

STYLES = {"passed": "green", "failed": "red", "rejected": "red", "inconclusive": "yellow", "oversize": "dim",
          "skipped": "dim", "crashed": "red", "quarantined": "red", "timed_out": "red", "error": "red"}
DASH = "–"


def console(*, stderr: bool = False) -> Console:
    """Return a console that is plain and wide enough when its output goes to a file."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=False, width=None if stream.isatty() else 400)


def megabytes(n_bytes: float | None) -> str:
    """Return bytes as MB or GB with three digits that matter."""
    if not n_bytes:
        return DASH
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as per cent."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def _loss(row: Mapping[str, Any]) -> str:
    if row.get("degradation") is None:
        return DASH
    low, high = row["degradation_low"], row["degradation_high"]
    return f"{signed(row['degradation'])} % [{signed(low)}, {signed(high)}]"


def levels_table(summary: Mapping[str, Any], width: int) -> Table:
    """Return the table of a run's levels, with fewer columns where width is under 116."""
    wide = width >= 116
    target = summary["plan"]["target_bytes"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    columns = ["level", "size", "bpw", *(["bytes", "of target"] if wide else []),
               r"degradation \[interval]" if wide else r"loss \[interval]", "KL divergence" if wide else "KLD",
               "same top", "tok/s", "verdict"]
    for name in columns:
        table.add_column(name, justify="left" if name in {"level", "verdict"} else "right", no_wrap=True)
    base, run = summary["baseline"], summary["run"]
    size = run["model_bytes"]
    speed = base.get("tokens_per_s", {}).get("value")
    table.add_row("  original", megabytes(size), "", *([f"{size:,}", _share_of(size, target)] if wide else []),
                  DASH, DASH, DASH, _number(speed, ",.0f"), "", style="dim")
    for row in summary["levels"]:
        found = row["measurements"]
        size = row["bytes"] or row["forecast_bytes"]
        chosen = row["level"] == run["chosen_level"]
        kld = found.get("kl_divergence", {})
        divergence = DASH
        if kld.get("value") is not None:
            divergence = f"{kld['value']:.5f}" + (f" ±{kld['error'] or 0:.5f}" if wide else "")
        style = STYLES.get(row["state"], "")
        table.add_row(
            ("▸ " if chosen else "  ") + row["level"], megabytes(size), _number(row["bits_per_weight"], ".2f"),
            *([f"{size:,}" if size else DASH, _share_of(size, target)] if wide else []),
            _loss(row), divergence, percent(found.get("same_top_token", {}).get("value")),
            _number(row["tokens_per_s"], ",.0f"), f"[{style}]{row['state']}[/]" if style else row["state"],
            style="bold" if chosen else "")
    return table


def _share_of(size: int | None, target: int) -> str:
    if not size:
        return DASH
    return percent(size / target, 2 if size < target / 100 else 1)


def run_heading(summary: Mapping[str, Any]) -> str:
    """Return what was pressed and how it was measured, in one line."""
    run, plan, base = summary["run"], summary["plan"], summary["baseline"]
    facts = plan.get("facts", {})
    told = [f"Run {run['id']}: {run['name']}", f"{megabytes(run['model_bytes'])} {facts.get('type') or ''}".strip()]
    if base.get("perplexity", {}).get("value"):
        told.append(f"perplexity {base['perplexity']['value']:.3f} on {facts.get('text', 'the text')}")
    if base.get("score", {}).get("value") is not None:
        told.append(f"score {base['score']['value']:.3f}")
    return ", ".join(told) + (" — SIMULATED, all figures invented" if run["simulated"] else "")


def print_run(out: Console, summary: Mapping[str, Any], *, reasons: bool = False) -> None:
    """Print a run: heading, table, reasons on request, the choice and where the release lies."""
    out.print(run_heading(summary), markup=False)
    source = summary["plan"].get("source")
    if source:
        told = ", ".join(f"{stage['stage']} agrees, KL divergence {stage['mean_kl']:.2g}" for stage in source["stages"])
        out.print(f"Converted from {source['folder']} by the converter of {source['converter']}"
                  f"{f': {told}' if told else ''}.", markup=False)
    out.print(levels_table(summary, out.width))
    run = summary["run"]
    if summary.get("calibration"):
        out.print(summary["calibration"]["reason"], markup=False)
    for row in summary["levels"]:
        if row["reason"] and (reasons or row["state"] not in {"passed", "skipped", "oversize"}):
            out.print(f"{row['level']}: {row['reason']}", markup=False)
    if run["state"] != "finished":
        out.print(f"This run is {run['state']}. {run['reason'] or ''}", markup=False)
    elif run["reason"]:
        out.print(run["reason"], markup=False)
    for release in summary["releases"]:
        out.print(f"Release {release['number']} of {release['model']}: {release['path']}", markup=False)


def plain_table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts, none of them read as markup; columns are (name, justification)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(escape, row))
    return table
