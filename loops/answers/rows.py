"""Rows of a prepared dataset, as questions with a reference answer, or as text; see docs/datasets.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loops.evaluation.fields import parse_json, require_text
from loops.evaluation.text import read_plain
from state.faults import NightpressError

SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, str]


class RowsRefused(NightpressError):
    """The rows to evaluate with cannot be read; the message names the file and the place in it."""

    exit_code = 121


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        id: unique in its file.
        domain: of it; may be empty.
        label: its class; may be empty.
        prompt: the messages before the answer; none for a text.
        reference: the answer that is wanted, or the text.
    """

    id: str
    domain: str
    label: str
    prompt: tuple[Message, ...]
    reference: str

    @property
    def answers(self) -> bool:
        """Whether there is something to answer; else it is a text, which has a perplexity only."""
        return bool(self.prompt)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {**asdict(self), "prompt": [dict(message) for message in self.prompt]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Example:
        """Return what `as_json` wrote."""
        return cls(**{**fields, "prompt": tuple(fields["prompt"])})


def read_rows(dataset: Path, split: str = "test", limit: int = 0) -> tuple[Example, ...]:
    """Return the rows of a split.

    Args:
        dataset: the folder of a dataset, or a file like one of its splits.
        split: of the folder.
        limit: of so many the first; 0 for all.

    Raises:
        RowsRefused: the split is missing or empty, or a row is no conversation that ends with an answer, and no text.
    """
    if dataset.is_dir():
        file = dataset / f"{split}.json"
        if not file.is_file():
            there = [name for name in SPLITS if (dataset / f"{name}.json").is_file()]
            raise RowsRefused(f"{dataset} has no {split}.json; " + (
                f"it has the splits {', '.join(there)}: name one with --split." if there else
                "it is no dataset that `nightpress dataset prepare` made."))
    elif dataset.is_file():
        file = dataset
    else:
        raise RowsRefused(f"There is no dataset {dataset}; check the spelling.")
    found = parse_json(read_plain(file, "split", RowsRefused), file.name, RowsRefused)
    if not isinstance(found, list) or not found:
        raise RowsRefused(f"{file} is no list of rows." if found else f"{file} has no rows.")
    rows: dict[str, Example] = {}
    for number, fields in enumerate(found, 1):
        row = _row(fields, f"{file.name}, row {number}", number)
        if row.id in rows:
            raise RowsRefused(f"{file.name}, row {number} repeats the id {row.id!r}.")
        rows[row.id] = row
    return tuple(rows.values())[:limit or None]


def _row(fields: Any, where: str, number: int) -> Example:
    if not isinstance(fields, dict):
        raise RowsRefused(f"{where} is not a JSON object.")
    name, domain, label = (str(fields.get(part) or "") for part in ("id", "domain", "label"))
    if "messages" not in fields:
        text = require_text(fields.get("text"), where, "text", RowsRefused)
        return Example(name or str(number), domain, label, (), text)
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowsRefused(f"{where} has no list of messages.")
    turns = tuple({"role": str(message.get("role")),
                   "content": require_text(message.get("content"), where, "content", RowsRefused, may_be_empty=True)}
                  for message in messages)
    strange = next((turn["role"] for turn in turns if turn["role"] not in ROLES), None)
    if strange is not None:
        raise RowsRefused(f"{where} has the role {strange[:40]!r}; there are {', '.join(ROLES)}.")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise RowsRefused(f"{where} has no answer to compare with: its last message must be the assistant's, after "
                          "one of a user.")
    return Example(name or str(number), domain, label, turns[:-1], turns[-1]["content"])


def parts(rows: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Return rows in parts of at most so many, in order."""
    return [rows[at:at + size] for at in range(0, len(rows), size)]
