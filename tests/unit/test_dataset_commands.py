"""`nightpress dataset`: what its commands print and write, and what they refuse."""

from __future__ import annotations

import hashlib
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

from daemon.cli import dataset
from loops.finetune import faults, prepare
from loops.finetune.sample import TASKS, generate
from loops.starter import STARTER_GGUF
from state.faults import NightpressError
from state.files import StateUnwritable

PROGRAM = """
import typer
from daemon.cli import dataset, guarded
app = typer.Typer(pretty_exceptions_enable=False)
dataset.register(app)
guarded(app)
"""
FILES = ("train.json", "validation.json", "test.json")


def run(*arguments: object) -> Result:
    app = typer.Typer()
    dataset.register(app)
    return CliRunner().invoke(app, ["dataset", *map(str, arguments)])


def text_of(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refusal(*arguments: object) -> NightpressError:
    problem = run(*arguments).exception
    assert isinstance(problem, NightpressError), problem
    assert "\n" not in str(problem)
    return problem


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "dataset", *map(str, arguments)], capture_output=True,
                          text=True, check=False, timeout=120, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr
    return done


def prepared(folder: Path, *more: object, domain: str = "legal") -> dict[str, Any]:
    """Prepare synthetic rows; return the manifest."""
    text_of("prepare", "--domain", domain, "--sample", "--num-samples", 60, "-o", folder, *more)
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("domain", TASKS)
def test_synthetic_rows_become_splits_that_pass_validation(tmp_path: Path, domain: str) -> None:
    manifest = prepared(tmp_path / "out", domain=domain)
    assert {name: len(rows) for name, rows in read(tmp_path / "out").items()} == {
        "train.json": 48, "validation.json": 6, "test.json": 6}
    row = read(tmp_path / "out")["train.json"][0]
    assert row["domain"] == domain
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert manifest["licence"] == "CC0-1.0"
    assert json.loads(text_of("validate", tmp_path / "out", "--strict", "--json"))["findings"] == []


def test_the_manifest_tells_hashes_sources_steps_and_licence(tmp_path: Path) -> None:
    source = tmp_path / "faq.csv"
    rows = [f"What is the number {n} times {n}?,It is {n * n} &amp; no less." for n in range(30)]
    source.write_text("\n".join(["asked,said", *rows, rows[0]]), encoding="utf-8")
    told = text_of("prepare", "--domain", "sums", "--input-file", source, "-o", tmp_path / "out", "--licence", "MIT",
                   "--map", "question=asked", "--map", "answer=said", "--steps", "html_entities,duplicates",
                   "--shares", "0.5,0.25,0.25")
    assert "html_entities       changed 31" in told
    assert "duplicates          removed 1" in told
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    origin, = manifest["sources"]
    assert origin["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (origin["name"], origin["rows"], origin["format"]) == ("faq.csv", 31, "qa")
    assert origin["columns"] == {"question": "asked", "answer": "said"}
    assert [(step["step"], step["before"], step["after"]) for step in manifest["steps"]] == [
        ("html_entities", 31, 31), ("duplicates", 31, 30)]
    assert manifest["licence"] == "MIT"
    for name, one in manifest["splits"].items():
        content = (tmp_path / "out" / f"{name}.json").read_bytes()
        assert (one["sha256"], one["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert one["rows"] == len(json.loads(content))
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([row.as_json("x") for row in generate("legal", 90)]), encoding="utf-8")

    def make(name: str, seed: int) -> dict[str, bytes]:
        text_of("prepare", "--domain", "x", "--input-file", source, "-o", tmp_path / name, "--num-samples", 50,
                "--seed", seed)
        return contents(tmp_path / name)

    first = make("one", 1)
    assert first == make("two", 1)
    assert first["train.json"] != make("three", 2)["train.json"]
    assert sum(len(json.loads(first[name])) for name in FILES) == 50


def test_several_sources_are_one_dataset_with_ids_of_their_own(tmp_path: Path) -> None:
    for folder, topic in (("a", "rivers"), ("b", "roads")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.txt").write_text("\n\n".join(
            f"{topic} {number} {number * 7} {number + 100}" for number in range(10)), encoding="utf-8")
    text_of("prepare", "--domain", "x", "--input-file", tmp_path / "a" / "rows.txt", "--input-file", tmp_path / "b",
            "-o", tmp_path / "out")
    rows = [row for found in read(tmp_path / "out").values() for row in found]
    assert len({row["id"] for row in rows}) == len(rows) == 20


def test_the_steps_come_from_the_settings_unless_told(tmp_path: Path, isolated: Path) -> None:
    (isolated / "config" / "nightpress.toml").write_text('dataset_steps = ["urls", "duplicates"]\n', encoding="utf-8")

    def steps(*more: object) -> list[str]:
        return [step["step"] for step in prepared(tmp_path / "out", "--force", *more)["steps"]]

    assert steps() == ["urls", "duplicates"]
    assert steps("--steps", "emails") == ["emails"]
    assert steps("--steps", "none") == []


def test_a_dataset_that_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    prepared(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert "--force" in str(refusal("prepare", "--domain", "finance", "--sample", "-o", tmp_path / "out"))
    assert contents(tmp_path / "out") == before
    assert prepared(tmp_path / "out", "--force", domain="finance")["domain"] == "finance"


@pytest.mark.parametrize(("arguments", "kind", "told"), [
    (["--domain", "a b", "--sample"], faults.DatasetRefused, "no name of a domain"),
    (["--domain", "../x", "--sample"], faults.DatasetRefused, "no name of a domain"),
    (["--domain", "poems", "--sample", "--num-samples", "20001"], faults.DatasetRefused, "at most 20,000 rows"),
    (["--domain", "x"], faults.DatasetRefused, "Name one source"),
    (["--domain", "x", "--sample", "--input-file", "y"], faults.DatasetRefused, "Name one source"),
    (["--domain", "legal", "--sample", "--revision", "y"], faults.DatasetRefused, "are of --dataset-name"),
    (["--domain", "legal", "--sample", "--steps", "wash"], faults.DatasetRefused, "'wash' is no cleaning step"),
    (["--domain", "legal", "--sample", "--shares", "1,1,1"], faults.DatasetRefused, "--shares"),
    (["--domain", "legal", "--sample", "--map", "x"], faults.DatasetRefused, "--map"),
    (["--domain", "legal", "--sample", "--min-tokens", "9", "--max-tokens", "8"], faults.DatasetRefused,
     "--min-tokens 9"),
    (["--domain", "legal", "--sample", "--num-samples", "2"], faults.TooFewRows, "are 2 rows"),
    (["--domain", "legal", "--sample", "--min-tokens", "900"], faults.TooFewRows, "removed: length 500"),
    (["--domain", "x", "--input-file", "none.csv"], faults.DatasetUnreadable, "There is no file none.csv"),
])
def test_wrong_orders_are_one_sentence_and_write_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kind: type[NightpressError], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    problem = refusal("prepare", *arguments, "-o", "out")
    assert type(problem) is kind
    assert told in str(problem)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/below", "/proc/none"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    problem = refusal("prepare", "--domain", "legal", "--sample", "-o", tmp_path / place)
    assert type(problem) is StateUnwritable


@pytest.mark.parametrize(("content", "code"), [
    (b"{", 85), (b"\xff\xfea", 86), (b"a,b\n1,2\n3,4\n5,6\n", 88), (b"question,answer\n", 89),
    (b"question,answer\nWhy is it so?,It is because it is.\n", 89),
    ("question,answer\né,a\n".encode() + b"\xe9,a\n", 86)])
def test_bad_files_end_with_their_own_codes_and_keep_what_was_prepared_before(
        tmp_path: Path, content: bytes, code: int) -> None:
    prepared(tmp_path / "out")
    before = contents(tmp_path / "out")
    bad = tmp_path / ("bad.json" if content == b"{" else "bad.csv")
    bad.write_bytes(content)
    done = program("prepare", "--domain", "x", "--input-file", bad, "-o", tmp_path / "out", "--force")
    assert done.returncode == code
    assert done.stderr.startswith("nightpress: ")
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path / "out") == before


def test_every_error_of_datasets_has_a_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in vars(faults).values()
             if isinstance(kind, type) and issubclass(kind, NightpressError) and kind is not NightpressError]
    assert sorted(codes) == [85, 86, 87, 88, 89, 91, 92]


@pytest.mark.parametrize(("fault", "code"), [("kill", -9), ("raise:ENOSPC", 50)])
def test_a_stop_between_two_files_leaves_whole_files_and_no_manifest_and_the_same_command_goes_on(
        tmp_path: Path, fault: str, code: int) -> None:
    prepared(tmp_path / "out", domain="finance")
    order = ("prepare", "--domain", "legal", "--sample", "--num-samples", 60, "-o", tmp_path / "out", "--force")
    done = program(*order, NIGHTPRESS_TESTING="1", NIGHTPRESS_FAILPOINT=f"dataset.split_written@2:{fault}")
    assert done.returncode == code
    assert sorted(contents(tmp_path / "out")) == sorted(FILES)
    assert {found[0]["domain"] for found in read(tmp_path / "out").values()} == {"legal", "finance"}
    assert program(*order).returncode == 0
    text_of("validate", tmp_path / "out")


def test_a_file_that_was_changed_or_is_gone_is_found(tmp_path: Path) -> None:
    prepared(tmp_path / "out")
    rows = read(tmp_path / "out")["test.json"]
    (tmp_path / "out" / "test.json").write_text(json.dumps(rows[:-1]), encoding="utf-8")
    assert "files" in str(refusal("validate", tmp_path / "out"))
    (tmp_path / "out" / "test.json").unlink()
    done = run("validate", tmp_path / "out", "--json")
    assert "test.json is missing." in [one["message"] for one in json.loads(done.output)["findings"]]
    (tmp_path / "out" / "manifest.json").write_text('{"version": 99}', encoding="utf-8")
    assert "version 99" in str(refusal("validate", tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").write_text("[", encoding="utf-8")
    assert "is no manifest" in str(refusal("validate", tmp_path / "out"))


def test_faults_end_with_a_code_and_warnings_only_when_strict(tmp_path: Path) -> None:
    rows = [row.as_json("x") for row in generate("legal", 12)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0] | {"id": "again"}]), encoding="utf-8")
    assert "warning no duplicates" in text_of("validate", tmp_path / "rows.json")
    assert isinstance(refusal("validate", tmp_path / "rows.json", "--strict"), faults.DatasetFaulty)
    empty = {"id": "x", "domain": "x", "messages": []}
    (tmp_path / "rows.json").write_text(json.dumps([*rows, empty]), encoding="utf-8")
    report = tmp_path / "report.json"
    problem = refusal("validate", tmp_path / "rows.json", "-o", report)
    assert problem.exit_code == 92
    assert json.loads(report.read_text(encoding="utf-8"))["usable"] is False


def test_lengths_are_those_of_the_dataset_unless_told(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\n\n".join(f"{n} " * (n + 1) for n in range(40)), encoding="utf-8")
    text_of("prepare", "--domain", "x", "--input-file", tmp_path / "rows.txt", "-o", tmp_path / "out",
            "--min-tokens", 1, "--max-tokens", 5000, "--near", 1.0)
    text_of("validate", tmp_path / "out", "--strict")
    assert "shorter than 3 words" in text_of("validate", tmp_path / "out", "--min-tokens", 3)


def test_tokens_are_those_of_a_gguf(tmp_path: Path, isolated: Path) -> None:
    manifest = prepared(tmp_path / "out", "--tokenizer", STARTER_GGUF)
    assert (manifest["tokenizer"], manifest["unit"]) == (STARTER_GGUF.name, "tokens")
    words = prepared(tmp_path / "words")
    note = next(step["note"] for step in manifest["steps"] if step["step"] == "statistics")
    assert " tokens; " in note
    assert note.partition(";")[0] != words["steps"][-1]["note"].partition(";")[0].replace("words", "tokens")
    (tmp_path / "x.gguf").write_bytes(b"no model")
    problem = refusal("prepare", "--domain", "legal", "--sample", "--tokenizer", tmp_path / "x.gguf", "-o",
                      tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert "x.gguf" in str(problem)


def test_text_is_sent_to_the_worker_in_parts_and_counted_in_order(
        monkeypatch: pytest.MonkeyPatch, isolated: Path) -> None:
    whole = dataset._tokenizer(STARTER_GGUF, isolated / "state")
    texts = ["one", "one two three", "", "one two"] * 3
    expected = whole.count(texts)
    assert expected[:4] == expected[4:8]
    assert expected[0] < expected[3] < expected[1]
    monkeypatch.setattr(dataset, "JOB_CHARACTERS", 30)
    assert whole.count(texts) == expected
    assert "</s>" in whole.special


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert "does not load" in str(refusal("validate", tmp_path, "--tokenizer", tmp_path))


def test_recommended_datasets_are_listed_with_the_command_that_prepares_them() -> None:
    told = text_of("recommend", "legal")
    assert "CC-BY-4.0" in told
    assert "nightpress dataset prepare --domain legal --dataset-name coastalcph/lex_glue" in told
    assert "healthcare" not in told
    assert {one["domain"] for one in json.loads(text_of("recommend", "--json"))["datasets"]} == set(TASKS)
    assert "healthcare, legal, finance" in str(refusal("recommend", "poems"))


def test_the_defaults_of_the_commands_are_those_of_the_library() -> None:
    import inspect

    from loops.finetune import cleaning, near, splits

    for command in (dataset.prepare, dataset.validate):
        assert inspect.signature(command).parameters["near"].default == near.NEAR
    default = {name: one.default for name, one in inspect.signature(dataset.prepare).parameters.items()}
    assert (default["min_tokens"], default["max_tokens"]) == (cleaning.MIN_TOKENS, cleaning.MAX_TOKENS)
    assert splits.parse_shares(default["shares"]) == splits.SHARES
    assert prepare.VERSION == 1
