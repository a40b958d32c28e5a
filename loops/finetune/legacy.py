"""Runs llama.cpp's script for files before GGUF with one fault of it made good.

The script hands raw bytes with the shape in weights, and `gguf.GGUFWriter.add_tensor` has since come to want the shape
in bytes (llama.cpp issue #11976, closed without a fix): every tensor came out too small.
"""

from __future__ import annotations

import math
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the script that the first argument names with the arguments that follow."""
    script = Path(sys.argv[1])
    sys.path.insert(0, str(script.parent / "gguf-py"))  # that which belongs to the script
    gguf = import_module("gguf")
    add = gguf.GGUFWriter.add_tensor

    def add_tensor(writer: Any, name: str, tensor: Any, raw_shape: Any = None, raw_dtype: Any = None,
                   **rest: Any) -> None:
        if raw_shape is not None and tensor.itemsize == 1 and math.prod(map(int, raw_shape)) != tensor.nbytes:
            raw_shape = gguf.quants.quant_shape_to_byte_shape(tuple(map(int, raw_shape)), raw_dtype)
        add(writer, name, tensor, raw_shape, raw_dtype, **rest)

    gguf.GGUFWriter.add_tensor = add_tensor
    del sys.argv[0]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
