"""LoRA adapters and the tensors of a base that they change: which belong together, told from the headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loops.finetune.model_folder import ADAPTER_CONFIG, ModelFolder, Stored, read_safetensors
from state.faults import NightpressError

#: types that a merged weight can be rounded to
FLOATS = ("F32", "F16", "BF16")
_PREFIX, _HEAD = "base_model.model.", "lm_head.weight"
_PART = re.compile(r"(.+?)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
                   r"(?:\.weight)?")
#: keys of adapter_config.json that say nothing about the sum, or that are minded below
_KNOWN = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora"))
#: ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change it
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class BaseQuantized(NightpressError):
    """The base is stored quantized, and merging into it would lose what was trained; pull the full model instead."""

    exit_code = 113


class AdapterMismatch(NightpressError):
    """The adapter does not fit the base; give the model that it was trained on."""

    exit_code = 114


class AdapterUnmergeable(NightpressError):
    """An adapter of this kind cannot be merged exactly; load it beside the base instead."""

    exit_code = 115


@dataclass(frozen=True)
class Lora:
    """An adapter that takes part in a merge.

    Attributes:
        path: its folder, without pickles.
        weight: its share of the sum.
        config: of adapter_config.json.
        tensors: of its weights.
    """

    path: Path
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def scaling(self, module: str, rank: int) -> float:
        """Return by what its product counts at a module: alpha / r, or alpha / sqrt(r) with rslora (peft, lora/layer.py).

        Patterns name modules as in peft: the end of the name, or a regular expression for it.
        """
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class Term:
    """What one adapter does to one tensor, named by the adapter's own tensors; '' for none.

    Attributes:
        adapter: which, by number.
        down: of the product.
        up: of the product.
        scale: of the product, the adapter's weight in it.
        transposed: the base stores inputs first.
        magnitude: of DoRA.
        whole: stands instead of the tensor.
        twin: holds the same as `whole`, for the other end of tied embeddings.
    """

    adapter: int
    down: str = ""
    up: str = ""
    scale: float = 0.0
    transposed: bool = False
    magnitude: str = ""
    whole: str = ""
    twin: str = ""


@dataclass(frozen=True)
class Plan:
    """Which tensors of the base change, and to what shape.

    Attributes:
        terms: by name of the tensor.
        rows: of the embeddings afterwards, where tokens were added; 0 for as before.
    """

    terms: Mapping[str, tuple[Term, ...]]
    rows: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_lora(folder: ModelFolder, weight: float = 1.0) -> Lora:
    """Return an adapter whose kind is known.

    Raises:
        AdapterUnmergeable: naming what of it is not.
    """
    config, name = folder.config, folder.path.name
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise AdapterUnmergeable(f"{name} was begun by {start!r}, which changes the base too; save it as a plain LoRA "
                                 "adapter with peft (path_initial_model_for_weight_conversion).")
    for key, value in config.items():
        if key not in _KNOWN and value:
            raise AdapterUnmergeable(f"{name} uses {key} of peft, which Nightpress does not merge; merge it with peft.")
    patterns = [config.get(key) or {} for key in ("alpha_pattern", "rank_pattern")]
    numbers = [config.get("lora_alpha", 8), config.get("r", 8), *(
        value for found in patterns if isinstance(found, dict) for value in found.values())]
    if not all(isinstance(found, dict) for found in patterns) or not all(
            isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise AdapterMismatch(f"{name} is damaged: r, lora_alpha or their patterns in {ADAPTER_CONFIG} are no numbers.")
    return Lora(folder.path, weight, config, read_safetensors(folder.safetensors[0]))


def check_full_precision(base: ModelFolder) -> None:
    """Refuse a base that is stored quantized.

    Raises:
        BaseQuantized: naming the method, and what to pull instead.
    """
    quantized = base.config.get("quantization_config") or _inner(base.config).get("quantization_config")
    odd = "" if base.pickles else next((
        f"{name} is stored as {tensor.dtype}" for file in base.safetensors
        for name, tensor in read_safetensors(file).items() if len(tensor.shape) > 1 and tensor.dtype not in FLOATS), "")
    if not quantized and not odd:
        return
    method = str(quantized.get("quant_method", "quantized")) if isinstance(quantized, dict) else odd
    named = str(base.config.get("_name_or_path") or base.path.name)
    full = re.sub(r"(?i)[-_.](unsloth|bnb|4bit|8bit|int4|int8|nf4|fp8|gptq|awq|dynamic|quantized)\b.*", "", named)
    what = f"`nightpress pull {full}`, the model that it was made from" if full != named and "/" in full else (
        f"the model that it was made from{f', {full}' if full != named else ''}")
    raise BaseQuantized(f"{base.path.name} is stored quantized ({method}), and an adapter is merged into the "
                        f"full-precision model alone: give {what} (BF16, F16 or F32), as --base.")


def check_named_base(adapter: ModelFolder, base: ModelFolder) -> None:
    """Refuse an adapter that says it belongs to a model of another name; a folder that was moved keeps its name.

    Raises:
        AdapterMismatch: with both names.
    """
    named = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/")
    if not named:
        return
    known = {base.path.name, base.path.resolve().name, Path(str(base.config.get("_name_or_path") or "")).name}
    if Path(named).name.lower() not in {name.lower() for name in known}:
        raise AdapterMismatch(f"{adapter.path.name} says that it belongs to {named}, and --base is {base.path.name}; "
                              "--any-base merges it if these are the same weights under another name.")


def plan_merge(base: ModelFolder, adapters: Sequence[Lora]) -> Plan:
    """Return what the adapters change of a base, every tensor of theirs accounted for.

    Args:
        base: in full precision, without pickles.
        adapters: what is added up.

    Raises:
        AdapterMismatch: a tensor has no counterpart in the base, or another shape.
        AdapterUnmergeable: it cannot be added up exactly.
    """
    stored = {name: tensor for file in base.safetensors for name, tensor in read_safetensors(file).items()}
    tied = _is_tied(base.config)
    terms: dict[str, list[Term]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for number, adapter in enumerate(adapters):
        whole: dict[str, Term] = {}
        for name, module, parts in _grouped(adapter):
            if parts:
                target = _target(stored, f"{module}.weight", adapter, tied)
                term = _product(adapter, number, module, parts, stored[target])
                if tied and stored[target].shape[0] == _vocabulary(base.config):
                    raise AdapterUnmergeable(
                        f"{adapter.path.name} adapts {target}, which the base uses for input and output alike, at one "
                        "end only; merged, both would change.")
                terms.setdefault(target, []).append(term)
                if term.magnitude:
                    _alone(adapters, adapter, "DoRA")
                continue
            _alone(adapters, adapter, name.removeprefix(_PREFIX))
            key = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            target = key if tied and key == _HEAD else _target(stored, key, adapter, tied)
            whole[target] = Term(number, whole=name)
        _take_whole(base, adapter, whole, stored, shapes, terms, tied=tied)
    rows = max((shape[0] for shape in shapes.values()), default=0)
    if rows and any(shapes.get(name, (rows,))[0] != rows or (
            name not in shapes and len(tensor.shape) == 2 and tensor.shape[0] == _vocabulary(base.config))
            for name, tensor in stored.items()):
        raise AdapterMismatch(f"{adapters[0].path.name} adds tokens to one of the embeddings only.")
    return Plan({name: tuple(found) for name, found in terms.items()}, rows, shapes)


def _take_whole(base: ModelFolder, adapter: Lora, whole: dict[str, Term], stored: Mapping[str, Stored],
                shapes: dict[str, tuple[int, ...]], terms: dict[str, list[Term]], *, tied: bool) -> None:
    """Enter the tensors that an adapter holds whole: of modules_to_save, biases, embeddings with more tokens."""
    head = whole.pop(_HEAD, None) if tied else None
    ends = [name for name in whole if tied and stored[name].shape[:1] == (_vocabulary(base.config),)]
    if (head is None) != (not ends):
        raise AdapterUnmergeable(f"{adapter.path.name} holds {ends[0] if ends else _HEAD}, which the base "
                                 "uses for input and output alike, at one end only; merged, both would change.")
    for target, found in whole.items():
        mine, theirs = adapter.tensors[found.whole].shape, stored[target].shape
        grown = target.endswith(".weight") and len(theirs) == 2 and theirs[0] == _vocabulary(base.config) and (
            mine[0] > theirs[0] and mine[1:] == theirs[1:])
        if mine != theirs and not grown:
            raise AdapterMismatch(f"{adapter.path.name} does not fit {base.path.name}: its {target} has the shape "
                                  f"{list(mine)}, and the base's {list(theirs)}.")
        if grown:
            shapes[target] = mine
        term = replace(found, twin=head.whole) if head is not None and target in ends else found
        terms.setdefault(target, []).insert(0, term)  # a product is added to what stands there
        if term.twin and _HEAD in stored:  # stored twice though it is one
            terms[_HEAD] = [replace(term, whole=term.twin, twin=found.whole)]
            if grown:
                shapes[_HEAD] = mine


def _grouped(adapter: Lora) -> list[tuple[str, str, dict[str, str]]]:
    """Return the adapter's tensors: of a product its module and parts, of one held whole its name."""
    modules: dict[str, dict[str, str]] = {}
    found: list[tuple[str, str, dict[str, str]]] = []
    for name in adapter.tensors:
        part = _PART.fullmatch(name.removeprefix(_PREFIX))
        if part:
            modules.setdefault(part[1].removesuffix(".base_layer"), {})[part[2]] = name
        elif "lora_" in name or "trainable_tokens" in name or not name.endswith((".weight", ".bias")):
            raise AdapterUnmergeable(f"{adapter.path.name} holds {name[:120]}, which Nightpress does not merge.")
        else:
            found.append((name, "", {}))
    if not modules and not found:
        raise AdapterMismatch(f"{adapter.path.name} holds no weights.")
    return [*found, *((module, module, parts) for module, parts in modules.items())]


def _product(adapter: Lora, number: int, module: str, parts: Mapping[str, str], base: Stored) -> Term:
    """Return the term of a pair of matrices.

    Raises:
        AdapterMismatch, AdapterUnmergeable: see `plan_merge`.
    """
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if any(name not in parts for name in names):
        raise AdapterMismatch(f"{adapter.path.name} is incomplete: {module} has {', '.join(parts)} alone.")
    down, up = (adapter.tensors[parts[name]].shape for name in names)
    if len(down) != 2 or len(up) != 2 or len(base.shape) != 2:
        raise AdapterUnmergeable(f"{adapter.path.name} adapts {module}, which is no matrix; merge it with peft.")
    if embedding and "lora_magnitude_vector" in parts:
        raise AdapterUnmergeable(f"{adapter.path.name} uses DoRA on an embedding ({module}); merge it with peft.")
    transposed = embedding or bool(adapter.config.get("fan_in_fan_out"))
    made = (down[1], up[0]) if transposed else (up[0], down[1])
    rank = _by_pattern(adapter.config.get("rank_pattern"), module, adapter.config.get("r", down[0]))
    if down[0] != up[1] or down[0] != rank or down[0] < 1:
        raise AdapterMismatch(f"{adapter.path.name} is damaged: at {module} its rank is {down[0]}, {up[1]} and "
                              f"{rank} in adapter_config.json.")
    if made != base.shape:
        raise AdapterMismatch(f"{adapter.path.name} does not fit the base: at {module} it makes {list(made)}, and the "
                              f"base has {list(base.shape)}.")
    return Term(number, parts[names[0]], parts[names[1]], adapter.weight * adapter.scaling(module, down[0]), transposed,
                parts.get("lora_magnitude_vector", ""))


def _target(stored: Mapping[str, Stored], name: str, adapter: Lora, tied: bool) -> str:
    """Return the base's name of a tensor; a base may have been saved without the name of its outermost part."""
    for known in (name, name.partition(".")[2]):
        if known in stored:
            if stored[known].dtype not in FLOATS:
                raise AdapterMismatch(f"{known} of the base is stored as {stored[known].dtype}, which is no type to "
                                      "merge into.")
            return known
    if tied and name == _HEAD:
        raise AdapterUnmergeable(f"{adapter.path.name} adapts lm_head, and the base has one matrix for input and "
                                 "output; merged, both would change.")
    raise AdapterMismatch(f"{adapter.path.name} changes {name[:120]}, which the base does not have.")


def _alone(adapters: Sequence[Lora], adapter: Lora, what: str) -> None:
    """Refuse what can only be taken whole beside other adapters, or at another weight than 1."""
    if len(adapters) > 1 or adapter.weight != 1:
        raise AdapterUnmergeable(f"{adapter.path.name} holds {what}, which is no sum: merge it alone, with weight 1.")


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, as peft's get_pattern_key finds it."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as problem:
            raise AdapterMismatch(f"{pattern[:80]!r} in {ADAPTER_CONFIG} is no pattern: {problem}.") from problem
    return default


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether input and output share a matrix; transformers' default is that they do not, some models' that they do."""
    return bool(config.get("tie_word_embeddings", _inner(config).get("tie_word_embeddings", True)))


def _vocabulary(config: Mapping[str, Any]) -> int:
    return int(config.get("vocab_size") or _inner(config).get("vocab_size") or -1)
