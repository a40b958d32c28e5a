"""Pickled weights made into safetensors: tensors are read, and nothing in the file may run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loops.finetune.model_folder import SAFETENSORS_INDEX, PickledWeights
from state.files import explained

#: under these names a checkpoint may hold its weights among other things
_NESTED = ("state_dict", "model", "module")


def to_safetensors(pickles: Sequence[Path], folder: Path, progress: Callable[[float, float], None],
                   stem: str = "model") -> list[Path]:
    """Write the tensors of pickles into folder as safetensors, with an index where they are several.

    PyTorch reads them with `weights_only`, which builds tensors and plain values and calls nothing else.

    Args:
        pickles: in order.
        folder: that takes `model.safetensors`, or shards and their index.
        progress: told how many of how many files are done.
        stem: instead of `model`.

    Raises:
        PickledWeights: one is no pickle of tensors, or holds something that would have to run.
    """
    from safetensors.torch import save_file

    written: list[Path] = []
    where: dict[str, str] = {}
    for number, pickle in enumerate(pickles, 1):
        progress(number - 1, len(pickles))
        tensors = _tensors(pickle)
        name = f"{stem}.safetensors" if len(pickles) == 1 else f"{stem}-{number:05d}-of-{len(pickles):05d}.safetensors"
        again = sorted(where.keys() & tensors.keys())
        if again:
            raise PickledWeights(f"{pickle} holds {again[0]}, which another file holds too; name the weights in an "
                                 "index, or remove the file that is not of this model.")
        where |= dict.fromkeys(tensors, name)
        with explained(folder):
            # copies, because safetensors refuses tensors that share memory, as tied embeddings do
            save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / name,
                      metadata={"format": "pt"})
        written.append(folder / name)
    if len(pickles) > 1:
        with explained(folder):
            (folder / SAFETENSORS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    progress(len(pickles), len(pickles))
    return written


def _tensors(path: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever a damaged or hostile pickle makes PyTorch raise
        said = str(problem)
        if "weights_only" in said or "Unsupported" in said:
            raise PickledWeights(f"{path} holds more than tensors, which would have to run to be read, and was "
                                 "refused; ask its author for safetensors.") from problem
        raise PickledWeights(f"{path} is no pickle of weights, or it is damaged: "
                             f"{' '.join(said.split())[:120] or type(problem).__name__}.") from problem
    for name in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    tensors = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)} if isinstance(
        found, dict) else {}
    if not tensors:
        raise PickledWeights(f"{path} holds no weights by name.")
    return tensors
