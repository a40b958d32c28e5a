"""`score` reads replies as their author meant them or refuses them with the line; `feel` and `score` tell all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.feelings import feel, score
from daemon.errors import RepliesRefused
from loops.evaluation.empathy import SCALES, grade
from loops.evaluation.metrics import evaluate, overall
from loops.evaluation.names import METRICS
from loops.evaluation.plutchik import feel as feel_text
from loops.evaluation.scenarios import Scenario

GOOD: dict[str, Any] = {"prompt": "I lost my key.", "reply": "That is hard. Where did you see it last?"}


def line(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def write(folder: Path, *lines: str) -> Path:
    file = folder / "mine.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


BAD = {
    "not JSON": ("{'prompt': 1}", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[1]", "is not a JSON object"),
    "a name twice": ('{"prompt": "x", "reply": "y", "reply": "z"}', "says 'reply' twice"),
    "no prompt": (json.dumps({"reply": "x"}), "has no 'prompt': a text is needed"),
    "no reply": (json.dumps({"prompt": "x"}), "has no 'reply': a text is needed"),
    "a number as reply": (line(reply=3), "has no 'reply'"),
    "half a character in the prompt": (line(prompt="\ud83d"), "half a character in 'prompt'"),
    "half a character in the reply": (line(reply="\ud83d"), "half a character in 'reply'"),
    "half a character in the id": (line(id="\ud83d"), "half a character in 'id'"),
    "half a character in the emotion": (line(emotion="\ud83d"), "half a character in 'emotion'"),
    "unknown valence": (line(valence="sad"), "valence 'sad': it must be one of positive, neutral, negative"),
    "no valence": (line(valence=None), "valence None"),
    "a list of valences": (line(valence=["positive"]), "valence ['positive']"),
    "too intense": (line(intensity=1.5), "intensity 1.5: a number from 0 to 1"),
    "not a number": (line(intensity=float("nan")), "intensity nan"),
    "truth as number": (line(intensity=True), "intensity True"),
    "text as number": (line(intensity="0.5"), "intensity '0.5'"),
}


@pytest.mark.parametrize(("bad", "why"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_by_its_number(bad: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(RepliesRefused, match=r"^mine\.jsonl, line 3 ") as refused:
        score(write(tmp_path, line(), "", bad))
    assert why in str(refused.value)


def test_an_empty_prompt_reply_or_id_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(write(tmp_path, line(prompt="", reply="", id="")), json=True)
    (row,) = json.loads(capsys.readouterr().out)["replies"]
    assert (row["id"], row["overall"]) == ("", 0)


def test_as_json_each_reply_has_its_scores_and_the_means_are_of_all(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"id": "a", "emotion": "fear", "valence": "negative", "intensity": 0.5}
    score(write(tmp_path, line(**told), line(reply="Buy another.")), weight=["empathy=3"], json=True)
    found = json.loads(capsys.readouterr().out)
    scores = evaluate(Scenario("a", GOOD["prompt"], "fear", "negative", 0.5, "", ""), GOOD["reply"])
    grades = grade(GOOD["prompt"], GOOD["reply"])
    first, second = found["replies"]
    assert first == {**told, **scores, "overall": overall(scores, {"empathy": 3}),
                     "epitome": {name: getattr(grades, name) for name in SCALES}}
    assert found["n"] == 2
    assert found["mean"] == {name: pytest.approx((first[name] + second[name]) / 2) for name in ("overall", *METRICS)}


def test_the_strongest_emotion_stands_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = "I am furious and sad that he lied, and a little afraid."
    feel(text)
    strengths = feel_text(text).strengths
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    told = [row[0] for row in rows if row and row[0] in strengths]
    assert told == sorted(strengths, key=lambda name: -strengths[name])


def test_two_replies_may_have_the_same_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(write(tmp_path, line(id="a"), line(id="a")), json=True)
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["replies"]] == ["a", "a"]
