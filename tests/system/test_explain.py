"""Gates, weights and instruments of a real run, and `explain`, which says why a level passed or did not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eq_bench_questions import FIELDS, REFERENCE

from loops.evaluation.names import METRICS

CHOICES = ({"question": "What floats?", "choices": ["a stone", "a cork", "a nail"], "answer": 1},
           {"question": "Who barks?", "choices": ["a dog", "a fish"], "answer": "A"})


def instruments(base: Any) -> tuple[str, ...]:
    """Write questions of one's own; return the options that name them."""
    eq_bench, choices = base / "eq.json", base / "choices.jsonl"
    eq_bench.write_text(json.dumps({number: {**FIELDS, "reference_answer": REFERENCE} for number in ("1", "2")}))
    choices.write_text("\n".join(map(json.dumps, CHOICES)))
    return ("--eq-bench", str(eq_bench), "--multiple-choice", str(choices))


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, new_nightpress: Any) -> Any:
    """A command line on which one quick run with all instruments has finished; run 1 is that run."""
    one = new_nightpress(tmp_path_factory.mktemp("pressed"))
    one.run("--seeds", "2", *instruments(one.base))
    return one


def results(nightpress: Any, run: int | str = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nightpress("results", str(run), "--json").stdout)
    return found


def latest(nightpress: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nightpress("results", "--json").stdout)
    return found


def explained(nightpress: Any, run: int | str, level: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(nightpress("explain", str(run), level, "--json").stdout)
    return found


def values(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: row["value"] for name, row in rows.items()}


# explain

def test_explain_says_in_sentences_what_each_gate_found(pressed: Any) -> None:
    told = " ".join(pressed("explain", "1", "q4_k_m").stdout.split())
    assert told.startswith("Q4_K_M passed.")
    assert "Gate overall: held; overall lost" in told
    assert "Gate forced_choice: held; forced choice lost" in told
    assert "KL divergence from the original is" in told
    assert "six emotional metrics" in told


def test_explain_compares_a_loss_with_the_noise_between_seeds(pressed: Any) -> None:
    assert "sampled with other seeds" in explained(pressed, 1, "Q4_K_M")["sentences"][-1]


def test_explain_without_a_number_means_the_last_run(pressed: Any) -> None:
    number = latest(pressed)["run"]["id"]
    assert explained(pressed, 0, "Q8_0") == explained(pressed, number, "Q8_0")


def test_explain_as_json_holds_what_the_sentences_say(pressed: Any) -> None:
    found = explained(pressed, 1, "Q4_K_M")
    assert (found["run"], found["level"], found["state"]) == (1, "Q4_K_M", "passed")
    assert [gate["gate"] for gate in found["gates"]] == ["overall", "forced_choice"]
    assert set(METRICS) <= set(found["metrics"])
    assert len(found["sentences"]) >= 5


def test_at_most_three_replies_that_lost_are_shown_the_worst_first(pressed: Any) -> None:
    lost = [one["lost"] for one in explained(pressed, 1, "Q4_K_M")["lost_most"]]
    assert len(lost) <= 3
    assert lost == sorted(lost, reverse=True)
    assert all(amount > 0 for amount in lost)


def test_a_lost_reply_stands_beside_the_originals(pressed: Any) -> None:
    replies = {row["scenario_id"]: row for row in json.loads(
        pressed("results", "1", "--replies", "Q4_K_M", "--json").stdout)}
    for lost in explained(pressed, 1, "Q4_K_M")["lost_most"]:
        row = replies[lost["scenario"]]
        assert (lost["prompt"], lost["level"]["text"], lost["original"]["text"]) == (
            row["prompt"], row["text"], row["original"])
        assert lost["lost"] == pytest.approx(
            lost["original"]["scores"]["overall"] - lost["level"]["scores"]["overall"])


def test_an_unknown_level_is_refused_with_those_there_are(pressed: Any) -> None:
    assert "no level Q9_9; it has Q8_0, Q4_K_M" in pressed("explain", "1", "Q9_9", status=62).stderr


def test_an_unknown_run_is_named(pressed: Any) -> None:
    assert "no run 99" in pressed("explain", "99", "Q8_0", status=52).stderr


def test_with_nothing_recorded_explain_says_how_to_start(nightpress: Any) -> None:
    assert "nightpress run" in nightpress("explain", "0", "Q8_0", status=40).stderr


def test_a_simulated_run_can_be_explained(nightpress: Any) -> None:
    nightpress.run("--simulate")
    assert explained(nightpress, 0, "Q8_0")["sentences"]


# gates

@pytest.fixture(scope="module")
def gated(pressed: Any) -> dict[str, Any]:
    """A run on which Q8_0 holds a gate on divergence and Q4_K_M does not."""
    pressed.run("--seeds", "2", "--gate", "kl_divergence:0.0005", "--accept-inconclusive")
    return latest(pressed)


def test_a_gate_on_divergence_fails_the_level_that_diverges_more(gated: dict[str, Any]) -> None:
    assert [(row["level"], row["state"]) for row in gated["levels"]] == [("Q8_0", "passed"), ("Q4_K_M", "failed")]
    assert gated["run"]["chosen_level"] == "Q8_0"


def test_a_gate_that_nothing_can_hold_fails_every_level_and_explain_names_it(pressed: Any) -> None:
    pressed.run("--gate", "kl_divergence:0.000001", status=3)
    found = explained(pressed, 0, "Q4_K_M")
    assert found["state"] == "failed"
    assert "kl divergence is" in found["reason"].lower()
    assert [sentence for sentence in found["sentences"] if "not held" in sentence] == [
        sentence for sentence in found["sentences"] if sentence.startswith("Gate kl_divergence: not held")]
    (ruling,) = [gate for gate in found["gates"] if gate["verdict"] == "failed"]
    assert ruling["gate"] == "kl_divergence"
    assert ruling["loss"]["low"] > ruling["limit"] == 1e-6


def test_an_abbreviation_keeps_its_capitals(pressed: Any, gated: dict[str, Any]) -> None:
    assert "KL divergence is" in gated["levels"][1]["reason"]


def test_a_level_heard_less_is_compared_on_the_scenarios_it_answered(pressed: Any, gated: dict[str, Any]) -> None:
    number, level = gated["run"]["id"], gated["levels"][1]
    assert level["measurements"]["empathy"]["n"] < gated["baseline"]["empathy"]["n"]  # it failed at the first look
    mine = [row["scenario_id"] for row in json.loads(
        pressed("results", str(number), "--replies", "Q4_K_M", "--json").stdout)]
    originals = {row["scenario_id"]: row["scores"] for row in json.loads(
        pressed("export").stdout)["response"] if row["run_id"] == number and row["level"] == ""}
    scores = [originals[name] for name in mine]
    scores = [json.loads(one) if isinstance(one, str) else one for one in scores]
    found = explained(pressed, number, "Q4_K_M")["metrics"]["empathy"]["original"]
    assert found == pytest.approx(sum(one["empathy"] for one in scores) / len(scores))


def test_the_worst_slice_can_be_a_gate_and_is_named(pressed: Any) -> None:
    pressed.run("--gate", "worst-slice:0.9", "--gate", "overall:0.9", "--accept-inconclusive", "--seeds", "2")
    found = explained(pressed, 0, "Q8_0")
    (ruling,) = [gate for gate in found["gates"] if gate["gate"] == "worst-slice"]
    assert ruling["slice"]
    assert any(sentence.startswith("Gate worst-slice: ") and f"({ruling['slice']})" in sentence
               for sentence in found["sentences"])
    assert "loss_worst_slice" in latest(pressed)["levels"][0]["measurements"]


def test_a_gate_can_be_dropped(pressed: Any) -> None:
    pressed.run("--gate", "forced_choice:off", "--seeds", "2")
    assert [gate["gate"] for gate in explained(pressed, 0, "Q8_0")["gates"]] == ["overall"]


@pytest.mark.parametrize(("gate", "words"), [
    ("empathyy:0.1", "Did you mean empathy?"), ("empathy:much", "no limit"), ("empathy:-1", "at least 0"),
    ("empathy:nan", "at least 0"), ("kl_divergence", "needs a limit"), ("eq_bench:0.1", "--eq-bench"),
    ("multiple_choice", "--multiple-choice"), ("judge", "--judge"), ("", "no metric")])
def test_a_bad_gate_is_refused_before_any_work(nightpress: Any, gate: str, words: str) -> None:
    assert words in nightpress.run("--gate", gate, status=59).stderr
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


def test_without_any_gate_but_a_judge_nothing_is_pressed(nightpress: Any) -> None:
    off = ("--gate", "overall:off", "--gate", "forced_choice:off")
    nightpress.run(*off, status=59)
    nightpress.run(*off, "--gate", "judge:0.1", status=59)


# weights

def test_weights_decide_the_score(pressed: Any) -> None:
    only = [f"--weight={name}=0" for name in METRICS if name != "empathy"]
    pressed.run("--seeds", "2", "--accept-inconclusive", "--max-degradation", "0.9", *only)
    for rows in (latest(pressed)["baseline"], latest(pressed)["levels"][0]["measurements"]):
        assert rows["score"]["value"] == pytest.approx(rows["empathy"]["value"])


@pytest.mark.parametrize("weight", ["empathy", "empathy=much", "warmth=1", "empathy=-1", "empathy=nan"])
def test_a_bad_weight_is_refused_before_any_work(nightpress: Any, weight: str) -> None:
    nightpress.run("--weight", weight, status=60)
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


def test_weights_that_leave_nothing_are_refused(nightpress: Any) -> None:
    nightpress.run(*[f"--weight={name}=0" for name in METRICS], status=60)


# instruments

@pytest.mark.parametrize("metric", ["eq_bench", "eq_bench_parsed", "multiple_choice_acc", "multiple_choice_acc_norm"])
def test_questions_of_ones_own_are_asked_and_recorded(pressed: Any, metric: str) -> None:
    summary = results(pressed)
    for rows in (summary["baseline"], *(level["measurements"] for level in summary["levels"])):
        assert rows[metric]["n"] == 2
        assert rows[metric]["value"] is not None


@pytest.mark.parametrize(("option", "status"), [("--eq-bench", 54), ("--multiple-choice", 55)])
def test_questions_that_cannot_be_read_are_refused_before_any_work(nightpress: Any, option: str, status: int) -> None:
    (nightpress.base / "bad.json").write_text('{"1": ')
    nightpress.run(option, "bad.json", status=status)
    nightpress.run(option, "missing.json", status=status)
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


# seeds

def test_the_noise_between_seeds_is_recorded_of_the_original(pressed: Any) -> None:
    summary = results(pressed)
    assert summary["baseline"]["seed_spread"]["n"] == 2
    assert summary["baseline"]["seed_spread"]["value"] > 0
    assert all("seed_spread" not in level["measurements"] for level in summary["levels"])


def test_the_same_run_again_has_the_same_numbers_measured_anew_or_not(pressed: Any) -> None:
    before = results(pressed)
    for more in ((), ("--fresh",)):
        pressed.run("--seeds", "2", *instruments(pressed.base), *more)
        again = latest(pressed)
        speed = {"tokens_per_s"}  # of the machine, not of the model
        for one, other in zip([before["baseline"], *(level["measurements"] for level in before["levels"])],
                              [again["baseline"], *(level["measurements"] for level in again["levels"])], strict=True):
            assert {name: value for name, value in values(one).items() if name not in speed} == {
                name: value for name, value in values(other).items() if name not in speed}


def test_without_seeds_no_noise_is_recorded(pressed: Any) -> None:
    pressed.run("--seeds", "0")
    assert "seed_spread" not in latest(pressed)["baseline"]
    assert not any("other seeds" in sentence for sentence in explained(pressed, 0, "Q4_K_M")["sentences"])
