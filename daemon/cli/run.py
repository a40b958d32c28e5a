"""`nightpress run`: press a model in the foreground."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import (
    MODEL,
    AsJson,
    Calibration,
    DeployDir,
    Domain,
    ImatrixFile,
    StateDir,
    Threads,
    absolute,
    print_json,
)

if TYPE_CHECKING:
    from daemon.settings import Settings
    from loops.pass1.plan import PressPlan


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run")(run)


def run(
    model: Annotated[Path | None, typer.Argument(
        help=f"{MODEL} Default: the starter model.",
        show_default=False)] = None,
    target_size: Annotated[str, typer.Option(
        help="Levels larger than this are not built: 20 (GB), 20GB, 800MB, 1.5GiB.")] = "24GB",
    max_degradation: Annotated[float, typer.Option(
        min=0.0, max=1.0, help="Largest loss of the score that passes, as a share: 0.07 is 7 %.")] = 0.07,
    levels: Annotated[str | None, typer.Option(
        help="Levels to try, such as Q8_0,Q4_K_M, or a ladder: original, full, iq, knees. Default: original, which is "
             "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_L,Q2_K.",
        show_default=False)] = None,
    once: Annotated[str | None, typer.Option(
        "--once", "--run-once", metavar="LEVEL", help="Build and measure this one level, and promote nothing.",
        show_default=False)] = None,
    domain: Domain = None,
    calibration: Calibration = None,
    imatrix: ImatrixFile = None,
    max_iterations: Annotated[int | None, typer.Option(
        min=1, help="Most levels to build. Default: 10, or as many as --levels names.", show_default=False)] = None,
    evaluation_prompts: Annotated[int, typer.Option(
        min=1, help="Scenarios at the first look; more follow while the verdict is open.")] = 25,
    max_prompts: Annotated[int, typer.Option(min=0, help="Most scenarios to use; 0 for all there are.")] = 0,
    gate: Annotated[list[str] | None, typer.Option(
        metavar="NAME:LIMIT", show_default=False,
        help="A metric and the loss it allows, such as empathy:0.05, kl_divergence:0.1, worst-slice, or "
             "forced_choice:off; repeat for more. Default: overall and forced_choice at --max-degradation.")] = None,
    weight: Annotated[list[str] | None, typer.Option(
        metavar="NAME=WEIGHT", show_default=False,
        help="Weight of an emotional metric in the overall score, such as metaphor_usage=0; repeat for more. "
             "Default: 1 each.")] = None,
    seeds: Annotated[int, typer.Option(
        min=0, help="Times the original answers the first look by sampling, to know its noise; 0 for none.")] = 3,
    eq_bench: Annotated[Path | None, typer.Option(
        help="EQ-Bench v2 questions (JSON as published) to ask too.", show_default=False)] = None,
    multiple_choice: Annotated[Path | None, typer.Option(
        help="Multiple-choice questions (JSONL: question, choices, answer) to score by likelihood too.",
        show_default=False)] = None,
    dataset: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default=False,
        help="Answer the test rows of this dataset too, for gates such as rougeL:0.03.")] = None,
    judge: Annotated[str | None, typer.Option(
        metavar="PROVIDER[:MODEL]", show_default=False,
        help="Let anthropic or openai grade the replies of the original and of levels that passed. Needs "
             "nightpress[generate] and a key in the environment.")] = None,
    scenarios: Annotated[Path | None, typer.Option(
        help="Your own scenarios, JSONL. Default: the 186 that ship.", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(
        help="Your own text for perplexity and KL divergence. Default: the one that ships.",
        show_default=False)] = None,
    text_windows: Annotated[int, typer.Option(min=0, help="Most windows of 512 tokens of the text; 0 for all.")] = 0,
    baseline_disk: Annotated[str, typer.Option(
        help="Most disk for the original's log-probabilities; beyond it only the most probable tokens are kept, and "
             "what that hides is measured.")] = "2GiB",
    max_kld: Annotated[float, typer.Option(
        min=0.0, help="Mean KL divergence beyond which a level is rejected before it speaks.")] = 0.5,
    strategy: Annotated[str, typer.Option(
        help="walk: from large to small, stop at the first failure after a pass. bisect: halve the ladder. refine: "
             "walk, then try recipes between the last level that passed and the first that did not.")] = "walk",
    prefer: Annotated[str, typer.Option(
        help="Which of the levels that pass to take: smallest, score, or score-per-gb.")] = "smallest",
    accept_inconclusive: Annotated[bool, typer.Option(
        "--accept-inconclusive", help="Count a level that could not be decided as passed.")] = False,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Release the chosen level.")] = True,
    name: Annotated[str | None, typer.Option(
        help="Name of the model in the deploy folder. Default: from its file.", show_default=False)] = None,
    quant_tool: Annotated[Path | None, typer.Option(
        help="An external llama-quantize to use instead of the built-in engine.", show_default=False)] = None,
    allow_requantize: Annotated[bool, typer.Option(
        "--allow-requantize", help="Accept a model that is already quantized.")] = False,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds that one level may take; 0 for no limit.")] = 0.0,
    force: Annotated[bool, typer.Option(
        "--force", help="Start whatever the load, and although the forecast says that memory will not do.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    simulate: Annotated[bool, typer.Option(
        "--simulate", "--mock",
        help="No native work; all figures are invented, marked so, and never promoted.")] = False,
    threads: Threads = None,
    output_dir: Annotated[Path | None, typer.Option(
        help="Folder for the summary. Default: `output` in the state folder.", show_default=False)] = None,
    state_dir: StateDir = None,
    deploy_dir: DeployDir = None,
    json: AsJson = False,
) -> None:
    """Press a model: quantize it level by level, measure each, promote the smallest that holds.

    Without MODEL the starter is pressed, in a minute or two. Ctrl-C stops; the same command again goes
    on where it was. Where a service runs, it does the work, once the machine is idle or at once with
    --force; Ctrl-C then only ends the watching.
    """
    from daemon.cli.folders import find
    from daemon.intake import name_of
    from daemon.settings import Settings, config_dir
    from loops.engine.ladders import expand
    from loops.pass1.criteria import parse_gates
    from loops.pass1.ladder import PREFERENCES, STRATEGIES
    from loops.pass1.plan import PressPlan, parse_size, parse_weights
    from loops.starter import STARTER, STARTER_GGUF
    from state.manifest import check_name

    for value, allowed, option in ((strategy, STRATEGIES, "--strategy"), (prefer, PREFERENCES, "--prefer")):
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}.", param_hint=option)
    parse_gates(gate or (), max_degradation)
    settings = Settings.load(state_dir=state_dir, deploy_dir=deploy_dir, output_dir=output_dir, threads=threads)
    chosen = find(model, settings) if model else STARTER_GGUF.absolute()
    named = check_name(name) if name else STARTER if str(model or STARTER) == STARTER else name_of(chosen)
    wanted = (once,) if once else tuple(part.strip() for part in levels.split(",") if part.strip()) if levels else ()
    plan = PressPlan(
        model=str(chosen), name=named, levels=wanted, blobs=str(settings.blobs), scratch=str(settings.scratch),
        target_bytes=parse_size(target_size), store_bytes=parse_size(baseline_disk),
        max_degradation=max_degradation, max_kld=max_kld,
        max_iterations=max_iterations or max(10, len(expand(wanted))), strategy=strategy, prefer=prefer,
        scenarios=absolute(scenarios) if scenarios else None, first_scenarios=evaluation_prompts,
        max_scenarios=max_prompts, text=absolute(text) if text else None, text_windows=text_windows,
        gates=tuple(gate or ()), weights=parse_weights(weight or ()), seeds=seeds, judge=judge,
        eq_bench=absolute(eq_bench) if eq_bench else None,
        multiple_choice=absolute(multiple_choice) if multiple_choice else None,
        dataset=absolute(dataset) if dataset else None,
        domains=tuple(domain or ()), calibration=tuple(map(absolute, calibration or ())),
        user_domains=str(config_dir() / "calibration"), imatrix=absolute(imatrix) if imatrix else None,
        accept_inconclusive=accept_inconclusive, allow_requantize=allow_requantize, ignore_forecast=force,
        tool=absolute(quant_tool) if quant_tool else None, timeout_s=timeout, simulate=simulate)
    options = {"--deploy-dir": deploy_dir, "--output-dir": output_dir, "--threads": threads}
    _press(settings, plan, options, promoting=promote and not once and not simulate, fresh=fresh, as_json=json)


def _press(settings: Settings, plan: PressPlan, own: dict[str, Any], *, promoting: bool, fresh: bool,
           as_json: bool) -> None:
    from daemon.cli.display import Display
    from daemon.cli.following import follow, refuse_own
    from daemon.cli.tables import console
    from daemon.client import Client

    client = Client.find(settings)
    if client is None:
        summary = _press_here(settings, plan, promoting=promoting, fresh=fresh)
    else:
        refuse_own(own)
        with client:
            end = follow(client, {"plan": plan.as_json(), "promoting": promoting, "fresh": fresh},
                         Display(console(stderr=True)), urgent=plan.ignore_forecast)
            if end is None:
                return
            summary = dict(client.ask("run", run_id=end["run"]))
    _show_summary(summary, plan, as_json=as_json)


def _press_here(settings: Settings, plan: PressPlan, *, promoting: bool, fresh: bool) -> dict[str, Any]:
    from daemon.cli.display import Display, Stages
    from daemon.cli.tables import console
    from daemon.pressing import press
    from daemon.sources import converted
    from daemon.summary import summarise
    from daemon.workers import grip_of_signals
    from state.ledger import Ledger

    errors = console(stderr=True)
    with (Ledger.open(settings.state_dir, " ".join(["nightpress run", *sys.argv[2:3]])) as ledger,
          grip_of_signals() as grip):
        if ledger.degraded:
            errors.print(f"nightpress: {ledger.degraded}", markup=False)
        if plan.model_path.is_dir():  # first and by itself, for its own bars; `press` finds it done
            with Stages(errors) as stages:
                converted(plan.model_path, settings, grip, stages.show)
        with Display(errors) as display:
            run_id = press(ledger, settings, plan, display.show, grip, promoting=promoting, fresh=fresh)
        return summarise(ledger, run_id)


def _show_summary(summary: dict[str, Any], plan: PressPlan, *, as_json: bool) -> None:
    from daemon.cli.tables import console, print_run
    from daemon.errors import NothingPassed

    if as_json:
        print_json(summary)
    else:
        out = console()
        print_run(out, summary)
        out.print(f"Summary: {summary['run']['summary_path']}", markup=False)
        if plan.simulate:
            out.print("Simulated: every figure above is invented, and nothing was promoted.", markup=False)
    if summary["run"]["chosen_level"] is None:
        raise NothingPassed("No level passed, so nothing was promoted. `nightpress results` shows the reasons.")
