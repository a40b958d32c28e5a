"""Calibration text as a model reads it, and how many tokens of it there are, from the vocabulary alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from tiny_models import TinyModel
from typer.testing import CliRunner
from worker_driver import run_job

from calibration_data.catalogue import BUILT_IN, Catalogue
from calibration_data.text import CalibrationRefused, Sample, parse
from daemon.cli import calibration as commands
from daemon.errors import WorkerRefused
from loops.engine import chat
from loops.engine.calibration import calibration_text, count_tokens, load_vocabulary, render_for
from loops.engine.imatrix import cut_chunks
from loops.engine.model import ModelNotLoaded, load_model
from loops.engine.options import EngineOptions
from loops.events import Failed, Finished
from loops.starter import STARTER_GGUF

SAMPLES = parse("""%% sample one a question
%% user
How long does an egg take?
%% assistant
Four minutes.

%% sample two a passage
Eggs keep for four weeks.

%% sample three with a tool
%% system
You cook.
%% user
Boil an egg.
%% assistant
{"boil": 4}
%% tool
done
%% assistant
It is ready.
""")
TALK = ("{{ bos_token }}{% for message in messages %}"
        "{{ '<|user|>\n' if message['role'] == 'user' else '<|assistant|>\n' }}"
        "{{ message['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TALK
SLOW = "{% for a in range(99999) %}{% for b in range(3000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


def tiny(folder: Path, template: str | None, *, add_bos: bool = True) -> Path:
    return TinyModel(layers=1, template=template, add_bos=add_bos).write(folder / "m.gguf")


def text_for(path: Path, samples: tuple[Sample, ...] = SAMPLES) -> str:
    with load_vocabulary(path) as model:
        return calibration_text(model, samples)


def test_samples_are_in_the_models_own_format_complete_and_not_open_for_a_reply() -> None:
    text = text_for(STARTER_GGUF)
    assert text.startswith("<|user|>\nHow long does an egg take?</s>\n<|assistant|>\nFour minutes.</s>\n")
    assert "\nEggs keep for four weeks.\n\n<s>" in text
    assert text.endswith("It is ready.</s>\n")


def test_each_conversation_begins_once(tmp_path: Path) -> None:
    for add_bos in (True, False):
        with load_vocabulary(tiny(tmp_path, TALK, add_bos=add_bos)) as model:
            tokens = model.tokenize(calibration_text(model, SAMPLES), add_bos=True, special=True)
            assert list(tokens).count(model.bos) == 2
            assert list(tokens).count(model.eos) == 7
            assert tokens[0] == model.bos


def test_without_a_template_the_roles_are_named(tmp_path: Path) -> None:
    with load_vocabulary(tiny(tmp_path, None)) as model:
        assert calibration_text(model, SAMPLES).startswith(
            "User: How long does an egg take?\nAssistant: Four minutes.\n\nEggs keep")
        assert render_for(model, SAMPLES).plain == 2


def test_what_a_template_refuses_is_told_otherwise_or_plain(tmp_path: Path) -> None:
    with load_vocabulary(tiny(tmp_path, STRICT)) as model:
        found = render_for(model, SAMPLES)
        assert found.plain == 0
        assert "<|user|>\nYou cook.\n\nBoil an egg.</s>" in found.texts[2]
    with load_vocabulary(tiny(tmp_path, "{% if messages | length > 2 %}{{ raise_exception('short ones') }}{% endif %}"
                              + TALK)) as model:
        found = render_for(model, [*SAMPLES, SAMPLES[0]])
        assert found.plain == 1
        assert found.texts[0] == found.texts[3] == ("<s><|user|>\nHow long does an egg take?</s>\n<|assistant|>\n"
                                                    "Four minutes.</s>\n")
        assert found.texts[2].startswith("System: You cook.\nUser: Boil an egg.")


def test_a_template_that_takes_too_long_is_not_tried_for_every_sample(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()  # where a worker renders, and time is bounded
    monkeypatch.setattr(chat, "TIME_S", 0.02)
    tried: list[int] = []
    real = chat.render

    def counted(*arguments: Any, **named: Any) -> str:
        tried.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(chat, "render", counted)
    with load_vocabulary(tiny(tmp_path, SLOW)) as model:
        assert render_for(model, SAMPLES * 20).plain == 40
    assert len(tried) <= 3


def test_counting_agrees_with_the_whole_model() -> None:
    samples = Catalogue().load("medical")
    with load_model(STARTER_GGUF, EngineOptions(threads=1, extra_buffers=False)) as model:
        text = calibration_text(model, samples)
        chunks = cut_chunks(model, text, special=True)
        tokens = model.tokenize(text, add_bos=True, special=True)
    with load_vocabulary(STARTER_GGUF) as vocabulary:
        found = count_tokens(vocabulary, samples)
    assert (found.tokens, found.chunks, found.plain) == (len(tokens), len(chunks.tokens), 0)
    assert found.distinct == len(np.unique(tokens))
    assert found.share == found.distinct / 3072


def spoilt(folder: Path, name: bytes) -> Path:
    """Write the starter with another last letter in a name."""
    path = folder / "m.gguf"
    path.write_bytes(STARTER_GGUF.read_bytes().replace(name, name[:-1] + b"X"))
    return path


def test_weights_are_not_asked_for(tmp_path: Path) -> None:
    path = spoilt(tmp_path, b"blk.7.ffn_up")
    with pytest.raises(ModelNotLoaded), load_model(path, EngineOptions(threads=1, extra_buffers=False)):
        pass
    with load_vocabulary(path) as model:
        assert count_tokens(model, SAMPLES).tokens > 50


def test_a_vocabulary_that_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    with (pytest.raises(ModelNotLoaded, match=r"m\.gguf does not load"),
          load_vocabulary(spoilt(tmp_path, b"tokenizer.ggml.model"))):
        pass


def test_the_job_counts_domains_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Eggs keep for four weeks.", encoding="utf-8")
    job = {"job": "count", "model": str(STARTER_GGUF), "folder": str(tmp_path)}
    (told,) = run_job({**job, "sources": ["rag", "mine", str(tmp_path / "mine.txt")]}).of(Finished)
    counts = told.result["counts"]
    assert counts["mine"] == counts[str(tmp_path / "mine.txt")]
    assert counts["rag"]["chunks"] > 50 > counts["mine"]["tokens"] > 5
    assert told.result["vocabulary"] == 3072
    (failed,) = run_job({**job, "sources": ["nothing"]}).of(Failed)
    assert failed.kind == "UnknownDomain"


# --- the commands ---

def run(*arguments: str) -> Result:
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, ["calibration", *arguments])


def json_of(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.output)


def test_list_tells_tokens_and_chunks_for_a_model(isolated: Path) -> None:
    (isolated / "config" / "calibration").mkdir()
    (isolated / "config" / "calibration" / "mine.txt").write_text("Eggs keep for four weeks.", encoding="utf-8")
    rows = {row["name"]: row for row in json_of("list", "--model", str(STARTER_GGUF))["domains"]}
    assert set(rows) == {*BUILT_IN, "mine"}
    assert all(rows[name]["chunks"] == rows[name]["tokens"] // 512 >= 20 for name in BUILT_IN)
    assert rows["mine"]["chunks"] == 0
    table = run("list", "--model", str(STARTER_GGUF)).output.splitlines()
    line = next(line for line in table if line.split()[:1] == ["medical"])
    assert f"{rows['medical']['tokens']:,}" in line
    assert "tokens" not in json_of("list")["domains"][0]


def test_check_tells_the_share_of_the_vocabulary(tmp_path: Path) -> None:
    found = json_of("check", "medical", "--model", str(STARTER_GGUF))
    assert found["usable"]
    assert 0.4 < found["tokens"]["share"] < 0.8
    printed = run("check", "medical", "--model", str(STARTER_GGUF)).output
    assert f"{found['tokens']['tokens']:,} tokens" in printed
    assert f"{found['tokens']['share']:.1%} of its vocabulary" in printed
    assert json_of("check", "medical")["tokens"] is None
    assert "no chat template" in run("check", "rag", "--model", str(tiny(tmp_path, None))).output


def test_too_few_tokens_are_an_error_and_few_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rag").write_text("A file with the name of a domain. " * 20, encoding="utf-8")
    done = run("check", "./rag", "--model", str(STARTER_GGUF), "--json")
    assert isinstance(done.exception, CalibrationRefused)
    assert "needs at least 1,024" in str(done.exception)
    found = json.loads(done.output)
    assert not found["usable"]
    assert 100 < found["tokens"]["tokens"] < 1024
    Path("rag").write_text("\n\n".join(f"Paragraph {number} of my own notes." for number in range(300)),
                           encoding="utf-8")
    assert "20 chunks or more" in run("check", "./rag", "--model", str(STARTER_GGUF)).output


@pytest.mark.parametrize(("content", "status"), [(None, 20), (b"no model at all", 22)])
def test_a_model_that_is_none_is_refused(content: bytes | None, status: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    for command in (("list",), ("check", "rag")):
        problem = run(*command, "--model", str(path)).exception
        assert isinstance(problem, WorkerRefused)
        assert problem.exit_code == status
        assert "\n" not in str(problem)
