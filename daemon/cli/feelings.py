"""`nightpress feel` and `nightpress score`: the emotional measures on texts of one's own."""

from __future__ import annotations

import json as json_lines
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from loops.evaluation.plutchik import Felt
    from loops.evaluation.scenarios import Scenario


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("feel")(feel)
    app.command("score")(score)


def feel(
    text: Annotated[str, typer.Argument(
        metavar="TEXT|FILE", help="A text, a file, or - for standard input. Each line is a turn; of a file of chat "
                                  "messages in JSON lines (role, content) those of the user are.")],
    json: AsJson = False,
) -> None:
    """Tell Plutchik's eight emotions in a text, how strong they are, and how steady over its turns."""
    from loops.evaluation import plutchik

    turns = _turns(text)
    felt = [plutchik.feel(turn) for turn in turns]
    whole, steady = plutchik.feel("\n".join(turns)), plutchik.stability(felt)
    if json:
        print_json({"overall": _as_json(whole), "stability": steady,
                    "turns": [{"text": turn, **_as_json(one)} for turn, one in zip(turns, felt, strict=True)]})
        return
    _print_felt(whole, steady, turns, felt)


def _turns(text: str) -> list[str]:
    """Return the turns of a text, a file or standard input.

    Raises:
        RepliesRefused: the file cannot be read, or there are no words.
    """
    from daemon.errors import RepliesRefused
    from loops.evaluation.text import MAX_BYTES, read_plain

    source = text
    if text == "-":
        try:
            source = sys.stdin.buffer.read(MAX_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise RepliesRefused(f"Standard input is not UTF-8 text (byte {problem.start}).") from problem
    elif _is_file(text):
        source = read_plain(Path(text).expanduser(), "text", RepliesRefused)
    turns = [line.strip() for line in source.splitlines() if line.strip()]
    if turns and all(turn.startswith("{") for turn in turns):
        turns = [_message(turn, number) for number, turn in enumerate(turns, 1)]
        turns = [turn for turn in turns if turn.strip()]
    if not turns:
        raise RepliesRefused("There is no text in it.")
    return turns


def _is_file(text: str) -> bool:
    """Return whether text names a file; what looks like a path and is none is refused, not felt.

    Raises:
        RepliesRefused: it looks like a path.
    """
    from daemon.errors import RepliesRefused

    try:
        if Path(text).expanduser().is_file():
            return True
    except (OSError, ValueError, RuntimeError):
        return False
    if " " not in text.strip() and ("/" in text or text.endswith((".txt", ".jsonl", ".md"))):
        raise RepliesRefused(f"There is no file {text}.")
    return False


def _message(line: str, number: int) -> str:
    """Return what the user says in a chat message as JSON; '' for other roles."""
    from daemon.errors import RepliesRefused

    try:
        fields = json_lines.loads(line)
        said = fields["content"] if fields.get("role", "user") == "user" else ""
        if isinstance(said, list):  # parts of a message, of which those of text are read
            said = " ".join(part["text"] for part in said if part.get("type") == "text")
        said.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RepliesRefused(f"Line {number} is no chat message: JSON with role and content is needed.") from None
    return str(said)


def _as_json(felt: Felt) -> dict[str, Any]:
    from loops.evaluation.feelings import PLUTCHIK

    return {"dominant": felt.dominant, "intensity": felt.intensity, "valence": felt.valence,
            "emotions": felt.strengths, "shares": dict(zip(PLUTCHIK, felt.shares, strict=True))}


def _print_felt(whole: Felt, steady: float, turns: list[str], felt: list[Felt]) -> None:
    from daemon.cli.tables import console, plain_table

    out = console()
    out.print(plain_table([("emotion", "left"), ("intensity", "right"), ("", "left")],
                          [(name, f"{value:.2f}", "█" * round(20 * value)) for name, value in
                           sorted(whole.strengths.items(), key=lambda item: -item[1])]))
    out.print(f"intensity {whole.intensity:.2f}, valence {whole.valence:+.2f}", markup=False)
    if len(turns) > 1:
        out.print(plain_table(
            [("turn", "right"), ("dominant", "left"), ("intensity", "right"), ("valence", "right"), ("text", "left")],
            [(str(number), one.dominant or "-", f"{one.intensity:.2f}", f"{one.valence:+.2f}", turn[:70])
             for number, (turn, one) in enumerate(zip(turns, felt, strict=True), 1)]))
        out.print(f"stability over {len(turns)} turns: {steady:.2f}", markup=False)


def score(
    file: Annotated[Path, typer.Argument(
        help="JSON lines with prompt and reply, and where known emotion, valence, intensity and id; what is missing "
             "is told from the prompt.")],
    weight: Annotated[list[str] | None, typer.Option(
        metavar="NAME=WEIGHT", help="Weight of a metric in the overall score; repeat for more. Default: 1 each.",
        show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """Score replies that any model or person gave by the six emotional metrics.

    Fluency leaves its likelihood out here, for want of a model to ask.
    """
    from loops.evaluation.empathy import grade
    from loops.evaluation.metrics import evaluate, overall
    from loops.evaluation.names import METRICS
    from loops.pass1.plan import parse_weights

    weights = parse_weights(weight or ())
    rows: list[dict[str, Any]] = []
    for scenario, reply in _read_replies(file):
        scores = evaluate(scenario, reply)
        grades = grade(scenario.prompt, reply)
        rows.append({"id": scenario.id, "overall": overall(scores, weights), **scores, "epitome": {
            "reaction": grades.reaction, "interpretation": grades.interpretation, "exploration": grades.exploration},
            "emotion": scenario.emotion, "valence": scenario.valence, "intensity": scenario.intensity})
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("overall", *METRICS)}
    if json:
        print_json({"n": len(rows), "mean": means, "replies": rows})
        return
    from daemon.cli.tables import console, plain_table

    console().print(plain_table(
        [("id", "left"), *((name.replace("_", " "), "right") for name in means)],
        [(str(row["id"])[:24], *(f"{row[name]:.2f}" for name in means)) for row in rows]
        + [(f"mean of {len(rows)}", *(f"{value:.3f}" for value in means.values()))]))


def _read_replies(file: Path) -> list[tuple[Scenario, str]]:
    """Return each reply with its scenario.

    Raises:
        RepliesRefused: naming the line.
    """
    from daemon.errors import RepliesRefused
    from loops.evaluation.fields import read_objects, require_text

    found = []
    for where, number, fields in read_objects(file.expanduser(), "file of replies", RepliesRefused):
        prompt, reply = (require_text(fields.get(name), where, name, RepliesRefused, may_be_empty=True)
                         for name in ("prompt", "reply"))
        found.append((_scenario(fields, prompt, where, number), reply))
    if not found:
        raise RepliesRefused(f"{file} holds no replies.")
    return found


def _scenario(fields: dict[str, Any], prompt: str, where: str, number: int) -> Scenario:
    """Return the scenario of a reply, what is not given told from its prompt."""
    from daemon.errors import RepliesRefused
    from loops.evaluation.fields import require_number, require_one_of, require_text
    from loops.evaluation.plutchik import feel as feel_text
    from loops.evaluation.scenarios import VALENCES, Scenario

    felt = feel_text(prompt)
    told = "positive" if felt.valence > 0.2 else "negative" if felt.valence < -0.2 else "neutral"
    valence = require_one_of(fields.get("valence", told), where, "valence", VALENCES, RepliesRefused)
    intensity = require_number(fields.get("intensity", felt.intensity), where, "intensity", (0, 1), RepliesRefused)
    emotion = fields.get("emotion")
    name, feeling = (
        require_text(text, where, field, RepliesRefused, may_be_empty=True) for field, text in (
            ("id", str(number if fields.get("id") is None else fields["id"])),
            ("emotion", emotion if isinstance(emotion, str) else felt.dominant or "")))
    return Scenario(name, prompt, feeling, valence, intensity, "", "")
