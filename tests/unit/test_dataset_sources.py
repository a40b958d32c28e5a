"""Where rows come from: what is read of each kind of file, and what is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_hub import COMMIT, serving

from loops.finetune.extra import TrainExtraMissing
from loops.finetune.faults import ColumnsWrong, DatasetUnreadable, EncodingWrong, ParquetBroken
from loops.finetune.sources import read_hub, read_path, split_of
from state.faults import NightpressError

ROWS = [{"question": "What is rain?", "answer": "Water, «falling»."},
        {"question": "And snow?", "answer": "Ice\u2028flakes."}]


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    source, = read_path(path)
    return [dict(row) for row in source.rows]


def refusal(kind: type[NightpressError], path: Path) -> str:
    with pytest.raises(kind) as told:
        read_path(path)
    assert type(told.value) is kind
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", json.dumps(ROWS)), ("a.json", "\ufeff" + json.dumps({"data": ROWS})),
    ("a.json", json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])),
    ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"),
    ("a.csv", 'question,answer\nWhat is rain?,"Water, «falling»."\nAnd snow?,Ice\u2028flakes.\n'),
    ("a.csv", 'question;answer\r\nWhat is rain?;Water, «falling».\r\nAnd snow?;Ice\u2028flakes.\r\n'),
    ("a.tsv", "question\tanswer\nWhat is rain?\tWater, «falling».\nAnd snow?\tIce\u2028flakes.\n"),
])
def test_the_same_rows_are_read_of_every_kind_of_text_file(tmp_path: Path, name: str, content: str) -> None:
    assert rows_of(put(tmp_path, name, content)) == ROWS


def test_rows_by_id_keep_their_ids_and_paragraphs_are_rows(tmp_path: Path) -> None:
    assert rows_of(put(tmp_path, "a.json", '{"17": {"QUESTION": "Why?"}, "18": {"QUESTION": "How?"}}')) == [
        {"id": "17", "QUESTION": "Why?"}, {"id": "18", "QUESTION": "How?"}]
    assert rows_of(put(tmp_path, "a.txt", "One\nline.\n\n \nTwo.\n")) == [{"text": "One\nline."}, {"text": "Two."}]
    assert rows_of(put(tmp_path, "b.jsonl", '{"text": "a", "n": NaN}')) == [{"text": "a", "n": None}]


@pytest.mark.parametrize(("name", "content", "kind", "told"), [
    ("a.json", '[{"a": 1}, ', DatasetUnreadable, "a.json is not JSON: line 1"),
    ("a.json", "[[1, 2]]", DatasetUnreadable, "a.json, row 1 is not an object with named columns"),
    ("a.json", "7", DatasetUnreadable, "a.json holds no list of rows"),
    ("a.json", "[" * 100_000, DatasetUnreadable, "a.json is not JSON that can be read"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', DatasetUnreadable, "a.jsonl, line 2 is not JSON"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", DatasetUnreadable, "a.csv, line 3 has 3 fields, and the header 2"),
    ("a.csv", 'a,b\n1,"2\n3,4\n', DatasetUnreadable, "a.csv, line 3 is not CSV"),
    ("a.csv", "a,a\n1,2\n", ColumnsWrong, "a.csv has two columns 'a'"),
    ("a.csv", b"a,b\n1,\x00\n", DatasetUnreadable, "holds NUL characters"),
    ("a.csv", b"a,b\ncaf\xe9,1\n", EncodingWrong, "a.csv is not UTF-8: line 2 has the byte 0xE9"),
    ("a.csv", "a,b\ncafé,1\n".encode() + b"caf\xe9,1\n", EncodingWrong,
     "a.csv mixes UTF-8 with another encoding: line 3"),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), EncodingWrong, "a.json is UTF-16"),
    ("a.xml", "<a/>", DatasetUnreadable, "a.xml is of no known kind"),
])
def test_a_broken_file_is_one_sentence_that_names_the_place(
        tmp_path: Path, name: str, content: str | bytes, kind: type[NightpressError], told: str) -> None:
    assert told in refusal(kind, put(tmp_path, name, content))


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "There is no file" in refusal(DatasetUnreadable, tmp_path / "none.json")
    assert "holds no JSON" in refusal(DatasetUnreadable, tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    assert "is not a file" in refusal(DatasetUnreadable, tmp_path / "pipe.json")


def test_a_folder_is_its_files_with_the_splits_that_their_names_say(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path, "dataset_infos.json", "{}")
    put(tmp_path, "README.md", "not data")
    put(tmp_path / "data", "train-00000-of-00001.jsonl", '{"text": "a"}')
    put(tmp_path / "data", "my_dev.jsonl", '{"text": "b"}')
    put(tmp_path, "rest.jsonl", '{"text": "c"}')
    assert {source.split: source.rows[0]["text"] for source in read_path(tmp_path)} == {
        "": "c", "train": "a", "validation": "b"}
    assert [split_of(name) for name in ("training", "contest", "x.test", "trainer", "val")] == [
        "train", "", "test", "", "validation"]


def test_parquet_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert rows_of(path) == ROWS
    content = path.read_bytes()
    for broken in (content[:-20], content[:50] + bytes(40) + content[90:], b"", b"text,and,more"):
        path.write_bytes(broken)
        assert "a.parquet is no whole Parquet file" in refusal(ParquetBroken, path)


def test_a_saved_dataset_is_read_with_its_splits_and_the_names_of_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["sad", "glad"])})
    part = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    datasets.DatasetDict({"train": part, "dev": part}).save_to_disk(str(tmp_path / "saved"))
    found = read_path(tmp_path / "saved")
    assert [source.split for source in found] == ["train", "validation"]
    assert list(found[0].rows) == [{"text": "a", "label": "glad"}, {"text": "b", "label": -1}]
    next((tmp_path / "saved" / "train").glob("*.arrow")).write_bytes(b"broken")
    assert "cannot be read" in refusal(DatasetUnreadable, tmp_path / "saved")


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("state.json", "datasets")])
def test_without_the_extra_the_way_to_install_it_is_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    path = put(tmp_path, name, "x")
    said = refusal(TrainExtraMissing, path if library == "pyarrow" else tmp_path)
    assert library in said
    assert "pip install 'nightpress[train]'" in said


def test_a_name_that_is_none_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DatasetUnreadable, match="is no name of a dataset"):
        read_hub("../etc/passwd")


def test_a_dataset_of_the_hub_is_read_at_the_commit_that_was_looked_up(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the library reads the address of the hub when it is imported."""
    pytest.importorskip("datasets")
    code = ("import sys, json; from loops.finetune.sources import read_hub\n"
            "from state.faults import NightpressError\n"
            "try: print(json.dumps([[s.split, len(s.rows), s.revision, s.licence] for s in read_hub(*sys.argv[1:])]))\n"
            "except NightpressError as problem: print(json.dumps([problem.exit_code, str(problem)]))")

    def ask(address: str, *arguments: str) -> Any:
        patient = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}  # the machine may be busy
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                              timeout=120, env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"),
                                                **patient})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    lines = "\n".join(map(json.dumps, ROWS)).encode()
    files = {"README.md": b"", "train.jsonl": lines, "test.jsonl": lines}
    with serving("someone/tiny", files, {"license": "mit"}) as hub:
        assert ask(hub, "someone/tiny") == [["train", 2, COMMIT, "mit"], ["test", 2, COMMIT, "mit"]]
        code_of, said = ask(hub, "someone/none")
        assert code_of == DatasetUnreadable.exit_code
        assert "there is none of that name" in said
    code_of, said = ask(hub, "someone/tiny")
    assert code_of == DatasetUnreadable.exit_code
    assert "Check its name and the connection" in said
