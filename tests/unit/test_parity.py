"""The parity gate against values worked out by hand, and every way in which it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loops.finetune import reading
from loops.finetune.parity import (
    EXACT,
    MOST,
    ROUNDED,
    SAMPLES,
    ParityFailed,
    Reading,
    TokenizerMismatch,
    bounds_of,
    check_tokens,
    compare,
)

READING = Reading(name="the model", tokens={name: [1, 2, 3, 4] for name in SAMPLES}, ids=[1, 2, 3, 4],
                  special={"bos": 1, "eos": 2}, control={1: "<s>", 2: "</s>"}, template="{{ x }}", chat=[1, 5],
                  weight_type="F16")


def test_a_model_that_rounding_changes_more_has_wider_bounds_up_to_a_limit() -> None:
    assert bounds_of("BF16", (1e-5, 1e-4, 0.01)) == ROUNDED
    assert bounds_of("F16", (1e-3, 1e-2, 0.3)) == EXACT
    wider = bounds_of("BF16", (2e-3, 4e-2, 0.6))
    assert (wider.mean_kl, wider.max_kl, wider.lead) == (1e-3, 2e-2, 0.6)
    assert bounds_of("BF16", (1.0, 9.0, 9.0)) == MOST


def logits(rows: int = 70, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def test_the_same_logits_agree_wholly_and_so_do_shifted_ones() -> None:
    found = compare("conversion", logits(), logits() + 7, EXACT)
    assert found.tokens == 70
    assert found.mean_kl < 1e-6
    assert found.same_top == 1.0


def test_the_divergence_is_that_of_the_definition() -> None:
    one, other = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.75, 0.25]]))
    wide = replace(EXACT, mean_kl=9, max_kl=9, lead=9)
    found = compare("x", one.astype(np.float32), other.astype(np.float32), wide)
    assert found.mean_kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    assert found.max_difference == pytest.approx(math.log(2), abs=1e-6)


def test_a_single_token_that_differs_is_found_wherever_it_is() -> None:
    for place in (0, 31, 32, 69):
        changed = logits()
        changed[place, changed[place].argmin()] += 12
        with pytest.raises(ParityFailed, match=f"Stage merging changed the model.*at token {place} "):
            compare("merging", logits(), changed, EXACT)


def test_a_small_difference_everywhere_is_found() -> None:
    noise = np.random.default_rng(2).normal(0, 0.02, logits().shape).astype(np.float32)
    with pytest.raises(ParityFailed, match="mean"):
        compare("x", logits(), logits() + noise, EXACT)
    compare("x", logits(), logits() + noise / 10, EXACT)


def test_another_most_probable_token_is_refused_only_where_it_led_clearly() -> None:
    first = np.zeros((1, 1000), dtype=np.float32)
    for lead, refused in ((0.01, False), (0.5, True)):
        first[0, 3], second = lead, first.copy()
        second[0, 3], second[0, 4] = 0.0, lead
        if refused:
            with pytest.raises(ParityFailed, match="another one is the most probable"):
                compare("x", first, second, replace(EXACT, mean_kl=9, max_kl=9))
        else:
            compare("x", first, second, EXACT)


def test_values_that_are_not_finite_and_another_vocabulary_are_refused() -> None:
    broken = logits()
    broken[40, 3] = np.nan
    with pytest.raises(ParityFailed, match="not finite"):
        compare("x", logits(), broken, EXACT)
    with pytest.raises(ParityFailed, match="51 tokens instead of 50"):
        compare("x", logits(), logits(vocabulary=51), EXACT)


@pytest.mark.parametrize(("changed", "said"), [
    ({"tokens": {**READING.tokens, "emoji": [1, 2, 9, 4]}}, r"'emoji'.*from token 2 on: \[9, 4\] instead of \[3, 4\]"),
    ({"tokens": {**READING.tokens, "code": [1, 2, 3]}}, "'code'.*from token 3"),
    ({"special": {"bos": 1, "eos": 3}}, "the eos token of the GGUF is 3, and that of the model is 2"),
    ({"control": {1: "<s>"}}, "'</s>' is a control token of the model, and plain text in the GGUF"),
    ({"template": ""}, "chat template"),
])
def test_a_tokenizer_that_differs_is_refused_with_the_difference(changed: dict[str, object], said: str) -> None:
    with pytest.raises(TokenizerMismatch, match=said):
        check_tokens("conversion", READING, replace(READING, name="the GGUF", **changed))  # type: ignore[arg-type]


def test_what_stops_nothing_is_noted() -> None:
    assert check_tokens("x", READING, READING) == ()
    assert check_tokens("x", replace(READING, special={"bos": -1, "eos": 2}), READING) == ()
    bare = replace(READING, template="", chat=[])
    assert "no chat template" in check_tokens("x", bare, bare)[0]
    assert "other tokens" in check_tokens("x", READING, replace(READING, chat=[1, 6]))[0]


def test_bounds_follow_the_type_of_the_weights() -> None:
    assert [bounds_of(name) for name in ("F16", "F32", "float16", "BF16", "bfloat16")] == [EXACT] * 3 + [ROUNDED] * 2


def test_a_reading_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    reading.save(tmp_path / "r", READING, logits())
    found = reading.load(tmp_path / "r")
    assert found is not None
    assert found[0] == READING
    assert (found[1] == logits()).all()
    (tmp_path / "r" / "reading.json").write_text("{")
    assert reading.load(tmp_path / "r") is None
    assert reading.load(tmp_path / "none") is None
