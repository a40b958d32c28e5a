"""Press one model from start to release: what `nightpress run` does, and the service with each of its queue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from daemon.engine import probe
from daemon.grip import Grip
from daemon.judging import check_judge, choose_again, judge_run
from daemon.promotion import promote
from daemon.settings import Settings
from daemon.sources import clean, converted
from daemon.summary import write_summary
from daemon.supervisor import Pressing, Show
from loops.engine.options import EngineOptions
from loops.events import Event, Note, Progress
from loops.pass1.plan import PressPlan
from state.backup import write_backup
from state.check import tidy
from state.faults import NightpressError, failpoint
from state.files import explained, make_folder
from state.ledger import Ledger, RunState


def press(ledger: Ledger, settings: Settings, plan: PressPlan, show: Show, grip: Grip, *,
          promoting: bool = True, fresh: bool = False, own_run: int | None = None,
          opened: Callable[[int], None] | None = None) -> int:
    """Press a model and release the chosen level; return the number of the run.

    Whatever an earlier process left behind is tidied first. Killed at any moment, the same plan
    goes on where it was, and ends with the same figures and the same release.

    Args:
        ledger: open for writing.
        settings: where things lie.
        plan: what to press; its engine options are completed by what the probe found, and a Hugging Face folder is
            converted first.
        show: is shown every event.
        grip: by which it is stopped for a while, or ended; ended, it can be resumed.
        promoting: release the chosen level.
        fresh: do not use results of earlier runs.
        own_run: that the same job began before, with which a fresh one goes on.
        opened: is given the number of the run as soon as there is one.

    Raises:
        NightpressError: the run is recorded as failed or interrupted, with the reason.
    """
    if plan.judge is not None and not plan.simulate:
        check_judge(plan.judge)
    with explained(settings.output):
        make_folder(settings.output, 0o755)
    tidy(ledger, settings.deploy)
    source: Mapping[str, Any] = {}
    if plan.model_path.is_dir():
        def shown(event: Event) -> None:  # how far a conversion is says nothing of the run
            show(replace(event, done=0.0) if isinstance(event, Progress) else event)

        file, source = converted(plan.model_path, settings, grip, shown)
        ledger.record_event("model.converted", None, None, dict(source))
        plan = replace(plan, model=str(file))
    plan = replace(plan, source=source)
    options = EngineOptions(threads=settings.threads, gpu_layers=settings.gpu_layers, extra_buffers=False)
    if not plan.simulate:
        show(Progress("looking at this CPU", "", 0, 1))
        found = probe(settings.state_dir, grip)
        options = replace(options, extra_buffers=found.extra_buffers)
        if not found.extra_buffers:
            show(Note(found.reason))
    pressing = Pressing(ledger, settings, replace(plan, options=options), show, grip, fresh=fresh,
                        own_run=own_run, opened_run=opened)
    try:
        outcome = pressing.run()
        run_id, chosen, reason = pressing.run_id, outcome.chosen, outcome.reason
        if plan.judge is not None and chosen is not None and not plan.simulate:
            judge_run(ledger, plan, run_id, show, grip)
            chosen, reason = choose_again(ledger, plan, run_id)
        failpoint("press.chosen")
        if promoting and chosen is not None and not plan.simulate:
            show(Progress("promoting", chosen, 0, 1))
            promote(ledger, settings, run_id, chosen, options, grip)
        failpoint("press.promoted")
        ledger.end_run(run_id, RunState.FINISHED, chosen_level=chosen, reason=reason)
        write_summary(ledger, run_id, settings.output)
    except NightpressError as problem:
        if pressing.run_id and ledger.run(pressing.run_id)["state"] == RunState.RUNNING:
            ledger.end_run(pressing.run_id, RunState.INTERRUPTED, reason=str(problem))
        raise
    ledger.record_event("run.finished", run_id, None, {"chosen": chosen, "reason": reason})
    write_backup(ledger, settings.keep_backups)
    clean(settings)
    return run_id
