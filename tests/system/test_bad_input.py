"""Kind to bad input: one sentence, a distinct exit code, nothing lost, no traceback."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from loops.starter import STARTER_GGUF
from state.ledger import Ledger

#: what is given as the model -> exit status, and words of the sentence
MODELS = {
    "missing.gguf": (20, "There is no file"),
    "folder": (94, "has no config.json"),
    "text.gguf": (22, "not a GGUF"),
    "packed.gguf": (22, "gzip"),
    "empty.gguf": (22, "empty"),
    "truncated.gguf": (24, "cut off"),
    "model-00001-of-00003.gguf": (25, "Shard 2 of 3 is missing"),
}


@pytest.fixture
def bad_models(isolated: Path, starter: Path) -> Path:
    """A folder with one bad model of each kind."""
    folder = isolated / "models"
    (folder / "folder").mkdir(parents=True)
    (folder / "text.gguf").write_text("this is a poem about models\n" * 50)
    (folder / "packed.gguf").write_bytes(gzip.compress(starter.read_bytes()[:4096]))
    (folder / "empty.gguf").touch()
    (folder / "truncated.gguf").write_bytes(starter.read_bytes()[:-100_000])
    (folder / "model-00001-of-00003.gguf").write_bytes(starter.read_bytes())
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused_with_the_reason(nightpress: Any, bad_models: Path, name: str) -> None:
    status, words = MODELS[name]
    done = nightpress("run", str(bad_models / name), status=status)
    assert words.lower() in done.stderr.lower()
    assert done.stderr.strip().count("\n") <= 1
    assert not (nightpress.deploy / name).exists()


def test_a_quantized_model_is_refused_unless_allowed(nightpress: Any) -> None:
    nightpress.run("--once", "Q8_0")
    (blob,) = (nightpress.state / "blobs").glob("*.gguf")
    quantized = nightpress.base / "again.gguf"
    os.link(blob, quantized)
    done = nightpress("run", str(quantized), *nightpress.QUICK, status=36)
    assert "already quantized" in done.stderr
    nightpress("run", str(quantized), *nightpress.QUICK, "--levels", "Q4_0", "--allow-requantize",
               "--accept-inconclusive", "--no-promote")


def test_an_unknown_level_offers_the_nearest(nightpress: Any) -> None:
    assert "Q4_K_M" in nightpress("run", "--levels", "Q4_KM", status=32).stderr


def test_a_model_is_no_importance_matrix(nightpress: Any) -> None:
    assert "importance matrix" in nightpress("run", "--imatrix", str(STARTER_GGUF), status=8).stderr


def test_a_target_that_no_level_meets_names_the_smallest(nightpress: Any) -> None:
    assert "Q4_K_M, takes 4.5 MB" in nightpress.run("--target-size", "1MB", status=66).stderr


@pytest.mark.parametrize(("option", "value", "status"), [
    ("--target-size", "big", 65), ("--target-size", "0", 65), ("--target-size", "-4GB", 65), ("--strategy", "jump", 2),
    ("--prefer", "pretty", 2), ("--max-degradation", "7", 2), ("--name", "../escape", 44), ("--name", "a\nb", 44),
    ("--name", "x" * 300, 44), ("--scenarios", "missing.jsonl", 28), ("--text", "missing.txt", 29),
    ("--quant-tool", "missing-tool", 38)])
def test_a_bad_option_is_refused(nightpress: Any, option: str, value: str, status: int) -> None:
    nightpress("run", option, value, status=status)


def test_a_bad_line_of_scenarios_is_named_by_number(nightpress: Any) -> None:
    file = nightpress.base / "mine.jsonl"
    file.write_text('{"id": "a"}\n')
    assert "mine.jsonl, line 1" in nightpress("run", "--scenarios", str(file), status=28).stderr


def test_a_text_too_short_to_measure_anything_is_refused(nightpress: Any) -> None:
    file = nightpress.base / "short.txt"
    file.write_text("Too short.")
    assert "1024 are needed" in nightpress("run", "--text", str(file), status=27).stderr


def test_an_output_folder_that_is_a_file_is_refused_before_any_work(nightpress: Any) -> None:
    (nightpress.base / "taken").touch()
    nightpress.run("--output-dir", str(nightpress.base / "taken"), status=51)
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder_is_refused_before_any_work(nightpress: Any) -> None:
    folder = nightpress.base / "locked"
    folder.mkdir(mode=0o500)
    nightpress.run("--output-dir", str(folder / "inside"), status=51)


def test_a_second_run_on_the_same_state_names_the_first(nightpress: Any) -> None:
    with Ledger.open(nightpress.state, "nightpress run big.gguf"):
        done = nightpress.run(status=75)
    assert str(os.getpid()) in done.stderr
    assert "big.gguf" in done.stderr


def test_an_unknown_setting_offers_the_nearest(nightpress: Any) -> None:
    (nightpress.base / "config" / "nightpress.toml").write_text("tread = 3\n")
    done = nightpress("results", status=78)
    assert "threads" in done.stderr


@pytest.mark.parametrize("content", ["threads = [", "keep_backups = 'many'\n", "keep_releases = 0\n"])
def test_wrong_settings_are_named(nightpress: Any, content: str) -> None:
    (nightpress.base / "config" / "nightpress.toml").write_text(content)
    assert "nightpress.toml" in nightpress("results", status=78).stderr


@pytest.mark.parametrize("command", [["results"], ["export"], ["quarantine"], ["promote"]])
def test_with_nothing_recorded_commands_say_how_to_start(nightpress: Any, command: list[str]) -> None:
    assert "nightpress run" in nightpress(*command, status=40).stderr


def test_unknown_runs_and_models_are_named(nightpress: Any) -> None:
    nightpress.run("--simulate")
    assert "no run 9" in nightpress("results", "9", status=52).stderr
    assert "Nothing is deployed" in nightpress("rollback", "starter", status=46).stderr
    nightpress("rollback", status=2)
    nightpress("rollback", "../x", status=44)
    assert "Nothing is deployed" in nightpress("releases").stdout
    assert "not in quarantine" in nightpress("quarantine", "--release", "abc").stdout
