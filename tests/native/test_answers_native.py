"""The engine's side of evaluation: what is an answer, how likely it is, and what is done only once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops.answers.jobs import NothingToMeasure, answer, measure_time, similar
from loops.answers.rows import read_rows
from loops.answers.speaker import EngineSpeaker, answer_of, prompt_of, windows_of
from loops.engine.chat import prompt_tokens
from loops.engine.generate import Sampling
from loops.engine.model import Model, load_model
from loops.engine.options import EngineOptions
from loops.engine.score import score
from loops.events import Event, Progress
from loops.starter import STARTER_GGUF

ASKED = ({"role": "user", "content": "I lost my dog yesterday."},)


@pytest.fixture(scope="module")
def model(options: EngineOptions) -> Any:
    with load_model(STARTER_GGUF, options) as loaded:
        yield loaded


@pytest.fixture
def speaker(model: Model) -> EngineSpeaker:
    return EngineSpeaker(model)


@pytest.fixture
def job(options: EngineOptions, tmp_path: Path) -> dict[str, Any]:
    """The starter answers 20 rows, one of them a text and one far too long."""
    rows: list[dict[str, Any]] = [
        {"id": str(number), "messages": [{"role": "user", "content": f"I lost {number} dogs."},
                                         {"role": "assistant", "content": "I am sorry. That must hurt."}]}
        for number in range(18)]
    rows[7]["messages"][0]["content"] = "dog " * 3000
    rows += [{"id": "text", "text": "It was a long day. " * 150}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    return {"kind": "gguf", "path": str(STARTER_GGUF), "name": "starter", "options": asdict(options),
            "dataset": str(tmp_path), "split": "test", "limit": 0, "journal": str(tmp_path / "journal"),
            "sampling": asdict(Sampling(max_tokens=8))}


def ignore(_event: Event) -> None:
    pass


def test_prompts_are_those_of_a_run(speaker: EngineSpeaker, model: Model) -> None:
    assert prompt_of(speaker, ASKED).tolist() == prompt_tokens(model, ASKED[0]["content"]).tolist()
    speaker.template = ""
    plain = prompt_of(speaker, ASKED)
    assert model.text_of(plain) == "User: I lost my dog yesterday.\nAssistant:"


def test_an_answer_ends_with_the_end_of_its_turn_and_nothing_after(speaker: EngineSpeaker, model: Model) -> None:
    question = answer_of(speaker, ASKED, "I am sorry.")
    answered, = question.continuations
    assert model.text_of(answered) == "I am sorry."
    assert [speaker.is_end(int(token)) for token in answered] == [False] * (len(answered) - 1) + [True]
    assert answer_of(speaker, ASKED, "").continuations[0].tolist() == [model.eos]


def test_an_answer_without_a_template_follows_a_space(speaker: EngineSpeaker, model: Model) -> None:
    speaker.template = ""
    turns = ({"role": "system", "content": "Be kind."}, *ASKED, {"role": "assistant", "content": "Oh."}, *ASKED)
    question = answer_of(speaker, turns, "I am </s> sorry.")
    text = model.text_of(question.prompt)
    assert text.startswith("System: Be kind.\nUser: I lost my dog yesterday.\nAssistant: Oh.\nUser: I lost")
    assert model.text_of(question.continuations[0]) == " I am </s> sorry."  # a marker in plain text is text


def test_a_template_that_rewrites_the_past_leaves_the_answer_as_it_is(speaker: EngineSpeaker, model: Model) -> None:
    speaker.template = ("{{ bos_token }}{% for message in messages %}{{ loop.index }}/{{ messages | length }} "
                        "{{ message.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}")
    answered, = answer_of(speaker, ASKED, "I am sorry.").continuations
    assert model.text_of(answered) == "I am sorry."
    assert int(answered[-1]) == model.eos


def test_what_the_model_says_itself_is_what_it_foresees(speaker: EngineSpeaker, model: Model) -> None:
    prompt = prompt_of(speaker, ASKED)
    reply, = speaker.generate([prompt], Sampling(max_tokens=60))
    own = answer_of(speaker, ASKED, reply.text)
    (found,), = score(model, [own])
    assert found.foreseen >= found.tokens - 1  # the end may come later than where the reply was cut
    other = answer_of(speaker, ASKED, "Bananas are yellow and the sum is seven.")
    (wrong,), = score(model, [other])
    assert wrong.foreseen < wrong.tokens / 2
    assert wrong.mean < found.mean


def test_windows_of_a_text_hold_all_of_its_tokens(speaker: EngineSpeaker) -> None:
    text = "It was a long day. " * 300
    windows = windows_of(speaker, text)
    joined = np.concatenate([window.continuations[0] for window in windows])
    assert joined.tolist() == speaker.tokenize(text, add_bos=False, special=False).tolist()
    assert len(windows) > 2
    assert {int(window.prompt[0]) for window in windows} == {speaker.bos_id}
    speaker.adds_bos = False
    assert windows_of(speaker, text)[0].prompt.tolist() == joined[:1].tolist()
    assert windows_of(speaker, "") == []


def test_rows_are_answered_and_those_too_long_left_out(job: dict[str, Any]) -> None:
    events: list[Event] = []
    found = answer(job, events.append)
    rows = found["rows"]
    assert list(rows) == [row.id for row in read_rows(Path(job["dataset"]))]
    assert rows.pop("7") == {"too_long": True}
    text = rows.pop("text")
    assert "text" not in text
    assert text["tokens"] > 512
    assert all(row["text"] and row["n_tokens"] <= 8 and row["tokens"] > 4 for row in rows.values())
    assert found["template"] is True
    stages = {event.stage for event in events if isinstance(event, Progress)}
    assert {"load", "likelihoods", "replies"} <= stages
    assert all(event.done <= event.total for event in events if isinstance(event, Progress))


def test_what_was_answered_is_not_asked_again(job: dict[str, Any]) -> None:
    first = answer({**job, "limit": 17}, ignore)
    before = Path(job["journal"]).read_bytes()
    events: list[Event] = []
    assert answer({**job, "limit": 17}, events.append) == first
    assert Path(job["journal"]).read_bytes() == before
    assert "load" not in {event.stage for event in events if isinstance(event, Progress)}
    answer(job, ignore)  # of 18 rows the first part is there
    kinds = [json.loads(line)["kind"] for line in Path(job["journal"]).read_text().splitlines() if line]
    assert kinds.count("likelihoods") == 3


def test_another_temperature_is_another_reply(job: dict[str, Any]) -> None:
    greedy = answer({**job, "limit": 4}, ignore)["rows"]
    drawn = answer({**job, "limit": 4, "sampling": asdict(Sampling(1.5, 1.0, 1, 8))}, ignore)["rows"]
    assert {key: row["nll"] for key, row in greedy.items()} == {key: row["nll"] for key, row in drawn.items()}
    assert {key: row["text"] for key, row in greedy.items()} != {key: row["text"] for key, row in drawn.items()}


def test_rows_of_which_none_fits_are_refused(job: dict[str, Any]) -> None:
    rows = json.loads((Path(job["dataset"]) / "test.json").read_text())
    (Path(job["dataset"]) / "test.json").write_text(json.dumps([rows[7]]))
    with pytest.raises(NothingToMeasure, match="No row fits into the context of starter"):
        answer(job, ignore)


def test_a_model_is_timed_on_every_prompt_but_the_one_that_warms_up(job: dict[str, Any]) -> None:
    timings = measure_time({**job, "limit": 3}, ignore)["timings"]
    assert len(timings) == 3
    assert all(one["tokens"] == 31 and one["prompt_s"] > 0 and one["reply_s"] > 0 for one in timings)


def test_equal_texts_are_closest_in_meaning_and_empty_ones_have_none(job: dict[str, Any]) -> None:
    pairs = [["My dog died.", "My dog died."], ["My dog died.", "Invoices are due in March."], ["", "My dog died."]]
    asked = {"model": str(STARTER_GGUF), "options": job["options"], "pairs": pairs, "name": "starter",
             "journal": job["journal"]}
    same, other, empty = similar(asked, ignore)["similarities"]
    assert same == pytest.approx(1, abs=1e-5)
    assert 0 < abs(other) < 0.99
    assert empty == 0
    before = Path(job["journal"]).read_bytes()
    similar(asked, ignore)
    assert Path(job["journal"]).read_bytes() == before
