"""Train the starter model from scratch on the dialogues of `corpus.py`.

Writes a Hugging Face model folder (safetensors, tokenizer, chat template) and beside it
`training.json`: the settings, the machine and the held-out loss. Every row that K-quants
pack is a multiple of 256 wide, so each level quantizes as it would on a large model.

    python -m loops.starter.train --out starter-hf --minutes 60

Needs the extra `nightpress[starter]`; a CUDA device is used when PyTorch finds one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loops.starter.corpus import HELD_OUT_SEED, TASKS_MIX, Dialogue, Mix, dialogue, mix_with_rag, render
from state.faults import NightpressError

if TYPE_CHECKING:
    import sentencepiece
    import torch
    from transformers import LlamaForCausalLM

VOCAB_SIZE = 3072
CONTEXT = 256
BATCH = 24
VALIDATION_ROWS = 32
REPORT_EVERY_STEPS = 50
BOS, EOS = 1, 2
WEIGHTS_SEED, TOKENIZER_SEED, VALIDATION_SEED = 0, 0, 2
#: the stream a training from scratch draws from, and the one that a resumed training does
FRESH_SEED, RESUMED_SEED = 1, 3
#: what nightpress[starter] brings, by the names that are imported
EXTRA = ("torch", "transformers", "sentencepiece", "google.protobuf")
ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class StarterExtraError(NightpressError):
    """Training the starter model needs more libraries: pip install 'nightpress[starter]'."""

    exit_code: ClassVar[int] = 64


@dataclass(frozen=True)
class Shape:
    """Of a Llama; each width is a multiple of 256, which K-quants ask for."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    tie_word_embeddings: bool = True


#: the starter's own shape, and two others on which benchmarks show that nothing is tuned to it
SHAPES = {"starter": Shape(), "wide": Shape(512, 1536, 4, 8, 4),
          "untied": Shape(num_hidden_layers=6, tie_word_embeddings=False)}


@dataclass(frozen=True)
class Recipe:
    """What one training does; everything in it ends up in training.json."""

    out: Path
    minutes: float = 60
    steps: int | None = None  # ends the training instead of the clock, so that it can be repeated
    peak_lr: float = 3e-3
    seed: int = FRESH_SEED  # of the stream of dialogues
    resume: Path | None = None  # a model folder to go on from, with its tokenizer
    rag_share: float | None = None  # None: the mix as it is
    shape: Shape = SHAPES["starter"]

    @property
    def mix(self) -> Mix:
        """The tasks in their shares."""
        return TASKS_MIX if self.rag_share is None else mix_with_rag(self.rag_share)


@dataclass(frozen=True)
class Report:
    """How the training stands: nats per token on the batch just trained and on the validation rows."""

    step: int
    tokens: int
    loss: float | None
    held_out_loss: float
    tokens_per_s: float


def train_tokenizer(rng: random.Random, dialogues: int = 60_000) -> bytes:
    """Train a SentencePiece BPE with byte fallback; return the serialized model."""
    import sentencepiece

    lines = (line for _ in range(dialogues) for turn in dialogue(rng).turns
             for line in turn.splitlines())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=VOCAB_SIZE, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
        unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, user_defined_symbols=ROLES,
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, num_threads=2, minloglevel=2)
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, drawn: Dialogue) -> list[int]:
    """Token ids of one dialogue, <s> first and </s> after every turn."""
    ids = [BOS]
    pieces = render(drawn.turns).split("</s>")
    for index, piece in enumerate(pieces):
        ids += tokenizer.encode(piece)
        if index < len(pieces) - 1:
            ids.append(EOS)
    return ids


def tokenizer_config() -> dict[str, object]:
    """Settings for the Hugging Face tokenizer.

    llama.cpp's converter takes the special tokens from added_tokens_decoder: without it the
    role markers would be split into plain text.
    """
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
               "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "add_prefix_space": False, "model_max_length": 1024, "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(index): {"content": token, **special}
            for index, token in enumerate(["<unk>", "<s>", "</s>", *ROLES])},
    }


class Stream:
    """Endless rows of CONTEXT + 1 token ids, dialogues packed end to end."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, seed: int,
                 mix: Mix = TASKS_MIX) -> None:
        self.tokenizer, self.rng, self.mix = tokenizer, random.Random(seed), mix
        self.left: list[int] = []

    def batch(self, rows: int) -> torch.Tensor:
        """Return int64 token ids of shape (rows, CONTEXT + 1)."""
        import torch

        need = rows * (CONTEXT + 1)
        while len(self.left) < need:
            self.left += encode(self.tokenizer, dialogue(self.rng, self.mix))
        taken, self.left = self.left[:need], self.left[need:]
        return torch.tensor(taken).view(rows, CONTEXT + 1)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats, computed where the model lies."""
    import torch
    from torch.nn import functional as F  # noqa: N812 - the name PyTorch's own documentation gives it

    ids = ids.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Warm up over 100 steps, then fall along a cosine to a twentieth of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def load(recipe: Recipe, tokenizer: sentencepiece.SentencePieceProcessor) -> LlamaForCausalLM:
    """Return the model to start from, in float32, on the CUDA device when there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(WEIGHTS_SEED)
    if recipe.resume is not None:
        model = LlamaForCausalLM.from_pretrained(recipe.resume, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=tokenizer.vocab_size(), max_position_embeddings=1024, rms_norm_eps=1e-5,
            bos_token_id=BOS, eos_token_id=EOS, **asdict(recipe.shape)))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def fit(recipe: Recipe, model: LlamaForCausalLM,
        tokenizer: sentencepiece.SentencePieceProcessor) -> list[Report]:
    """Train the model in place until the recipe's end or Ctrl-C; return the reports printed on the way.

    The first report stands before any step, the last after the last one. The validation
    rows come from the default mix, so losses compare between recipes.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.95),
                                  weight_decay=0.1)
    stream = Stream(tokenizer, recipe.seed, recipe.mix)
    validation = Stream(tokenizer, VALIDATION_SEED).batch(VALIDATION_ROWS)
    reports: list[Report] = []
    start, step = time.monotonic(), 0
    loss: torch.Tensor | None = None

    def report() -> None:
        with torch.no_grad():
            held = loss_of(model, validation).item()
        tokens, last = step * BATCH * CONTEXT, None if loss is None else loss.item()
        reports.append(Report(step, tokens, last, held, tokens / (time.monotonic() - start)))
        trained = "" if last is None else f"loss {last:.4f} "
        print(f"step {step} tokens {tokens / 1e6:.1f}M {trained}held-out {held:.4f} "
              f"{reports[-1].tokens_per_s:.0f} tok/s", flush=True)

    def progress() -> float:
        if recipe.steps is not None:
            return step / recipe.steps
        return (time.monotonic() - start) / (recipe.minutes * 60)

    report()
    try:
        while (done := progress()) < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.peak_lr, step, done)
            loss = loss_of(model, stream.batch(BATCH))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % REPORT_EVERY_STEPS == 0:
                report()
    except KeyboardInterrupt:
        print(f"stopped after {step} steps; what was learned so far is kept", flush=True)
    if reports[-1].step != step:
        report()
    return reports


def save(recipe: Recipe, model: LlamaForCausalLM, serialized_tokenizer: bytes,
         reports: list[Report]) -> None:
    """Write the Hugging Face folder in bfloat16, and training.json last."""
    import torch
    import transformers

    device = (torch.cuda.get_device_name() if model.device.type == "cuda"
              else f"CPU, {torch.get_num_threads()} threads")
    recipe.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(recipe.out)
    (recipe.out / "tokenizer.model").write_bytes(serialized_tokenizer)
    (recipe.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2))
    record: dict[str, Any] = {
        "held_out_loss": reports[-1].held_out_loss,
        "held_out_loss_before": reports[0].held_out_loss,
        "steps": reports[-1].step,
        "tokens": reports[-1].tokens,
        "parameters": model.num_parameters(),
        "vocabulary": model.config.vocab_size,
        "recipe": asdict(recipe),
        "mix": {task.__name__: round(share, 4) for task, share in recipe.mix},
        "batch": BATCH, "context": CONTEXT,
        "seeds": {"weights": WEIGHTS_SEED, "tokenizer": TOKENIZER_SEED, "training": recipe.seed,
                  "validation": VALIDATION_SEED},
        "device": device,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "reports": [asdict(report) for report in reports],
    }
    (recipe.out / "training.json").write_text(json.dumps(record, indent=2, default=str) + "\n")


def conversion_steps(out: Path) -> str:
    """Say how the folder becomes a GGUF, with the converter that belongs to the pinned engine."""
    try:
        requirements = metadata.requires("nightpress") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        requirements = []
    version = next((line.partition("==")[2].split(";")[0].strip() for line in requirements
                    if line.startswith("llama-cpp-python==")), "VERSION")
    source = f"llama_cpp_python-{version}"
    return (f"To convert it for llama.cpp:\n"
            f"  pip download --no-deps --no-binary llama-cpp-python llama-cpp-python=={version}\n"
            f"  tar -xzf {source}.tar.gz\n"
            f"  python {source}/vendor/llama.cpp/convert_hf_to_gguf.py {out} "
            f"--outtype f16 --outfile starter-f16.gguf")


def train(recipe: Recipe) -> None:
    """Run the recipe: tokenizer, model, training, folder.

    Raises:
        StarterExtraError: PyTorch, transformers, sentencepiece or protobuf is missing.
    """
    _require_extra()
    import sentencepiece

    serialized = (train_tokenizer(random.Random(TOKENIZER_SEED)) if recipe.resume is None
                  else (recipe.resume / "tokenizer.model").read_bytes())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    model = load(recipe, tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size()}, "
          f"on {model.device.type}", flush=True)
    reports = fit(recipe, model, tokenizer)
    save(recipe, model, serialized, reports)
    print(f"held-out loss {reports[0].held_out_loss:.4f} before, {reports[-1].held_out_loss:.4f} after; "
          f"written to {recipe.out}")
    print(conversion_steps(recipe.out))


def _require_extra() -> None:
    """Find out before any work whether the extra is there."""
    try:
        for library in EXTRA:
            import_module(library)
    except ImportError as error:
        raise StarterExtraError(
            f"training the starter model needs {', '.join(EXTRA)}, and {error.name} is not installed: "
            "pip install 'nightpress[starter]'") from error


def parse(argv: Sequence[str] | None = None) -> Recipe:
    """Read the command line into a recipe; what makes no sense is refused with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m loops.starter.train",
                                     description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the model to")
    parser.add_argument("--minutes", type=float, default=60, help="how long to train (default: 60)")
    parser.add_argument("--steps", type=int, help="train this many steps instead, however long they take")
    parser.add_argument("--peak-lr", type=float, default=3e-3, help="highest learning rate (default: 0.003)")
    parser.add_argument("--seed", type=int, help="of the training dialogues "
                        f"(default: {FRESH_SEED}, with --resume {RESUMED_SEED})")
    parser.add_argument("--resume", type=Path, help="go on from this model folder and its tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="starter",
                        help="of a model from scratch (default: starter)")
    parser.add_argument("--rag-share", type=float, metavar="SHARE",
                        help="share of dialogues that answer from a context (default: 0.12)")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else RESUMED_SEED if args.resume else FRESH_SEED
    recipe = Recipe(args.out, args.minutes, args.steps, args.peak_lr, seed, args.resume, args.rag_share,
                    SHAPES[args.shape])
    if seed in (VALIDATION_SEED, HELD_OUT_SEED):
        parser.error(f"--seed {seed} draws the dialogues that the model is measured on; take another")
    if not recipe.minutes > 0 or (recipe.steps is not None and recipe.steps < 1):
        parser.error("--minutes and --steps are above zero")
    if recipe.resume is not None and not (recipe.resume / "tokenizer.model").is_file():
        parser.error(f"--resume: {recipe.resume} holds no tokenizer.model")
    if recipe.rag_share is not None and not 0 < recipe.rag_share < 1:
        parser.error("--rag-share lies between 0 and 1")
    return recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    recipe = parse(argv)
    try:
        train(recipe)
    except NightpressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
