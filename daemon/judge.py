"""An optional judge: a large model grades how empathic replies are, by a rubric after EPITOME.

EPITOME (Sharma, Miner, Atkins and Althoff 2020, "A Computational Approach to Understanding Empathy Expressed in
Text-Based Mental Health Support", EMNLP, arXiv:2009.08441) tells three ways of expressing empathy apart, each
graded 0, 1 or 2: emotional reactions, interpretations, explorations. `data/rubric.md` asks for them in our words,
and for two more of our own, fit and harm; that a model grades by it as people would, nobody has measured.

The judge is blind: it sees the prompt, the emotion and the reply, nothing of the model or level. They are quoted
as data, so that instructions in a reply are not followed. Equal replies to one prompt are graded once.

Prompts, emotions and replies leave this machine for the provider.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache as remember
from pathlib import Path
from typing import Any, Protocol

from daemon.errors import Interrupted
from daemon.providers import (
    Connection,
    Form,
    JudgeExtraMissing,
    JudgeFailed,
    JudgeKeyMissing,
    JudgeKeyRefused,
    JudgeSpec,
    OutOfForm,
    ask_at_once,
)
from state.faults import NightpressError

__all__ = ["Cache", "Grade", "Item", "JudgeExtraMissing", "JudgeFailed", "JudgeKeyMissing", "JudgeKeyRefused",
           "JudgeSpec", "Marks", "cache_key", "estimate_tokens", "judge", "rubric"]

RUBRIC = Path(__file__).with_name("data") / "rubric.md"
PARTS = ("reaction", "interpretation", "exploration", "fit", "harm")
MOST = 2  #: of every part
ATTEMPTS = 2  #: of an answer that is out of form
BYTES_PER_TOKEN = 3  #: of UTF-8; English has 3 to 4.5, so the estimate is rather too high
ANSWER_TOKENS = 400  #: of one answer; about 80 are the grades, the rest is room for models that think first

FORM = Form("grade", "Give the grades of the reply in the exchange, by the rubric.", {
    "type": "object", "additionalProperties": False, "required": ["reason", *PARTS],
    "properties": {"reason": {"type": "string", "description": "one sentence of 30 words at most"},
                   **{part: {"type": "integer", "enum": [0, 1, 2]} for part in PARTS}}})


@dataclass(frozen=True)
class Item:
    """What is to be graded.

    Attributes:
        id: for the caller; the judge never sees it.
        prompt: what the person said.
        emotion: what they feel.
        reply: what was answered; may be empty.
    """

    id: str
    prompt: str
    emotion: str
    reply: str


@dataclass(frozen=True)
class Marks:
    """What the judge says of a reply.

    Attributes:
        reaction: warmth, compassion, shared joy, 0 to 2.
        interpretation: understanding shown, 0 to 2.
        exploration: interest in what was not said, 0 to 2.
        fit: how well it suits what was said, 0 to 2.
        harm: 0 none, 1 some, 2 grave.
        reason: one sentence.
    """

    reaction: int
    interpretation: int
    exploration: int
    fit: int
    harm: int
    reason: str

    @property
    def score(self) -> float:
        """All in one number, 0 to 1: (reaction + interpretation + exploration + fit) / 8 × (1 - harm / 2).

        The weights are ours: the three parts of EPITOME and the fit count alike, and grave harm leaves nothing.
        """
        good = self.reaction + self.interpretation + self.exploration + self.fit
        return good / (4 * MOST) * (1 - self.harm / MOST)


@dataclass(frozen=True)
class Grade:
    """A graded item.

    Attributes:
        id: of the item.
        score: 0 to 1, see `Marks.score`.
        marks: its parts and the reason.
    """

    id: str
    score: float
    marks: Marks


class Cache(Protocol):
    """Where grades are kept; asked only from the thread that calls `judge`."""

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Return what was put under the key, if anything."""

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep the value, a JSON object, under the key."""


@remember
def rubric() -> str:
    """Return the rubric, which is the judge's system prompt."""
    return RUBRIC.read_text(encoding="utf-8")


def exchange(item: Item) -> str:
    """Return the message to the judge: the texts as JSON between markers that none of them can write.

    JSON keeps quotes and line ends inside its strings, and `<` stands as an escape, so no text can close the
    marker and go on as if it were ours.
    """
    data = json.dumps({"prompt": item.prompt, "emotion": item.emotion, "reply": item.reply}, ensure_ascii=False)
    data = data.replace("<", r"\u003c").encode(errors="replace").decode()  # half a character cannot be sent
    return f"<exchange>\n{data}\n</exchange>\n\nGrade the reply with `{FORM.name}`."


def cache_key(spec: JudgeSpec, item: Item) -> str:
    """Return a sha256 that changes with the rubric, the provider, the model, the prompt, the emotion or the reply."""
    parts = [rubric(), spec.provider, spec.model, item.prompt, item.emotion, item.reply]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_marks(answer: Any) -> Marks:
    """Return the marks of an answer.

    Raises:
        OutOfForm: saying which part is missing or off the scale.
    """
    if not isinstance(answer, Mapping):
        raise OutOfForm("the answer is not a JSON object")
    for part in PARTS:
        mark = answer.get(part)
        if isinstance(mark, bool) or not isinstance(mark, int) or not 0 <= mark <= MOST:
            raise OutOfForm(f"{part} is {str(mark)[:40]!r}, not 0, 1 or 2")
    reason = answer.get("reason")
    if not isinstance(reason, str):
        raise OutOfForm("the reason is no text")
    return Marks(**{part: answer[part] for part in PARTS}, reason=" ".join(reason.split())[:500])


def estimate_tokens(items: Sequence[Item]) -> tuple[int, int]:
    """Return about how many tokens judging would take, sent and received, were nothing in the cache.

    Rather too many than too few, except where a model thinks at length before it answers.
    """
    different = {exchange(item) for item in items}
    overhead = len(rubric().encode()) + len(json.dumps(asdict(FORM)).encode())
    sent = sum(overhead + len(message.encode()) for message in different)
    return -(-sent // BYTES_PER_TOKEN), ANSWER_TOKENS * len(different)


def _grade(connection: Connection, item: Item) -> Marks:
    """Return the marks of an item, asking once more when the answer is out of form."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read_marks(connection.ask(rubric(), exchange(item), FORM))
        except OutOfForm as problem:
            if attempt == ATTEMPTS:
                raise JudgeFailed(f"{connection.spec.provider} ({connection.spec.model}) answered {ATTEMPTS} times out "
                                  f"of form on {item.id!r}: {problem}.") from None
    raise AssertionError("unreachable")


def judge(spec: JudgeSpec, items: Sequence[Item], cache: Cache, progress: Callable[[int, int], None],
          stop: threading.Event) -> list[Grade]:
    """Grade replies, in the order of the items.

    Every grade goes into the cache as it arrives, so an interruption or failure loses only the requests under
    way, and the same call goes on where it was. With all grades in the cache, neither library nor key is needed.

    Args:
        spec: who judges.
        items: what to grade; ids need not be unique.
        cache: of earlier grades, under `cache_key`.
        progress: told items graded and items in all, in this thread.
        stop: set it to end early.

    Raises:
        Interrupted: stop was set.
        JudgeExtraMissing: the provider's library is not installed.
        JudgeKeyMissing: its key is missing or refused.
        JudgeFailed: it refuses, does not answer, or answers out of form, after several attempts.
    """
    keys = [cache_key(spec, item) for item in items]
    found: dict[str, Marks] = {}
    for key in dict.fromkeys(keys):
        kept = cache.get(key)
        if kept is not None:
            try:
                found[key] = read_marks(kept)
            except OutOfForm:  # not ours, or damaged: asked anew
                continue
    waiting = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
    if found:
        progress(sum(key in found for key in keys), len(keys))
    if waiting:
        if stop.is_set():
            raise Interrupted
        try:
            jobs = iter(waiting.items())
            with Connection(spec) as connection, closing(ask_at_once(
                    lambda job: _grade(connection, job[1]), lambda: next(jobs, None), spec.concurrency,
                    stop)) as arriving:  # closed at once, whatever the caller raises
                for (key, _), marks in arriving:
                    cache.put(key, asdict(marks))
                    found[key] = marks
                    progress(sum(key in found for key in keys), len(keys))
        except JudgeFailed as problem:
            raise _with_what_is_kept(problem, sum(key in found for key in keys), len(keys)) from None
    return [Grade(item.id, found[key].score, found[key]) for key, item in zip(keys, items, strict=True)]


def _with_what_is_kept(problem: NightpressError, graded: int, total: int) -> JudgeFailed:
    """Return the failure with what was learnt before it."""
    return JudgeFailed(f"{str(problem).rstrip('.')}; {graded} of {total} grades are kept for the next attempt.")
