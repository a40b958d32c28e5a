"""A run that is judged: graded once, gated where asked for, and no key anywhere but in the requests."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import provider_server
import pytest
from provider_server import GOOD, exchange_of
from provider_server import Provider as Server

KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"
PROVIDERS = ("anthropic", "openai")
BAD = {**GOOD, "harm": 2, "reason": "It hurts."}  # scores nothing

for _name in PROVIDERS:
    pytest.importorskip(_name, reason=f"the extra nightpress[generate] is not installed: {_name} is missing")


@pytest.fixture
def server() -> Iterator[Server]:
    with provider_server.serving() as provider:
        yield provider


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, new_nightpress: Any) -> Any:
    """A command line on which all levels of these tests were pressed, without judge, and nothing is released."""
    one = new_nightpress(tmp_path_factory.mktemp("measured"))
    one.run("--levels", "Q8_0,Q4_K_M,Q2_K", "--no-promote", *LENIENT)
    return one


#: everything passes that is no matter of a judge
LENIENT = ("--max-degradation", "1", "--max-kld", "9", "--accept-inconclusive", "--seeds", "0")


class Judged:
    """A command line of the test's own, where measuring takes no time, and a provider of judges."""

    def __init__(self, nightpress: Any, server: Server) -> None:
        self.nightpress, self.server = nightpress, server
        self.environment = {f"{name.upper()}_{what}": value for name in PROVIDERS
                            for what, value in (("BASE_URL", server.url), ("API_KEY", KEY))}

    def run(self, *arguments: str, judge: str = "anthropic", status: int = 0, **environment: str) -> Any:
        """Press and judge."""
        return self.nightpress.run(*LENIENT, "--judge", judge, *arguments, status=status,
                                   **{**self.environment, **environment})

    def start(self, *arguments: str) -> Any:
        """Start pressing and judging."""
        return self.nightpress.start("run", *self.nightpress.QUICK, *LENIENT, "--judge", "anthropic", *arguments,
                                     "--levels", "Q8_0", **self.environment)

    def results(self) -> dict[str, Any]:
        """The last run."""
        found: dict[str, Any] = json.loads(self.nightpress("results", "--json").stdout)
        return found

    def level(self, name: str) -> dict[str, Any]:
        """A level of the last run."""
        return next(row for row in self.results()["levels"] if row["level"] == name)


@pytest.fixture
def judged(measured: Any, new_nightpress: Callable[[Path], Any], isolated: Path, server: Server) -> Judged:
    shutil.copytree(measured.state, isolated / "state", dirs_exist_ok=True)
    return Judged(new_nightpress(isolated), server)


@pytest.fixture
def originals(measured: Any) -> set[str]:
    """What the original replied."""
    return {row["original"] for row in json.loads(measured("results", "--replies", "Q8_0", "--json").stdout)}


@pytest.fixture
def strict(judged: Judged, originals: set[str]) -> Judged:
    """The same, where the judge likes nothing that the original did not say."""
    judged.server.grade = lambda exchange: GOOD if exchange["reply"] in originals else BAD
    return judged


# grades

@pytest.mark.parametrize("provider", PROVIDERS)
def test_grades_of_the_original_and_of_levels_that_passed_are_recorded(judged: Judged, provider: str) -> None:
    judged.run(judge=provider)
    summary = judged.results()
    assert summary["baseline"]["judge"]["value"] == pytest.approx(5 / 8)
    assert provider in summary["baseline"]["judge"]["unit"]
    for level in summary["levels"]:
        assert level["state"] == "passed"
        assert level["measurements"]["judge"]["value"] == pytest.approx(5 / 8)
        loss = level["measurements"]["loss_judge"]
        assert (loss["value"], loss["n"]) == (pytest.approx(0), level["measurements"]["judge"]["n"])
    assert judged.server.seen


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_same_run_again_asks_nothing_and_ends_the_same(strict: Judged, provider: str) -> None:
    strict.run("--levels", "Q8_0,Q2_K", "--gate", "judge:0.5", judge=provider)
    asked, before = len(strict.server.seen), strict.results()
    strict.run("--levels", "Q8_0,Q2_K", "--gate", "judge:0.5", judge=provider)
    again = strict.results()
    assert len(strict.server.seen) == asked
    assert again["run"]["id"] != before["run"]["id"]
    for one, other in zip(before["levels"], again["levels"], strict=True):
        assert (one["state"], one["reason"]) == (other["state"], other["reason"])
        for metric in ("judge", "loss_judge"):
            assert one["measurements"][metric] == other["measurements"][metric]


def test_another_model_of_the_same_provider_is_asked_anew(judged: Judged) -> None:
    judged.run("--levels", "Q8_0", judge="openai:one")
    asked = len(judged.server.seen)
    judged.run("--levels", "Q8_0", judge="openai:other")
    assert len(judged.server.seen) == 2 * asked
    assert {body["model"] for body in judged.server.seen} == {"one", "other"}


def test_equal_replies_are_asked_about_once(judged: Judged) -> None:
    judged.run()
    exchanges = [json.dumps(exchange_of(body)) for body in judged.server.seen]
    assert len(set(exchanges)) == len(exchanges)


def test_the_judge_is_told_the_emotion_and_nothing_of_levels(judged: Judged) -> None:
    judged.run()
    for body in judged.server.seen:
        assert set(exchange_of(body)) == {"prompt", "emotion", "reply"}
        assert not [word for word in ("Q8_0", "Q4_K_M", "starter", "gguf") if word in json.dumps(body)]


def test_a_level_that_failed_is_not_judged(judged: Judged) -> None:
    judged.run("--gate", "kl_divergence:0.0005")
    assert judged.level("Q4_K_M")["state"] == "failed"
    assert "judge" not in judged.level("Q4_K_M")["measurements"]
    assert "judge" in judged.level("Q8_0")["measurements"]


def test_where_no_level_passed_the_judge_is_asked_nothing(judged: Judged) -> None:
    judged.run("--gate", "kl_divergence:0.000001", status=3)
    assert judged.server.seen == []


def test_how_much_is_sent_away_is_told_before(judged: Judged) -> None:
    assert "tokens sent" in " ".join(judged.run().stderr.split())


def test_a_simulated_run_asks_nobody(judged: Judged) -> None:
    judged.run("--simulate")
    assert judged.server.seen == []


# the gate

def test_a_level_that_the_judge_likes_less_loses_its_pass_and_is_not_released(strict: Judged) -> None:
    strict.run("--levels", "Q2_K", "--gate", "judge:0.0", status=3)
    level = strict.level("Q2_K")
    assert level["state"] == "failed"
    assert level["reason"].startswith("Judge lost ")
    assert strict.results()["run"]["chosen_level"] is None
    assert not (strict.nightpress.deploy / "starter").exists()
    number = str(strict.results()["run"]["id"])
    assert "only a level that passed" in strict.nightpress("promote", number, "Q2_K", status=45).stderr


def test_explain_names_the_judge_as_the_gate_that_did_not_hold(strict: Judged) -> None:
    strict.run("--levels", "Q2_K", "--gate", "judge:0.0", status=3)
    told = " ".join(strict.nightpress("explain", "0", "Q2_K").stdout.split())
    assert "Gate judge: not held; judge lost" in told


def test_the_next_level_is_released_when_the_judge_takes_the_smallest_back(strict: Judged) -> None:
    strict.run("--levels", "Q8_0,Q2_K", "--gate", "judge:0.5")
    assert {row["level"]: row["state"] for row in strict.results()["levels"]} == {"Q8_0": "passed", "Q2_K": "failed"}
    manifest = json.loads((strict.nightpress.deploy / "starter" / "current" / "manifest.json").read_text())
    assert manifest["level"] == strict.results()["run"]["chosen_level"] == "Q8_0"
    assert manifest["verdict"]["state"] == "passed"


def test_without_a_gate_the_judge_decides_nothing(strict: Judged) -> None:
    strict.run("--levels", "Q2_K")
    level = strict.level("Q2_K")
    assert level["state"] == "passed"
    assert level["measurements"]["loss_judge"]["value"] > 0.5
    assert (strict.nightpress.deploy / "starter" / "current").exists()


def test_a_gate_that_holds_is_recorded_beside_the_others(judged: Judged) -> None:
    judged.run("--levels", "Q8_0", "--gate", "judge:0.1")
    assert [(gate["gate"], gate["verdict"]) for gate in judged.level("Q8_0")["gates"]][-1] == ("judge", "passed")


# before any work

@pytest.mark.parametrize("key", ["", "  "])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_missing_key_is_told_before_any_work(nightpress: Any, server: Server, provider: str, key: str) -> None:
    judged = Judged(nightpress, server)
    done = judged.run(judge=provider, status=57, **{f"{provider.upper()}_API_KEY": key})
    assert f"set {provider.upper()}_API_KEY" in done.stderr
    assert not list((nightpress.state / "blobs").glob("*.gguf"))
    assert server.seen == []


@pytest.mark.parametrize("judge", ["gemini", "Anthropic", ":model", "anthropic-model"])
def test_an_unknown_judge_is_told_before_any_work(nightpress: Any, server: Server, judge: str) -> None:
    done = Judged(nightpress, server).run(judge=judge, status=61)
    assert "anthropic, openai" in done.stderr
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


@pytest.mark.parametrize("gate", [(), ("--gate", "judge:0.0")], ids=["ungated", "gated"])
def test_an_empty_judge_does_not_pass_for_none(judged: Judged, gate: tuple[str, ...]) -> None:
    judged.run("--levels", "Q8_0", *gate, judge="", status=61)


def test_a_gate_on_a_judge_that_nobody_named_is_told_before_any_work(nightpress: Any) -> None:
    assert "--judge" in nightpress.run("--gate", "judge:0.1", status=59).stderr
    assert not list((nightpress.state / "blobs").glob("*.gguf"))


# what goes wrong on the way

def test_a_provider_that_breaks_keeps_what_was_graded_and_the_same_run_goes_on(judged: Judged) -> None:
    judged.server.script = ["", "", "401", *["401"] * 40]
    assert "ANTHROPIC_API_KEY" in judged.run(status=57).stderr
    assert judged.results()["run"]["state"] == "interrupted"
    number, asked = judged.results()["run"]["id"], len(judged.server.seen)
    assert not (judged.nightpress.deploy / "starter").exists()
    judged.server.script = []
    judged.run()
    again = judged.results()["run"]
    assert (again["id"], again["state"]) == (number, "finished")
    exchanges = [json.dumps(exchange_of(body)) for body in judged.server.seen]
    assert exchanges[0] not in exchanges[asked:]  # the first is asked alone; of the others some were under way


def test_answers_out_of_form_end_the_run_with_a_sentence(judged: Judged) -> None:
    judged.server.script = ["wrong-schema"] * 9
    assert "out of form" in " ".join(judged.run("--levels", "Q8_0", status=58).stderr.split())
    assert not (judged.nightpress.deploy / "starter").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_the_judge_is_thinking_the_same_run_goes_on(
        judged: Judged, poll: Any, how: signal.Signals) -> None:
    judged.server.open.clear()
    with judged.start() as process:
        poll(lambda: judged.server.waiting or process.poll() is not None, 120, "a request to the judge")
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    number = judged.results()["run"]["id"]
    judged.server.open.set()
    judged.run("--levels", "Q8_0")
    again = judged.results()
    assert (again["run"]["id"], again["run"]["state"]) == (number, "finished")
    assert again["baseline"]["judge"]["value"] == pytest.approx(5 / 8)


# the key

def assert_nowhere(judged: Judged, *said: str) -> None:
    for part in (KEY, KEY[8:28]):
        assert part not in "".join(said)
        for file in judged.nightpress.base.rglob("*"):
            assert not file.is_file() or part.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_key_is_sent_to_the_provider_and_appears_nowhere_else(judged: Judged, provider: str) -> None:
    done = judged.run("--levels", "Q8_0", "--json", judge=provider)
    assert KEY in json.dumps(judged.server.headers)
    export = judged.nightpress("export").stdout
    assert_nowhere(judged, done.stdout, done.stderr, export)


@pytest.mark.parametrize("fault", ["401", "echo-key", "404"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_that_repeats_the_key_makes_nobody_tell_it(judged: Judged, provider: str, fault: str) -> None:
    judged.server.script = [fault] * 20
    done = judged.run("--levels", "Q8_0", judge=provider, status=57 if fault == "401" else 58)
    assert KEY in json.dumps(judged.server.headers)
    assert_nowhere(judged, done.stdout, done.stderr)
