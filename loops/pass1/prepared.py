"""A run that can be done: everything that can be checked before any work, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from loops.engine import native
from loops.engine.gguf_check import CheckedModel, check_model
from loops.engine.levels import Level, parse_ladder
from loops.engine.quantize import refuse_quantized, tool_identity
from loops.evaluation import metrics
from loops.evaluation.scenarios import Scenario, fingerprint_of, read_scenarios
from loops.evaluation.text import EvaluationText, read_text
from loops.events import Opened, Progress
from loops.fingerprint import fingerprint, sha256_of_files
from loops.pass1.bench import engine_parts
from loops.pass1.calibrate import given
from loops.pass1.examiner import Instruments
from loops.pass1.plan import PressPlan
from loops.pass1.source import Source, read_source, refuse_overlap
from loops.pass1.steps import Emit


@dataclass(frozen=True)
class Prepared:
    """A run that can be done.

    Attributes:
        plan: as asked for.
        model: the checked original.
        ladder: levels to consider.
        scenarios: all that may be used, in order.
        text: for perplexity and KL divergence.
        source: text to calibrate with, None where none was asked for.
        instruments: questions besides the scenarios.
        opened: what was told about it.
    """

    plan: PressPlan
    model: CheckedModel
    ladder: tuple[Level, ...]
    scenarios: tuple[Scenario, ...]
    text: EvaluationText
    source: Source | None
    instruments: Instruments
    opened: Opened


def prepare(plan: PressPlan, emit: Emit, known_sha256: str | None = None) -> Prepared:
    """Check everything that can be checked before any work.

    Args:
        plan: what to do.
        emit: told progress of hashing.
        known_sha256: of the original, when its files did not change since it was computed.

    Raises:
        NightpressError: whichever part of the plan cannot be carried out.
    """
    model = check_model(plan.model_path)
    refuse_quantized(model, allow=plan.allow_requantize)
    ladder = parse_ladder(",".join(plan.levels) if plan.levels else None)
    scenarios = read_scenarios(Path(plan.scenarios) if plan.scenarios else None)
    sha256 = known_sha256 or sha256_of_files(
        model.shards, lambda done, total: emit(Progress("hash", "", done, total)))
    text = read_text(Path(plan.text) if plan.text else None, plan.model_path)
    instruments = Instruments.of(plan)
    source = read_source(plan.domains, plan.calibration, plan.user_domains)
    if source is not None:
        refuse_overlap(source, text, scenarios, compared=plan.imatrix is None)
    matrix = given(model, Path(plan.imatrix)) if plan.imatrix else None
    engine = asdict(native.build()) | {"id": native.build().id}
    identity = fingerprint("run", plan=plan.identity(), model=sha256, text=text.sha256,
                           scenarios=fingerprint_of(scenarios), instruments=asdict(instruments),
                           metrics=metrics.identity(), engine=engine_parts(plan.options),
                           calibration=source.sha256 if source else None, imatrix=matrix.sha256 if matrix else None,
                           tool=tool_identity(Path(plan.tool) if plan.tool else None))
    header = model.header
    opened = Opened(
        name=plan.name, model_sha256=sha256, model_bytes=model.file_bytes,
        bits_per_weight=model.bits_per_weight, plan_fingerprint=identity, engine=engine,
        facts={"architecture": model.architecture, "parameters": model.n_parameters, "type": model.dominant_type,
               "model_name": header.name, "license": header.license,
               "base_model": ", ".join(header.base_models) or None,
               "text": text.source, "text_sha256": text.sha256, "scenarios": plan.scenarios or "built-in",
               "scenarios_fingerprint": fingerprint_of(scenarios),
               "calibration": source.name if source else matrix.name if matrix else None})
    return Prepared(plan, model, ladder, scenarios, text, source, instruments, opened)
