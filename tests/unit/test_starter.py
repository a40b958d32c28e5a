"""The starter model's recipe: the same dialogues for ever, and a clear word where PyTorch is missing."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from loops.starter import HELD_OUT, STARTER_GGUF, corpus, train

#: sha256 of 200 dialogues as JSON lines, by seed, from the file the shipped model was trained with
DIALOGUES_SHA256 = {
    1: "cb112976bc80c8f5d7b0c82dd3093103959328fcbc89efa74800f8e2b72d4389",
    2: "1ca1c884f9303a262e5cf39ebefdb2986d183daabc78f28d1d21e37e0c54f37d",
    3: "bd0569bcfe5936def146e2fd6a21305ee0098de99266b2d82ed116513a75b479",
}

#: runs the training as `python -m` does, in a process to which PyTorch does not exist
WITHOUT_TORCH = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
runpy.run_module("loops.starter.train", run_name="__main__")
"""


@pytest.mark.parametrize("seed", DIALOGUES_SHA256)
def test_a_seed_gives_the_dialogues_that_the_shipped_model_was_trained_on(
        seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.main(["--dialogues", "200", "--seed", str(seed)]) == 0
    printed = capsys.readouterr().out
    assert hashlib.sha256(printed.encode()).hexdigest() == DIALOGUES_SHA256[seed]


def test_the_corpus_prints_json_lines_from_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "loops.starter.corpus", "--dialogues", "5", "--seed", "1"],
                          capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert all(line["task"] and len(line["turns"]) >= 2 for line in lines)


def test_the_held_out_text_is_what_its_seed_gives(tmp_path: Path) -> None:
    again = tmp_path / "held_out.txt"
    assert corpus.main(["--held-out", str(again)]) == 0
    assert again.read_bytes() == HELD_OUT.read_bytes()


def test_the_held_out_text_is_drawn_from_no_seed_of_the_recipe() -> None:
    seeds = {train.WEIGHTS_SEED, train.TOKENIZER_SEED, train.VALIDATION_SEED, train.FRESH_SEED,
             train.RESUMED_SEED}
    assert seeds <= corpus.RECIPE_SEEDS
    assert corpus.HELD_OUT_SEED not in corpus.RECIPE_SEEDS


def test_the_held_out_text_is_in_the_chat_format() -> None:
    text = HELD_OUT.read_text(encoding="utf-8")
    dialogues = text.split("<s>")[1:]
    assert len(dialogues) == corpus.HELD_OUT_DIALOGUES
    for dialogue in dialogues:
        assert dialogue.startswith("<|user|>\n")
        assert dialogue.endswith("</s>\n")
        assert dialogue.count("<|user|>") == dialogue.count("<|assistant|>") >= 1


def test_the_model_and_its_card_are_where_the_package_says() -> None:
    assert STARTER_GGUF.read_bytes()[:4] == b"GGUF"
    card = STARTER_GGUF.with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    assert STARTER_GGUF.name in card
    assert f"{STARTER_GGUF.stat().st_size:,}" in card


def test_more_rag_in_the_mix_leaves_the_other_tasks_in_proportion() -> None:
    mix, default = dict(corpus.mix_with_rag(0.5)), dict(corpus.TASKS_MIX)
    assert mix[corpus.rag] == 0.5
    assert sum(mix.values()) == pytest.approx(1)
    assert mix[corpus.empathy] / mix[corpus.small_talk] == pytest.approx(
        default[corpus.empathy] / default[corpus.small_talk])


def test_a_share_of_rag_moves_what_is_drawn() -> None:
    rng = random.Random(5)
    drawn = [corpus.dialogue(rng, corpus.mix_with_rag(0.9)).task for _ in range(300)]
    assert drawn.count("rag") > 240


@pytest.mark.parametrize("share", [0, 1, -0.5, 2])
def test_a_share_outside_zero_and_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        corpus.mix_with_rag(share)


def test_training_without_torch_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "--out", str(tmp_path / "model")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'nightpress[starter]'" in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (["--minutes", "0"], "above zero"),
    (["--minutes", "nan"], "above zero"),
    (["--steps", "0"], "above zero"),
    (["--rag-share", "1"], "between 0 and 1"),
    (["--seed", str(corpus.HELD_OUT_SEED)], "measured on"),
    (["--resume", "no-such-folder"], "no tokenizer.model"),
])
def test_flags_that_make_no_sense_are_refused_before_any_work(
        flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--out", str(tmp_path / "model"), *flags])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_resumed_training_draws_other_dialogues_than_a_fresh_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    assert train.parse(["--out", "x"]).seed == train.FRESH_SEED
    assert train.parse(["--out", "x", "--resume", str(tmp_path)]).seed == train.RESUMED_SEED
    assert train.parse(["--out", "x", "--resume", str(tmp_path), "--seed", "9"]).seed == 9


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert train.learning_rate(1.0, 0, 0.0) == pytest.approx(0.01)
    assert train.learning_rate(1.0, 1000, 0.0) == pytest.approx(1.0)
    assert train.learning_rate(1.0, 1000, 1.0) == pytest.approx(0.05)


def test_the_conversion_names_the_source_of_the_pinned_engine() -> None:
    assert "llama-cpp-python==0." in train.conversion_steps(Path("out"))


def test_the_chat_template_is_what_render_writes() -> None:
    from jinja2.sandbox import SandboxedEnvironment

    turns = ("My dog died yesterday.", "I'm so sorry.")
    messages = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": turns[1]}]
    template = SandboxedEnvironment().from_string(train.CHAT_TEMPLATE)
    rendered = template.render({"messages": messages, "bos_token": "<s>", "eos_token": "</s>"})
    assert rendered == "<s>" + corpus.render(turns)
