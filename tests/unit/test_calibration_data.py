"""The calibration texts that ship keep what they promise; each figure is measured here."""

from __future__ import annotations

import functools

import pytest

from calibration_data.catalogue import BUILT_IN, FOLDER
from calibration_data.checks import ENOUGH_WORDS, count_words, near_duplicates, overlaps
from calibration_data.text import Sample, parse, read, write
from loops.evaluation.scenarios import read_scenarios
from loops.evaluation.text import BUILT_IN as EVALUATION_TEXT

#: Jaccard similarity of word 5-grams that no two samples reach; a copy with every fourth word changed has about 0.13
THRESHOLD = 0.1
PARTS = ("domains", "held_out")


@functools.cache
def samples(part: str, name: str) -> tuple[Sample, ...]:
    return read(FOLDER / part / f"{name}.txt")


def every(part: str) -> list[Sample]:
    return [sample for name in BUILT_IN for sample in samples(part, name)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_domain_has_80_samples_of_prompt_and_answer_and_6000_words(name: str) -> None:
    whole = [sample for sample in samples("domains", name)
             if {"user", "assistant"} <= {turn.role for turn in sample.turns} and sample.turns[-1].role == "assistant"]
    assert len({sample.turns for sample in whole}) >= 80
    assert count_words(whole) >= ENOUGH_WORDS
    assert sum(len(turn.text.split()) for sample in whole for turn in sample.turns) >= 6000


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_held_out_part_has_20_samples_and_2500_words(name: str) -> None:
    assert len(samples("held_out", name)) >= 20
    assert count_words(samples("held_out", name)) >= 2500


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_file_says_its_domain_language_licence_and_source(part: str, name: str) -> None:
    for header in {sample.header for sample in samples(part, name)}:
        assert (header.domain, header.licence) == (name, "CC0-1.0")
        assert header.language.split(",")[0] == "en"
        assert header.source


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_file_is_written_as_the_program_would(part: str, name: str) -> None:
    assert (FOLDER / part / f"{name}.txt").read_text(encoding="utf-8").rstrip() == write(samples(part, name)).rstrip()


def test_all_files_concatenate() -> None:
    files = [FOLDER / part / f"{name}.txt" for part in PARTS for name in BUILT_IN]
    together = "".join(file.read_text(encoding="utf-8") for file in files)
    assert parse(together) == (*every("domains"), *every("held_out"))


def test_every_id_is_there_once_and_every_sample_has_a_topic() -> None:
    whole = [*every("domains"), *every("held_out")]
    assert len({sample.id for sample in whole}) == len(whole)
    assert [sample.id for sample in whole if not sample.topic or not sample.id.startswith(sample.header.domain)] == []


def test_no_two_samples_are_near_duplicates_held_out_parts_included() -> None:
    assert near_duplicates([*every("domains"), *every("held_out")], THRESHOLD) == []


def test_no_text_shares_nine_words_with_a_held_out_part() -> None:
    kept = {sample.id: sample.text for sample in every("held_out")}
    assert overlaps(every("domains"), kept) == []


def test_no_text_shares_nine_words_with_evaluation_text_or_scenarios() -> None:
    others = {"evaluation text": EVALUATION_TEXT.read_text(encoding="utf-8")}
    for scenario in read_scenarios():
        others |= {f"{scenario.id} {field}": getattr(scenario, field) for field in ("prompt", "empathic", "dismissive")}
    assert len(others) > 400
    assert overlaps([*every("domains"), *every("held_out")], others) == []
