"""The rows of a dataset by what its sources are called: the hub, files, or synthetic rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loops.finetune import prepare as making
from loops.finetune.recommended import licence_of
from loops.finetune.records import Row
from loops.finetune.sample import generate
from loops.finetune.sources import read_hub, read_path


@dataclass(frozen=True)
class Wanted:
    """Where rows come from: a dataset of the hub, files, or where neither is named synthetic ones.

    Attributes:
        domain: of synthetic rows.
        hub: a dataset of the hub.
        which: its configuration, split and revision.
        files: or folders of them.
        num_samples: of synthetic rows.
        seed: of synthetic rows.
        form: the format; None to recognise it.
        columns: by part.
    """

    domain: str
    hub: str | None = None
    which: tuple[str | None, str | None, str | None] = (None, None, None)
    files: Sequence[Path] = ()
    num_samples: int | None = None
    seed: int = 0
    form: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def load_rows(wanted: Wanted) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows, and of each source what it is and how its columns were read.

    Raises:
        NightpressError: a source cannot be read, or its columns are of no known format.
    """
    if wanted.hub is not None:
        sources = [replace(source, licence=source.licence or licence_of(wanted.hub))
                   for source in read_hub(wanted.hub, *wanted.which)]
        return making.load(sources, wanted.form, wanted.columns)
    if wanted.files:
        return making.load([source for file in wanted.files for source in read_path(file.expanduser())], wanted.form,
                           wanted.columns)
    count = wanted.num_samples or 500
    return generate(wanted.domain, count, wanted.seed), [
        {"name": f"sample-{wanted.domain}", "kind": "sample", "rows": count, "seed": wanted.seed,
         "licence": "CC0-1.0"}]
