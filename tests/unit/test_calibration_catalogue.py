"""The domains: those that ship and the user's, by name; nothing else is reachable by a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration_data.catalogue import BUILT_IN, FOLDER, GENERAL, Catalogue, UnknownDomain, describe
from calibration_data.checks import count_words
from calibration_data.text import CalibrationRefused, read

LAW = """%% domain law
%% language en
%% licence MIT
%% source mine

%% sample law-1 fence
%% user
Whose?
%% assistant
Yours.
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    folder = tmp_path / "calibration"
    (folder / "held_out").mkdir(parents=True)
    (folder / "law.txt").write_text(LAW, encoding="utf-8")
    (folder / "held_out" / "law.txt").write_text("A held-out paragraph.\n", encoding="utf-8")
    (folder / "notes.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (folder / "notes.md").write_text("No domain.", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("Not to be read by a name.", encoding="utf-8")
    return Catalogue(folder)


def test_the_names_are_those_that_ship_and_the_users(catalogue: Catalogue) -> None:
    assert catalogue.names() == (*BUILT_IN, "law", "notes")
    assert Catalogue().names() == Catalogue(Path("does") / "not" / "exist").names() == BUILT_IN


def test_every_file_that_ships_is_a_domain_with_a_held_out_part() -> None:
    for part in ("domains", "held_out"):
        assert sorted(path.name for path in (FOLDER / part).iterdir()) == sorted(f"{name}.txt" for name in BUILT_IN)


def test_a_file_dropped_in_the_users_folder_is_a_domain(catalogue: Catalogue) -> None:
    assert [sample.id for sample in catalogue.load("law")] == ["law-1"]
    assert [sample.text for sample in catalogue.held_out("law")] == ["A held-out paragraph."]
    assert [sample.text for sample in catalogue.load("notes")] == ["One.", "Two."]
    assert catalogue.held_out("notes") == ()
    assert catalogue.folder is not None
    assert catalogue.file("law") == catalogue.folder / "law.txt"
    assert catalogue.file("medical") is None


def test_a_domain_that_ships_is_its_file_and_its_held_out_part_the_other() -> None:
    for name in set(BUILT_IN) - {GENERAL}:
        assert Catalogue().load(name) == read(FOLDER / "domains" / f"{name}.txt")
        assert Catalogue().held_out(name) == read(FOLDER / "held_out" / f"{name}.txt")


@pytest.mark.parametrize("held_out", [False, True])
def test_general_mixes_all_domains_evenly_by_words_from_the_start(held_out: bool) -> None:
    catalogue = Catalogue()
    mixed = catalogue.held_out(GENERAL) if held_out else catalogue.load(GENERAL)
    assert mixed == (catalogue.held_out(GENERAL) if held_out else catalogue.load(GENERAL))
    assert {sample.header.domain for sample in mixed[:len(BUILT_IN)]} == set(BUILT_IN)
    given = {name: count_words(sample for sample in mixed if sample.header.domain == name) for name in BUILT_IN}
    longest = max(count_words([sample]) for sample in mixed)
    assert max(given.values()) - min(given.values()) <= longest
    part = FOLDER / ("held_out" if held_out else "domains")
    whole = [count_words(read(part / f"{name}.txt")) for name in BUILT_IN]
    assert min(given.values()) >= min(whole) - longest


def test_every_held_out_sample_is_among_all_that_are_held_out(catalogue: Catalogue) -> None:
    kept = set(catalogue.every_held_out())
    assert all(kept >= set(catalogue.held_out(name)) for name in catalogue.names())
    assert all(kept >= set(read(FOLDER / "held_out" / f"{name}.txt")) for name in BUILT_IN)


@pytest.mark.parametrize("name", [
    "../secret", "held_out/law", "/etc/passwd", "..", ".", "", "law.txt", "law\n", "law\0", "x" * 300, "-law", "läw"])
def test_what_is_no_name_is_refused(catalogue: Catalogue, name: str) -> None:
    for ask in (catalogue.load, catalogue.held_out, catalogue.file):
        with pytest.raises(UnknownDomain) as refused:
            ask(name)
        assert "is no name of a domain" in str(refused.value)
        assert len(str(refused.value)) < 200
        assert "\n" not in str(refused.value)


def test_a_domain_that_is_not_there_is_refused_with_the_nearest(catalogue: Catalogue) -> None:
    with pytest.raises(UnknownDomain, match="Did you mean medical"):
        catalogue.load("medicl")
    with pytest.raises(UnknownDomain, match="calibration list"):
        catalogue.held_out("zzz")


def test_a_file_with_the_name_of_a_domain_that_ships_is_refused_not_preferred(catalogue: Catalogue) -> None:
    assert catalogue.folder is not None
    (catalogue.folder / "medical.txt").write_text("Mine.", encoding="utf-8")
    (catalogue.folder / "my notes.txt").write_text("Mine.", encoding="utf-8")
    assert catalogue.names() == (*BUILT_IN, "law", "notes")
    assert ["medical.txt" in str(one) or "my notes.txt" in str(one) for one in catalogue.misplaced()] == [True, True]
    with pytest.raises(CalibrationRefused, match="Give it another"):
        catalogue.load("medical")
    assert catalogue.load("rag")


def test_a_domain_or_a_file_opens_by_what_it_is_called(catalogue: Catalogue, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law").write_text("A file of that name.", encoding="utf-8")
    assert [sample.id for sample in catalogue.open("law")[1]] == ["law-1"]
    assert catalogue.open("./law")[1][0].text == "A file of that name."
    assert catalogue.open("secret.txt")[0] == "secret.txt"
    with pytest.raises(CalibrationRefused, match="No such file"):
        catalogue.open("./none.txt")
    with pytest.raises(UnknownDomain):
        catalogue.open("")
    for nothing in ("none.txt", "nul\0", "x" * 300, "~nobody-of-that-name/a.txt"):
        with pytest.raises((UnknownDomain, CalibrationRefused)) as refused:
            catalogue.open(nothing)
        assert len(str(refused.value)) < 200


def test_the_facts_of_a_text_are_said_once_each() -> None:
    facts = describe(Catalogue().load(GENERAL))
    assert facts.licences == ("CC0-1.0",)
    assert facts.samples > 300
    assert describe([]).words == 0
