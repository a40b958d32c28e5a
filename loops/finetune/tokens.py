"""How long texts are: in the tokens of a model, or in words where none is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration_data.checks import words
from loops.finetune.extra import require
from loops.finetune.faults import DatasetRefused


@dataclass(frozen=True)
class Tokenizer:
    """What counts.

    Attributes:
        name: of the file or folder, empty for words.
        unit: what is counted, in the plural.
        count: returns the length of each text.
        special: texts of the tokens that no text may hold.
    """

    name: str
    unit: str
    count: Callable[[Sequence[str]], list[int]]
    special: tuple[str, ...] = ()


WORDS = Tokenizer("", "words", lambda texts: [len(words(text)) for text in texts])


def from_folder(folder: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder; no code of the folder runs.

    Raises:
        DatasetRefused: there is none in it, or it does not load.
        TrainExtraMissing: the library is not installed.
    """
    require(f"Reading the tokenizer of {folder.name}", "transformers")
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # the library raises its own and those of three tokenizer formats
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")
        raise DatasetRefused(f"The tokenizer in {folder} does not load: {reason[:200]}.") from problem

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in found(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
                ] if texts else []

    return Tokenizer(folder.name, "tokens", count, tuple(str(token) for token in found.all_special_tokens))
