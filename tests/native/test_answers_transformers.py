"""A Hugging Face folder gives the same numbers as the GGUF that was made of it; needs nightpress[train]."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops.answers.jobs import answer, measure_time
from loops.answers.overlap import compare
from loops.answers.speaker import EngineSpeaker, answer_of, prompt_of, windows_of
from loops.answers.statistics import Measured, summarise
from loops.answers.transformer import FolderDoesNotLoad, TorchSpeaker, load
from loops.engine.generate import Sampling
from loops.engine.model import load_model
from loops.engine.options import EngineOptions
from loops.engine.score import Question
from loops.events import Event
from loops.finetune.model_folder import PickledWeights, read_folder
from loops.starter import STARTER_GGUF
from loops.starter.folder import write_folder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    any(find_spec(library) is None for library in ("torch", "transformers", "sentencepiece")),
    reason="needs nightpress[train]"), pytest.mark.filterwarnings("default")]  # warnings of libraries that are not ours
WORDS = ("My dog died and I am sad.", "They gave me the job!", "Zoë said <s> to me, 3 times.", "I feel nothing at all.")
REPLIES = ("I am so sorry. That must hurt.", "Congratulations, you earned it!", "What did you feel then?", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter as a folder."""
    return write_folder(tmp_path_factory.mktemp("folder") / "starter-hf")


@pytest.fixture(scope="module")
def torch_speaker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TorchSpeaker:
    return load(read_folder(folder), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def engine_speaker(options: EngineOptions) -> Any:
    with load_model(STARTER_GGUF, options) as model:
        yield EngineSpeaker(model)


@pytest.fixture
def job(options: EngineOptions, tmp_path: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"id": f"{turn}", "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]}
        for turn, (said, reply) in enumerate(zip(WORDS, REPLIES, strict=True))]
    rows += [{"id": "system", "messages": [{"role": "system", "content": "Be brief."}, *rows[0]["messages"]]},
             {"id": "text", "text": "It was a long day, and nobody asked how it was. " * 30}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    choices = [{"question": "I lost my dog.", "choices": ["I am so sorry.", "Bananas are yellow."], "answer": 0}]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)), encoding="utf-8")
    return {"options": asdict(options), "dataset": str(tmp_path), "split": "test", "limit": 0,
            "journal": str(tmp_path / "journal"), "sampling": asdict(Sampling(max_tokens=12)),
            "multiple_choice": str(tmp_path / "choices.jsonl"), "eq_bench": None}


def ignore(_event: Event) -> None:
    pass


def test_both_forms_have_the_same_words_and_tokens(torch_speaker: TorchSpeaker, engine_speaker: EngineSpeaker) -> None:
    for name in ("template", "bos", "eos", "bos_id", "adds_bos", "context"):
        assert getattr(torch_speaker, name) == getattr(engine_speaker, name), name
    for said, reply in zip(WORDS, REPLIES, strict=True):
        mine, theirs = (answer_of(speaker, ({"role": "user", "content": said},), reply)
                        for speaker in (torch_speaker, engine_speaker))
        assert mine.prompt.tolist() == theirs.prompt.tolist()
        assert mine.continuations[0].tolist() == theirs.continuations[0].tolist()
        for special in (True, False):
            assert torch_speaker.tokenize(said, add_bos=True, special=special).tolist() == engine_speaker.tokenize(
                said, add_bos=True, special=special).tolist()
    assert [window.cells for window in windows_of(torch_speaker, WORDS[0] * 99)] == [
        window.cells for window in windows_of(engine_speaker, WORDS[0] * 99)]


def test_both_forms_give_the_same_figures_within_a_thousandth(job: dict[str, Any], folder: Path) -> None:
    forms = [answer({**job, "kind": kind, "path": str(path), "name": kind}, ignore)
             for kind, path in (("gguf", STARTER_GGUF), ("folder", folder))]
    assert forms[0]["engine"]["name"] == "llama.cpp"
    assert forms[1]["engine"]["name"] == "transformers"
    references = dict(zip("0123", REPLIES, strict=True)) | {"system": REPLIES[0]}
    found = [summarise([Measured(
        row["nll"], row["tokens"], row["foreseen"], compare(row["text"], references[name]) if "text" in row else None)
        for name, row in form["rows"].items()]) for form in forms]
    assert [row["tokens"] for row in forms[0]["rows"].values()] == [row["tokens"] for row in forms[1]["rows"].values()]
    assert found[1].keys() == found[0].keys()
    for name, metric in found[0].items():
        assert found[1][name].value == pytest.approx(metric.value, rel=1e-3), name
    said = [[row["text"] for row in form["rows"].values() if "text" in row] for form in forms]
    assert said[0] == said[1]
    assert all(said[0])
    assert forms[0]["multiple_choice"]["acc"] == forms[1]["multiple_choice"]["acc"] == 1


def test_replies_do_not_depend_on_their_neighbours(torch_speaker: TorchSpeaker) -> None:
    prompts = [prompt_of(torch_speaker, ({"role": "user", "content": said},)) for said in WORDS]
    together = torch_speaker.generate(prompts, Sampling(max_tokens=10))
    alone = [torch_speaker.generate([prompt], Sampling(max_tokens=10))[0] for prompt in prompts]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert len({len(prompt) for prompt in prompts}) > 1


def test_likelihoods_do_not_depend_on_their_neighbours(torch_speaker: TorchSpeaker) -> None:
    questions = [answer_of(torch_speaker, ({"role": "user", "content": said},), reply)
                 for said, reply in zip(WORDS, REPLIES, strict=True)]
    questions.append(Question(questions[0].prompt, (*questions[0].continuations, np.empty(0, dtype=np.int32))))
    told: list[tuple[int, int]] = []
    together = torch_speaker.score(questions, lambda done, total: told.append((done, total)))
    for question, likelihoods in zip(questions, together, strict=True):
        (alone,) = torch_speaker.score([question])
        assert [one.total for one in likelihoods] == pytest.approx([one.total for one in alone], abs=1e-3)
    assert (together[-1][1].total, together[-1][1].tokens) == (0, 0)
    assert told[-1] == (5, 5)


def test_sampling_draws_the_same_for_the_same_seed(torch_speaker: TorchSpeaker) -> None:
    prompts = [prompt_of(torch_speaker, ({"role": "user", "content": WORDS[0]},))]
    drawn = [torch_speaker.generate(prompts, Sampling(1.5, 1.0, seed, 12))[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_folder_is_timed(job: dict[str, Any], folder: Path) -> None:
    timings = measure_time({**job, "kind": "folder", "path": str(folder), "name": "x", "limit": 1}, ignore)["timings"]
    assert [one["tokens"] for one in timings] == [31]


def test_a_folder_that_transformers_does_not_know_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}), encoding="utf-8")
    with pytest.raises(FolderDoesNotLoad, match="transformers cannot load its"):
        load(read_folder(tmp_path), tmp_path / "cache")


def test_a_pickle_is_never_read(job: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).symlink_to(file)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(PickledWeights, match="--allow-pickle"):
        answer({**job, "kind": "folder", "path": str(source), "name": "x"}, ignore)
