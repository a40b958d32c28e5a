"""Perplexity and KL divergence are what a slow and simple implementation computes, to the digit, and resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import TinyModel

from loops.engine.divergence import BaselineStore, Divergence, measure_baseline, measure_divergence
from loops.engine.levels import ORIGINAL_LADDER
from loops.engine.model import ContextSpec, NotFinite, check_finite, load_model, open_context
from loops.engine.options import EngineOptions
from loops.engine.windows import ROWS, WINDOW, TextTooShort, Windows, cut_windows
from loops.starter import HELD_OUT, STARTER_GGUF

TEXT = HELD_OUT.read_text(encoding="utf-8")
ALL = 1 << 40  #: a budget that keeps everything


@dataclass(frozen=True)
class Baseline:
    """The starter's log-probabilities on eight windows, two per decode, so that there are four groups."""

    windows: Windows
    store: BaselineStore
    n_vocab: int


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, options: EngineOptions) -> Baseline:
    with load_model(STARTER_GGUF, options) as model:
        windows = Windows(cut_windows(model, TEXT, special=True, limit=8).tokens, 2)
        store = BaselineStore(tmp_path_factory.mktemp("store"), windows, model.n_vocab, ALL)
        measure_baseline(model, store)
        return Baseline(windows, store, model.n_vocab)


def measure(path: Path, store: BaselineStore, folder: Path, options: EngineOptions) -> Divergence:
    with load_model(path, options) as model:
        return measure_divergence(model, store, folder)


@pytest.fixture(scope="module")
def of_q2_k(baseline: Baseline, pressed: Any, tmp_path_factory: pytest.TempPathFactory,
            options: EngineOptions) -> Divergence:
    return measure(pressed("Q2_K").path, baseline.store, tmp_path_factory.mktemp("q2_k"), options)


def naive_logits(path: Path, windows: NDArray[np.int32], options: EngineOptions) -> NDArray[np.float64]:
    """The logits of every position, one window and 128 tokens at a time: shape (windows, 512, vocabulary)."""
    every = []
    with (load_model(path, options) as model,
          open_context(model, ContextSpec(sequences=1, cells=WINDOW, shared=False)) as context):
        for window in windows:
            context.clear()
            parts = [context.decode(window[start:start + 128], range(start, start + 128), [(0,)] * 128, [True] * 128)
                     .astype(np.float64) for start in range(0, WINDOW, 128)]
            every.append(np.concatenate(parts))
    return np.stack(every)


def test_the_model_against_itself_has_diverged_by_exactly_nothing(baseline: Baseline, tmp_path: Path,
                                                                  options: EngineOptions) -> None:
    found = measure(STARTER_GGUF, baseline.store, tmp_path, options)
    assert (found.kld, found.kld_max, found.kld_min, found.kld_error) == (0, 0, 0, 0)
    assert found.same_top == 1
    assert (found.delta_p, found.delta_p_rms, found.ppl_ratio) == (0, 0, 1)


def test_divergence_rises_strictly_as_bits_fall(baseline: Baseline, pressed: Any, tmp_path: Path,
                                                of_q2_k: Divergence, options: EngineOptions) -> None:
    found = [measure(pressed(name).path, baseline.store, tmp_path / name, options).kld for name in ORIGINAL_LADDER[:-1]]
    assert all(lower < higher for lower, higher in pairwise([0.0, *found, of_q2_k.kld]))


def test_every_statistic_is_that_of_a_plain_loop(baseline: Baseline, pressed: Any, of_q2_k: Divergence,
                                                 options: EngineOptions) -> None:
    base = naive_logits(STARTER_GGUF, baseline.windows.tokens, options)
    mine = naive_logits(pressed("Q2_K").path, baseline.windows.tokens, options)
    nll, nll_base, kld, delta_p, same = [], [], [], [], []
    for window, rows_base, rows in zip(baseline.windows.tokens, base, mine, strict=True):
        for place in range(256, 511):  # as llama-perplexity does
            target = window[place + 1]
            p = rows_base[place] - rows_base[place].max()
            p -= math.log(np.exp(p).sum())
            q = rows[place] - rows[place].max()
            q -= math.log(np.exp(q).sum())
            nll_base.append(-p[target])
            nll.append(-q[target])
            kld.append(sum(np.exp(p) * (p - q)))
            delta_p.append(math.exp(q[target]) - math.exp(p[target]))
            same.append(p.argmax() == q.argmax())
    n = len(kld)
    assert of_q2_k.tokens == n == 8 * 255

    def close(value: float, expected: float) -> bool:
        return value == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def error(values: list[float]) -> float:
        return float(np.std(values, ddof=1)) / math.sqrt(n)

    covariance = np.cov(nll, nll_base)[0, 1] / n
    ratio_error = math.sqrt(error(nll) ** 2 + error(nll_base) ** 2 - 2 * covariance)
    ppl, ppl_base = math.exp(np.mean(nll)), math.exp(np.mean(nll_base))
    expected = {
        "ppl": ppl, "ppl_base": ppl_base, "ppl_error": ppl * error(nll), "ppl_base_error": ppl_base * error(nll_base),
        "ln_ppl_ratio": math.log(ppl / ppl_base), "ln_ppl_ratio_error": ratio_error, "ppl_ratio": ppl / ppl_base,
        "ppl_ratio_error": ppl / ppl_base * ratio_error, "ppl_difference": ppl - ppl_base,
        "ln_ppl_correlation": np.corrcoef(nll, nll_base)[0, 1],
        "kld": np.mean(kld), "kld_error": error(kld), "kld_median": np.median(kld), "kld_max": max(kld),
        "kld_min": min(kld), "delta_p": np.mean(delta_p), "delta_p_error": error(delta_p),
        "delta_p_median": np.median(delta_p), "delta_p_max": max(delta_p), "delta_p_min": min(delta_p),
        "delta_p_rms": math.sqrt(np.mean(np.square(delta_p))), "same_top": np.mean(same),
        "same_top_error": math.sqrt(np.mean(same) * (1 - np.mean(same)) / (n - 1))}
    wrong = {name: (getattr(of_q2_k, name), float(value)) for name, value in expected.items()
             if not close(getattr(of_q2_k, name), float(value))}
    assert wrong == {}
    for p in (1, 5, 10, 90, 95, 99):
        assert close(of_q2_k.kld_percentiles[f"{p:g}"], float(np.percentile(kld, p)))
        assert close(of_q2_k.delta_p_percentiles[f"{p:g}"], float(np.percentile(delta_p, p)))


def test_perplexity_does_not_depend_on_windows_per_decode(baseline: Baseline, tmp_path: Path,
                                                          options: EngineOptions) -> None:
    found = []
    with load_model(STARTER_GGUF, options) as model:
        for per_decode in (1, 3, 8):
            store = BaselineStore(tmp_path / str(per_decode), Windows(baseline.windows.tokens, per_decode),
                                  baseline.n_vocab, ALL)
            measure_baseline(model, store)
            found.append(store.perplexity())
    for one in found:
        assert one["ppl"] == pytest.approx(baseline.store.perplexity()["ppl"], rel=1e-4)
        assert one["tokens"] == 8 * ROWS


def test_every_window_begins_with_the_beginning_of_a_sequence(baseline: Baseline) -> None:
    assert baseline.windows.tokens.shape == (8, WINDOW)
    assert set(baseline.windows.tokens[:, 0]) == {1}


def test_a_resumed_measurement_is_the_same_to_the_last_digit(baseline: Baseline, pressed: Any, of_q2_k: Divergence,
                                                             tmp_path: Path, options: EngineOptions) -> None:
    path = pressed("Q2_K").path
    assert measure(path, baseline.store, tmp_path, options) == of_q2_k
    files = sorted(tmp_path.glob("group-*.npy"))
    assert len(files) == baseline.windows.groups == 4
    kept = files[1].stat().st_ino
    for file in (files[0], files[2]):
        file.unlink()
    told: list[tuple[int, int]] = []
    with load_model(path, options) as model:
        assert measure_divergence(model, baseline.store, tmp_path, lambda *share: told.append(share)) == of_q2_k
    assert told == [(3, 4), (4, 4)]
    assert files[1].stat().st_ino == kept


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"hello", b"PK\x03\x04 no archive"])
def test_a_damaged_checkpoint_is_computed_again(damage: bytes, baseline: Baseline, pressed: Any, of_q2_k: Divergence,
                                                tmp_path: Path, options: EngineOptions) -> None:
    path = pressed("Q2_K").path
    measure(path, baseline.store, tmp_path, options)
    (tmp_path / "group-00001.npy").write_bytes(damage)
    file = tmp_path / "group-00002.npy"
    file.write_bytes(file.read_bytes()[:-8])
    assert measure(path, baseline.store, tmp_path, options) == of_q2_k


@pytest.mark.parametrize("kind", ["full", "ids", "best", "scalars"])
def test_a_damaged_part_of_the_baseline_is_computed_again(kind: str, baseline: Baseline, tmp_path: Path,
                                                          options: EngineOptions) -> None:
    windows = Windows(baseline.windows.tokens[:2], 1)
    store = BaselineStore(tmp_path, windows, baseline.n_vocab, windows.scored * 8 * 100)
    with load_model(STARTER_GGUF, options) as model:
        measure_baseline(model, store)
        group = 0 if kind == "full" else 1
        file = tmp_path / f"{kind}-{group:05d}.npy"
        before = file.read_bytes()
        file.write_bytes(before[:-8])
        told: list[tuple[int, int]] = []
        measure_baseline(model, store, lambda *share: told.append(share))
    assert told == [(2, 2)]
    assert file.read_bytes() == before


def test_a_baseline_that_is_complete_is_not_computed_again(baseline: Baseline, options: EngineOptions) -> None:
    told: list[tuple[int, int]] = []
    with load_model(STARTER_GGUF, options) as model:
        measure_baseline(model, baseline.store, lambda *share: told.append(share))
    assert told == []


@pytest.mark.parametrize("kept", [100, 400])
def test_a_small_budget_gives_a_lower_bound_within_what_it_says(kept: int, baseline: Baseline, pressed: Any,
                                                                of_q2_k: Divergence, tmp_path: Path,
                                                                options: EngineOptions) -> None:
    store = BaselineStore(tmp_path / "store", baseline.windows, baseline.n_vocab, baseline.windows.scored * 8 * kept)
    assert store.top == kept
    with load_model(STARTER_GGUF, options) as model:
        measure_baseline(model, store)
        itself = measure_divergence(model, store, tmp_path / "self")
    found = measure(pressed("Q2_K").path, store, tmp_path / "rows", options)
    assert itself.kld == 0
    assert found.kld <= of_q2_k.kld
    assert 0 < found.kld_truncation < 0.01 * of_q2_k.kld
    assert of_q2_k.kld - found.kld <= 3 * found.kld_truncation
    assert (found.ppl, found.same_top, found.delta_p) == (of_q2_k.ppl, of_q2_k.same_top, of_q2_k.delta_p)


@pytest.mark.parametrize("budget", [ALL, 8 * ROWS * 8 * 100])
def test_the_store_takes_the_bytes_it_announces(budget: int, baseline: Baseline, tmp_path: Path,
                                                options: EngineOptions) -> None:
    store = BaselineStore(tmp_path, baseline.windows, baseline.n_vocab, budget)
    with load_model(STARTER_GGUF, options) as model:
        measure_baseline(model, store)
    taken = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert taken == pytest.approx(store.n_bytes, rel=0.03)
    if budget != ALL:
        first = 2 * ROWS * baseline.n_vocab * 4  # the first group is always kept whole
        assert store.n_bytes - first <= 1.05 * budget


def test_a_text_too_short_to_measure_is_refused_with_both_lengths(options: EngineOptions) -> None:
    with (load_model(STARTER_GGUF, options) as model,
          pytest.raises(TextTooShort, match="has 5 tokens, and at least 1024 are needed")):
        cut_windows(model, "I feel sad today")


def test_an_original_that_computes_no_numbers_is_refused(tmp_path: Path, options: EngineOptions) -> None:
    path = TinyModel(layers=1, damaged=("blk.0.ffn_up.weight",)).write(tmp_path / "m.gguf")
    with load_model(path, options) as model:
        windows = cut_windows(model, TEXT, special=True, limit=2)
        with pytest.raises(NotFinite, match="unquantized model computes values that are not finite"):
            measure_baseline(model, BaselineStore(tmp_path / "s", windows, model.n_vocab, ALL))
        with pytest.raises(NotFinite, match="not finite"):
            check_finite(model)


@pytest.mark.parametrize("budget", [ALL, 1])
def test_a_level_that_computes_no_numbers_is_refused(budget: int, baseline: Baseline, tmp_path: Path,
                                                     options: EngineOptions) -> None:
    path = TinyModel(layers=1, damaged=("output_norm.weight",)).write(tmp_path / "m.gguf")
    windows = Windows(baseline.windows.tokens[:2], 1)
    store = BaselineStore(tmp_path / "store", windows, baseline.n_vocab, budget)
    with load_model(STARTER_GGUF, options) as model:
        measure_baseline(model, store)
    with pytest.raises(NotFinite, match="The model computes values that are not finite"):
        measure(path, store, tmp_path / "rows", options)


def test_a_level_too_far_off_for_a_number_is_refused(baseline: Baseline, tmp_path: Path,
                                                     options: EngineOptions) -> None:
    """Its perplexity would overflow; infinity is no result."""
    path = TinyModel(layers=1, untied=True, scale=3e3).write(tmp_path / "m.gguf")
    with pytest.raises(NotFinite, match="per token"):
        measure(path, baseline.store, tmp_path / "rows", options)
