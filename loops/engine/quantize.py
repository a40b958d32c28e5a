"""Quantize a model to a level: the exact size first, then the file, verified before anyone sees it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loops.engine.gguf_check import CheckedModel, check_gguf
from loops.engine.gguf_format import tensor_types
from loops.engine.imatrix import NativeImatrix
from loops.engine.imatrix_file import Imatrix, check_fits, write_imatrix
from loops.engine.levels import UNQUANTIZED, Level
from loops.engine.model import check_finite, load_model
from loops.engine.native import EngineFailed, library, log
from loops.engine.options import EngineOptions
from loops.engine.size import file_size
from loops.leash import die_with_parent
from state.faults import NightpressError, failpoint
from state.files import DiskFull, explained, fsync_file, fsync_folder, sha256_file, temporary_beside

Progress = Callable[[float], None]

#: one tensor in the library's log, in a dry run and in a real one
_TENSOR_LINE = re.compile(
    r"\[\s*(?P<index>\d+)/\s*(?P<count>\d+)\]\s+(?P<name>\S+)\s+- \[.*?\], type =\s*(?P<old>\w+), "
    r"(?:size =\s*[\d.]+ MiB(?: ->\s*[\d.]+ MiB \((?P<dry>\w+)\))?|converting to (?P<new>\w+))")
_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")

#: types that the library refuses for a matrix that no importance is known of (tensor_requires_imatrix() in
#: src/llama-quant.cpp), but for the embedding and the output
NEEDING_IMATRIX = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
_EXEMPT = ("token_embd.weight", "output.weight")


class AlreadyQuantized(NightpressError):
    """The model is already quantized, and quantizing it again adds errors to errors."""

    exit_code = 36


class NeedsImatrix(NightpressError):
    """This level needs an importance matrix, or one that knows more of the model."""

    exit_code = 37


class ToolFailed(NightpressError):
    """The external quantization tool failed."""

    exit_code = 38


@dataclass(frozen=True)
class QuantizeSpec:
    """One quantization.

    Attributes:
        model: the checked original, sharded or not.
        level: what to quantize to.
        options: threads and extra buffers; the file does not depend on them.
        allow_requantize: accept an original that is itself quantized.
        max_buffer_bytes: rows held in memory at once.
        tool: an external llama-quantize instead of the library.
        imatrix: what matters in the model, None to treat all columns alike.
        types: of tensors that are not to get the level's, by name, such as `{"output.weight": "Q8_0"}`.
    """

    model: CheckedModel
    level: Level
    options: EngineOptions = field(default_factory=EngineOptions)
    allow_requantize: bool = False
    max_buffer_bytes: int = 1 << 30
    tool: Path | None = None
    imatrix: Imatrix | None = None
    types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecast:
    """What quantizing will give, known before it starts.

    Attributes:
        level: name of the level.
        n_bytes: exact size of the file.
        tensor_types: type of every tensor, by name.
        fallbacks: tensors whose rows do not fit the level's block, stored in another type.
        needs_imatrix: the library refuses this level without an importance matrix, or with the one given.
        unknown: the tensor because of which it refuses the one given, '' otherwise.
    """

    level: str
    n_bytes: int
    tensor_types: Mapping[str, str]
    fallbacks: int
    needs_imatrix: bool
    unknown: str = ""


@dataclass(frozen=True)
class Quantized:
    """A finished, verified file, named by its sha256.

    Attributes:
        path: `<folder>/<sha256>.gguf`.
        sha256: of the whole file.
        n_bytes: its size.
        tensor_types: type of every tensor, by name, as read back from the file.
        fallbacks: see Forecast.
        seconds: what quantizing took, without verifying.
    """

    path: Path
    sha256: str
    n_bytes: int
    tensor_types: Mapping[str, str]
    fallbacks: int
    seconds: float


def refuse_quantized(model: CheckedModel, *, allow: bool) -> None:
    """Refuse an original that is not F32, F16 or BF16, unless allowed.

    Raises:
        AlreadyQuantized: naming the types found.
    """
    types = {tensor.ggml_type for tensor in model.tensors if len(tensor.shape) > 1} - UNQUANTIZED
    if types and not allow:
        raise AlreadyQuantized(
            f"{model.path.name} is already quantized ({', '.join(sorted(types))}): there is no unquantized "
            "model to measure against, and errors would add up. Give the F16, BF16 or F32 file, or pass "
            "--allow-requantize to measure against this one.")


class _Parameters:
    """The parameters of llama_model_quantize, and everything they point to."""

    def __init__(self, spec: QuantizeSpec, *, dry_run: bool) -> None:
        lib = library()
        self.native = lib.llama_model_quantize_default_params()
        self.native.nthread = spec.options.thread_count
        self.native.ftype = spec.level.ftype
        self.native.allow_requantize = spec.allow_requantize
        self.native.dry_run = dry_run
        self.native.max_buf_size = spec.max_buffer_bytes
        if spec.imatrix is not None:
            self._imatrix = NativeImatrix(spec.imatrix)
            self.native.imatrix = ctypes.cast(self._imatrix.array, type(self.native.imatrix))
        if spec.types:
            numbers = {name: number for number, (name, _, _) in tensor_types().items()}
            self._types = (lib.llama_model_tensor_override * (len(spec.types) + 1))()  # the last, all zero, ends it
            for slot, (name, ggml_type) in zip(self._types, spec.types.items(), strict=False):
                slot.pattern, slot.type = _pattern(name).encode(), numbers[ggml_type]
            self.native.tt_overrides = ctypes.cast(self._types, type(self.native.tt_overrides))


def _pattern(name: str) -> str:
    """Return the regular expression, as C++ has them, that only this name matches."""
    return "^" + name.replace(".", r"\.") + "$"


def _types_in(lines: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    types = dict(before)
    for match in _TENSOR_LINE.finditer("".join(lines)):
        new = match["dry"] or match["new"] or match["old"]
        types[match["name"]] = new.upper()
    return types


def forecast(spec: QuantizeSpec) -> Forecast:
    """Compute the exact result of quantizing, without writing anything.

    Raises:
        AlreadyQuantized: unless the spec allows it.
        EngineFailed: the library refuses the model.
    """
    refuse_quantized(spec.model, allow=spec.allow_requantize)
    if spec.imatrix is not None:
        check_fits(spec.imatrix, spec.model.tensors, "The importance matrix", spec.model.path.name)
    params = _Parameters(spec, dry_run=True)
    with log.capture() as lines:
        log.forget()
        status = library().llama_model_quantize(
            os.fsencode(spec.model.path), os.fsencode(spec.model.path.with_suffix(".dry-run")),
            ctypes.byref(params.native))
    if status != 0:
        raise EngineFailed(f"{spec.model.path.name} cannot be quantized to {spec.level.name}: "
                           f"{log.reason('the engine gives no reason')}.")
    text = "".join(lines)
    types = _types_in(lines, {tensor.name: tensor.ggml_type for tensor in spec.model.tensors})
    unknown = _first_unknown(spec, types)
    return Forecast(
        level=spec.level.name, n_bytes=file_size(spec.model, types), tensor_types=types,
        fallbacks=sum(int(match[1]) for match in _FALLBACKS.finditer(text)),
        needs_imatrix="require an imatrix" in text or bool(unknown), unknown=unknown)


def _first_unknown(spec: QuantizeSpec, types: Mapping[str, str]) -> str:
    """Return the first tensor whose type needs an importance that the matrix does not have; '' for none."""
    if spec.imatrix is None:
        return ""
    needing = NEEDING_IMATRIX | ({"Q2_K"} if spec.level.name == "Q2_K_S" else frozenset())
    return next((tensor.name for tensor in spec.model.tensors
                 if types[tensor.name] in needing and tensor.ggml_type not in needing
                 and tensor.name not in _EXEMPT and tensor.name not in spec.imatrix.entries), "")


def quantize(spec: QuantizeSpec, expected: Forecast, folder: Path,
             progress: Progress | None = None) -> Quantized:
    """Quantize into folder; the file appears there complete, verified and named by its sha256.

    It is written to `folder/incoming/`, checked, loaded, evaluated finite, synced to disk and
    then renamed. An external tool is run with the same care.

    Args:
        spec: what to do.
        expected: the forecast of the same spec.
        folder: the blob store.
        progress: told the finished share of the tensors' bytes, 0 to 1.

    Raises:
        NeedsImatrix: the level cannot be made without an importance matrix, or with the one given.
        DiskFull: nothing is left behind.
        EngineFailed: the library's reason, or the file is not what was forecast.
    """
    if expected.needs_imatrix:
        raise NeedsImatrix(
            f"{spec.level.name} needs an importance matrix that knows {expected.unknown}: give more calibration text."
            if expected.unknown else f"{spec.level.name} needs an importance matrix: give calibration text, or choose "
            "a level that does without, such as Q2_K or IQ3_S.")
    incoming = temporary_beside(folder / "incoming" / f"{spec.level.name}.gguf")
    started = time.monotonic()
    try:
        with explained(folder):
            incoming.parent.mkdir(parents=True, exist_ok=True)
            _write(spec, expected, incoming, progress or (lambda _share: None))
            failpoint("quantize.written")
        seconds = time.monotonic() - started
        types = _verify(spec, expected, incoming)
        with explained(folder):
            fsync_file(incoming)
            sha256 = sha256_file(incoming)
            failpoint("quantize.verified")
            final = folder / f"{sha256}.gguf"
            incoming.chmod(0o444)
            incoming.replace(final)
            fsync_folder(folder)
            failpoint("quantize.renamed")
    finally:
        with contextlib.suppress(OSError):  # what already went wrong is the one to hear of
            incoming.unlink()
    return Quantized(final, sha256, final.stat().st_size, types, expected.fallbacks, seconds)


def _write(spec: QuantizeSpec, expected: Forecast, target: Path, progress: Progress) -> None:
    if shutil.disk_usage(target.parent).free < expected.n_bytes:
        raise DiskFull(f"{spec.level.name} needs {expected.n_bytes / 1e6:,.1f} MB in {target.parent.parent}, "
                       f"and only {shutil.disk_usage(target.parent).free / 1e6:,.1f} MB are free.")
    if spec.tool is not None:
        _run_tool(spec, spec.tool, target, progress)
        return
    params = _Parameters(spec, dry_run=False)
    status: list[int] = []
    with log.capture() as lines:
        log.forget()
        call = threading.Thread(daemon=True, target=lambda: status.append(library().llama_model_quantize(
            os.fsencode(spec.model.path), os.fsencode(target), ctypes.byref(params.native))))
        call.start()
        share = _ShareOfBytes(spec.model)
        while call.is_alive():
            call.join(0.1)
            progress(share.of(lines))
    if status != [0]:
        reason = log.reason("the engine gives no reason")
        if shutil.disk_usage(target.parent).free < (1 << 20):
            raise DiskFull(f"The disk under {target.parent.parent} filled up while writing {spec.level.name}.")
        raise EngineFailed(f"Quantizing to {spec.level.name} failed: {reason}.")


class _ShareOfBytes:
    """How much of the model the log's lines have named so far, weighted by tensor size."""

    def __init__(self, model: CheckedModel) -> None:
        self._sizes = {tensor.name: tensor.n_bytes for tensor in model.tensors}
        self._total = max(1, sum(self._sizes.values()))
        self._done, self._read, self._last = 0, 0, 0

    def of(self, lines: list[str]) -> float:
        """Return the share of bytes whose tensors are finished, 0 to 1."""
        fresh, self._read = "".join(lines[self._read:]), len(lines)
        for match in re.finditer(r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[", fresh):
            self._done += self._last
            self._last = self._sizes.get(match[1], 0)
        return self._done / self._total


def tool_identity(tool: Path | None) -> str | None:
    """Return the sha256 of an external tool, None for the library.

    Raises:
        ToolFailed: the file cannot be read.
    """
    if tool is None:
        return None
    try:
        return sha256_file(tool)
    except OSError as problem:
        raise ToolFailed(f"The tool {tool} cannot be read: {problem.strerror}. "
                         "Give the path of a llama-quantize binary to --quant-tool.") from problem


def _run_tool(spec: QuantizeSpec, tool: Path, target: Path, progress: Progress) -> None:
    """Run an external llama-quantize, its output read line by line for progress."""
    options: list[str] = ["--allow-requantize"] if spec.allow_requantize else []
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if spec.imatrix is not None:
            write_imatrix(Path(folder) / "imatrix.gguf", spec.imatrix)
            options += ["--imatrix", f"{folder}/imatrix.gguf"]
        if spec.types:
            Path(folder, "types.txt").write_text(tensor_type_file(spec.types), encoding="utf-8")
            options += ["--tensor-type-file", f"{folder}/types.txt"]
        _follow_tool(spec, [str(tool), *options, str(spec.model.path), str(target), spec.level.name,
                            str(spec.options.thread_count)], progress)


def tensor_type_file(types: Mapping[str, str]) -> str:
    """Return what `llama-quantize --tensor-type-file` reads: a pattern and a type per line."""
    return "".join(f"{_pattern(name)}={ggml_type}\n" for name, ggml_type in types.items())


def _follow_tool(spec: QuantizeSpec, command: list[str], progress: Progress) -> None:
    tool = Path(command[0])
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL,  # noqa: S603 - the user named the tool
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                   preexec_fn=die_with_parent())
    except OSError as problem:
        raise ToolFailed(f"The tool {tool} does not start: {problem.strerror}. "
                         "Give the path of a llama-quantize binary to --quant-tool.") from problem
    share, lines = _ShareOfBytes(spec.model), []
    with process:
        assert process.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in process.stdout:
            lines.append(line)
            progress(share.of(lines))
    if process.returncode != 0:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        raise ToolFailed(f"{tool.name} ended with status {process.returncode}: {last}")


def _verify(spec: QuantizeSpec, expected: Forecast, file: Path) -> dict[str, str]:
    """Read back, load and evaluate the file; return its tensor types."""
    if not file.exists():
        raise EngineFailed(f"Quantizing to {spec.level.name} wrote no file.")
    header = check_gguf(file)
    types = {tensor.name: tensor.ggml_type for tensor in header.tensors}
    if types.keys() != expected.tensor_types.keys():
        raise EngineFailed(f"{spec.level.name} came out with {len(types)} tensors instead of "
                           f"{len(expected.tensor_types)}.")
    if spec.tool is None and file.stat().st_size != expected.n_bytes:
        raise EngineFailed(f"{spec.level.name} came out with {file.stat().st_size:,} bytes instead of the "
                           f"forecast {expected.n_bytes:,}.")
    if header.metadata.get("general.file_type") != spec.level.ftype:
        raise EngineFailed(f"Asked for {spec.level.name}, and the file says that it is of another level: number "
                           f"{header.metadata.get('general.file_type')} instead of {spec.level.ftype}.")
    with load_model(file, spec.options) as model:
        check_finite(model)
    return types
