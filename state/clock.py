"""Wall-clock time as the ledger stores it: UTC, ISO 8601, milliseconds."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """Return the present moment, for instance `2026-05-04T03:02:01.123Z`; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_compact() -> str:
    """Return the present moment for a file name, for instance `20260504T030201.123Z`."""
    return utc_now().replace("-", "").replace(":", "")
