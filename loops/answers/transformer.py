"""A Hugging Face folder as a speaker: transformers on the CPU or a GPU, without any code of the folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loops.answers.speaker import Advance, Timing
from loops.engine.generate import Reply, Sampling
from loops.engine.model import NotFinite, OutOfMemory, Tokens
from loops.engine.score import Likelihood, Question
from loops.finetune.extra import require
from loops.finetune.model_folder import ModelFolder
from state.faults import NightpressError

BATCH_TOKENS = 4096  #: scored together, padding included
LOGITS_BYTES = 256 << 20  #: of one batch
SPARE_BYTES = 1 << 30  #: memory for the computation beside the weights
#: tokens that end a turn, by their texts, where a vocabulary has them as special ones; llama.cpp ends at these too
#: (`llama-vocab.cpp`, special_eog_ids)
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
         "<EOT>", "_<EOT>", "[EOT]", "<|return|>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<turn|>")


class FolderDoesNotLoad(NightpressError):
    """transformers cannot load the model folder; the message says why."""

    exit_code = 124


@contextlib.contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Turn whatever the libraries raise on files that they do not understand into a sentence."""
    try:
        yield
    except (MemoryError, NightpressError):
        raise
    except Exception as problem:
        if "out of memory" in str(problem).lower() or "can't allocate memory" in str(problem):
            raise OutOfMemory(f"{name} does not fit into memory; use a larger machine, or convert it and evaluate "
                              "the GGUF.") from problem
        raise FolderDoesNotLoad(f"transformers cannot load {part} of {name}: "
                                f"{' '.join(str(problem).split())[:200] or type(problem).__name__}") from problem


class TorchSpeaker:
    """A model of transformers; see `loops.answers.speaker.Speaker`. Use `load`."""

    def __init__(self, name: str, tokenizer: Any, model: Any, device: str) -> None:
        self._torch, self._tokenizer, self._model = import_module("torch"), tokenizer, model
        self.name, self.device = name, device
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.template = ""
        with contextlib.suppress(ValueError):  # it has none, or several of which none is the default
            self.template = str(tokenizer.get_chat_template())
        self.bos, self.eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
        self.bos_id = -1 if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.adds_bos = self.bos_id >= 0 and list(tokenizer("a")["input_ids"])[:1] == [self.bos_id]
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 4096)
        special = {str(added.content): int(token) for token, added in tokenizer.added_tokens_decoder.items()}
        configured = getattr(model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        self._ends = {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None} | {
            special[text] for text in _ENDS if text in special}
        self._control = {int(token) for token in tokenizer.all_special_ids} | {
            int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> Tokens:
        """See `Speaker`."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)
        begin = [self.bos_id] if add_bos and self.bos_id >= 0 else []
        return np.asarray([*begin, *ids["input_ids"]], dtype=np.int32)

    def is_end(self, token: int) -> bool:
        """See `Speaker`."""
        return token in self._ends

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Any, Any]:
        """Return ids and mask of shape (rows, longest), filled up on one side."""
        width = max(map(len, rows))
        ids, mask = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(2))
        for at, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[at, place], mask[at, place] = row, 1
        return (self._torch.from_numpy(part).to(self.device) for part in (ids, mask))  # type: ignore[return-value]

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, progress: Advance | None = None) -> list[Reply]:
        """See `Speaker`; samples are not those that the engine draws from the same seed."""
        replies: list[Reply] = []
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ends = sorted(self._ends)
        for start in range(0, len(prompts), 8):
            batch = [prompt.tolist() for prompt in prompts[start:start + 8]]
            ids, mask = self._padded(batch, left=True)
            self._torch.manual_seed(sampling.seed + start)
            with self._torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_tokens,
                    eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **how)
            for row in out[:, ids.shape[1]:].tolist():
                end = next((at for at, token in enumerate(row) if token in self._ends), None)
                made = row[:end] if end is not None else row
                replies.append(Reply(self._text(made), tuple(made), end is not None))
            if progress is not None:
                progress(len(replies) * sampling.max_tokens, len(prompts) * sampling.max_tokens)
        return replies

    def _text(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in self._control]
        return str(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)).strip()

    def score(self, questions: Sequence[Question], progress: Advance | None = None) -> list[tuple[Likelihood, ...]]:
        """See `Speaker`."""
        pairs = [(at, question.prompt, continuation) for at, question in enumerate(questions)
                 for continuation in question.continuations]
        found: list[list[Likelihood]] = [[] for _ in questions]
        for batch in self._batches([len(prompt) + len(continuation) for _, prompt, continuation in pairs]):
            chosen = [pairs[at] for at in batch]
            for (at, _, _), likelihood in zip(chosen, self._score([(one, two) for _, one, two in chosen]), strict=True):
                found[at].append(likelihood)
            if progress is not None:
                progress(sum(map(bool, found)), len(questions))
        return [tuple(each) for each in found]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield places in order, as many as fit together."""
        most = min(BATCH_TOKENS, LOGITS_BYTES // (4 * int(self._model.config.get_text_config().vocab_size)))
        batch: list[int] = []
        for at, length in enumerate(lengths):
            if batch and max(length, *(lengths[one] for one in batch)) * (len(batch) + 1) > most:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Likelihood]:
        torch = self._torch
        ids, mask = self._padded([[*prompt.tolist(), *continuation.tolist()] for prompt, continuation in pairs],
                                 left=False)
        with torch.inference_mode(), _explained(self.name, "a batch"):
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = []
        for row, (prompt, continuation) in enumerate(pairs):
            if not len(continuation):
                found.append(Likelihood(0.0, 0, ()))
                continue
            first = len(prompt) - 1
            mine = logits[row, first:first + len(continuation)].float()
            targets = ids[row, len(prompt):len(prompt) + len(continuation)]
            values = torch.log_softmax(mine, dim=-1).gather(1, targets[:, None])[:, 0]
            if not bool(torch.isfinite(values).all()):
                raise NotFinite(f"{self.name} computes values that are not finite: its weights are damaged.")
            each = tuple(float(value) for value in values.cpu())
            found.append(Likelihood(sum(each), len(each), each, int((mine.argmax(dim=-1) == targets).sum())))
        return found

    def time(self, prompt: Tokens, tokens: int) -> Timing:
        """See `Speaker`."""
        torch = self._torch

        def now() -> float:
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.monotonic()

        with torch.inference_mode():
            ids = torch.tensor([prompt.tolist()], device=self.device)
            started = now()
            out = self._model(input_ids=ids, use_cache=True)
            token = out.logits[:, -1:].argmax(dim=-1)
            first = now()
            for _ in range(tokens - 1):
                out = self._model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(dim=-1)
            return Timing(len(prompt), first - started, tokens - 1, now() - first)


def load(folder: ModelFolder, cache: Path) -> TorchSpeaker:
    """Load a model folder, onto a GPU as it is stored where there is one, else in 32 bits where memory allows that.

    Args:
        folder: checked, without code and pickles, see `loops.finetune.model_folder.stage`.
        cache: a folder for what the libraries keep.

    Raises:
        TrainExtraMissing: libraries are missing.
        OutOfMemory: the weights do not fit.
        FolderDoesNotLoad: with the library's reason.
    """
    require("Evaluating a Hugging Face folder", "torch", "transformers", "safetensors")
    import psutil

    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(cache),
                       "TOKENIZERS_PARALLELISM": "false"})
    torch, transformers = import_module("torch"), import_module("transformers")  # untyped, and only in the extra
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = psutil.virtual_memory().available - SPARE_BYTES
    dtype: Any = torch.float32 if device == "cpu" and 4 * folder.parameters <= free else "auto"
    if device == "cpu" and folder.n_bytes > free:
        raise OutOfMemory(f"{folder.path.name} needs {(folder.n_bytes + SPARE_BYTES) / 1e9:,.1f} GB of memory and "
                          f"{(free + SPARE_BYTES) / 1e9:,.1f} GB are free; close other programs, or convert it and "
                          "evaluate a quantized level.")
    with _explained(folder.path.name, "its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False)
    with _explained(folder.path.name, "its weights"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype)
        model = model.to(device).eval()
    return TorchSpeaker(folder.path.name, tokenizer, model, device)
