"""EQ-Bench v2: how strongly does a person in a dialogue feel each of four emotions, 0 to 10?

Paech 2023, arXiv:2312.06281, and the published code, github.com/EQ-bench/EQ-Bench (`lib/scoring.py`,
`lib/eq_bench_utils.py`, `lib/run_bench.py`). Kept as published:

- Version 2 asks without the revision by default; its instructions are cut out of the prompt.
- The score of an item is not clipped: 10 is perfect, random answers average 0, the worst is below -19.
- Answers that cannot be read are left out of the score. An answer of four zeros counts as one of them.
- With fewer than 83.33 % of the answers readable, a run has failed and has no score.
- With the revision, the revised score counts when it is at least the score of the first pass and has at
  least 95 % as many readable answers; else the first pass does.
- Of several scores for one emotion the last counts.

Different from it, so figures near those published need not be equal to them:

- It asks up to five times, warmer each time, until an answer can be read; here each question is asked once.
- It reads only `Name: 7` with the very spelling of the question, and any further `word: number` makes the
  answer unreadable. Here capitals, markdown, `7/10` and text around the scores do no harm.
- It reads the 7 of `7.5`, of `7-8` and of `70`; here 7.5 is 7.5, and the others are unreadable.
- It reads scores in the critique as scores of the first pass; here the critique is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loops.evaluation.fields import parse_json, require_number, require_text
from loops.evaluation.text import read_plain
from state.faults import NightpressError

EMOTIONS = 4
SCALE = (0.0, 10.0)
MAX_TOKENS = 60  #: of a reply without the revision, as published
MAX_TOKENS_REVISED = 600  #: of a reply with it
MIN_PARSED = 0.8333  #: share of readable answers below which the published code gives no score
MIN_REVISED = 0.95  #: readable revised answers for each readable first pass, for the revised score to count

_ASKS_TO_REVISE = " Then critique your answer by thinking it through step by step. Finally, give your revised scores."
_FIRST_HEADING, _CRITIQUE, _END = "First pass scores:\n", "Critique: <your critique here>", "[End of answer]"
_HEADING = r"(?:[ \t]+(?:scores?|answers?))?"
#: headings at the start of a line, whatever marks stand before them; the published ones anywhere
_FIRST = re.compile(rf"(?:^[^a-z\n]*first[ \t-]*pass{_HEADING}\b|first pass scores(?=:))", re.IGNORECASE | re.MULTILINE)
_REVISED = re.compile(rf"(?:^[^a-z\n]*revised?{_HEADING}\b(?=[^\w\n]*(?::|$))|revised scores(?=:))",
                      re.IGNORECASE | re.MULTILINE)
_CRITICAL = re.compile(r"^[^a-z\n]*critique\b", re.IGNORECASE | re.MULTILINE)
#: after the name: closing marks, a separator, opening marks, the number, and nothing that makes it another number
_SCORE = (r"[\s*_\"'`’”)\]]*[:=|][\s*_\"'`‘“(\[<]*"
          r"(\d{1,2}(?:\.\d+)?)(?!\d|\s*%|[.,]\d|\s*[-–—]\s*\d|\s*(?:to|or)\s+\d)"
          r"(?!\s*(?:/|out\s+of)\s*+(?!10(?:\.0+)?(?!\d|[.,]\d)))")

Scores = tuple[float, ...]


class EqBenchRefused(NightpressError):
    """The EQ-Bench questions cannot be read. Give the published file of version 2, or one in its format."""

    exit_code = 54


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique in its file.
        prompt: as published, with the instructions to revise.
        emotions: the four names.
        reference: how strong each is, 0 to 10, on the full scale of version 2.
    """

    id: str
    prompt: str
    emotions: tuple[str, ...]
    reference: Scores


@dataclass(frozen=True)
class Answer:
    """Scores of the four emotions, 0 to 10, in the question's order; None where they could not be read.

    Attributes:
        first: of the first pass.
        revised: after the critique; None where none was asked for.
    """

    first: Scores | None
    revised: Scores | None = None


@dataclass(frozen=True)
class EqBench:
    """The result of a model.

    Attributes:
        score: the published one: 10 times the mean of the readable items, of the pass that counts. 100 is
            perfect, random answers average 0, bad ones are negative. 0 when nothing could be read.
        valid: enough answers could be read; otherwise the published code reports a failed run.
        scores: of each item, from -19.908 to 10, in the pass that counts; None where it could not be read.
        paired: of each item, 0 to 1, for paired comparison: a tenth of its score, and 0 for a score below
            0 or none. Cut at 0, because else a model would gain by becoming unreadable.
        n: questions.
        n_parsed: readable answers of the pass that counts.
        first_pass: score of the first pass, as `score`.
        revised: score of the revised pass; None where none was asked for.
    """

    score: float
    valid: bool
    scores: tuple[float | None, ...]
    paired: tuple[float, ...]
    n: int
    n_parsed: int
    first_pass: float
    revised: float | None


def _question(name: str, fields: Any, file: str) -> Question:
    where = f"{file}, question {name!r},"
    if not isinstance(fields, dict):
        raise EqBenchRefused(f"{where} is not a JSON object.")
    prompt = require_text(fields.get("prompt"), where, "prompt", EqBenchRefused)
    reference = fields.get("reference_answer_fullscale")
    if not isinstance(reference, dict):
        raise EqBenchRefused(f"{where} has no 'reference_answer_fullscale': this is not version 2 of EQ-Bench.")
    names = [f"emotion{number}" for number in range(1, EMOTIONS + 1)]
    emotions = tuple(require_text(reference.get(name), where, name, EqBenchRefused).strip() for name in names)
    if len({emotion.casefold() for emotion in emotions}) < EMOTIONS:
        raise EqBenchRefused(f"{where} names the same emotion twice.")
    return Question(name, prompt, emotions, tuple(
        require_number(reference.get(f"{name}_score"), where, f"{name}_score", SCALE, EqBenchRefused, spelled=True)
        for name in names))


def read_questions(path: Path) -> tuple[Question, ...]:
    """Return the questions of a file in its order.

    Args:
        path: the published `eq_bench_v2_questions_171.json` or a file of its format: an object from id to
            `prompt` and `reference_answer_fullscale`, which has `emotion1` to `emotion4` and
            `emotion1_score` to `emotion4_score`, numbers or texts that spell one.

    Raises:
        EqBenchRefused: naming the question.
    """
    content = parse_json(read_plain(path, "list of EQ-Bench questions", EqBenchRefused), path.name, EqBenchRefused)
    if not isinstance(content, dict):
        raise EqBenchRefused(f"{path.name} is not a JSON object from ids to questions.")
    if not content:
        raise EqBenchRefused(f"{path} holds no questions.")
    return tuple(_question(name, fields, path.name) for name, fields in content.items())


def request(question: Question, *, revise: bool = False) -> str:
    """Return the prompt to send.

    Args:
        question: any.
        revise: ask for a critique and revised scores too. Version 2 does not by default: the instructions
            are cut out, and `Your answer:` is put at the end.
    """
    if revise:
        return question.prompt
    prompt = question.prompt.replace(_ASKS_TO_REVISE, "").replace(_FIRST_HEADING, "")
    before, critique, after = prompt.partition(_CRITIQUE)
    if critique and _END in after:
        prompt = before + "\n" + after[after.index(_END):]
    return prompt + "\nYour answer:\n"


def _read_scores(text: str, emotions: Sequence[str]) -> Scores | None:
    """Return the last score of each emotion; None if one has none, or all are 0."""
    found = []
    for emotion in emotions:
        name = r"\s+".join(map(re.escape, emotion.split()))
        given = re.findall(rf"(?<!\w)(?<!\w[-'’]){name}{_SCORE}", text, re.IGNORECASE)
        if not given or not SCALE[0] <= float(given[-1]) <= SCALE[1]:
            return None
        found.append(float(given[-1]))
    return tuple(found) if any(found) else None


def parse_answer(reply: str, question: Question, *, revise: bool = False) -> Answer | None:
    """Return the scores in a reply, or None when neither pass can be read.

    Read are `Name: 7`, `**Name**: 7`, `- name = 7.5`, `"Name": <7>`, `Name: 7/10` and the like, with any
    text around. A pass needs all four emotions and a score above 0, as the prompt demands. Not read, because
    it would be guessing: words, ranges, shares of something else than 10, numbers off the scale.

    Args:
        reply: what the model said.
        question: that it was asked.
        revise: it was asked to revise. The first pass then ends at the heading of the critique or of the
            revised scores, whichever comes first, and the revised scores stand after theirs.
    """
    if not revise:
        first = _read_scores(reply, question.emotions)
        return Answer(first) if first else None
    heading = _FIRST.search(reply)
    start = heading.end() if heading else 0
    critique, again = _CRITICAL.search(reply, start), _REVISED.search(reply, start)
    end = min(found.start() for found in (critique, again) if found) if critique or again else len(reply)
    first = _read_scores(reply[start:end], question.emotions)
    revised = _read_scores(reply[again.end():], question.emotions) if again else None
    return Answer(first, revised) if first or revised else None


def score_answer(question: Question, scores: Sequence[float]) -> float:
    """Return the score of one pass of an answer on the full scale of version 2, from -19.908 to 10.

    10 - 0.7477 × Σ f(d) over the four emotions, d the distance from the reference: f(0) = 0,
    f(d) = 6.5 / (1 + exp(-1.2 (d - 4))) up to 5, f(d) = d above (`calculate_score_fullscale` in the published
    code). The factor makes random answers average 0. Not clipped, as published.

    Args:
        question: any.
        scores: of its four emotions, in their order, 0 to 10.
    """
    tally = 0.0
    for given, wanted in zip(scores, question.reference, strict=True):
        distance = abs(given - wanted)
        if distance > 5:
            tally += distance
        elif distance:
            tally += 6.5 / (1 + math.exp(-1.2 * (distance - 4)))
    return 10 - 0.7477 * tally


def summarise(questions: Sequence[Question], replies: Sequence[str], *, revise: bool = False) -> EqBench:
    """Return the result of a model's replies, in the order of the questions.

    Raises:
        ValueError: there are no questions, or not one reply for each.
    """
    if not questions or len(questions) != len(replies):
        raise ValueError(f"{len(questions)} questions and {len(replies)} replies give no score")
    first: list[float | None] = []
    second: list[float | None] = []
    for question, reply in zip(questions, replies, strict=True):
        answer = parse_answer(reply, question, revise=revise) or Answer(None)
        first.append(score_answer(question, answer.first) if answer.first else None)
        second.append(score_answer(question, answer.revised) if answer.revised else None)
    read_first, read_second = ([score for score in scores if score is not None] for scores in (first, second))
    score_first, score_second = (10 * math.fsum(read) / len(read) if read else 0.0
                                 for read in (read_first, read_second))
    counts = revise and score_second >= score_first and len(read_second) >= MIN_REVISED * len(read_first)
    scores, read = (second, read_second) if counts else (first, read_first)
    return EqBench(
        score=score_second if counts else score_first, valid=len(read) >= MIN_PARSED * len(questions),
        scores=tuple(scores), paired=tuple(max(0.0, score or 0.0) / 10 for score in scores),
        n=len(questions), n_parsed=len(read), first_pass=score_first, revised=score_second if revise else None)
