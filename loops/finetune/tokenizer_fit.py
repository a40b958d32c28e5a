"""Whether a tokenizer belongs to a model: told from ids, from names, and from what the model makes of plain English."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loops.engine.logits import Floats, log_softmax
from loops.finetune import parity
from loops.finetune.model_folder import CONFIG, ModelFolder
from loops.finetune.parity import TokenizerMismatch

#: rows of the embeddings without a token: at most so many, or this share of them. Of models in use the most are
#: DeepSeek-V2's 2,385 of 102,400 (2.3 %) and Phi-2's 905 of 51,200 (1.8 %).
SPARE_ROWS, SPARE_SHARE = 1024, 0.05
#: Everyday English: what even a small model of conversations knows. The starter and its two sisters read it with a
#: loss of 6.9 to 8.1 nats per token, where ln(vocabulary) is 8.0, and shuffled with 3.5 to 3.9 more; with a tokenizer
#: of another of them, of the same size, with 11.1 to 13.1, and shuffled with 0.4 to 0.9 more. A model of random weights
#: comes to ln(vocabulary) + 0.7 in any order.
TALK = (
    "I had a long day. Can you say something kind? I am sorry to hear that. It sounds hard. What would help you now? "
    "I feel alone and my friend does not call me any more. That must hurt. You are not alone, and it is good that you "
    "told me. Thank you, I feel a little better now.")
#: nats per token above ln(vocabulary), the loss of blind guessing, from which on it is asked whether the order counts
EXCESS = 1.5
#: nats per token that the right order must be better than a wrong one
ORDER = 1.5
#: files that are a tokenizer by themselves; a tokenizer_config.json alone is none
_WHOLE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_ids(model: ModelFolder, tokenizer: Any, rows: int) -> None:
    """Compare a tokenizer's ids with the model's.

    Args:
        model: whose config.json and generation_config.json name ids.
        tokenizer: of transformers.
        rows: of the embeddings.

    Raises:
        TokenizerMismatch: it has ids beyond the rows, or far fewer; or the model ends its answers, or begins its
            texts, with a token that is plain text to the tokenizer.
    """
    name, vocabulary = model.path.name, tokenizer.get_vocab()
    n_tokens = max(len(tokenizer), 1 + max(vocabulary.values(), default=-1))
    if n_tokens > rows:
        raise TokenizerMismatch(f"The tokenizer of {name} has {n_tokens:,} tokens and the model only {rows:,}: it is "
                                "that of another model.")
    if rows - n_tokens > max(SPARE_ROWS, SPARE_SHARE * rows):
        raise TokenizerMismatch(f"The tokenizer of {name} has {n_tokens:,} tokens and the model {rows:,}, more than "
                                "padding explains: it is that of another model.")
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = {token: text for text, token in vocabulary.items()}
    for kind in ("bos", "eos"):
        own = getattr(tokenizer, f"{kind}_token_id")
        for file, token in _named(model, f"{kind}_token_id"):
            if own is None or token in control or not 0 <= token < rows:
                continue
            raise TokenizerMismatch(
                f"{file} of {name} says that token {token} is the model's {kind}; to the tokenizer that is "
                f"{texts.get(token, 'nothing')!r}, and its own {kind} is {own}: it is that of another model, or {file} "
                "is wrong.")


def _named(model: ModelFolder, key: str) -> list[tuple[str, int]]:
    """Return the ids that the model's files give a kind of token, each with the name of the file."""
    configs = [(CONFIG, model.config)]
    with contextlib.suppress(OSError, ValueError):
        generation = json.loads((model.path / "generation_config.json").read_text(encoding="utf-8"))
        configs += [("generation_config.json", generation)] if isinstance(generation, dict) else []
    found: list[tuple[str, int]] = []
    for file, config in configs:
        tokens = config.get(key)
        found += [(file, token) for token in (tokens if isinstance(tokens, list) else [tokens])
                  if isinstance(token, int) and not isinstance(token, bool)]
    return found


def check_loss(model: ModelFolder, ids: Sequence[int], compute: Callable[[Sequence[int]], Floats]) -> None:
    """Refuse a tokenizer whose tokens the model does not know: it does worse than blind guessing, in any order.

    Args:
        model: for its name.
        ids: of `TALK`.
        compute: returns the model's logits for ids, shape (tokens, rows).

    Raises:
        TokenizerMismatch: the mean loss is `EXCESS` above ln(rows), and less than `ORDER` below that of shuffled ids.
    """
    logits = compute(ids)
    found, blind = mean_loss(ids, logits), math.log(logits.shape[1])
    if found <= blind + EXCESS:
        return
    shuffled = list(ids[1:])
    random.Random(0).shuffle(shuffled)
    shuffled = [ids[0], *shuffled]
    if mean_loss(shuffled, compute(shuffled)) - found < ORDER:
        raise TokenizerMismatch(
            f"{model.path.name} reads plain English with a loss of {found:.1f} nats per token, and no better than the "
            f"same tokens in disorder; blind guessing costs {blind:.1f}. Its tokenizer is that of another model, or it "
            "knows no English: then `nightpress convert --no-parity` leaves the check out.")


def mean_loss(ids: Sequence[int], logits: Floats) -> float:
    """Return the mean negative log-probability of each token after those before it, in nats; 0 for a single token."""
    if len(ids) < 2:
        return 0.0
    expected = log_softmax(np.array(logits[:len(ids) - 1], dtype=np.float32))
    return float(-expected[np.arange(len(ids) - 1), list(ids[1:])].mean())


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a whole tokenizer."""
    return any((folder / name).is_file() for name in _WHOLE)


def choose(base: ModelFolder, adapters: Sequence[Path], rows: int) -> tuple[Path | None, str, tuple[str, ...]]:
    """Decide which tokenizer a merged model gets: the base's, unless an adapter was trained with more tokens.

    Args:
        base: with its tokenizer.
        adapters: staged folders, with or without a tokenizer.
        rows: of the embeddings after merging; 0 for as many as the base has.

    Returns:
        The folder whose tokenizer to take, None for the base's; a chat template to set, '' for none; notes.

    Raises:
        TokenizerMismatch: an adapter's tokenizer reads text otherwise than the base's, or two adapters' differ.
    """
    own = [folder for folder in adapters if has_tokenizer(folder)]
    if not own:
        return None, "", ()
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()

    def load(folder: Path) -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                              config=config)
        except Exception as problem:  # libraries raise anything on files that they do not understand
            raise TokenizerMismatch(f"transformers cannot load the tokenizer of {folder.name}: "
                                    f"{' '.join(str(problem).split())[:200]}.") from problem

    try:
        config = transformers.AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    except Exception as problem:
        raise TokenizerMismatch(f"transformers cannot read {CONFIG} of {base.path.name}: "
                                f"{' '.join(str(problem).split())[:200]}.") from problem
    first = load(base.path)
    limit = rows or int(getattr(config.get_text_config(), "vocab_size", 0) or len(first))
    grown: list[tuple[Path, Any]] = []
    templates: dict[str, None] = {}
    for folder in own:
        found = load(folder)
        _compare(base, first, folder, found, limit)
        if len(found) > len(first) or found.eos_token_id != first.eos_token_id:
            grown.append((folder, found))
        elif template_of(found) not in ("", template_of(first)):
            templates[template_of(found)] = None
    if len(grown) > 1 and any(other.get_vocab() != grown[0][1].get_vocab() for _folder, other in grown[1:]):
        raise TokenizerMismatch("The adapters added different tokens to the tokenizer; merge them one at a time.")
    if grown:
        return grown[0][0], "", (f"The tokenizer is that of {grown[0][0].name}, with its added tokens.",)
    if len(templates) > 1:
        raise TokenizerMismatch("The adapters were trained with different chat templates; merge them one at a time.")
    return None, next(iter(templates), ""), ("The chat template is the adapter's.",) if templates else ()


def _compare(base: ModelFolder, first: Any, folder: Path, found: Any, limit: int) -> None:
    """Make sure that an adapter's tokenizer is the base's, with tokens added at most.

    Raises:
        TokenizerMismatch: it is not.
    """
    mine, theirs = found.get_vocab(), first.get_vocab()
    changed = next((token for token, number in theirs.items() if mine.get(token) != number), None)
    if changed is not None:
        raise TokenizerMismatch(f"The tokenizer of {folder.name} is not that of {base.path.name}: {changed!r} is token "
                                f"{mine.get(changed, 'none')} there, and {theirs[changed]} here.")
    if 1 + max(mine.values()) > limit:
        raise TokenizerMismatch(f"The tokenizer of {folder.name} has {1 + max(mine.values()):,} tokens and the merged "
                                f"model only {limit:,}: the adapter holds no embeddings for those that were added.")
    added = [token for token in mine if token not in theirs]
    for name, text in parity.SAMPLES.items():
        if not any(token in text for token in added) and found(text)["input_ids"] != first(text)["input_ids"]:
            raise TokenizerMismatch(f"The tokenizer of {folder.name} splits the sample {name!r} otherwise than that of "
                                    f"{base.path.name}.")


def template_of(tokenizer: Any) -> str:
    """Return the chat template of a tokenizer of transformers; '' for none, or for several without a default."""
    with contextlib.suppress(ValueError):
        return str(tokenizer.get_chat_template())
    return ""
