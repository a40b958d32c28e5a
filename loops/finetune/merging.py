"""An adapter added to the weights of its base: tensor by tensor, in 32 bits, rounded once to the base's own type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from loops.finetune.lora import AdapterMismatch, AdapterUnmergeable, Lora, Plan, Term
from loops.finetune.model_folder import CONFIG, PICKLE_INDEX, SAFETENSORS_INDEX, ModelFolder, Stored, read_safetensors
from state.files import explained, fsync_file, rename

CHUNK_BYTES = 8 << 20
#: files of a tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt",
                   "merges.txt", "spiece.model", "tekken.json")


def write_weights(base: ModelFolder, adapters: Sequence[Lora], plan: Plan, folder: Path,
                  progress: Callable[[float, float], None]) -> None:
    """Write the merged weights into folder, in the base's shards, each of which appears whole.

    W' = W + sum of w_i s_i B_i A_i, computed in 32 bits and rounded once to the type of W. No more than one tensor is
    in memory, in a few copies. A shard that is there already is kept.

    Args:
        base: in full precision.
        adapters: as the plan was made of.
        plan: of `plan_merge`.
        folder: takes the weights.
        progress: told how many bytes of how many are done.

    Raises:
        AdapterMismatch: the sum overflows the base's type, or the adapter holds values that are not finite.
        AdapterUnmergeable: it holds two different ends of embeddings that the base ties.
    """
    from safetensors import safe_open

    total, done = base.n_bytes, 0
    opened = [safe_open(adapter.path / "adapter_model.safetensors", framework="pt") for adapter in adapters]
    for shard in base.safetensors:
        target = folder / shard.name
        if not target.is_file():
            partial = folder / f"{shard.name}.part"
            stored = read_safetensors(shard)
            with (explained(folder), shard.open("rb") as source, partial.open("wb") as stream,
                  safe_open(shard, framework="pt") as weights):
                stream.write(_header(shard, stored, plan))
                for name, tensor in stored.items():
                    if name in plan.terms:
                        stream.write(_merged(name, tensor, weights.get_tensor(name), plan.terms[name], opened, adapters))
                    else:
                        _copy(source, tensor, stream)
                    progress(done + tensor.end, total)
            fsync_file(partial)
            rename(partial, target)
        done += shard.stat().st_size
        progress(done, total)


def write_rest(base: ModelFolder, plan: Plan, folder: Path, tokenizer: Path | None) -> None:
    """Write everything but the weights: the base's files, with the tokenizer of another folder if one is given.

    Args:
        base: whose files are copied.
        plan: says how many tokens there are.
        folder: takes the files.
        tokenizer: whose tokenizer to take, all of it; None for the base's.
    """
    with explained(folder):
        for file in sorted(base.path.iterdir()):
            own = tokenizer is not None and file.name in TOKENIZER_FILES
            weights = file.suffix in {".safetensors", ".gguf"} or file.name == PICKLE_INDEX
            if file.is_file() and not weights and not own and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        if tokenizer is not None:
            for name in TOKENIZER_FILES:
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, folder / name)
        if plan.rows:
            config = {**base.config}
            inner = config.get("text_config")
            if "vocab_size" in config or not isinstance(inner, dict):
                config["vocab_size"] = plan.rows
            if isinstance(inner, dict) and "vocab_size" in inner:
                config["text_config"] = {**inner, "vocab_size": plan.rows}
            (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            if (folder / SAFETENSORS_INDEX).is_file():  # its total is of fewer tokens
                index = json.loads((folder / SAFETENSORS_INDEX).read_text(encoding="utf-8"))
                index["metadata"] = {"total_size": sum(tensor.end - tensor.start for file in base.safetensors
                                                       for tensor in read_safetensors(folder / file.name).values())}
                (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for file in folder.iterdir():
            fsync_file(file)


def set_template(folder: Path, template: str) -> None:
    """Give a folder's tokenizer another chat template, wherever it is looked for."""
    with explained(folder):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = folder / "tokenizer_config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        config.write_text(json.dumps({**fields, "chat_template": template}, indent=2, ensure_ascii=False),
                          encoding="utf-8")


def _header(shard: Path, stored: dict[str, Stored], plan: Plan) -> bytes:
    """Return the header of a merged shard, its length in front; padded to eight bytes, as the format's README asks."""
    with shard.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    made, place = {"__metadata__": header.get("__metadata__") or {"format": "pt"}}, 0
    for name, tensor in stored.items():
        shape, size = tensor.shape, tensor.end - tensor.start
        if name in plan.shapes:
            shape = plan.shapes[name]
            size = size // max(1, tensor.shape[0]) * shape[0]
        made[name] = {"dtype": tensor.dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(made, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, tensor: Stored, stream: BinaryIO) -> None:
    source.seek(tensor.start)
    left = tensor.end - tensor.start
    while left > 0:
        chunk = source.read(min(CHUNK_BYTES, left))
        if not chunk:
            raise OSError(5, "the file became shorter while it was read")
        stream.write(chunk)
        left -= len(chunk)


def _merged(name: str, stored: Stored, weights: Any, terms: Sequence[Term], opened: Sequence[Any],
            adapters: Sequence[Lora]) -> bytes:
    """Return the bytes of a merged tensor."""
    import torch

    total = weights.float()
    for term in terms:
        tensor = opened[term.adapter].get_tensor
        if term.whole:
            total = tensor(term.whole).float()
            if term.twin and not torch.equal(total, tensor(term.twin).float()):
                raise AdapterUnmergeable(f"{adapters[term.adapter].path.name} holds different matrices for input and "
                                         "output, and the base has one for both.")
            continue
        product = tensor(term.up).float() @ tensor(term.down).float()
        product = (product.T if term.transposed else product) * term.scale
        total = total + product
        if term.magnitude:  # DoRA (arXiv:2402.09353, eq. 5): m V / ||V||, the norm over the inputs of each output
            inputs = 0 if term.transposed else 1
            total *= tensor(term.magnitude).float().reshape(-1).unsqueeze(inputs) / total.norm(dim=inputs, keepdim=True)
    rounded = total.to(weights.dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise AdapterMismatch(f"Merging makes values of {name} that {stored.dtype} cannot hold, or the adapter holds "
                              "values that are not finite; nothing was written.")
    return bytes(rounded.view(torch.uint8).numpy().data)
