"""llama.cpp's own converter: its files checked, run in a process of its own, its complaints made one sentence."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loops.engine.model import OutOfMemory
from loops.finetune.extra import INSTALL, TrainExtraMissing
from loops.finetune.model_folder import TokenizerMissing, WeightsDamaged
from loops.finetune.parity import TokenizerMismatch
from loops.leash import die_with_parent
from state.faults import NightpressError
from state.files import DiskFull

MODEL_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
LEGACY_SCRIPT = "convert_llama_ggml_to_gguf.py"
#: what of llama.cpp's source is taken, its licence with it
PARTS = (MODEL_SCRIPT, ADAPTER_SCRIPT, LEGACY_SCRIPT, "conversion", "gguf-py", "LICENSE")
OUTTYPES = ("f16", "bf16", "f32", "auto")
#: no network, and nothing of what the user has in a cache: what is converted is what lies in the folder
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
_WRITING = re.compile(r"(?:Writing|Shard \(\d+/\d+\)):\s+(\d+)%\|")
_RAISED = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit))(?:: (.*))?")
_LOGGED = re.compile(r"(?:ERROR|CRITICAL):[\w.-]+:(.*)")
KEPT_LINES = 400  #: of what the converter says; a traceback is shorter


class UnknownArchitecture(NightpressError):
    """llama.cpp's converter of this engine does not know the architecture; a newer llama-cpp-python may."""

    exit_code = 95


class ConverterMissing(NightpressError):
    """llama.cpp's converter is not here; fetch it, or name a folder of llama.cpp with --llama-cpp."""

    exit_code = 99


class ConversionFailed(NightpressError):
    """The converter refused the model; the message has its reason."""

    exit_code = 100


@dataclass(frozen=True)
class Converter:
    """A folder with llama.cpp's scripts.

    Attributes:
        folder: that holds them.
        version: of the llama-cpp-python release it came with; '' for a folder of the user's.
    """

    folder: Path
    version: str = ""


def check_layout(folder: Path) -> None:
    """Make sure that a folder holds the converter whole.

    Raises:
        ConverterMissing: naming what is missing.
    """
    for name in (MODEL_SCRIPT, ADAPTER_SCRIPT, "conversion/__init__.py", "gguf-py/gguf/__init__.py"):
        if not (folder / name).is_file():
            raise ConverterMissing(f"{folder} lacks {name}, so it is no llama.cpp of the engine's version; its source "
                                   "is in vendor/llama.cpp of llama-cpp-python's source archive.")


def architectures(converter: Converter) -> frozenset[str]:
    """Return the architectures that the converter names, read from its source without running it; empty if it can't."""
    try:
        tree = ast.parse((converter.folder / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return frozenset()
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "TEXT_MODEL_MAP" and isinstance(node, ast.AnnAssign):
            return frozenset(key.value for key in getattr(node.value, "keys", ())
                             if isinstance(key, ast.Constant) and isinstance(key.value, str))
    return frozenset()


def check_architecture(converter: Converter, architecture: str, where: Path) -> None:
    """Refuse a model whose architecture the converter does not know.

    Raises:
        UnknownArchitecture: naming the nearest that it knows.
    """
    known = architectures(converter)
    if not architecture:
        raise UnknownArchitecture(f"{where} does not say which architecture it is: config.json has no `architectures`.")
    if known and architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1, cutoff=0.8)
        hint = f" The nearest that it knows is {near[0]}." if near else ""
        raise UnknownArchitecture(f"llama.cpp's converter of this engine does not know {architecture[:80]!r}.{hint} A "
                                  "newer llama-cpp-python may.")


def run_script(converter: Converter, script: str, arguments: Sequence[str], home: Path,
               progress: Callable[[float, float], None], settings: Mapping[str, str] | None = None) -> None:
    """Run one of the scripts to its end, in a process that ends with this one.

    Args:
        converter: whose scripts.
        script: by name.
        arguments: of the script.
        home: an empty folder that stands in for the caches of Hugging Face libraries.
        progress: told the percentage written, of 100.
        settings: further environment variables.

    Raises:
        ConverterMissing: there is no such script.
        ConversionFailed, UnknownArchitecture, TokenizerMissing, TokenizerMismatch, WeightsDamaged, DiskFull,
        OutOfMemory, TrainExtraMissing: see `complaint`.
    """
    file = converter.folder / script
    if not file.is_file():
        raise ConverterMissing(f"{converter.folder} has no {script}.")
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_OFFLINE, "HF_HOME": str(home), **(settings or {})}
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    # without -P: the scripts import what lies beside them
    start = [sys.executable, "-P", "-m", "loops.finetune.legacy"] if script == LEGACY_SCRIPT else [sys.executable]
    process = subprocess.Popen([*start, str(file), *arguments], stdin=subprocess.DEVNULL, cwd=home,  # noqa: S603
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                               errors="replace", env=environment, preexec_fn=die_with_parent())
    with process:
        assert process.stdout is not None  # noqa: S101 - PIPE was asked for
        for line in process.stdout:  # a carriage return of the progress bar ends a line too
            found = _WRITING.match(line)
            if found:
                progress(float(found[1]), 100.0)
            elif line.strip():
                lines.append(line.rstrip())
                print(line, end="", file=sys.stderr)  # the worker's log has the whole story
    if process.returncode != 0:
        raise complaint(lines, process.returncode)


def complaint(lines: Iterable[str], status: int) -> NightpressError:
    """Return the error that says in one sentence why the converter stopped.

    Args:
        lines: the end of what it printed.
        status: its exit status, negative for a signal.
    """
    said = list(lines)
    kind, reason = _reason(said)
    everything = "\n".join(said)
    if status == -9 or kind == "MemoryError" or "can't allocate memory" in everything:
        return OutOfMemory("The converter ran out of memory; close other programs, or convert on a larger machine.")
    if "No space left on device" in everything or "Disk quota exceeded" in everything:
        return DiskFull("The disk filled up while converting; free some space, then run the same command again.")
    if kind in {"ModuleNotFoundError", "ImportError"}:
        return TrainExtraMissing(f"The converter needs more libraries ({reason}): {INSTALL}")
    if "BPE pre-tokenizer was not recognized" in everything:
        return TokenizerMismatch("llama.cpp does not know how this tokenizer splits text: it was changed, or is newer "
                                 "than the engine. Use the tokenizer that the model was published with.")
    if re.search(r"Model \S+ is not supported|Architecture \S+ not supported", everything):
        return UnknownArchitecture(f"llama.cpp's converter of this engine refuses the architecture: {reason}")
    if kind == "FileNotFoundError" and "token" in reason.lower():
        return TokenizerMissing(f"The converter misses a file of the tokenizer: {reason}")
    if "Missing or incomplete model files" in everything or "Mismatch between weight map" in everything:
        return WeightsDamaged(f"The converter finds the weights incomplete: {reason}")
    if status < 0:
        return ConversionFailed(f"The converter was ended by signal {-status}.")
    return ConversionFailed(f"The converter refused the model: {reason or f'it ended with status {status}'}.")


def _reason(lines: Sequence[str]) -> tuple[str, str]:
    """Return kind and message of the last exception of a traceback, else '' and the last error that was logged."""
    for line in reversed(lines):
        raised = _RAISED.fullmatch(line)
        if raised and any(one.startswith("Traceback") for one in lines):
            return raised[1], _tidy(raised[2] or raised[1])
    for line in reversed(lines):
        logged = _LOGGED.match(line)
        if logged:
            return "", _tidy(logged[1])
    return "", _tidy(lines[-1]) if lines else ""


def _tidy(text: str) -> str:
    return " ".join(text.split())[:200].rstrip(". ")
