"""What a training will take, before it starts: memory by its parts, disk, and settings that would fit.

Sources: 4-bit weights and their scales, Dettmers et al. 2023 (QLoRA), section 3; adapters, Hu et al. 2021 (LoRA),
section 4.1; two moments per trained weight, Kingma & Ba 2015 (Adam); activations counted per layer in the manner of
Korthikanti et al. 2022 (Reducing Activation Recomputation), section 4, for a gated layer with frozen weights, whose
inputs need not be kept, and with LoRA's dropout, whose inputs and masks are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loops.finetune.model_folder import ModelFolder
from loops.finetune.plan import PROJECTIONS, ModelNotTrainable, TrainSpec

#: PyTorch, transformers, peft and bitsandbytes loaded, nothing computed yet: measured 0.62 to 0.70 GB on Linux
RUNTIME_BYTES = 700_000_000
#: a CUDA context with its libraries, on the device
CUDA_BYTES = 600_000_000
#: of float32 rows of the vocabulary at once: logits, their log-softmax, its gradient, and one copy
LOGIT_COPIES = 4
#: Memory over what autograd keeps: buffers of the backward pass, and what the allocator holds on to. Measured on the
#: CPU with the starter, 1.41 and 1.46; taken for GPUs too, where it was not measured.
SPARE = 1.4
NF4_BLOCK = 64  #: weights that share a scale of 32 bits
_KEPT = ("embed", "lm_head", "wte", "wpe", "output_layer")  #: parts of names of what bitsandbytes leaves as it is


@dataclass(frozen=True)
class Shape:
    """What of a model decides how much memory it takes.

    Attributes:
        parameters: in all.
        linear: of those, how many are in 4 bits when the base is.
        modules: names of the matrices, each with the sizes of in and out of every layer that has it.
        layers, hidden, attention, intermediate, vocabulary: sizes; attention is that of all query heads.
    """

    parameters: int
    linear: int
    modules: Mapping[str, tuple[tuple[int, int], ...]]
    layers: int
    hidden: int
    attention: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Forecast:
    """Bytes, by what they are for."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def as_json(self) -> dict[str, int]:
        """Return the parts and their sum."""
        return {**vars(self), "total": self.total}


def shape_of(model: ModelFolder) -> Shape:
    """Return the shape of a model, from its config and the headers of its safetensors.

    Raises:
        ModelNotTrainable: the config names no sizes.
    """
    tensors: dict[str, list[int]] = {}
    for file in model.safetensors:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tensors.update((name, facts["shape"]) for name, facts in header.items() if name != "__metadata__")
    modules: dict[str, list[tuple[int, int]]] = {}
    for name, shape in tensors.items():
        if name.endswith(".weight") and len(shape) == 2 and not any(part in name for part in _KEPT):
            modules.setdefault(name.split(".")[-2], []).append((shape[1], shape[0]))
    inner = model.config.get("text_config")
    config = {**model.config, **inner} if isinstance(inner, dict) else dict(model.config)

    def size(*names: str) -> int:
        return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), 0)

    hidden, layers = size("hidden_size", "n_embd", "d_model"), size("num_hidden_layers", "n_layer", "num_layers")
    if not hidden or not layers:
        raise ModelNotTrainable(f"{model.path / 'config.json'} does not say how many layers the model has and of what "
                                "size; it is no language model that is known here.")
    embeddings = ("embed_tokens", "wte", "word_embeddings")
    embedded = next((shape[0] for name, shape in tensors.items()
                     if len(shape) == 2 and any(part in name for part in embeddings)), 0)
    heads = size("num_attention_heads", "n_head")
    return Shape(
        sum(math.prod(shape) for shape in tensors.values()),
        sum(one * other for found in modules.values() for one, other in found),
        {name: tuple(found) for name, found in modules.items()}, layers, hidden,
        heads * size("head_dim") if heads and size("head_dim") else hidden,
        size("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden, embedded or size("vocab_size"))


def targets(shape: Shape, asked: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the modules to adapt: those asked for, else those of the seven projections that the model has.

    Raises:
        ModelNotTrainable: it has none of them, or not one that was asked for; names those that it has.
    """
    has = ", ".join(sorted(shape.modules)) or "none"
    missing = [one for one in asked if one not in shape.modules]
    if missing:
        raise ModelNotTrainable(f"{name} has no module {missing[0][:60]!r}; it has {has}.")
    found = asked or tuple(one for one in PROJECTIONS if one in shape.modules)
    if not found:
        raise ModelNotTrainable(f"{name} has none of the modules {', '.join(PROJECTIONS)}; name those to adapt with "
                                f"--target-modules. It has {has}.")
    return found


def adapter_weights(shape: Shape, modules: tuple[str, ...], rank: int) -> int:
    """Return how many weights the adapters have: rank × (in + out) for each matrix."""
    return sum(rank * (one + other) for name in modules for one, other in shape.modules[name])


def forecast(shape: Shape, spec: TrainSpec, modules: tuple[str, ...], longest: int, device: str, width: int
             ) -> Forecast:
    """Return the memory that a training takes.

    Args:
        shape: of the model.
        spec: how to train; its 4 bits must be what the device does.
        modules: that are adapted.
        longest: tokens of the longest row of a batch.
        device: cuda, mps or cpu.
        width: bytes of a weight, and of an activation, that is in no 4 bits.
    """
    others = shape.parameters - shape.linear
    if spec.four_bit:  # peft keeps the others in 32 bits then (`prepare_model_for_kbit_training`)
        scales = 4 / NF4_BLOCK if not spec.double_quant else 1 / NF4_BLOCK + 4 / (NF4_BLOCK * 256)
        weights = int(shape.linear * (0.5 + scales)) + 4 * others
    else:
        weights = width * shape.parameters
    trained = adapter_weights(shape, modules, spec.rank)
    tokens = spec.batch * min(longest, spec.max_length)
    inputs = sum(found[0][0] for name in modules if (found := shape.modules[name]))
    masks = (1 if device == "cuda" else width) / width  # of dropout; the CPU keeps them as numbers
    dropped = inputs * (1 + masks) if spec.dropout else inputs
    # norms 2 h; dropped inputs of LoRA; queries, keys, values and their result 4 a; gate, its activation, and up 3 m
    layer = 2 * shape.hidden + dropped + len(modules) * spec.rank + 4 * shape.attention + 3 * shape.intermediate
    kept = shape.layers * shape.hidden + layer if spec.checkpointing else shape.layers * layer
    activations = SPARE * tokens * (width * kept + LOGIT_COPIES * 4 * shape.vocabulary)
    return Forecast(weights, 4 * trained, 4 * trained, 8 * trained, int(activations),
                    RUNTIME_BYTES if device == "cpu" else CUDA_BYTES)


def checkpoint_bytes(shape: Shape, spec: TrainSpec, modules: tuple[str, ...]) -> int:
    """Return the disk that is needed: of every checkpoint the adapters with two moments; of the best the adapters."""
    trained = adapter_weights(shape, modules, spec.rank)
    return 4 * trained * (3 * (spec.keep + 1) + 3) + (16 << 20)


def fitting(spec: TrainSpec, fits: Callable[[TrainSpec], bool], longest: int, four_bit: bool) -> dict[str, Any]:
    """Return the settings, by option, that must change for the training to fit, the harmless first; empty for none.

    Args:
        spec: that does not fit.
        fits: tells whether another does.
        longest: tokens of the longest row.
        four_bit: whether the device can.
    """
    tried, told = spec, {}

    def change(option: str, value: Any, **settings: Any) -> bool:
        nonlocal tried
        tried = replace(tried, **settings)
        told[option] = value
        return fits(tried)

    if not spec.checkpointing and change("--gradient-checkpointing", "", checkpointing=True):
        return told
    while tried.batch > 1:
        batch = tried.batch // 2
        accumulation = math.ceil(spec.batch * spec.accumulation / batch)
        told["--gradient-accumulation-steps"] = accumulation
        if change("--batch-size", batch, batch=batch, accumulation=accumulation):
            return told
    if not spec.four_bit and four_bit and change("--4bit", "", four_bit=True):
        return told
    while tried.rank > 8:
        if change("--lora-r", tried.rank // 2, rank=tried.rank // 2):
            return told
    length = min(tried.max_length, longest)
    while length > 128:
        length //= 2
        if change("--max-length", length, max_length=length):
            return told
    return {}
