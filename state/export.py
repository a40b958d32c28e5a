"""The ledger for other programs: one JSON document, or a folder of CSV files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

from state.backup import tables_of
from state.files import explained, make_folder, write_atomic
from state.queries import Queries, decoded

_VIEWS = ("leaderboard",)


def export_ledger(
    ledger: Queries, form: Literal["csv", "json"], destination: Path | None = None
) -> list[Path] | str:
    """Write all tables and the leaderboard; return the files written, or the text without a destination.

    JSON is one document with a list of objects per table. CSV is one file per table in the
    folder `destination`, with a header line; JSON columns are JSON text there.

    Raises:
        ValueError: CSV without a destination, as it is several files.
        DiskFull, StateUnwritable: as the disk says; each file is whole or absent.
    """
    with ledger.snapshot():
        names = (*tables_of(ledger.migrations()), *_VIEWS)
        stored = {name: ledger.stored_rows(name) for name in names}
    if form == "json":
        tables = {name: [decoded(row) for row in rows] for name, rows in stored.items()}
        text = json.dumps(tables, indent=2, ensure_ascii=False) + "\n"
        if destination is None:
            return text
        with explained(destination):
            make_folder(destination.absolute().parent, 0o755)
            write_atomic(destination, text.encode(), mode=0o644)
        return [destination]
    if destination is None:
        raise ValueError("CSV is one file per table and needs a folder")
    written = []
    with explained(destination):
        make_folder(destination.absolute(), 0o755)
        for name, rows in stored.items():
            path = destination / f"{name}.csv"
            write_atomic(path, _csv(ledger.columns(name), rows).encode(), mode=0o644)
            written.append(path)
    return written


def _csv(names: list[str], rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(names)
    writer.writerows([row[name] for name in names] for row in rows)
    return stream.getvalue()
