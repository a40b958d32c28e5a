"""Samples as a model reads them: through its chat template, or plain with the names of the roles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from calibration_data.text import TEXT, Sample, Turn
from state.faults import NightpressError

Message = dict[str, str]
#: gives the text of messages (`role`, `content`); raises a NightpressError where the template refuses them
Template = Callable[[Sequence[Message]], str]


def render(samples: Iterable[Sample], template: Template | None = None) -> list[str]:
    """Return the text of each sample.

    A passage of plain text stays as it is. Not every template knows tools or a system's message: where one refuses a
    sample or leaves a turn out, what the tool says is told as the user's, and then what the system says before the
    first thing that the user says.

    Raises:
        NightpressError: of the template, which refuses the sample in every form.
    """
    return [_plain(sample) if template is None or sample.turns[0].role == TEXT else _through(template, sample)
            for sample in samples]


def _plain(sample: Sample) -> str:
    return "\n".join(turn.text if turn.role == TEXT else f"{turn.role.capitalize()}: {turn.text}"
                     for turn in sample.turns)


def _through(template: Template, sample: Sample) -> str:
    first, refusal = None, None
    for roles in ({}, {"tool": "user"}, {"tool": "user", "system": "user"}):
        try:
            text = template(_messages(sample.turns, roles))
        except NightpressError as problem:
            refusal = problem
            continue
        if all(turn.text.strip() in text for turn in sample.turns):
            return text
        first = text if first is None else first  # a template may also encode what it is given
    if first is None and refusal is not None:
        raise refusal
    return first or ""


def _messages(turns: Iterable[Turn], roles: dict[str, str]) -> list[Message]:
    """Return turns as messages, some roles told as others, and neighbours of which one was told so made one."""
    messages: list[Message] = []
    before = ""
    for turn in turns:
        role = roles.get(turn.role, turn.role)
        if messages and messages[-1]["role"] == role and {turn.role, before} & roles.keys():
            messages[-1]["content"] += f"\n\n{turn.text}"
        else:
            messages.append({"role": role, "content": turn.text})
        before = turn.role
    return messages
