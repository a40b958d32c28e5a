"""A model on this machine writes conversations: the same each time, within its context, through the whole command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner
from worker_driver import run_job

from calibration_data.briefs import Brief, opening
from calibration_data.catalogue import Catalogue
from calibration_data.text import read
from daemon.cli import calibration
from daemon.errors import WorkerRefused
from loops.engine.generate import Reply
from loops.engine.options import EngineOptions
from loops.engine.writing import bare, tidy
from loops.events import Failed, Finished
from loops.starter import STARTER_GGUF

PROMPTS = [opening(Brief("x", "replies to people who tell what they feel"), number) for number in range(4)]
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "seed": 3, "max_tokens": 80, "batch": 4}


def job(options: EngineOptions, **other: Any) -> dict[str, Any]:
    return {"job": "write", "model": str(STARTER_GGUF), "options": asdict(options), "prompts": PROMPTS,
            "sampling": SAMPLING, **other}


def test_every_prompt_leads_to_an_exchange_and_the_same_each_time(options: EngineOptions) -> None:
    first, again = (run_job(job(options)).of(Finished)[0].result for _ in range(2))
    assert first == again
    assert len(first["exchanges"]) == len(PROMPTS)
    assert all(one["message"] and one["answer"] for one in first["exchanges"])
    assert len({one["message"] for one in first["exchanges"]}) > 1
    assert first["sent"] > first["received"] > 16
    other = run_job(job(options, sampling={**SAMPLING, "seed": 4})).of(Finished)[0].result
    assert other["exchanges"] != first["exchanges"]


def test_a_request_beyond_the_models_context_is_one_sentence(options: EngineOptions) -> None:
    told, = run_job(job(options, prompts=["word " * 3000])).of(Failed)
    assert told.exit_code == 82
    assert "reads 1024 tokens at once, and the request alone takes" in told.message


def test_a_file_that_is_no_model_is_refused(options: EngineOptions, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    told, = run_job(job(options, model=str(tmp_path / "x.gguf"))).of(Failed)
    assert told.kind.startswith("Gguf") or "gguf" in told.message


@pytest.mark.parametrize(("text", "ended", "kept"), [
    ("All is said.", True, "All is said."), ("No stop at the end", True, "No stop at the end"),
    ("One. Two is cut off in the", False, "One."), ("cut off in the", False, ""), ("好。还没", False, "好。"),
    ("<think>Hm. Well.</think>\n\nYes.", True, "Yes."), ("<think>Hm, this takes lo. Too", False, ""),
    ("```py\nx = 1\n```\nand", False, "```py\nx = 1\n```")])
def test_a_reply_ends_with_a_whole_sentence_and_has_no_thoughts(text: str, ended: bool, kept: str) -> None:
    assert tidy(Reply(text, (), ended)) == kept


@pytest.mark.parametrize(("text", "kept"), [
    ("How are you?", "How are you?"), ('"How are you?"', "How are you?"), ("User: How are you?", "How are you?"),
    ('**Message:** "How are you?"', "How are you?"), ('"One" and "two"', '"One" and "two"'), ("„Wie?“", "Wie?"),
    ('"', '"'), ("", ""), ("User experience matters: why?", "User experience matters: why?")])
def test_a_message_comes_without_label_and_quotation_marks(text: str, kept: str) -> None:
    assert bare(text) == kept


def run(*arguments: str) -> Result:
    app = typer.Typer()
    calibration.register(app)
    return CliRunner().invoke(app, ["calibration", "generate", "--provider", "local", *arguments])


def test_a_new_user_makes_a_domain_without_key_or_consent(isolated: Path, engine_probe: Path) -> None:
    (isolated / "state" / "engine.json").write_bytes(engine_probe.read_bytes())
    done = run("--custom-purpose", "Consoling people.", "--num-samples", "6", "--json", "--concurrency", "12")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    samples = read(isolated / "config" / "calibration" / "consoling-people.txt")
    assert (told["samples"], len(samples)) == (6, 6)
    assert told["tokens_sent"] > told["tokens_received"] > 0
    assert "The starter is far too small to write anything of use" in done.stderr
    assert samples == Catalogue(isolated / "config" / "calibration").load("consoling-people")
    assert [turn.role for turn in samples[0].turns] == ["user", "assistant"]
    assert "with local (starter-f16.gguf, sha256 " in samples[0].header.source


def test_a_model_that_does_not_load_is_one_sentence(isolated: Path, engine_probe: Path, tmp_path: Path) -> None:
    (isolated / "state" / "engine.json").write_bytes(engine_probe.read_bytes())
    (tmp_path / "x.gguf").write_bytes(b"no model")
    problem = run("--domain", "rag", "--model", str(tmp_path / "x.gguf")).exception
    assert isinstance(problem, WorkerRefused)
    assert "x.gguf" in str(problem)
    assert list((isolated / "config" / "calibration").iterdir()) == []
