"""`nightpress calibration`: what its commands print and write, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from calibration_data.catalogue import BUILT_IN, FOLDER, Catalogue, UnknownDomain
from calibration_data.text import CalibrationRefused, read, write
from daemon.cli import calibration
from loops.evaluation.scenarios import read_scenarios
from state.files import StateUnwritable

LAW = """%% domain law
%% licence MIT
%% source mine

%% sample law-1 fence
%% user
Whose fence is it?
%% assistant
Yours, says the deed.
"""
PROGRAM = """
import typer
from daemon.cli import calibration, guarded
app = typer.Typer(pretty_exceptions_enable=False)
calibration.register(app)
guarded(app)
"""


@pytest.fixture
def folder(isolated: Path) -> Path:
    """The user's folder of calibration text."""
    folder = isolated / "config" / "calibration"
    (folder / "held_out").mkdir(parents=True)
    return folder


def run(*arguments: str) -> Result:
    app = typer.Typer()
    calibration.register(app)
    return CliRunner().invoke(app, ["calibration", *arguments])


def text_of(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def json_of(*arguments: str) -> Any:
    return json.loads(text_of(*arguments, "--json"))


def refusal_of(*arguments: str) -> CalibrationRefused | UnknownDomain:
    problem = run(*arguments).exception
    assert isinstance(problem, CalibrationRefused | UnknownDomain), problem
    assert "\n" not in str(problem)
    return problem


def test_list_tells_of_every_domain_its_size_licence_and_source(folder: Path) -> None:
    (folder / "law.txt").write_text(LAW, encoding="utf-8")
    rows = {row["name"]: row for row in json_of("list")["domains"]}
    assert list(rows) == [*BUILT_IN, "law"]
    assert rows["law"] == {
        "name": "law", "samples": 1, "words": 8, "languages": [], "licences": ["MIT"], "sources": ["mine"],
        "held_out_samples": 0, "held_out_words": 0, "built_in": False, "file": str(folder / "law.txt")}
    assert rows["medical"]["samples"] == len(read(FOLDER / "domains" / "medical.txt"))
    table = text_of("list").splitlines()
    line = next(line for line in table if line.split()[:1] == ["medical"])
    assert f"{rows['medical']['words']:,}" in line
    assert "CC0-1.0" in line
    assert str(folder) in table[-1]


def test_list_shows_the_others_when_a_file_cannot_be_used_and_then_fails(folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "rag.txt").write_text("Mine.", encoding="utf-8")
    done = run("list", "--json")
    assert isinstance(done.exception, CalibrationRefused)
    assert "bad.txt" in str(done.exception)
    assert str(done.exception).count("rag.txt") == 1
    assert {row["name"] for row in json.loads(done.output)["domains"]} == set(BUILT_IN) - {"rag"}


def test_show_prints_samples_in_the_format_of_the_files() -> None:
    whole = Catalogue().load("medical")
    printed = text_of("show", "medical", "--limit", "2")
    assert write(whole[:2]) in printed
    assert f"{len(whole) - 2} more" in printed
    assert write(whole[4:5]) in text_of("show", "medical", "--sample", whole[4].id)
    assert write(Catalogue().held_out("medical")[:3]) in text_of("show", "medical", "--held-out")


def test_show_as_json_has_turns_and_header() -> None:
    found = json_of("show", "rag", "--limit", "0")
    assert len(found["shown"]) == found["samples"] >= 80
    assert found["shown"][0]["turns"][0]["role"] in {"system", "user"}
    assert found["shown"][0]["header"]["licence"] == "CC0-1.0"


def test_what_is_exported_is_read_again(tmp_path: Path) -> None:
    text_of("export", "general", "-o", str(tmp_path / "mine.txt"))
    assert read(tmp_path / "mine.txt") == Catalogue().load("general")
    assert text_of("export", "rag") == write(Catalogue().load("rag"))
    assert text_of("export", "rag", "--held-out") == write(Catalogue().held_out("rag"))


def test_plain_export_is_text_without_markup() -> None:
    text = text_of("export", "medical", "--plain")
    assert "%%" not in text
    assert "User: Our daughter is five weeks old" in text


def test_combine_takes_words_by_weight_and_says_how_many(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(f"Paragraph number {number} of my notes." for number in range(200)), encoding="utf-8")
    made = json_of("combine", "medical", str(mine), "--weights", "3,1", "--words", "4000",
                   "-o", str(tmp_path / "out.txt"))
    assert [one["name"] for one in made["taken"]] == ["medical", "mine.txt"]
    medical, own = (one["words"] for one in made["taken"])
    assert medical / own == pytest.approx(3, rel=0.3)
    assert made["words"] == medical + own >= 4000
    found = read(tmp_path / "out.txt")
    assert len(found) == made["samples"]
    assert {sample.header.domain for sample in found} == {"medical", "mine"}
    assert "mine.txt" in text_of("combine", "medical", str(mine), "-o", str(tmp_path / "other.txt"))


def test_nothing_that_is_there_is_replaced_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    out.write_text("precious", encoding="utf-8")
    for command in (("export", "rag"), ("combine", "rag", "medical")):
        assert "--force" in str(refusal_of(*command, "-o", str(out)))
    assert out.read_text(encoding="utf-8") == "precious"
    text_of("export", "rag", "-o", str(out), "--force")
    assert read(out) == Catalogue().load("rag")
    assert "no folder" in str(refusal_of("export", "rag", "-o", str(tmp_path / "none" / "out.txt")))
    assert "there already" in str(refusal_of("export", "rag", "-o", str(tmp_path), "--force"))
    assert isinstance(run("export", "rag", "-o", str(tmp_path / ("x" * 300))).exception, StateUnwritable)


@pytest.mark.parametrize(("weights", "what"), [("1", "1 numbers for 2"), ("1,x", "numbers with commas"),
                                               ("1,-1", "above 0"), ("1,nan", "above 0")])
def test_weights_that_make_no_sense_are_refused(tmp_path: Path, weights: str, what: str) -> None:
    out = tmp_path / "out.txt"
    assert what in str(refusal_of("combine", "rag", "medical", "--weights", weights, "-o", str(out)))
    assert not out.exists()


def test_a_domain_that_ships_passes_the_check() -> None:
    found = json_of("check", "medical")
    assert (found["usable"], found["enough_words"], found["near_duplicates"], found["overlaps"]) == (True, True, [], [])
    assert found["samples_by_language"]["en"] >= 100
    assert "(runs of 9 words): none" in text_of("check", "medical")


def test_the_check_tells_repetition_other_languages_and_want_of_words(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("The boat to the islands leaves at seven and comes back in the evening with the tide.\n\n"
                    "The boat to the islands leaves at seven and comes back in the evening with the post.\n\n"
                    "Wer das Boot verpasst, der wartet auf dem Steg, bis die Flut kommt und es ein anderes gibt.\n",
                    encoding="utf-8")
    found = json_of("check", str(mine))
    assert not found["enough_words"]
    assert [(one["id"], one["like"]) for one in found["near_duplicates"]] == [("mine-p002", "mine-p001")]
    assert found["in_other_languages"] == ["mine-p003"]
    printed = text_of("check", str(mine))
    assert "That is little" in printed
    assert "mine-p002 is like mine-p001" in printed
    assert "mine-p003: de" in printed


def test_text_that_models_are_judged_by_is_refused(tmp_path: Path, folder: Path) -> None:
    scenario = read_scenarios()[5]
    other = tmp_path / "other.txt"
    other.write_text("A sentence that is only in the text which somebody else is judged by.", encoding="utf-8")
    (folder / "law.txt").write_text(LAW, encoding="utf-8")
    (folder / "held_out" / "law.txt").write_text("Held out, so that nobody is trained or calibrated on this.",
                                                 encoding="utf-8")
    held_out = Catalogue().held_out("rag")[3]
    cases = {
        f"scenario {scenario.id}": scenario.empathic, f"held-out {held_out.id}": held_out.text,
        "the evaluation text": "The sea has no outlet. Water leaves it only by evaporation, and evaporation leaves it.",
        "held-out law-p001": "Held out, so that nobody is trained or calibrated on this.",
        str(other): other.read_text(encoding="utf-8")}
    mine = tmp_path / "mine.txt"
    for name, text in cases.items():
        mine.write_text(f"Harmless.\n\n{text}\n", encoding="utf-8")
        done = run("check", str(mine), "--against", str(other), "--json")
        assert isinstance(done.exception, CalibrationRefused), name
        found = json.loads(done.output)
        assert not found["usable"]
        assert {one["other"] for one in found["overlaps"]} == {name}
    assert "shares" in run("check", str(mine), "--against", str(other)).output


@pytest.mark.parametrize(("arguments", "what"), [
    (("show", "medicl"), "Did you mean medical"), (("export", "none/of/these.txt"), "No such file"),
    (("show", "../medical", "--held-out"), "is no name"), (("show", "medical", "--sample", "x"), "no sample 'x'"),
    (("check", "none.txt"), "no domain 'none.txt'"), (("check", "medical", "--against", "none.txt"), "none.txt"),
])
def test_what_is_not_there_is_told_in_one_sentence(arguments: tuple[str, ...], what: str) -> None:
    assert what in str(refusal_of(*arguments))


def test_a_domain_without_held_out_part_says_where_it_would_be(folder: Path) -> None:
    (folder / "law.txt").write_text(LAW, encoding="utf-8")
    assert str(folder / "held_out") in str(refusal_of("show", "law", "--held-out"))


@pytest.mark.parametrize(("arguments", "status", "told"), [
    (("show", "nothing"), 19, "no domain"), (("check", "bad.txt"), 18, "not UTF-8"), (("show", "rag"), 0, "")])
def test_errors_are_one_sentence_and_their_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], status: int, told: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    done = subprocess.run([sys.executable, "-c", PROGRAM, "calibration", *arguments], cwd=tmp_path, check=False,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == status
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == bool(told)
