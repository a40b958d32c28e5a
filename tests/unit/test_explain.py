"""The replies that `explain` shows are those that lost most, the worst first."""

from __future__ import annotations

from typing import Any

from daemon.cli.explain import SHOWN, _lost_most

#: of each scenario, the overall score of the original's reply and of the level's
SCORES = {"a": (0.5, 0.4), "b": (0.9, 0.5), "gained": (0.2, 0.4), "c": (0.4, 0.1), "same": (0.3, 0.3), "d": (0.8, 0.6)}


def said(name: str, text: str, score: float) -> dict[str, Any]:
    return {"scenario_id": name, "prompt": f"prompt {name}", "text": text, "scores": {"overall": score}}


def test_the_replies_that_lost_most_are_shown_the_worst_first() -> None:
    shown = _lost_most([(said(name, "before", base), said(name, "after", mine))
                        for name, (base, mine) in SCORES.items()])
    assert SHOWN == 3
    assert [(one["scenario"], round(one["lost"], 6)) for one in shown] == [("b", 0.4), ("c", 0.3), ("d", 0.2)]
    assert [(one["prompt"], one["original"]["text"], one["level"]["text"]) for one in shown] == [
        (f"prompt {name}", "before", "after") for name in "bcd"]


def test_a_reply_that_lost_nothing_is_not_shown() -> None:
    assert _lost_most([(said(name, "before", base), said(name, "after", mine))
                       for name, (base, mine) in SCORES.items() if base <= mine]) == []
    assert _lost_most([]) == []
