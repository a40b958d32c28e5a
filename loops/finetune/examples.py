"""Rows to tokens: the chat template rendered, the answers found in it, long rows cut, short ones packed together."""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loops.finetune.faults import DatasetUnreadable
from loops.finetune.plan import NothingToTrain

IGNORED = -100  #: the label of a token that is not trained on; PyTorch's cross entropy leaves it out
REFUSED, HIDDEN, TOO_LONG, EMPTY = ("the chat template refuses them", "the chat template changes their answers",
                                    "their answer alone is too long", "they have no answer")


@dataclass(frozen=True)
class Example:
    """Tokens of one row, and of each the label: itself where it is trained on, else IGNORED; the first never is."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class Encoded:
    """The examples of a split, how many rows were cut, and how many were left out for what reason."""

    examples: list[Example] = field(default_factory=list)
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return sum(example.trained for example in self.examples)

    def as_json(self) -> dict[str, Any]:
        """Return what became of the rows."""
        return {"rows": len(self.examples) + self.left_out.total(), "used": len(self.examples), "cut": self.cut,
                "left_out": dict(self.left_out), "tokens": sum(len(one.ids) for one in self.examples),
                "trained_tokens": self.trained}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a split that `nightpress dataset prepare` wrote, or that has the same form.

    Raises:
        DatasetUnreadable: it is not there, no JSON, or a row is neither a conversation nor a text; names the row.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise DatasetUnreadable(f"{file.parent} has no {file.name}, so it is no dataset to train with; "
                                "`nightpress dataset prepare` makes one.") from problem
    except OSError as problem:
        raise DatasetUnreadable(f"{file} cannot be read: {problem.strerror}.") from problem
    except (ValueError, RecursionError) as problem:
        raise DatasetUnreadable(f"{file} is no JSON in UTF-8: {problem}.") from problem
    if not isinstance(found, list):
        raise DatasetUnreadable(f"{file} is JSON, but no list of rows.")
    for number, row in enumerate(found, 1):
        if not _is_row(row):
            raise DatasetUnreadable(f"{file}, row {number}: a row has messages, a list of objects with role and "
                                    "content, or a text; `nightpress dataset prepare` makes such rows of others.")
    return found


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    turns = row.get("messages")
    if turns is None:
        return isinstance(row.get("text"), str)
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns)


class Encoder:
    """Makes tokens of rows with a tokenizer of transformers, whose chat template is set."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self._max = tokenizer, max_length
        self._eos = tokenizer.eos_token_id

    def encode(self, rows: Sequence[Mapping[str, Any]], told: Callable[[float, float], None] | None = None) -> Encoded:
        """Return the examples of rows."""
        made = Encoded()
        for number, row in enumerate(rows, 1):
            whole, reason = self._row(row)
            if whole is not None:
                whole, was_cut, reason = self._fit(whole, "text" in row and "messages" not in row)
                made.cut += was_cut and whole is not None
            if whole is None:
                made.left_out[reason] += 1
            else:
                made.examples.append(whole)
            if told is not None and (number % 100 == 0 or number == len(rows)):
                told(number, len(rows))
        return made

    def _row(self, row: Mapping[str, Any]) -> tuple[Example | None, str]:
        if "messages" not in row:
            ids = list(self._tokenizer(row["text"])["input_ids"])
            if self._eos is not None and ids[-1:] != [self._eos]:
                ids.append(self._eos)
            return (Example(tuple(ids), (IGNORED, *ids[1:])), "") if len(ids) > 1 else (None, EMPTY)
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"]]
        if not answers:
            return None, EMPTY
        text = self._render(turns)
        if text is None:
            return None, REFUSED
        ids, offsets = self._split(text)
        labels = [IGNORED] * len(ids)
        for number in answers:
            span = self._span(turns, number, text)
            if span is None:
                return None, HIDDEN
            first = self._boundary(ids, offsets, text[:span[0]], over=False)
            last = self._boundary(ids, offsets, text[:span[1]], over=True)
            if first is None or last is None or first >= last:
                return None, HIDDEN
            # what a template writes after the end of the answer is not the model's to say
            end = next((place + 1 for place in range(first, last) if ids[place] == self._eos), last)
            labels[first:end] = ids[first:end]
        labels[0] = IGNORED  # nothing comes before it that it could follow from
        return Example(tuple(ids), tuple(labels)), ""

    def _render(self, turns: Sequence[Mapping[str, str]], ask: bool = False) -> str | None:
        """Return a conversation in the chat template, rendered in transformers' sandbox; None where it refuses."""
        try:
            return str(self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))
        except Exception:  # noqa: BLE001 - a template from a stranger raises anything; such rows are counted
            return None

    def _span(self, turns: Sequence[Mapping[str, str]], number: int, text: str) -> tuple[int, int] | None:
        """Return where in the text the answer of a turn begins and ends; None where that cannot be said."""
        before = self._render(turns[:number], ask=True) if number else self._render(turns[:1])
        until = self._render(turns[:number + 1]) if number + 1 < len(turns) else text
        start = len(before) if number and before is not None and text.startswith(before) else None
        answer = turns[number]["content"].strip()
        if start is None:  # the template treats the last turn in its own way: look for the answer itself
            shared = os.path.commonprefix([text, before or ""])  # noqa: RUF071 - by character is what is wanted
            start = text.find(answer, len(shared) if number else 0)
        if start < 0 or not answer:
            return None
        if until is not None and text.startswith(until):
            return start, len(until)
        found = text.find(answer, start)
        return None if found < 0 else (start, found + len(answer))

    def _split(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        fast = bool(self._tokenizer.is_fast)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        return list(found["input_ids"]), [tuple(one) for one in found["offset_mapping"]] if fast else None

    def _boundary(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None, prefix: str, *, over: bool
                  ) -> int | None:
        """Return how many of the tokens belong to the first characters, with or without one over their end.

        So a token that an answer shares with what stands before or after it is trained on.
        """
        alone = self._split(prefix)[0]
        if list(ids[:len(alone)]) == alone:
            return len(alone)
        if offsets is None:
            return None
        return next((place for place, (start, end) in enumerate(offsets)
                     if (start if over else end - 1) >= len(prefix)), len(ids))

    def _fit(self, whole: Example, is_text: bool) -> tuple[Example | None, bool, str]:
        """Cut what is too long: a text at its end, of a conversation the oldest tokens before its last answer."""
        over = len(whole.ids) - self._max
        if over <= 0:
            return whole, False, ""
        if is_text:
            return Example(whole.ids[:self._max], whole.labels[:self._max]), True, ""
        last = len(whole.labels)
        while whole.labels[last - 1] == IGNORED:
            last -= 1
        start = last
        while whole.labels[start - 1] != IGNORED:
            start -= 1
        bos = self._tokenizer.bos_token_id is not None and whole.ids[0] == self._tokenizer.bos_token_id
        over += bos
        if over >= start:  # not one token of the prompt would be left
            return None, True, TOO_LONG
        head = whole.ids[:1] if bos else ()
        labels = (IGNORED, *whole.labels[over:]) if bos else (IGNORED, *whole.labels[over + 1:])
        return Example((*head, *whole.ids[over:]), labels), True, ""


def windows(examples: Sequence[Example], length: int, packing: bool) -> list[tuple[Example, ...]]:
    """Return what goes into each row of a batch: one example, or with packing as many as fit in, best fit first.

    Raises:
        NothingToTrain: there are no examples.
    """
    if not examples:
        raise NothingToTrain("No row is left to train with.")
    if not packing:
        return [(example,) for example in examples]
    order = sorted(range(len(examples)), key=lambda number: (-len(examples[number].ids), number))
    room: list[tuple[int, int]] = []  # of each window that is not full, and its number; sorted
    packed: list[list[int]] = []
    for number in order:
        size = len(examples[number].ids)
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            packed.append([number])
            left, window = length - size, len(packed) - 1
        else:
            left, window = room.pop(at)
            packed[window].append(number)
            left -= size
        if left > 0:
            bisect.insort(room, (left, window))
    return [tuple(examples[number] for number in sorted(window)) for window in packed]


def collate(batch: Sequence[Sequence[Example]], pad: int, packing: bool) -> dict[str, list[list[int]]]:
    """Return the columns of a batch, padded on the right.

    With packing the positions start again at 0 with each example, and transformers keeps examples apart by that
    (`masking_utils.find_packed_sequence_indices`); what pads is one more example.
    """
    longest = max(sum(len(example.ids) for example in window) for window in batch)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [],
                                           "position_ids" if packing else "attention_mask": []}
    for window in batch:
        ids = [token for example in window for token in example.ids]
        empty = longest - len(ids)
        columns["input_ids"].append(ids + [pad] * empty)
        columns["labels"].append([label for example in window for label in example.labels] + [IGNORED] * empty)
        if packing:
            columns["position_ids"].append([place for example in window for place in range(len(example.ids))]
                                           + list(range(empty)))
        else:
            columns["attention_mask"].append([1] * len(ids) + [0] * empty)
    return columns
