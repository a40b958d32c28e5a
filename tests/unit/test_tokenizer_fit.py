"""A tokenizer that belongs to another model is noticed, and one that does not look like it is left alone."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loops.finetune import tokenizer_fit
from loops.finetune.model_folder import ModelFolder
from loops.finetune.parity import TokenizerMismatch

ROWS = 4096


class Tokens:
    """As much of a tokenizer as is asked for its ids."""

    def __init__(self, n_tokens: int = ROWS, special: Sequence[int] = (0, 1, 2), bos: int | None = 1,
                 eos: int | None = 2) -> None:
        self.n_tokens, self.all_special_ids, self.added_tokens_decoder = n_tokens, list(special), {}
        self.bos_token_id, self.eos_token_id = bos, eos

    def __len__(self) -> int:
        return self.n_tokens

    def get_vocab(self) -> dict[str, int]:
        return {f"t{number}": number for number in range(self.n_tokens)}


def check(folder: Path, tokens: Tokens, config: dict[str, Any], generation: dict[str, Any] | None = None) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    tokenizer_fit.check_ids(ModelFolder(folder, config, (), (), 0), tokens, ROWS)


def test_ids_that_fit_are_left_alone(tmp_path: Path) -> None:
    check(tmp_path, Tokens(), {"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 0]})
    check(tmp_path, Tokens(ROWS - tokenizer_fit.SPARE_ROWS), {"eos_token_id": None})
    check(tmp_path, Tokens(eos=0), {"eos_token_id": 2})  # another control token: fine-tuned models do that
    check(tmp_path, Tokens(bos=None), {"bos_token_id": 77})  # a default that nobody looks at
    check(tmp_path, Tokens(), {"eos_token_id": 10 ** 9})


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMismatch, match="4,097 tokens and the model only 4,096"):
        check(tmp_path, Tokens(ROWS + 1), {})
    with pytest.raises(TokenizerMismatch, match="more than padding explains"):
        check(tmp_path, Tokens(ROWS - tokenizer_fit.SPARE_ROWS - 1), {})
    with pytest.raises(TokenizerMismatch, match=r"config\.json of .* token 77 is the model's eos.*'t77'"):
        check(tmp_path, Tokens(), {"eos_token_id": 77})
    with pytest.raises(TokenizerMismatch, match=r"generation_config\.json of .* token 78 is the model's bos"):
        check(tmp_path, Tokens(), {}, {"bos_token_id": [1, 78]})


def judged(compute: Any) -> None:
    ids = [1, *np.random.default_rng(5).permutation(np.arange(3, 90))]
    tokenizer_fit.check_loss(ModelFolder(Path("m"), {}, (), (), 0), list(map(int, ids)), compute)


def knowing(order: Sequence[int], lead: float, otherwise: float = 0.0) -> Any:
    """Return a model that expects every token after the one before it in order, and all others with `otherwise`."""
    follows = dict(itertools.pairwise(order))

    def compute(ids: Sequence[int]) -> np.ndarray:
        logits = np.zeros((len(ids), 200), dtype=np.float32)
        for place, token in enumerate(ids):
            logits[place, 100] = otherwise  # what it would rather say
            if token in follows:
                logits[place, follows[token]] = lead
        return logits

    return compute


def test_only_who_is_confident_and_deaf_to_order_is_refused() -> None:
    ids = [1, *map(int, np.random.default_rng(5).permutation(np.arange(3, 90)))]
    judged(knowing(ids, 8.0))  # expects the text
    judged(knowing([], 0.0))  # knows nothing: guesses blindly
    judged(knowing(ids, 8.0, otherwise=14.0))  # thinks of other things, but the order is right
    with pytest.raises(TokenizerMismatch, match=r"loss of 12\.\d nats.*blind guessing costs 5\.3"):
        judged(knowing([], 0.0, otherwise=12.0))


@pytest.mark.slow
def test_the_starter_with_a_tokenizer_of_its_size_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from loops.starter.folder import write_folder

    folder = write_folder(tmp_path / "starter")
    from loops.finetune.model_folder import read_folder
    from loops.finetune.reading import read_with_torch
    from loops.starter import train

    def read() -> None:
        read_with_torch(read_folder(folder), tmp_path / "reading", "the model", (), lambda _done, _total: None)

    read()
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            shutil.move(folder / name, tmp_path / name)
    (folder / "tokenizer.model").write_bytes(train.train_tokenizer(random.Random(4), dialogues=600))
    with pytest.raises(TokenizerMismatch, match="reads plain English with a loss of"):
        read()
