"""Single files without a run: an importance matrix, and a model at the levels asked for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from loops.engine import imatrix_stats
from loops.engine.gguf_check import CheckedModel, check_model
from loops.engine.imatrix_file import Imatrix, check_fits, merge_imatrices, read_imatrix, write_imatrix
from loops.engine.levels import Level, parse_ladder
from loops.engine.quantize import Forecast, QuantizeSpec, forecast, quantize, refuse_quantized
from loops.evaluation.scenarios import read_scenarios
from loops.evaluation.text import read_text
from loops.events import Note, Progress
from loops.fingerprint import sha256_of_files
from loops.pass1 import calibrate
from loops.pass1.bench import engine_parts
from loops.pass1.calibrate import Matrix
from loops.pass1.journal import journaling, read_journal
from loops.pass1.menu import Menu
from loops.pass1.plan import SinglePlan
from loops.pass1.recipe import RecipeSearch
from loops.pass1.rig import Rig, Subject
from loops.pass1.sensitivity import Effort
from loops.pass1.source import Source, general, read_source, refuse_overlap
from loops.pass1.steps import Emit, Result, Steps
from state.faults import NightpressError
from state.files import explained, orphans, rename, temporary_beside


class OutputThere(NightpressError):
    """There is a file of that name already; --force replaces it."""

    exit_code = 74


def open_rig(plan: SinglePlan, emit: Emit) -> Rig:
    """Check the model and return a rig whose steps are journalled.

    Raises:
        NightpressError: the model cannot be used.
    """
    model = check_model(Path(plan.model))
    sha256 = sha256_of_files(model.shards, lambda done, total: emit(Progress("hash", "", done, total)))
    journal = Path(plan.journals) / f"{sha256}.jsonl"
    steps = Steps(journaling(journal, emit), read_journal(journal), engine=engine_parts(plan.options))
    return Rig(model, Subject("", model.path, sha256), plan.options, Path(plan.scratch), Path(plan.matrices), steps,
               emit)


def _source(plan: SinglePlan) -> Source | None:
    """Return the text that is asked for, None where none is.

    Raises:
        CalibrationRefused: it overlaps with what a run would measure what is made on.
    """
    found = read_source(plan.domains, plan.calibration, plan.user_domains)
    if found is not None:
        refuse_overlap(found, read_text(None, Path(plan.model)), read_scenarios())
    return found


def make_matrix(plan: SinglePlan, emit: Emit) -> Result:
    """Collect, merge and write an importance matrix; return what it is and what it knows of the model.

    Without text and without matrices to merge, the general domain is collected from.

    Raises:
        OutputThere: the file exists.
        ImatrixRefused: a matrix to merge cannot be used, or is of another model.
    """
    output = Path(plan.output)
    _refuse_existing([output], replace=plan.replace)
    asked = _source(plan)
    rig = open_rig(plan, emit)
    parts = []
    for file in plan.merge:
        found = read_imatrix(Path(file))
        check_fits(found, rig.model.tensors, file, rig.model.path.name)
        parts.append(found)
    source = asked or (None if parts else general())
    if source is not None:
        parts.insert(0, calibrate.collect(rig, source, plan.chunks).imatrix)
    rig.release()
    whole = merge_imatrices(parts) if len(parts) > 1 else parts[0]
    write_imatrix(output, whole)
    return {"path": str(output), "bytes": output.stat().st_size, **describe(whole, rig.model)}


def show_matrix(file: Path) -> Result:
    """Return what an importance matrix on disk holds, and its statistics.

    Raises:
        ImatrixRefused: it is none, or damaged.
    """
    found = read_imatrix(file)
    return {"path": str(file), "bytes": file.stat().st_size, **describe(found, None)}


def describe(whole: Imatrix, model: CheckedModel | None) -> Result:
    """Return what an importance matrix holds, its statistics, and what of the model it does not know."""
    tensors = imatrix_stats.tensor_statistics(whole)
    covered = imatrix_stats.coverage(whole, model.tensors) if model else None
    return {"datasets": list(whole.datasets), "chunks": whole.chunks, "chunk_size": whole.chunk_size,
            "sha256": whole.sha256, "entries": len(whole.entries),
            "coverage": str(covered) if covered else None, "complete": covered.is_complete if covered else None,
            "tensors": [one.as_json() for one in tensors],
            "layers": [one.as_json() for one in imatrix_stats.layer_statistics(tensors)]}


def _refuse_existing(files: Sequence[Path], *, replace: bool) -> None:
    """Make sure that no file is replaced that was not to be.

    Raises:
        OutputThere: naming the first.
    """
    for file in files:
        if file.is_dir() or (file.exists() and not replace):
            raise OutputThere(f"{file} is there already. " + (
                "Give another name." if file.is_dir() else "Give another name, or replace it with --force."))


def make_files(plan: SinglePlan, emit: Emit) -> list[Result]:
    """Quantize a model to each level of the plan; return the finished files.

    A level that needs an importance matrix gets one of the general domain where none was asked for.

    Raises:
        OutputThere: a file exists; nothing was made.
        NightpressError: the first level that cannot be made; the files before it stay.
    """
    ladder = parse_ladder(",".join(plan.levels))
    folder = Path(plan.output)
    targets = {level.name: folder / f"{plan.stem}-{level.name}.gguf" for level in ladder}
    _refuse_existing(list(targets.values()), replace=plan.replace)
    source = _source(plan) if plan.imatrix is None else None
    rig = open_rig(plan, emit)
    refuse_quantized(rig.model, allow=plan.allow_requantize)
    asked = (calibrate.given(rig.model, Path(plan.imatrix)) if plan.imatrix else
             calibrate.collect(rig, source) if source else None)
    if asked is not None:
        calibrate.tell_gaps(asked, rig)
    made = []
    for level in ladder:
        spec, found, matrix = _specified(plan, rig, level, asked)
        rig.release()
        made.append(_make(spec, found, targets[level.name], rig) | {"imatrix": matrix.name if matrix else None})
    return made


def make_sized(plan: SinglePlan, emit: Emit) -> Result:
    """Make the best file of a model within a size: every matrix gets its own type.

    Returns:
        the file, its divergence, its recipe, and every candidate that was tried.

    Raises:
        OutputThere: the file exists; nothing was made.
        BudgetImpossible: the size is too small or too large for this model; nothing was computed.
        CalibrationTooShort: the text is too short to measure on.
    """
    model = check_model(Path(plan.model))
    budget = plan.target_bytes or int(plan.target_bits * model.n_parameters / 8)
    folder = Path(plan.output)
    target = folder / f"{plan.stem}-{8 * budget / model.n_parameters:.3f}bpw.gguf"
    _refuse_existing([target], replace=plan.replace)
    known = calibrate.given(model, Path(plan.imatrix)) if plan.imatrix else None
    foreseen = known or calibrate.blank(model, with_output=True)  # what will be collected knows no more than this
    Menu(model, plan.options, foreseen.imatrix, Effort.for_weights(model.n_parameters).types).check(budget)
    source = _source(plan) or general()
    rig = open_rig(plan, emit)
    text = calibrate.text_to_measure(rig, source)
    matrix = known or calibrate.collect(rig, source)
    calibrate.tell_gaps(matrix, rig)
    rig.release()
    with _workplace(folder) as place:
        with RecipeSearch(rig.model, plan.options, matrix.imatrix, text, rig.steps, rig.scratch,
                          lambda stage, done, total: rig.report(stage, "")(done, total),
                          sha256=rig.original.sha256) as search:
            found = search.best(budget, place)
        _hand_out(found.path, target)
    return {"level": found.winner.name, "path": str(target), "bytes": target.stat().st_size,
            "sha256": found.winner.sha256, "bits_per_weight": 8 * target.stat().st_size / model.n_parameters,
            "imatrix": matrix.name, "kld": found.winner.kld, "recipe": found.winner.recipe.as_json(),
            "tried": [{"name": one.name, "bytes": one.recipe.n_bytes, "estimate": one.estimate, "kld": one.kld}
                      for one in found.tried]}


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Make a folder in `folder/incoming` for files that are not finished; it is gone at the end, whatever happens.

    What a killed process left of its own goes first.
    """
    incoming = folder / "incoming"
    place = temporary_beside(incoming / "files")
    with explained(folder):
        for left in orphans(incoming):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
        place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # another command may be at work in it
            incoming.rmdir()


def _hand_out(file: Path, target: Path) -> None:
    """Give a finished file its name and the mode of a file that its user may replace."""
    with explained(target.parent):
        file.chmod(0o644)
        rename(file, target)


def _specified(plan: SinglePlan, rig: Rig, level: Level,
               asked: Matrix | None) -> tuple[QuantizeSpec, Forecast, Matrix | None]:
    """Return how a level is made: with the matrix asked for, else with the general one where it needs one."""
    def spec_with(matrix: Matrix | None) -> QuantizeSpec:
        return QuantizeSpec(rig.model, level, plan.options, plan.allow_requantize,
                            tool=Path(plan.tool) if plan.tool else None, imatrix=matrix.imatrix if matrix else None)

    found = forecast(spec_with(asked))
    if found.needs_imatrix and asked is None:
        rig.emit(Note(f"{level.name} needs an importance matrix: it is made from the general calibration text."))
        asked = calibrate.collect(rig, general())
        calibrate.tell_gaps(asked, rig)
        found = forecast(spec_with(asked))
    return spec_with(asked), found, asked


def _make(spec: QuantizeSpec, found: Forecast, target: Path, rig: Rig) -> Result:
    report = rig.report("quantize", found.level)
    with _workplace(target.parent) as place:
        made = quantize(spec, found, place, lambda share: report(share, 1.0))
        _hand_out(made.path, target)
    return {"level": found.level, "path": str(target), "bytes": made.n_bytes, "sha256": made.sha256,
            "bits_per_weight": 8 * made.n_bytes / rig.model.n_parameters, "fallbacks": made.fallbacks,
            "seconds": made.seconds}
