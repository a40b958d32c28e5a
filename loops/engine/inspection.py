"""What a person wants to know of a model or of the levels before pressing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loops.engine.gguf_check import CheckedModel, check_model
from loops.engine.levels import UNQUANTIZED, levels
from loops.engine.native import EngineFailed
from loops.engine.quantize import QuantizeSpec, forecast
from loops.starter import STARTER_GGUF


def describe(model: CheckedModel) -> dict[str, Any]:
    """Return the facts of a checked model, as JSON can hold them."""
    header = model.header
    types: dict[str, int] = {}
    for tensor in model.tensors:
        types[tensor.ggml_type] = types.get(tensor.ggml_type, 0) + 1
    return {
        "path": str(model.path), "files": [str(shard) for shard in model.shards], "bytes": model.file_bytes,
        "gguf_version": header.version, "architecture": model.architecture, "name": header.name,
        "parameters": model.n_parameters, "bits_per_weight": round(model.bits_per_weight, 4),
        "type": model.dominant_type, "quantized": model.is_quantized, "tensors": len(model.tensors),
        "tensor_types": types, "license": header.license, "base_models": list(header.base_models),
        "context": header.metadata.get(f"{model.architecture}.context_length"),
        "chat_template": "tokenizer.chat_template" in header.metadata}


def list_levels(path: Path | None) -> list[dict[str, Any]]:
    """Return every level with its exact size for a model (the starter when none is given), smallest first."""
    model = check_model(path or STARTER_GGUF)
    found: list[dict[str, Any]] = []
    for level in levels().values():
        try:
            sized = forecast(QuantizeSpec(model, level, allow_requantize=True))
        except EngineFailed:
            continue  # the library names it but cannot write it, such as NVFP4
        found.append({"level": level.name, "bytes": sized.n_bytes, "needs_imatrix": sized.needs_imatrix,
                      "bits_per_weight": 8 * sized.n_bytes / model.n_parameters, "fallbacks": sized.fallbacks,
                      "quantized": level.name not in UNQUANTIZED})
    return sorted(found, key=lambda entry: entry["bytes"])
