"""A dataset from its sources to splits on disk: read, drawn, cleaned, parted, written with a manifest."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loops.finetune import splits as parting
from loops.finetune.cleaning import Change, Cleaning, clean
from loops.finetune.faults import DatasetRefused, DatasetUnreadable, TooFewRows
from loops.finetune.records import Row, convert, recognise
from loops.finetune.sources import MANIFEST, SPLITS, Source
from loops.finetune.validation import ERROR, Finding
from state.faults import failpoint
from state.files import StateUnwritable, explained, make_folder, sha256_file, write_atomic

VERSION = 1  #: of the manifest


@dataclass(frozen=True)
class Plan:
    """What to make.

    Attributes:
        domain: that every row is of.
        cleaning: steps and their bounds; its seed also draws and parts.
        num_samples: rows to draw before cleaning; None for all.
        shares: of train, validation and test.
        licence: of the result, where it is told.
    """

    domain: str
    cleaning: Cleaning
    num_samples: int | None = None
    shares: tuple[float, float, float] = parting.SHARES
    licence: str = ""


@dataclass(frozen=True)
class Prepared:
    """Splits by name, what cleaning did, where the rows come from, and how many were drawn of them."""

    plan: Plan
    splits: Mapping[str, Sequence[Row]]
    changes: tuple[Change, ...]
    origins: tuple[dict[str, Any], ...]
    drawn: int
    licence: str


def load(sources: Iterable[Source], form: str | None = None, mapped: Mapping[str, str] | None = None
         ) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of sources, and of each what it is and how its columns were read; no two ids are equal.

    Raises:
        ColumnsWrong, DatasetRefused, TooFewRows: see `recognise` and `convert`.
    """
    rows: list[Row] = []
    origins: list[dict[str, Any]] = []
    for source in sources:
        how = recognise(source, form, mapped)
        rows += convert(source, how)
        said = {name: value for name, value in vars(source).items() if name != "rows"}
        origins.append({**said, "rows": len(source.rows), "format": how.format, "columns": dict(how.columns)})
    uses = Counter(row.id for row in rows)
    if any(count > 1 for count in uses.values()):
        rows = [replace(row, id=f"{row.id}#{number}") if uses[row.id] > 1 else row
                for number, row in enumerate(rows, 1)]
    return rows, origins


def prepare(rows: Sequence[Row], origins: Sequence[Mapping[str, Any]], plan: Plan) -> Prepared:
    """Return the splits of the rows: drawn by the seed, cleaned, parted.

    Raises:
        TooFewRows: fewer than three rows that differ are left; says what removed the others.
        DatasetRefused, TrainExtraMissing: see `clean` and `part`.
    """
    drawn = list(rows)
    if plan.num_samples is not None and plan.num_samples < len(rows):
        kept = sorted(random.Random(plan.cleaning.seed).sample(range(len(rows)), plan.num_samples))
        drawn = [rows[number] for number in kept]
    cleaned, changes = clean(drawn, plan.cleaning)
    if len(cleaned) < len(SPLITS) < len(drawn):
        removed = ", ".join(f"{change.step} {change.before - change.after:,}" for change in changes
                            if change.before != change.after)
        raise TooFewRows(f"Of {len(drawn):,} rows {len(cleaned) or 'none'} {'is' if len(cleaned) == 1 else 'are'} left "
                         f"after cleaning (removed: {removed}); at least three are needed.")
    splits = parting.part(cleaned, plan.shares, plan.cleaning.seed, plan.cleaning.near)
    licences = sorted({str(origin["licence"]) for origin in origins if origin.get("licence")})
    return Prepared(plan, splits, tuple(changes), tuple(dict(origin) for origin in origins), len(drawn),
                    plan.licence or ", ".join(licences))


def check_folder(folder: Path, *, force: bool) -> None:
    """Make sure that a dataset may be written there.

    Raises:
        DatasetRefused: there are files of a dataset in it, and force is not given, or it is a file.
    """
    with explained(folder):
        if folder.exists() and not folder.is_dir():
            raise DatasetRefused(f"{folder} is a file; name a folder.")
        there = [name for name in (*(f"{split}.json" for split in SPLITS), MANIFEST) if (folder / name).exists()]
    if there and not force:
        raise DatasetRefused(f"{folder} holds {there[0]} already; --force replaces it.")


def write(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Write train.json, validation.json, test.json, and last the manifest; return the manifest.

    Each file is there whole or not at all. A manifest that is there always describes the files beside it: one of
    before goes first. The same input, plan and seed give the same bytes.

    Raises:
        DiskFull, StateUnwritable: it cannot be written; the files that were finished stay.
    """
    try:
        with explained(folder):
            make_folder(folder, 0o755)
    except FileNotFoundError as problem:  # where no folder can be made, as in /proc
        raise StateUnwritable(f"The folder {folder} cannot be made; name another.") from problem
    with explained(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        written = {}
        for name, rows in prepared.splits.items():
            file = folder / f"{name}.json"
            lines = [json.dumps(row.as_json(prepared.plan.domain), ensure_ascii=False) for row in rows]
            content = ("[\n" + ",\n".join(lines) + "\n]\n").encode()
            write_atomic(file, content, mode=0o644)
            failpoint("dataset.split_written")
            written[name] = {"file": file.name, "rows": len(rows), "bytes": len(content), "sha256": sha256_file(file)}
        how = prepared.plan.cleaning
        manifest = {
            "version": VERSION, "domain": prepared.plan.domain, "licence": prepared.licence, "seed": how.seed,
            "shares": dict(zip(SPLITS, prepared.plan.shares, strict=True)), "near": how.near,
            "tokenizer": how.tokenizer.name, "unit": how.tokenizer.unit, "min_tokens": how.min_tokens,
            "max_tokens": how.max_tokens, "sources": list(prepared.origins), "drawn": prepared.drawn,
            "steps": [asdict(change) for change in prepared.changes], "splits": written}
        document = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomic(folder / MANIFEST, document.encode(), mode=0o644)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, None where there is none.

    Raises:
        DatasetUnreadable: it is no manifest of a version that is known.
    """
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_bytes())
        if found["version"] != VERSION:
            raise DatasetUnreadable(f"{file} is of version {found['version']}, which this Nightpress does not know.")
        return {**found, "splits": {name: dict(found["splits"][name]) for name in SPLITS},
                "min_tokens": int(found["min_tokens"]), "max_tokens": int(found["max_tokens"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DatasetUnreadable(f"{file} is no manifest of a dataset.") from problem


def check_files(folder: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    """Return what of a folder is not as its manifest says; nothing for an empty manifest."""
    findings = []
    for split, one in manifest.get("splits", {}).items():
        file = folder / f"{split}.json"
        if not file.is_file():
            findings.append(Finding("files", ERROR, f"{file.name} is missing."))
        elif sha256_file(file) != one.get("sha256"):
            findings.append(Finding("files", ERROR, f"{file.name} is not as it was prepared."))
    return findings
