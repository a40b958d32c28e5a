"""`nightpress imatrix` and `nightpress quantize` through the real command line, as a user would."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from calibration_data.catalogue import Catalogue
from calibration_data.text import write
from loops.engine.gguf_check import check_gguf
from loops.engine.imatrix_file import read_imatrix
from loops.evaluation.scenarios import read_scenarios
from loops.starter import STARTER_GGUF

STARTER = str(STARTER_GGUF)


@pytest.fixture
def notes(nightpress: Any) -> Path:
    """A short calibration text of the user's."""
    path = Path(nightpress.base / "notes.txt")
    path.write_text(write(Catalogue().load("rag")[:12]), encoding="utf-8")
    return path


def test_a_matrix_is_written_described_merged_and_used(nightpress: Any, notes: Path) -> None:
    made = json.loads(nightpress("imatrix", STARTER, "--calibration", str(notes), "--json").stdout)
    file = nightpress.base / "starter-imatrix.gguf"
    assert made["path"] == str(file)
    assert made["complete"] is True
    assert made["datasets"] == ["notes.txt"]
    assert made["entries"] == len(made["tensors"]) == len(read_imatrix(file).entries)
    shown = nightpress("imatrix", str(file), "--stats").stdout
    assert made["tensors"][0]["name"] in shown
    assert "notes.txt" in shown

    refused = nightpress("imatrix", STARTER, "--calibration", str(notes), status=74)
    assert "--force" in refused.stderr
    twice = json.loads(nightpress("imatrix", STARTER, "--merge", str(file), "--merge", str(file), "-o", "twice.gguf",
                                  "--json").stdout)
    assert twice["tensors"][0]["tokens"] == 2 * made["tensors"][0]["tokens"]

    files = json.loads(nightpress("quantize", STARTER, "--level", "IQ2_XS,Q4_K_M", "--imatrix", str(file), "-o", "out",
                                  "--json").stdout)
    assert [(one["level"], one["imatrix"]) for one in files] == [("IQ2_XS", file.name), ("Q4_K_M", file.name)]
    for one in files:
        assert Path(one["path"]).stat().st_size == one["bytes"]
        assert check_gguf(Path(one["path"])).tensors
    assert sorted(path.name for path in (nightpress.base / "out").iterdir()) == sorted(
        Path(one["path"]).name for one in files)
    assert "--force" in nightpress("quantize", STARTER, "--level", "Q4_K_M", "-o", "out", status=74).stderr


def test_a_level_that_needs_no_matrix_is_made_without(nightpress: Any) -> None:
    made, = json.loads(nightpress("quantize", STARTER, "--json").stdout)
    assert made["level"] == "Q4_K_M"
    assert made["imatrix"] is None
    assert made["path"].endswith("-Q4_K_M.gguf")


def test_collecting_goes_on_where_it_was_interrupted(nightpress: Any, poll: Any) -> None:
    arguments = ("imatrix", STARTER, "--domain", "medical", "--json")
    with nightpress.start(*arguments) as process:
        scratch = nightpress.state / "scratch"
        poll(lambda: list(scratch.rglob("sums.gguf")), 60, "the first group of chunks")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    before, = scratch.rglob("sums.gguf")
    assert read_imatrix(before).chunks >= 4
    made = json.loads(nightpress(*arguments).stdout)
    whole = json.loads(nightpress(*arguments[:-1], "--json", "--force").stdout)
    assert made["sha256"] == whole["sha256"]


@pytest.mark.parametrize(("name", "content", "status", "said"), [
    ("short.txt", b"Too little to say anything of a model.", 76, "tokens"),
    ("binary.txt", b"\x00\x01\x02" * 2000, 18, "NUL"),
    ("latin.txt", "caf\u00e9 ".encode("latin-1") * 2000, 18, "not UTF-8"),
    ("utf16.txt", ("word " * 2000).encode("utf-16"), 18, "UTF-16"),
    ("empty.txt", b"", 18, "no calibration text")])
def test_text_that_cannot_calibrate_is_a_sentence(name: str, content: bytes, status: int, said: str,
                                                  nightpress: Any) -> None:
    (nightpress.base / name).write_bytes(content)
    refused = nightpress("imatrix", STARTER, "--calibration", name, status=status)
    assert said in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not list(nightpress.base.glob("*-imatrix.gguf"))


@pytest.mark.parametrize(("arguments", "status", "said"), [
    (("imatrix", "none.gguf"), 20, "none.gguf"),
    (("imatrix", STARTER, "--domain", "a/b"), 19, "a/b"),
    (("imatrix", STARTER, "--domain", "medicine"), 19, "medical"),
    (("imatrix", STARTER, "--merge", STARTER), 8, "imatrix"),
    (("quantize", STARTER, "--level", "Q4_X"), 32, "Q4_X"),
    (("quantize", STARTER, "--imatrix", STARTER), 8, "imatrix"),
    (("run", STARTER, "--domain", "medicine"), 19, "medical"),
    (("add", STARTER, "--domain", "a/b"), 19, "a/b")])
def test_what_cannot_be_done_is_a_sentence(arguments: tuple[str, ...], status: int, said: str, nightpress: Any) -> None:
    refused = nightpress(*arguments, status=status)
    assert said in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def left_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("point", ["quantize.written", "quantize.renamed"])
def test_what_a_killed_command_left_is_gone_after_the_next(point: str, nightpress: Any) -> None:
    out = nightpress.base / "out"
    (out / "incoming").mkdir(parents=True)
    (out / "incoming" / ".mine.tmp").write_text("not ours")
    killed = nightpress("quantize", STARTER, "-o", "out", status=71, NIGHTPRESS_TESTING="1",
                        NIGHTPRESS_FAILPOINT=f"{point}:kill")
    assert "SIGKILL" in killed.stderr
    assert len(left_in(out)) == 2  # of several attempts only the last
    made, = json.loads(nightpress("quantize", STARTER, "-o", "out", "--json").stdout)
    assert sorted(left_in(out)) == sorted([Path(made["path"]), out / "incoming" / ".mine.tmp"])


def test_a_size_that_is_impossible_is_refused_before_anything_is_computed(nightpress: Any) -> None:
    refused = nightpress("quantize", STARTER, "--target-size", "1MB", "--domain", "medical", status=79)
    assert "smallest recipe takes" in refused.stderr
    assert not (nightpress.state / "imatrices").exists()
    assert not list(nightpress.state.rglob("sums.gguf"))


def test_text_that_is_enough_for_a_matrix_but_not_for_a_recipe_is_a_sentence(nightpress: Any) -> None:
    (nightpress.base / "short.txt").write_text(write(Catalogue().load("rag")[:4]), encoding="utf-8")
    made = json.loads(nightpress("imatrix", STARTER, "--calibration", "short.txt", "--json").stdout)
    assert made["chunks"] in (2, 3)
    refused = nightpress("quantize", STARTER, "--target-bpw", "4.2", "--calibration", "short.txt", status=76)
    assert "short.txt" in refused.stderr
    assert "at least 2048" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [
    ("imatrix", STARTER), ("quantize", STARTER, "--level", "IQ2_XS"), ("quantize", STARTER, "--target-bpw", "4.2"),
    ("run", STARTER, "--levels", "Q4_K_M")])
def test_text_that_models_are_judged_by_calibrates_nothing(arguments: tuple[str, ...], nightpress: Any) -> None:
    judged = "\n\n".join(scenario.prompt for scenario in read_scenarios()[:60])
    (nightpress.base / "judged.txt").write_text(judged, encoding="utf-8")
    refused = nightpress(*arguments, "--calibration", "judged.txt", status=18)
    assert "judged.txt overlaps with what the model is judged by" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not list(nightpress.state.rglob("sums.gguf"))
    assert not (nightpress.state / "imatrices").exists()
