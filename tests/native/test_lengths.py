"""Token counts by a GGUF's vocabulary."""

from __future__ import annotations

from pathlib import Path

from worker_driver import run_job

from loops.events import Failed, Finished
from loops.starter import STARTER_GGUF


def test_texts_are_counted_and_markers_in_them_are_text() -> None:
    told = run_job({"job": "lengths", "model": str(STARTER_GGUF), "texts": ["Hello", "Hello Hello", "", "</s>"]})
    found = told.of(Finished)[0].result
    one, two, none, marker = found["lengths"]
    assert none == 0 < one < two
    assert marker > 1
    assert {"<s>", "</s>"} <= set(found["special"])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    assert run_job({"job": "lengths", "model": str(tmp_path / "x.gguf"), "texts": []}).of(Failed)
