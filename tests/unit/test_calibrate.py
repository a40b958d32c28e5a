"""What calibrates a run: the texts that are asked for, a part of them kept back, nothing that is measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration_data.catalogue import Catalogue, UnknownDomain
from calibration_data.checks import overlaps
from calibration_data.text import CalibrationRefused, Sample
from loops.evaluation.scenarios import Scenario, read_scenarios
from loops.evaluation.text import EvaluationText
from loops.pass1.calibrate import Compared, _sentence, best_on
from loops.pass1.source import (
    KEPT_BACK_WORDS,
    Source,
    general,
    general_apart_from,
    read_source,
    refuse_overlap,
)

SENTENCE = "The {0}th keeper of the light wrote down {0} ships, their {0} cargoes and the weather of day {0}. "


def write_text(path: Path, paragraphs: int, words: int = 40) -> Path:
    """Write paragraphs, each of about so many words, no two alike."""
    path.write_text("\n\n".join(
        " ".join(SENTENCE.format(1000 * paragraph + line) for line in range(words // 19 + 1))
        for paragraph in range(paragraphs)), encoding="utf-8")
    return path


def ids(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.id for sample in samples]


def test_nothing_asked_for_is_nothing() -> None:
    assert read_source((), (), None) is None


def test_domains_and_files_are_joined_each_once(tmp_path: Path) -> None:
    file = str(write_text(tmp_path / "notes.txt", 4))
    source = read_source(("medical", "rag", "medical"), (file, file), None)
    assert source is not None
    catalogue = Catalogue()
    assert source.name == "medical+rag+notes.txt"
    assert ids(source.samples)[:3] == ids(catalogue.load("medical"))[:3]
    assert len(source.samples) == len(catalogue.load("medical")) + len(catalogue.load("rag")) + 4
    assert len(source.held_out) == len(catalogue.held_out("medical")) + len(catalogue.held_out("rag"))


def test_of_a_long_text_every_so_many_th_sample_is_kept_back(tmp_path: Path) -> None:
    source = read_source((), (str(write_text(tmp_path / "notes.txt", 100, 60)),), None)
    assert source is not None
    assert source.held_out
    assert not {one.text for one in source.held_out} & {one.text for one in source.samples}
    assert len(source.held_out) + len(source.samples) == 100
    assert sum(len(one.text.split()) for one in source.held_out) > KEPT_BACK_WORDS / 2
    assert len(source.held_out) <= 34


def test_of_a_short_text_nothing_is_kept_back(tmp_path: Path) -> None:
    source = read_source((), (str(write_text(tmp_path / "notes.txt", 10)),), None)
    assert source is not None
    assert source.held_out == ()
    assert len(source.samples) == 10


def test_a_domain_of_the_users_with_a_held_out_part_keeps_nothing_more_back(tmp_path: Path) -> None:
    write_text(tmp_path / "law.txt", 100)
    (tmp_path / "held_out").mkdir()
    write_text(tmp_path / "held_out" / "law.txt", 3)
    source = read_source(("law",), (), str(tmp_path))
    assert source is not None
    assert (len(source.samples), len(source.held_out)) == (100, 3)


@pytest.mark.parametrize("name", ["medicine", "a/b", "../general", ""])
def test_an_unknown_domain_is_refused(name: str) -> None:
    with pytest.raises(UnknownDomain):
        read_source((name,), (), None)


def test_another_text_is_another_source(tmp_path: Path) -> None:
    first = read_source((), (str(write_text(tmp_path / "notes.txt", 4)),), None)
    second = read_source((), (str(write_text(tmp_path / "notes.txt", 5)),), None)
    assert first is not None
    assert second is not None
    assert first.sha256 != second.sha256
    assert first.sha256 == Source(first.name, first.samples, first.held_out).sha256


def test_no_domain_that_ships_overlaps_with_what_models_are_judged_by() -> None:
    text = EvaluationText("The weather was fine.", special=False, source="a text")
    refuse_overlap(general(), text, read_scenarios())


def test_text_that_is_measured_on_is_not_calibrated_with(tmp_path: Path) -> None:
    source = read_source((), (str(write_text(tmp_path / "notes.txt", 3)),), None)
    assert source is not None
    excerpt = source.samples[1].text
    with pytest.raises(CalibrationRefused, match=r"notes\.txt overlaps .* the evaluation text"):
        refuse_overlap(source, EvaluationText(f"Before. {excerpt.upper()} After.", special=False, source="x"), ())
    scenario = Scenario(**{**vars(read_scenarios()[0]), "prompt": excerpt})
    with pytest.raises(CalibrationRefused, match=f"scenario {scenario.id}"):
        refuse_overlap(source, None, [scenario])
    with pytest.raises(CalibrationRefused, match="its own held-out part"):
        refuse_overlap(Source("x", source.samples, source.samples[:1]), None, (), compared=True)


def test_what_choices_are_made_on_is_not_measured_on_either(tmp_path: Path) -> None:
    source = read_source((), (str(write_text(tmp_path / "notes.txt", 100, 60)),), None)
    assert source is not None
    kept = source.held_out[0].text
    with pytest.raises(CalibrationRefused, match="the evaluation text"):
        refuse_overlap(source, EvaluationText(kept, special=False, source="x"), ())


def test_a_file_that_holds_the_general_text_that_matrices_are_compared_on_is_refused() -> None:
    samples = general().held_out[:2]
    refuse_overlap(Source("mine.txt", samples, ()), None, ())
    with pytest.raises(CalibrationRefused, match=r"mine\.txt overlaps .* held-out general text"):
        refuse_overlap(Source("mine.txt", samples, ()), None, (), compared=True)


def test_the_general_matrix_is_not_made_from_what_it_is_judged_on() -> None:
    whole = general()
    kept = whole.samples[3:5]
    apart = general_apart_from(kept)
    assert not overlaps(apart.samples, {"": kept[0].text + kept[1].text})
    assert len(apart.samples) == len(whole.samples) - 2
    assert general_apart_from(()).sha256 == whole.sha256


@pytest.mark.parametrize("name", ["general", "none"])
def test_no_file_and_no_domain_of_the_users_passes_for_the_general_one_or_for_none(name: str, tmp_path: Path) -> None:
    file = read_source((), (str(write_text(tmp_path / name, 4)),), None)
    assert file is not None
    assert file.name == f"{name} (file)"
    write_text(tmp_path / "none.txt", 4)
    own = read_source(("none",), (), str(tmp_path))
    assert own is not None
    assert own.name == "none (domain)"


def row(matrix: str, text: str, kld: float) -> dict[str, object]:
    return {"matrix": matrix, "text": text, "kld": kld, "error": 0.001, "n": 255, "bytes": 10}


@pytest.mark.parametrize(("used", "end"), [
    ("law", "the law matrix is used."), ("general", "law text does not help this model here, and the general matrix"),
    ("none", "does not help this model here, and no matrix is used.")])
def test_the_sentence_says_what_is_used_and_whether_it_helped(used: str, end: str) -> None:
    rows = [row("law", "law", 0.1), row("general", "law", 0.2), row("none", "law", 0.3), row("none", "general", 0.4)]
    told = _sentence("Q2_K", "law", "law", rows, used)
    assert end in told
    assert "0.1 with the law matrix, 0.2 with the general matrix, 0.3 without a matrix" in told
    assert "0.4" not in told
    assert "cannot be made without" not in told
    assert "IQ1_S cannot be made without" in _sentence("IQ1_S", "law", "law", rows[:2], used)
    assert Compared("Q2_K", tuple(rows), used, "law", told).judged_on == "law"


def test_the_matrix_that_does_best_on_the_domains_own_text_is_taken() -> None:
    rows = [row("law", "law", 0.2), row("law", "general", 0.5), row("general", "law", 0.3),
            row("general", "general", 0.1), row("none", "law", 0.4), row("none", "general", 0.6)]
    assert best_on("law", rows) == "law"
    assert best_on("general", rows) == "general"
    assert best_on("law", rows[2:]) == "general"
