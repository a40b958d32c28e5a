"""`nightpress evaluate` through the real command line: answers, figures, files, refusals, and going on after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import provider_server
import pytest
from eq_bench_questions import FIELDS, REFERENCE
from provider_server import Provider as Server
from provider_server import message_of
from tiny_models import TinyModel

FEARS = ("my exam", "the dark", "dogs", "my boss", "the surgery", "flying", "being alone", "the interview")
SHORT = ("--max-tokens", "12")


def row(number: int, said: str, reply: str, domain: str = "support") -> dict[str, Any]:
    return {"id": f"r{number}", "domain": domain, "label": "fear" if number % 2 else "hope",
            "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]}


def written(folder: Path, rows: list[Any], split: str = "test") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture
def dataset(isolated: Path) -> Path:
    return written(isolated / "dataset", [
        row(number, f"I am afraid of {fear}.", "I am sorry. That sounds hard.", "support" if number < 5 else "care")
        for number, fear in enumerate(FEARS)])


@pytest.fixture
def tiny(isolated: Path) -> Path:
    """A model of random weights without a chat template."""
    return TinyModel().write(isolated / "tiny.gguf")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_models_are_measured_compared_and_written_down(nightpress: Any, dataset: Path, tiny: Path) -> None:
    out = nightpress.base / "out"
    done = nightpress("evaluate", "starter", str(tiny), "--dataset", str(dataset), "-o", str(out), "--compare",
                      "--by-domain", *SHORT)
    assert "tiny has no chat template" in done.stderr
    metrics, predictions = read(out, "metrics.json"), read(out, "predictions.json")
    starter, other = metrics["models"]["starter"], metrics["models"]["tiny"]
    assert (starter["rows"], starter["too_long"]) == (8, 0)
    assert (starter["chat_template"], other["chat_template"]) == (True, False)
    assert metrics["dataset"]["rows"] == 8
    for one in (starter, other):
        for found in one["metrics"].values():
            assert found["low"] <= found["value"] <= found["high"]
            assert found["n"] == 8
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "precision", "recall", "f1", "rouge1", "rouge2",
            "rougeL", "bleu", "sentence_bleu"} == set(starter["metrics"])
    assert [found["id"] for found in predictions] == [f"r{number}" for number in range(8)]
    assert predictions[0]["reference"] == "I am sorry. That sounds hard."
    assert set(predictions[0]["answers"]) == {"starter", "tiny"}
    pair, = read(out, "model_comparison.json")["pairs"]
    assert pair["differences"]["loss"]["better"] == "first"
    assert pair["differences"]["loss"]["clear"]
    assert read(out, "model_comparison.json")["ranking"]["perplexity"] == ["starter", "tiny"]
    domains = read(out, "domain_evaluation.json")["starter"]
    assert {name: one["rows"] for name, one in domains["domains"].items()} == {"care": 3, "support": 5}
    assert {name: one["rows"] for name, one in domains["labels"].items()} == {"fear": 4, "hope": 4}
    assert metrics["machine"] is None
    for text in ("rougeL", "tiny less starter, 8 rows", "starter, domains"):
        assert text in done.stdout, done.stdout


@pytest.mark.slow
def test_speed_is_told_with_the_machine(nightpress: Any, dataset: Path, tiny: Path) -> None:
    done = nightpress("evaluate", "starter", str(tiny), "--dataset", str(dataset), "--limit", "2", "--benchmark-speed",
                      "--max-tokens", "4")
    metrics = read(nightpress.base / "evaluation", "metrics.json")
    assert metrics["machine"]["processors"] >= 1
    for model in ("starter", "tiny"):
        speed = metrics["models"][model]["speed"]
        assert (speed["replies"], speed["tokens_each"]) == (6, 32)
        assert 0 < speed["latency_p50_s"] <= speed["latency_p95_s"]
        assert min(speed["prompt_tokens_per_s"], speed["generated_tokens_per_s"]) > 0
    for text in ("generated tokens/s", "latency p95", "Speed on "):
        assert text in done.stdout, done.stdout


def test_a_model_that_says_what_is_wanted_has_every_point(nightpress: Any, dataset: Path) -> None:
    out = nightpress.base / "out"
    nightpress("evaluate", "starter", "--dataset", str(dataset), "-o", str(out), *SHORT)
    own = [row(number, found["prompt"][0]["content"], found["answers"]["starter"]["text"])
           for number, found in enumerate(read(out, "predictions.json"))]
    found = json.loads(nightpress("evaluate", "starter", "--dataset", str(written(nightpress.base / "own", own)), "-o",
                                  str(out), "--json", *SHORT).stdout)
    values = {name: one["value"] for name, one in found["models"]["starter"]["metrics"].items()}
    for name in ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu"):
        assert values[name] == pytest.approx(1), name
    assert values["token_accuracy"] > 0.8
    assert values["perplexity"] < 10  # not 1: they were cut, and the end is missing
    assert found["comparison"] is None
    assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
        "metrics.json", "predictions.json"]


def test_one_model_under_two_names_does_not_differ(nightpress: Any, dataset: Path, starter: Path) -> None:
    (nightpress.base / "same.gguf").symlink_to(starter)
    found = json.loads(nightpress("evaluate", "starter", "same.gguf", "--dataset", str(dataset), "--compare", "--json",
                                  "--limit", "4", *SHORT).stdout)
    pair, = found["comparison"]["pairs"]
    assert not any(one["clear"] or one["value"] for one in pair["differences"].values())
    assert (nightpress.base / "evaluation" / "metrics.json").is_file()


def test_questions_are_asked_without_a_dataset(nightpress: Any) -> None:
    (nightpress.base / "eq.json").write_text(json.dumps(
        {number: {**FIELDS, "reference_answer": REFERENCE} for number in ("1", "2")}))
    (nightpress.base / "choices.jsonl").write_text("\n".join(json.dumps(
        {"question": said, "choices": ["I am so sorry.", "Bananas are yellow."], "answer": 0}) for said in FEARS))
    found = json.loads(nightpress("evaluate", "starter", "--eq-bench", "eq.json", "--multiple-choice", "choices.jsonl",
                                  "--json").stdout)
    one = found["models"]["starter"]
    assert (one["multiple_choice"]["n"], one["eq_bench"]["n"], one["metrics"]) == (8, 2, {})
    low, high = one["multiple_choice"]["acc_interval"]
    assert low < one["multiple_choice"]["acc"] <= high <= 1
    assert not (nightpress.base / "evaluation" / "predictions.json").exists()


def test_texts_have_a_perplexity_only(nightpress: Any) -> None:
    folder = written(nightpress.base / "texts", [{"text": f"It was a {word} day. " * 9} for word in ("long", "good")])
    found = json.loads(nightpress("evaluate", "starter", "--dataset", str(folder), "--json").stdout)
    assert set(found["models"]["starter"]["metrics"]) == {"loss", "perplexity"}


@pytest.mark.slow
def test_a_release_and_a_level_are_models_too(nightpress: Any, dataset: Path) -> None:
    nightpress.run("--levels", "Q8_0", "--accept-inconclusive")
    asked = ("--dataset", str(dataset), "--limit", "2", "--max-tokens", "4", "--json")
    found = json.loads(nightpress("evaluate", "starter@1", *asked).stdout)["models"]
    assert found["starter@1"]["path"].endswith("releases/1/model.gguf")
    found = json.loads(nightpress("evaluate", "1:q8_0", *asked, "-o", "level").stdout)["models"]
    assert found["1:q8_0"]["path"].endswith(".gguf")
    assert "no file of the level Q2_K" in nightpress("evaluate", "1:Q2_K", *asked, status=120).stderr


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(nightpress: Any, isolated: Path, poll: Any) -> None:
    folder = written(isolated / "many", [row(number, f"I am afraid of {number} dogs.", "That sounds hard.")
                                         for number in range(64)])
    call = ("evaluate", "starter", "--dataset", str(folder), "-o", "out", "--max-tokens", "48")
    steps = isolated / "out" / ".steps.jsonl"

    def done() -> list[str]:
        return [json.loads(line)["fingerprint"] for line in steps.read_text().splitlines() if line] \
            if steps.exists() else []

    process = nightpress.start(*call)
    try:
        poll(lambda: len(done()) >= 3, 120, "two parts of the rows")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    kept = done()
    assert not (isolated / "out" / "metrics.json").exists()
    nightpress(*call)
    assert done()[:len(kept)] == kept
    assert len(set(done())) == len(done())  # nothing was done twice
    nightpress(*call[:4], "-o", "fresh", *call[6:])
    for name in ("metrics.json", "predictions.json"):
        assert read(isolated / "out", name) == read(isolated / "fresh", name)


@pytest.mark.parametrize(("arguments", "status", "told"), [
    (("nowhere.gguf", "--dataset", "dataset"), 120, "no model nowhere.gguf"),
    (("../nowhere", "--dataset", "dataset"), 120, "no model"),
    (("starter", "starter", "--dataset", "dataset"), 120, "named twice"),
    (("text.gguf", "--dataset", "dataset"), 22, "not a GGUF"),
    (("dataset", "--dataset", "dataset"), 94, "config.json"),
    (("starter", "--dataset", "nowhere"), 121, "no dataset"),
    (("starter", "--dataset", "dataset", "--split", "train"), 121, "name one with --split"),
    (("starter", "--dataset", "text.gguf"), 121, "not JSON"),
    (("starter", "--dataset", "unanswered"), 121, "no answer to compare with"),
    (("starter", "--dataset", "long"), 122, "No row fits"),
    (("starter", "--dataset", "dataset", "--split", "dev"), 123, "no split"),
    (("starter",), 123, "nothing to ask"),
    (("starter", "--multiple-choice", "q.jsonl", "--by-domain"), 123, "--by-domain needs --dataset"),
    (("starter", "--dataset", "dataset", "--compare"), 123, "two models"),
    (("starter", "--dataset", "dataset", "--judge", "openai"), 123, "--rubric together"),
    (("starter", "--dataset", "dataset", "--judge", "openai", "--rubric", "nowhere.md"), 125, "cannot be read"),
    (("starter", "--dataset", "dataset", "--multiple-choice", "text.gguf"), 55, "not JSON"),
    (("starter", "--dataset", "dataset", "--embedding-model", "text.gguf"), 22, "not a GGUF")])
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(nightpress: Any, dataset: Path, arguments: tuple[str, ...],
                                                           status: int, told: str) -> None:
    base = nightpress.base
    (base / "text.gguf").write_text("a poem about models\n" * 50)
    written(base / "unanswered", [{"messages": [{"role": "user", "content": "Hello?"}]}])
    written(base / "long", [row(1, "dog " * 5000, "Yes.")])
    done = nightpress("evaluate", *arguments, status=status)
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert not (base / "evaluation" / "metrics.json").exists()


@pytest.mark.skipif(find_spec("torch") is not None, reason="nightpress[train] is installed")
def test_a_folder_without_the_extra_says_how_to_install_it(nightpress: Any, dataset: Path) -> None:
    (nightpress.base / "hf").mkdir()
    done = nightpress("evaluate", "hf", "--dataset", str(dataset), status=93)
    assert "pip install 'nightpress[train]'" in done.stderr


def test_an_adapter_is_to_be_merged_first(nightpress: Any, dataset: Path) -> None:
    (nightpress.base / "lora").mkdir()
    (nightpress.base / "lora" / "adapter_config.json").write_text("{}")
    assert "merge it" in nightpress("evaluate", "lora", "--dataset", str(dataset), status=94).stderr


def test_figures_of_an_earlier_evaluation_do_not_stay(nightpress: Any, dataset: Path) -> None:
    call = ("evaluate", "starter", "--dataset", str(dataset), "--limit", "2", "--max-tokens", "4")
    nightpress(*call, "--by-domain")
    assert (nightpress.base / "evaluation" / "domain_evaluation.json").is_file()
    nightpress(*call)
    assert not (nightpress.base / "evaluation" / "domain_evaluation.json").exists()


def test_closeness_in_meaning_needs_no_extra(nightpress: Any, dataset: Path, starter: Path) -> None:
    found = json.loads(nightpress("evaluate", "starter", "--dataset", str(dataset), "--limit", "3", "--max-tokens", "8",
                                  "--embedding-model", str(starter), "--json").stdout)
    assert -1 <= found["models"]["starter"]["metrics"]["semantic_similarity"]["value"] <= 1
    assert found["models"]["starter"]["metrics"]["semantic_similarity"]["n"] == 3


# --- the judge


@pytest.fixture
def server() -> Iterator[Server]:
    with provider_server.serving() as provider:
        provider.write = lambda body: {"grade": 9 if "dogs" in message_of(body) else 4, "reason": "It is kind."}
        yield provider


@pytest.mark.parametrize("name", ["anthropic", "openai"])
def test_a_judge_grades_every_reply_once_by_the_rubric(nightpress: Any, dataset: Path, server: Server,
                                                       name: str) -> None:
    pytest.importorskip(name, reason=f"the extra nightpress[generate] is not installed: {name} is missing")
    (nightpress.base / "rubric.md").write_text("10 for kindness, 0 for none.")
    call = ("evaluate", "starter", "--dataset", str(dataset), "--limit", "4", *SHORT, "--judge", name, "--rubric",
            "rubric.md", "--json")
    environment = {f"{name.upper()}_BASE_URL": server.url, f"{name.upper()}_API_KEY": "sk-test-0123456789abcdef"}
    assert "API_KEY" in nightpress(*call, status=57).stderr
    assert not (nightpress.base / "evaluation" / ".steps.jsonl").exists()  # before any work
    found = json.loads(nightpress(*call, **environment).stdout)["models"]["starter"]["judge"]
    assert found["value"] == pytest.approx((0.9 + 3 * 0.4) / 4)
    assert found["low"] <= found["value"] <= found["high"]
    assert len(server.seen) == 4
    assert "10 for kindness" in json.dumps(server.seen[0])
    assert read(nightpress.base / "evaluation", "predictions.json")[2]["answers"]["starter"]["grade"] == 9
    nightpress(*call, **environment)
    assert len(server.seen) == 4  # kept


# --- gates of a run


@pytest.mark.slow
def test_a_run_can_be_held_to_text_metrics(nightpress: Any, dataset: Path) -> None:
    assert "needs --dataset" in nightpress.run("--gate", "rougeL:0.03", status=59).stderr
    found = json.loads(nightpress.run(
        "--dataset", str(dataset), "--levels", "Q8_0", "--gate", "rougeL:1", "--gate", "answer_perplexity:9",
        "--accept-inconclusive", "--seeds", "0", "--no-promote", "--json").stdout)
    level, = found["levels"]
    assert {"rougeL", "answer_perplexity"} <= {gate["gate"] for gate in level["gates"]}
    assert {"rougeL", "f1", "bleu", "token_accuracy", "answer_perplexity", "loss_rougeL"} <= set(level["measurements"])
    assert found["baseline"]["answer_perplexity"]["value"] > 1


def test_a_simulation_invents_text_metrics_too(nightpress: Any, dataset: Path) -> None:
    told = nightpress.run("--simulate", "--dataset", str(dataset), "--gate", "f1:0.5", "--gate", "bleu:0.05", "--json")
    found = json.loads(told.stdout)
    assert "f1" in found["levels"][0]["measurements"]
    assert "could go unseen in fewer than 48." in told.stderr  # the strictest limit decides, and here are fewer rows
