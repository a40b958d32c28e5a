"""What a person wants to know of a model or of the levels before pressing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from loops.engine.gguf_check import CheckedModel
from loops.engine.imatrix_file import Imatrix
from loops.engine.ladders import EXPECTED, LADDERS, knees, use_of
from loops.engine.levels import UNQUANTIZED, Level, levels, parse_ladder
from loops.engine.memory import DEFAULT_CELLS, ContextMemory, Room, plan_memory, room_of, trained_cells
from loops.engine.native import EngineFailed
from loops.engine.quantize import QuantizeSpec, forecast
from state.faults import NightpressError

#: For each task, the level whose expected distance from the original is still near enough. These are judgements: a word
#: of a chat may well be another one, but a wrong token breaks a command or a program. Of Llama-3-8B, 8 % of the most
#: probable tokens are others at Q4_K_M, 4 % at Q6_K (llama.cpp, tools/perplexity/README.md, "Same top p").
TASKS: Mapping[str, str] = {"chat": "Q4_K_M", "commands": "Q5_K_S", "code": "Q5_K_M"}


class UnknownTask(NightpressError):
    """There is no recommendation for this task; those there are: chat, code, commands."""

    exit_code = 77


@dataclass(frozen=True)
class Measured:
    """What a run on this machine found out about a level of the very model.

    Attributes:
        run: its number.
        kld: mean KL divergence from the original in nats per token.
        share: the same as a share of the original's loss, the logarithm of its perplexity.
        n_bytes: of the file.
        state: how the level ended: `passed`, `failed`, `rejected` or another.
    """

    run: int
    kld: float
    share: float
    n_bytes: int
    state: str


@dataclass(frozen=True)
class Survey:
    """What is asked about the levels of a model.

    Attributes:
        room: memory of the machine that is to run it.
        cells: tokens of context; 0 for 8,192, or what the model was trained for where that is less.
        ladder: names of levels or ladders; None for everything there is.
        task: a key of `TASKS`; None for no recommendation.
        measured: by level.
    """

    room: Room
    cells: int = 0
    ladder: str | None = None
    task: str | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Survey:
        """Return the survey that JSON holds; `room` without `free` is another machine's."""
        measured = {level: Measured(**found) for level, found in fields.get("measured", {}).items()}
        total, free = fields["room"]["total"], fields["room"].get("free")
        room = room_of(total) if free is None else Room(total, free)
        return cls(**{**fields, "room": room, "measured": measured})


def describe(model: CheckedModel) -> dict[str, Any]:
    """Return the facts of a checked model, as JSON can hold them."""
    header = model.header
    types: dict[str, int] = {}
    for tensor in model.tensors:
        types[tensor.ggml_type] = types.get(tensor.ggml_type, 0) + 1
    return {
        "path": str(model.path), "files": [str(shard) for shard in model.shards], "bytes": model.file_bytes,
        "gguf_version": header.version, "architecture": model.architecture, "name": header.name,
        "parameters": model.n_parameters, "bits_per_weight": round(model.bits_per_weight, 4),
        "type": model.dominant_type, "quantized": model.is_quantized, "tensors": len(model.tensors),
        "tensor_types": types, "license": header.license, "base_models": list(header.base_models),
        "context": header.metadata.get(f"{model.architecture}.context_length"),
        "chat_template": "tokenizer.chat_template" in header.metadata}


def list_levels(model: CheckedModel, matrix: Imatrix, wanted: Sequence[Level] | None = None) -> list[dict[str, Any]]:
    """Return levels with their exact size for a model, smallest first.

    Sizes are of files made without an importance matrix, where the level can do without one: with a matrix llama.cpp
    chooses some types otherwise, and files come out up to 1 % smaller or larger.

    Args:
        model: the original.
        matrix: that knows every tensor, whatever its values: gives the sizes of the levels that need one.
        wanted: which; None for every level that the library can write.
    """
    found: list[dict[str, Any]] = []
    for level in levels().values() if wanted is None else wanted:
        spec = QuantizeSpec(model, level, allow_requantize=True)
        try:
            first = forecast(spec)
        except EngineFailed:
            continue  # the library names it but cannot write it, such as NVFP4
        sized = forecast(replace(spec, imatrix=matrix)) if first.needs_imatrix else first
        found.append({"level": level.name, "bytes": sized.n_bytes, "needs_imatrix": first.needs_imatrix,
                      "bits_per_weight": 8 * sized.n_bytes / model.n_parameters, "fallbacks": sized.fallbacks,
                      "quantized": level.name not in UNQUANTIZED, "use": use_of(level.name),
                      "ladders": [name for name in ("original", "knees") if level.name in LADDERS[name]]})
    return sorted(found, key=lambda entry: entry["bytes"])


def survey(model: CheckedModel, matrix: Imatrix, asked: Survey) -> dict[str, Any]:
    """Return the levels of a model, what they take in memory, and the one to take, as JSON can hold it.

    Raises:
        UnknownTask: naming those there are.
        UnknownLevel: the ladder names no level.
        ModelNotLoaded, OutOfMemory, EngineFailed: see `plan_memory`.
    """
    if asked.task is not None and asked.task not in TASKS:
        raise UnknownTask(f"There is no recommendation for {asked.task[:80]!r}. Those there are: "
                          f"{', '.join(sorted(TASKS))}.")
    wanted = parse_ladder(asked.ladder) if asked.ladder is not None else None
    trained = trained_cells(model.metadata, model.architecture)
    context = plan_memory(model, asked.cells or min(trained or DEFAULT_CELLS, DEFAULT_CELLS))
    rows = list_levels(model, matrix, wanted)
    for row in rows:
        row["memory"] = row["bytes"] + context.total
        row["fits"] = asked.room.fits(row["memory"])
        if row["level"] in asked.measured:
            row["measured"] = asdict(asked.measured[row["level"]])
    return {"model": model.path.name, "trained_context": trained, "context": asdict(context),
            "room": asdict(asked.room), "levels": rows, "notes": _notes(context, trained),
            "knees_measured": list(knees({level: (one.n_bytes, one.kld) for level, one in asked.measured.items()})),
            "recommendation": recommend(rows, asked.task, asked.measured) if asked.task else None}


def _notes(context: ContextMemory, trained: int) -> list[str]:
    notes = []
    if trained and context.cells > trained:
        notes.append(f"The model was trained for {trained:,} tokens of context and makes no sense of more.")
    if context.window_cache < context.cache:
        saved = (context.cache - context.window_cache) / 1e6
        notes.append("Some layers look back over a window only. Nightpress keeps every token for them; programs that "
                     f"do not, such as llama-server, take {saved:,.1f} MB less.")
    return notes


def expected_shares(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Return, by level, the KL divergence to expect as a share of the original's loss.

    Measured levels have what was measured. For the others it is what the tables say (`ladders.EXPECTED`), times the
    median of what was measured in units of the tables where both are known.
    """
    ratios = [one.share / EXPECTED[level] for level, one in measured.items() if level in EXPECTED]
    scale = median(ratios) if ratios else 1.0
    return {level: share * scale for level, share in EXPECTED.items()} | {
        level: one.share for level, one in measured.items()}


def recommend(rows: Sequence[Mapping[str, Any]], task: str, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the level to take for a task, and a sentence that says why.

    It is the smallest that fits and is near enough to the original for the task, or for chat the smallest that passed
    a run on this machine. Where none is near enough it is the nearest that fits, with a warning. Levels that failed a
    run are not recommended.

    Args:
        rows: of levels with `level`, `bytes`, `memory`, `fits`, `needs_imatrix` and `quantized`.
        task: a key of `TASKS`.
        measured: what runs on this machine found out about this model.
    """
    shares, limit = expected_shares(measured), EXPECTED[TASKS[task]]
    failed = {level for level, one in measured.items() if one.state in {"failed", "rejected"}}
    known = [row for row in rows if row["quantized"] and row["level"] in shares and row["level"] not in failed]
    for fits in ("yes", "tight"):
        there = sorted((row for row in known if row["fits"] == fits), key=lambda row: int(row["bytes"]))
        good = [row for row in there if shares[row["level"]] <= limit
                or (task == "chat" and row["level"] in measured and measured[row["level"]].state == "passed")]
        if good:
            return _recommended(good[0], task, shares, measured)
    there = [row for row in known if row["fits"] != "no"]
    if not there:
        return {"task": task, "level": None, "reason": (
            "No level fits into this memory, or all that fit have failed. Ask for a shorter --context, or use a "
            "machine with more memory or a smaller model.")}
    return _recommended(min(there, key=lambda row: shares[row["level"]]), task, shares, measured, enough=False)


def _recommended(row: Mapping[str, Any], task: str, shares: Mapping[str, float], measured: Mapping[str, Measured], *,
                 enough: bool = True) -> dict[str, Any]:
    level, share, limit = row["level"], shares[row["level"]], EXPECTED[TASKS[task]]
    run = measured.get(level)
    source = (f"measured in run {run.run} on this machine" if run else
              "expected from llama.cpp's figures of Llama-3-8B and ours of the starter"
              + (", scaled by what runs of this model measured" if measured else ""))
    said = f"its KL divergence is {share:.1%} of the original's loss, {source}"
    if run and run.state == "passed" and task == "chat":
        reason = f"{level} is the smallest that fits and passed a run of this model (run {run.run}); {said}."
    elif enough:
        reason = (f"{level} is the smallest that fits and keeps as much as {task} asks for, {limit:.1%} or less: "
                  f"{said}.")
    else:
        reason = (f"Nothing that fits keeps as much as {task} asks for, which is {limit:.1%} or less. {level} is the "
                  f"nearest: {said}. Expect mistakes.")
    if row["fits"] == "tight":
        reason += " It fits only when other programs give way."
    if row["needs_imatrix"]:
        reason += " It needs an importance matrix, which `nightpress quantize` collects by itself."
    if run is None:
        reason += " `nightpress run` measures what it really does to this model."
    return {"task": task, "level": level, "reason": reason, "share": share, "limit": limit,
            "measured": run is not None}
