"""Labelled texts are read line by line, and agreement with them is measured as the books define it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from loops.evaluation.labelled import macro_f1, parse_files, rank_correlation, read


def test_the_lines_of_all_files_come_in_order_and_blank_ones_are_passed_over(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n', encoding="utf-8")
    second.write_text('{"text": "three"}', encoding="utf-8")
    assert [row["text"] for row in read([second, first])] == ["three", "one", "two"]
    assert read([]) == []


def test_a_separator_inside_a_text_is_no_line_end(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\u0085three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read([tmp_path / "rows.jsonl"]) == [row]


@pytest.mark.parametrize(("one", "other", "expected"), [
    ([1, 2, 3], [10, 20, 900], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ([0, 0, 1, 2], [0, 1, 2, 3], 0.9 ** 0.5)])  # tied: ranks 1.5 1.5 3 4 against 1 2 3 4
def test_rank_correlation_is_spearmans_with_ties_sharing_their_rank(
        one: list[float], other: list[float], expected: float) -> None:
    assert rank_correlation(one, other) == pytest.approx(expected)
    assert rank_correlation(other, one) == pytest.approx(expected)


def test_macro_f1_is_the_mean_over_the_classes() -> None:
    gold, found = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    of_each = (2 / 3, 1 / 2, 0)  # of 0: precision 1, recall 1/2; of 1: precision 1/3, recall 1; of 2: never found
    assert macro_f1(gold, found) == pytest.approx(sum(of_each) / 3)
    assert macro_f1(gold, found, 8) == pytest.approx(sum(of_each) / 8)


def test_the_command_line_names_what_to_learn_from_to_measure_and_to_write(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit", "a.jsonl", "b.jsonl", "--test", "c.jsonl"])
    options = parse_files("Fit.", tmp_path / "weights.json")
    assert (options.files, options.test) == ([Path("a.jsonl"), Path("b.jsonl")], [Path("c.jsonl")])
    assert options.output == tmp_path / "weights.json"
