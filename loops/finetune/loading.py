"""The base for a training: device and number type, 4 bits where the device can, tokenizer, weights, adapters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loops.engine.model import OutOfMemory
from loops.finetune.examples import Example, collate
from loops.finetune.model_folder import ModelFolder
from loops.finetune.parity import TokenizerMismatch
from loops.finetune.plan import TEMPLATES, ModelNotTrainable, TemplateMissing, TrainingRefused, TrainSpec

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory")


@dataclass(frozen=True)
class Device:
    """Where it is computed and in which numbers.

    Attributes:
        name: cuda, mps or cpu.
        label: for people.
        dtype: bfloat16, float16 or float32.
        four_bit: whether the base is in NF4.
        why_not: a sentence, where 4 bits were wanted and are not.
        free_bytes: of its memory.
    """

    name: str
    label: str
    dtype: str
    four_bit: bool
    why_not: str
    free_bytes: int

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2


def prepare_environment() -> None:
    """Keep the libraries from the network and from a second GPU; before they are imported."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "BITSANDBYTES_NOWELCOME": "1"})
    # transformers' Trainer would spread a batch over all it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def choose_device(spec: TrainSpec, inputs: Collection[int]) -> Device:
    """Return where to train.

    Args:
        spec: how.
        inputs: sizes of what goes into the matrices: not every device has 4 bits for every size.

    Raises:
        TrainingRefused: the device that was asked for is not there.
    """
    import psutil

    torch = import_module("torch")
    torch.set_num_threads(spec.threads or os.cpu_count() or 1)
    there = {"cuda": bool(torch.cuda.is_available()), "mps": bool(torch.backends.mps.is_available()), "cpu": True}
    name = next(one for one in there if there[one]) if spec.device == "auto" else spec.device
    if not there[name]:
        raise TrainingRefused(f"PyTorch finds no {name} here; leave --device out, or name "
                              f"{' or '.join(one for one in there if there[one])}.")
    free, label, dtype = psutil.virtual_memory().available, f"{name}, {torch.get_num_threads()} threads", "float32"
    if name == "cuda":
        free, label = int(torch.cuda.mem_get_info()[0]), str(torch.cuda.get_device_name())
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "mps":
        label = "mps"
    why_not = _no_four_bit(torch, name, dtype, inputs) if spec.four_bit else ""
    return Device(name, label, dtype, spec.four_bit and not why_not, why_not, free)


def _no_four_bit(torch: Any, device: str, dtype: str, inputs: Collection[int]) -> str:
    """Try small matrices in NF4 there, forth and back; return why they do not work, '' where they do."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    try:
        for size in sorted(set(inputs)):
            layer = import_module("bitsandbytes").nn.Linear4bit(
                size, 64, bias=False, compute_dtype=getattr(torch, dtype), quant_type="nf4").to(device)
            _keep_unpacked(layer)
            given = torch.ones(1, 2, size, dtype=getattr(torch, dtype), device=device, requires_grad=True)
            layer(given).sum().backward()
            with torch.no_grad():  # it may take another kernel than with gradients
                alone = layer.eval()(given.detach())
            if not (torch.isfinite(given.grad).all() and torch.isfinite(alone).all()):
                return "bitsandbytes computes no finite numbers there"
    except Exception as problem:  # noqa: BLE001 - a library without a kernel for a device raises anything
        said = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")[:150]
        return f"bitsandbytes fails on a matrix with {size} inputs ({said})"
    return ""


def _keep_unpacked(model: Any) -> None:
    """Keep 4-bit weights as they are when a model is evaluated on the CPU.

    bitsandbytes repacks them there for a kernel that has no gradients, computes in bfloat16, and fails on sizes that
    are no multiple of 64; a training that is validated on the way would go on with that
    (`bitsandbytes.nn.Linear4bit.forward`, 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def explaining(part: str, name: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads something into a sentence.

    Raises:
        OutOfMemory, ModelNotTrainable: as they say.
    """
    try:
        yield
    except Exception as problem:
        if is_memory(problem):
            raise OutOfMemory(f"There is not enough memory to load {part} of {name}.") from problem
        raise ModelNotTrainable(f"transformers cannot load {part} of {name}: "
                                f"{' '.join(str(problem).split())[:200] or type(problem).__name__}") from problem


def is_memory(problem: BaseException) -> bool:
    """Tell whether an error means that memory ran out."""
    return isinstance(problem, MemoryError) or any(one in str(problem).lower() for one in _NO_MEMORY)


def load_tokenizer(model: ModelFolder, template: str, rows: int, conversations: bool) -> tuple[Any, list[str]]:
    """Return the tokenizer with the chat template that is used, and notes.

    Args:
        model: checked.
        template: a name of `TEMPLATES`, the text of another, or '' for the model's own.
        rows: of its embedding.
        conversations: whether the dataset has any.

    Raises:
        TokenizerMismatch: it gives tokens that the model has no embedding for.
        TemplateMissing: there is none, and there are conversations.
        ModelNotTrainable: it does not load.
    """
    name, notes = model.path.name, []
    with explaining("the tokenizer", name):
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(
            str(model.path), local_files_only=True, trust_remote_code=False)
    if len(tokenizer) > rows:
        raise TokenizerMismatch(f"The tokenizer of {name} has {len(tokenizer):,} tokens and the model only {rows:,}: "
                                "it is that of another model.")
    if len(tokenizer) < 0.9 * rows:
        notes.append(f"The tokenizer of {name} has {len(tokenizer):,} tokens and the model {rows:,}: is it this "
                     "model's?")
    if template == "chatml":
        lacking = [one for one in ("<|im_start|>", "<|im_end|>") if one not in tokenizer.get_vocab()]
        if lacking:
            raise TemplateMissing(f"The tokenizer of {name} has no token {lacking[0]}, which chatml needs; use "
                                  "--chat-template plain.")
    if template:
        tokenizer.chat_template = TEMPLATES.get(template, template)
    if conversations and not tokenizer.chat_template:
        raise TemplateMissing(f"{name} has no chat template, so there is no saying how a conversation looks to it; "
                              f"name one with --chat-template: {', '.join(TEMPLATES)}, or a file with Jinja in it.")
    return tokenizer, notes


def load_base(model: ModelFolder, spec: TrainSpec, device: Device) -> Any:
    """Return the base, frozen, on its device; in NF4 where that was decided.

    Raises:
        OutOfMemory, ModelNotTrainable: it does not load.
    """
    torch, transformers = import_module("torch"), import_module("transformers")
    dtype = getattr(torch, device.dtype)
    how: dict[str, Any] = {}
    if device.four_bit:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=dtype)
        how["device_map"] = {"": device.name if device.name != "cuda" else 0}
    with explaining("the weights", model.path.name):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            str(model.path), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype, **how)
    _keep_unpacked(base)
    base.config.use_cache = False
    if device.four_bit:
        base = import_module("peft").prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=spec.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.requires_grad_(False)
        if spec.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.to(device.name)
    return base


def add_adapters(base: Any, spec: TrainSpec, modules: tuple[str, ...], path: Path) -> Any:
    """Return the base with new adapters of LoRA in float32.

    Raises:
        ModelNotTrainable: peft cannot adapt the modules.
    """
    peft = import_module("peft")
    with explaining("adapters into the layers", path.name):
        adapted = peft.get_peft_model(base, peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=list(modules), bias="none",
            task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(path)
    return adapted


def check_packing(model: Any, vocabulary: int, device: Device, name: str) -> None:
    """Make sure that examples in one window do not see each other: a second one alone must get the same logits.

    Raises:
        TrainingRefused: they do.
    """
    torch = import_module("torch")
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randint(0, vocabulary, (12,), generator=generator).tolist() for _ in range(2))
    blank = tuple([-100] * 12)
    together, alone = (collate([window], 0, packing=True) for window in (
        (Example(tuple(one), blank), Example(tuple(two), blank)), (Example(tuple(two), blank),)))
    refusal = TrainingRefused(f"In {name}, examples in one window see each other; leave --packing out for this "
                              "architecture.")
    model.eval()
    try:
        with torch.inference_mode():
            logits = [model(**{column: torch.tensor(rows, device=device.name) for column, rows in found.items()
                               if column != "labels"}).logits[0, -12:].float() for found in (together, alone)]
    except (TypeError, ValueError) as problem:  # it takes no positions
        raise refusal from problem
    model.train()
    bound = 1e-3 if device.dtype == "float32" else 5e-2
    if float((logits[0] - logits[1]).abs().max()) > bound * max(1.0, float(logits[1].std())):
        raise refusal
