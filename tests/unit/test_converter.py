"""The converter's complaints made one sentence each, and its source read without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loops.engine.model import OutOfMemory
from loops.finetune.converter import (
    ConversionFailed,
    Converter,
    ConverterMissing,
    UnknownArchitecture,
    check_architecture,
    complaint,
    run_script,
)
from loops.finetune.extra import TrainExtraMissing
from loops.finetune.model_folder import TokenizerMissing, WeightsDamaged
from loops.finetune.parity import TokenizerMismatch
from state.files import DiskFull

TRACE = "Traceback (most recent call last):"


@pytest.mark.parametrize(("lines", "status", "error", "said"), [
    ([TRACE, '  File "x", line 1', "ValueError: Can not map tensor 'a.b'"], 1, ConversionFailed,
     "refused the model: Can not map tensor 'a.b'."),
    ([TRACE, "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()"], 1,
     TokenizerMismatch, "how this tokenizer splits text"),
    (["INFO:hf-to-gguf:x", "ERROR:hf-to-gguf:Model FooForCausalLM is not supported"], 1, UnknownArchitecture,
     "Model FooForCausalLM is not supported"),
    ([TRACE, "FileNotFoundError: File not found: /m/tokenizer.model"], 1, TokenizerMissing, "tokenizer.model"),
    ([TRACE, "OSError: [Errno 28] No space left on device"], 1, DiskFull, "filled up"),
    ([TRACE, "ModuleNotFoundError: No module named 'mistral_common'"], 1, TrainExtraMissing, "mistral_common"),
    ([TRACE, "ValueError: Missing or incomplete model files: ['a']", "Missing tensors: ['b']"], 1, WeightsDamaged,
     "incomplete"),
    ([TRACE, "MemoryError"], 1, OutOfMemory, "out of memory"),
    (["Writing"], -9, OutOfMemory, "out of memory"),
    ([], -11, ConversionFailed, "signal 11"),
    ([], 3, ConversionFailed, "status 3"),
    (["INFO:x:one", "the last thing it said"], 1, ConversionFailed, "the last thing it said"),
])
def test_a_complaint_is_one_sentence(lines: list[str], status: int, error: type[Exception], said: str) -> None:
    found = complaint(lines, status)
    assert type(found) is error
    assert said in str(found)
    assert "\n" not in str(found)
    assert TRACE not in str(found)


def converter(folder: Path, script: str) -> Converter:
    (folder / "conversion").mkdir()
    (folder / "conversion" / "__init__.py").write_text(
        'raise SystemExit("it ran")\nTEXT_MODEL_MAP: dict[str, str] = {"LlamaForCausalLM": "llama"}\n')
    (folder / "script.py").write_text(script)
    return Converter(folder)


def test_an_architecture_is_looked_up_without_running_anything(tmp_path: Path) -> None:
    known = converter(tmp_path, "")
    check_architecture(known, "LlamaForCausalLM", tmp_path)
    with pytest.raises(UnknownArchitecture, match="nearest that it knows is LlamaForCausalLM"):
        check_architecture(known, "LlamasForCausalLM", tmp_path)
    with pytest.raises(UnknownArchitecture, match="does not say"):
        check_architecture(known, "", tmp_path)


def test_progress_is_read_and_the_script_hears_of_no_cache(tmp_path: Path) -> None:
    script = ('import os, sys\nfor p in (0, 50, 100): sys.stderr.write(f"\\rWriting: {p:3}%|#| 1/2")\n'
              'print("\\n", os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"], sys.argv[1])\n'
              'open("seen", "w").write(os.environ["HF_HOME"])\n')
    seen: list[float] = []
    run_script(converter(tmp_path, script), "script.py", ["a b"], tmp_path / "home",
               lambda done, _total: seen.append(done))
    assert seen == [0.0, 50.0, 100.0]
    assert (tmp_path / "home" / "seen").read_text() == str(tmp_path / "home")


def test_a_script_that_fails_is_told_and_one_that_is_missing_too(tmp_path: Path) -> None:
    failing = converter(tmp_path, 'raise ValueError("of the weights\\nand more")')
    with pytest.raises(ConversionFailed) as caught:
        run_script(failing, "script.py", [], tmp_path / "home", lambda _done, _total: None)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConverterMissing, match="has no other"):
        run_script(failing, "other.py", [], tmp_path / "home", lambda _done, _total: None)
