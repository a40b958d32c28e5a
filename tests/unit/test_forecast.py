"""Promise 12: what cannot finish is refused before it starts, with both figures."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loops.engine.gguf_check import CheckedModel, check_model
from loops.pass1.forecast import MARGIN_BYTES, check_disk, check_memory, check_time
from loops.pass1.plan import CannotFinish, PressPlan
from state.files import DiskFull

PLAN = PressPlan(model="m.gguf", name="m", blobs="blobs", scratch="scratch")


def grown(path: Path, factor: int) -> CheckedModel:
    """The starter, as if it had so many shards of its size."""
    model = check_model(path)
    return replace(model, headers=model.headers * factor)


def test_a_small_model_fits(starter: Path) -> None:
    check_memory(check_model(starter))


def test_a_model_larger_than_the_memory_is_refused_unless_forced(starter: Path) -> None:
    factor = 1 + psutil.virtual_memory().total // starter.stat().st_size
    model = grown(starter, factor)
    with pytest.raises(CannotFinish, match=r"takes about [\d.]+ GB of memory, and this machine has [\d.]+ GB.*--force"):
        check_memory(model)
    check_memory(model, ignore=True)


def test_a_model_whose_evaluation_does_not_fit_is_refused(starter: Path) -> None:
    factor = (psutil.virtual_memory().total - 10**9) // starter.stat().st_size
    with pytest.raises(CannotFinish):
        check_memory(grown(starter, factor))


def test_a_run_that_the_disk_can_hold_may_start(tmp_path: Path) -> None:
    check_disk(tmp_path / "new" / "blobs", [10**6, 2 * 10**6], 10**6)
    assert (tmp_path / "new" / "blobs").is_dir()


def test_a_run_too_large_for_the_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DiskFull, match=r"needs [\d,.]+ GB of disk .* and [\d,.]+ GB are free"):
        check_disk(tmp_path, [free], 10**9)


def test_the_variants_that_are_compared_must_fit_all_at_once(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DiskFull):
        check_disk(tmp_path, [free // 2], 0, compared=3 * (free // 2))
    check_disk(tmp_path, [free // 2], 0, compared=free // 4)


def test_two_levels_at_a_time_and_the_baseline_must_fit(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    third, slack = free // 3, 64 << 20  # the disk is shared with whatever else runs here
    check_disk(tmp_path, [third] * 9, max(0, third - MARGIN_BYTES - 16 * slack))
    with pytest.raises(DiskFull):
        check_disk(tmp_path, [third] * 9, third + 16 * slack)
    with pytest.raises(DiskFull):
        check_disk(tmp_path, [free // 2 + slack] * 2, 0)


def test_a_level_that_breaks_its_deadline_is_refused_before_it_starts() -> None:
    with pytest.raises(CannotFinish, match="about 120 s here, and the deadline of a level is 60 s"):
        check_time(replace(PLAN, timeout_s=60), 10**9, 120, 6)


def test_a_long_run_is_announced_with_its_length() -> None:
    assert check_time(PLAN, 6 * 10**9, 500, 6) == "About 60 minutes for at most 6 levels, judging by the original."


@pytest.mark.parametrize("baseline_s", [0.0, 0.5, 2.0])
def test_a_short_run_is_not_announced(baseline_s: float) -> None:
    assert check_time(PLAN, 15 * 10**6, baseline_s, 6) is None


def test_a_baseline_that_was_not_measured_now_says_nothing_of_the_deadline() -> None:
    assert check_time(replace(PLAN, timeout_s=0.1), 10**9, 0.0, 6) is None
