"""Rows as conversations: which column is what, recognised or named, and the form in which splits are written.

A format says which columns make a row. `alpaca` has instruction, input and output; `qa` question, context and answer;
`chat` a list of messages; `text` a passage. Columns are found by name in any case, or mapped.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from calibration_data.text import TEXT, Turn
from loops.finetune.faults import ColumnsWrong, DatasetRefused, TooFewRows
from loops.finetune.sources import Source

#: names of columns for each part of a row, the likeliest first
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "turns"),
    "instruction": ("instruction", "instructions", "task"),
    "input": ("input", "inputs"),
    "output": ("output", "response", "outputs", "completion"),
    "question": ("question", "query", "prompt", "user_prompt", "patient_message", "user"),
    "context": ("context", "contexts", "passage", "background", "document"),
    "answer": ("answer", "long_answer", "answers", "response", "resp", "completion", "doctor_response", "assistant",
               "output"),
    "text": ("text", "content", "document", "body"),
    "system": ("system", "system_prompt"),
    "label": ("label", "category", "class", "topic", "final_decision", "subject_name", "question_type"),
}
#: by format the parts that a row must have, and those that it may have; the first that fits is recognised
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages",), ("system", "label")),
    "alpaca": (("instruction", "output"), ("input", "system", "label")),
    "qa": (("question", "answer"), ("context", "system", "label")),
    "text": (("text",), ("label",)),
}
_ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
          "bot": "assistant", "chatbot": "assistant", "model": "assistant", "function_call": "assistant",
          "system": "system", "developer": "system", "tool": "tool", "function": "tool", "observation": "tool"}
_KEYS_OF_TEXT = ("text", "contexts", "content", "value")  #: where a nested value keeps what it says


@dataclass(frozen=True)
class Row:
    """One example to train with.

    Attributes:
        id: tells the place in the source, such as `faq.csv:17`, counted from 1.
        turns: of a conversation, the last one the assistant's answer; or one turn of the role TEXT.
        context: what the question is about, kept apart until it is written, for several questions may share it.
        label: its class, where the data have classes.
        split: that the source puts it in.
    """

    id: str
    turns: tuple[Turn, ...]
    context: str = ""
    label: str = ""
    split: str = ""

    @property
    def answer(self) -> str:
        """What is to be learnt: the last turn."""
        return self.turns[-1].text if self.turns else ""

    @property
    def said(self) -> str:
        """All turns, without the context."""
        return "\n".join(turn.text for turn in self.turns)

    @property
    def text(self) -> str:
        """All turns and the context."""
        return "\n".join(turn.text for turn in self.spoken)

    @property
    def in_order(self) -> bool:
        """Whether it is a passage, or turns of user and assistant by turns, ending with the assistant's."""
        roles = [turn.role for turn in self.turns]
        if roles == [TEXT]:
            return True
        roles = roles[roles[:1] == ["system"]:]
        return (bool(roles) and roles[0] == "user" and roles[-1] == "assistant" and "system" not in roles
                and TEXT not in roles and all(one != other or one == "tool" for one, other in pairwise(roles)))

    @property
    def spoken(self) -> tuple[Turn, ...]:
        """The turns as they are written: the context follows the first question."""
        asked = next((number for number, turn in enumerate(self.turns) if turn.role == "user"), None)
        if not self.context or asked is None:
            return self.turns
        with_context = Turn("user", f"{self.turns[asked].text}\n\n{self.context}")
        return (*self.turns[:asked], with_context, *self.turns[asked + 1:])

    def as_json(self, domain: str) -> dict[str, Any]:
        """Return what stands in a split: `messages` with role and content, or `text`."""
        if self.turns and self.turns[0].role == TEXT:
            said: dict[str, Any] = {"text": self.turns[0].text}
        else:
            said = {"messages": [{"role": turn.role, "content": turn.text} for turn in self.spoken]}
        return {"id": self.id, "domain": domain, **({"label": self.label} if self.label else {}), **said}


@dataclass(frozen=True)
class Mapped:
    """How the columns of a source are read: the format, and the column of each of its parts."""

    format: str
    columns: Mapping[str, str]


def parse_map(given: Sequence[str]) -> dict[str, str]:
    """Return columns by part from `PART=COLUMN`.

    Raises:
        DatasetRefused: one is not of this form, or names no part.
    """
    found: dict[str, str] = {}
    for one in given:
        part, equals, column = one.partition("=")
        if not (equals and column) or part not in COLUMNS:
            raise DatasetRefused(f"--map is {one[:80]!r}; it is PART=COLUMN, where PART is one of "
                                 f"{', '.join(COLUMNS)}.")
        found[part] = column
    return found


def recognise(source: Source, name: str | None = None, mapped: Mapping[str, str] | None = None) -> Mapped:
    """Return how to read a source.

    Args:
        source: with at least one row.
        name: of the format, where it is not to be recognised.
        mapped: columns by part; the other parts are found by name.

    Raises:
        DatasetRefused: there is no such format.
        ColumnsWrong: a mapped column is missing, or the columns are of no format; says which there are.
        TooFewRows: the source is empty.
    """
    if name is not None and name not in FORMATS:
        raise DatasetRefused(f"{name[:40]!r} is no format; there are {', '.join(FORMATS)}.")
    if not source.rows:
        raise TooFewRows(f"{source.name} has no rows.")
    columns = {column: None for row in source.rows for column in row}
    chosen = dict(mapped or {})
    for part, column in chosen.items():
        if column not in columns:
            raise ColumnsWrong(f"{source.name} has no column {column!r} for the {part}; it has {_listed(columns)}.")
    for form in [name] if name else FORMATS:
        needed, optional = FORMATS[form]
        if not chosen.keys() <= {*needed, *optional}:
            continue
        found = {**_found(columns, [part for part in (*needed, *optional) if part not in chosen], chosen), **chosen}
        if found.keys() >= {*needed}:
            return Mapped(form, found)
    wanted = " or ".join(" and ".join(FORMATS[form][0]) for form in ([name] if name else FORMATS))
    raise ColumnsWrong(f"{source.name} has the columns {_listed(columns)}, and {wanted} is needed; say with "
                       "--map PART=COLUMN which is which.")


def _found(columns: Iterable[str], parts: Sequence[str], taken: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each part that one has a known name for, mapped columns left out."""
    by_name = {column.strip().lower(): column for column in columns if column not in taken.values()}
    known = {part: [by_name[name] for name in COLUMNS[part] if name in by_name] for part in parts}
    return {part: found[0] for part, found in known.items() if found}


def _listed(columns: Iterable[str]) -> str:
    names = [str(column)[:40] for column in columns]
    return ", ".join(map(repr, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def convert(source: Source, mapped: Mapped) -> list[Row]:
    """Return the rows of a source as conversations or passages; what is missing in a row is empty.

    Raises:
        ColumnsWrong: a conversation has a role or a shape that is not known; names the row.
    """
    width = len(str(len(source.rows)))
    made = []
    for number, row in enumerate(source.rows, 1):
        parts = {part: row.get(column) for part, column in mapped.columns.items()}
        own = row.get("id") if source.kind == "json" and isinstance(row.get("domain"), str) else None
        place = f"{source.name}/{source.split}" if source.kind == "hub" else source.name
        name = str(own) if own else f"{place}:{number:0{width}}"
        label, context, system = flatten(parts.get("label")), "", flatten(parts.get("system"))
        if mapped.format == "chat":
            turns = _read_messages(parts["messages"], f"{source.name}, row {number}")
            if system.strip() and turns and turns[0].role != "system":
                turns = (Turn("system", system), *turns)
        elif mapped.format == "text":
            turns = (Turn(TEXT, flatten(parts["text"])),)
        else:
            asked, about, said = (("instruction", "input", "output") if mapped.format == "alpaca"
                                  else ("question", "context", "answer"))
            turns = (*([Turn("system", system)] if system.strip() else []),
                     Turn("user", flatten(parts[asked])), Turn("assistant", flatten(parts[said], first=True)))
            context = flatten(parts.get(about))
        made.append(Row(name, turns, context if context.strip() else "", label, source.split))
    return made


def _read_messages(value: Any, where: str) -> tuple[Turn, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):  # a table keeps a list so
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ColumnsWrong(f"{where}: a conversation is a list of messages with role and content.")
    turns = []
    for message in value:
        role = str(message.get("role", message.get("from", ""))).strip().lower()
        if role not in _ROLES:
            raise ColumnsWrong(f"{where} has the role {role[:40]!r}; there are user, assistant, system and tool.")
        content = message.get("content", message.get("value"))
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in (None, "text", "input_text", "output_text", "refusal"):
                raise ColumnsWrong(f"{where} holds {str(kind)[:40]!r} besides text, and only text can be learnt from; "
                                   "remove such rows.")
        said = [flatten(content), *_calls(message, where)]
        if any(text.strip() for text in said) or _ROLES[role] != "system":
            turns.append(Turn(_ROLES[role], "\n".join(text for text in said if text)))
    return tuple(turns)


def _calls(message: Mapping[str, Any], where: str) -> list[str]:
    """Return the calls of tools in a message, each as a line of JSON with name and arguments."""
    calls = message.get("tool_calls") or [{"function": one} for one in [message.get("function_call")] if one]
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        asked = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
            raise ColumnsWrong(f"{where} calls a tool without a name.")
        arguments = asked.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        lines.append(json.dumps({"name": asked["name"], "arguments": arguments}, ensure_ascii=False, default=str))
    return lines


def flatten(value: Any, *, first: bool = False) -> str:
    """Return what a value says as text; nothing for null, NaN and bytes that are no text.

    Nested values say what they hold under `text`, `contexts`, `content` or `value`; of a list all is joined by lines,
    or with `first` only the first, as alternatives of one answer are listed. Half characters, which cannot be written
    as UTF-8, become question marks.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bytes):  # as some writers of Parquet keep text
        try:
            return value.decode()
        except UnicodeDecodeError:
            return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        inner = next((value[key] for key in _KEYS_OF_TEXT if key in value), None)
        return flatten(inner, first=first)
    if isinstance(value, Iterable):
        parts = [part for part in (flatten(one, first=first) for one in value) if part.strip()]
        return "\n".join(parts[:1] if first else parts)
    return str(value)
