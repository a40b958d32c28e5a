"""Prompts as the model's own vocabulary reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import TinyModel

from loops.engine.chat import ChatTemplateBroken, prompt_tokens
from loops.engine.model import load_model
from loops.engine.options import EngineOptions

OPTIONS = EngineOptions(threads=2, extra_buffers=False)
QUESTION = "How do you feel?"
WITH_BOS = "{{ bos_token }}{{ '<|user|>\n' + messages[0].content + eos_token + '\n<|assistant|>\n' }}"


def tokens_of(path: Path, question: str = QUESTION) -> tuple[list[int], str]:
    with load_model(path, OPTIONS) as model:
        tokens = prompt_tokens(model, question)
        return [int(token) for token in tokens], "".join(model.token_text(int(token)) for token in tokens)


def test_the_starters_prompt_is_in_control_tokens(starter: Path) -> None:
    tokens, text = tokens_of(starter)
    assert tokens[0] == 1
    assert text.startswith("<s><|user|>")
    assert text.endswith("</s><0x0A><|assistant|><0x0A>")
    assert tokens.count(2) == 1


@pytest.mark.parametrize("template", [WITH_BOS, WITH_BOS.replace("{{ bos_token }}", "")])
def test_the_beginning_of_sequence_comes_exactly_once(template: str, tmp_path: Path) -> None:
    tokens, _ = tokens_of(TinyModel(layers=1, template=template).write(tmp_path / "m.gguf"))
    assert tokens[0] == 1
    assert tokens.count(1) == 1


@pytest.mark.parametrize(("template", "times"), [(WITH_BOS, 1), (WITH_BOS.replace("{{ bos_token }}", ""), 0)])
def test_a_tokenizer_that_wants_no_beginning_gets_only_the_templates(template: str, times: int,
                                                                     tmp_path: Path) -> None:
    tokens, _ = tokens_of(TinyModel(layers=1, template=template, add_bos=False).write(tmp_path / "m.gguf"))
    assert tokens.count(1) == times


def test_a_model_without_a_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    with load_model(TinyModel(layers=1).write(tmp_path / "m.gguf"), OPTIONS) as model:
        tokens = prompt_tokens(model, QUESTION)
        assert tokens[0] == model.bos
        assert model.text_of(tokens) == f"User: {QUESTION}\nAssistant:"


def test_a_long_template_is_read_whole(tmp_path: Path) -> None:
    long = "{# " + "x" * 5000 + " #}" + WITH_BOS
    _, text = tokens_of(TinyModel(layers=1, template=long).write(tmp_path / "m.gguf"))
    assert text.endswith("<|assistant|><0x0A>")


def test_a_broken_template_is_a_sentence(tmp_path: Path) -> None:
    path = TinyModel(layers=1, template="{{ ''.__class__.__mro__ }}").write(tmp_path / "m.gguf")
    with pytest.raises(ChatTemplateBroken, match="chat template"):
        tokens_of(path)


def test_tokens_come_back_as_the_text_they_were(starter: Path) -> None:
    text = "Zoë said: “naïve café”, 家族 😀\nand \t tabs."
    with load_model(starter, OPTIONS) as model:
        assert model.text_of(model.tokenize(text, add_bos=True, special=False)) == text
