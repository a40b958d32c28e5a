"""Run as a child: hand files with one changed byte to the engine, and say how far each came.

Usage: python flip_loader.py FILE FLIPS.json FIRST LAST QUANTIZE_EVERY. FILE is a copy that it may
change. A line before and one after each attempt tell the parent which one killed the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

os.environ["GGML_NO_BACKTRACE"] = "1"

import llama_cpp as lib


def decode(path: bytes) -> str:
    params = lib.llama_model_default_params()
    params.use_extra_bufts = False
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path, params)
    if not model:
        return "not loaded"
    try:
        vocab = lib.llama_model_get_vocab(model)
        tokens = (lib.llama_token * 64)()
        words = "Hello, wörld! 12\n".encode()
        n = lib.llama_tokenize(vocab, words, len(words), tokens, 64, True, True)
        piece = ctypes.create_string_buffer(256)
        for token in tokens[:max(n, 0)]:
            lib.llama_token_to_piece(vocab, token, piece, 256, 0, True)
        sizes = lib.llama_context_default_params()
        sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = 32
        sizes.n_threads = sizes.n_threads_batch = 1
        context = lib.llama_init_from_model(model, sizes)
        if not context:
            return "no context"
        try:
            eight = (lib.llama_token * 8)(*range(8))
            return f"decoded {lib.llama_decode(context, lib.llama_batch_get_one(eight, 8))} after {n} tokens"
        finally:
            lib.llama_free(context)
    finally:
        lib.llama_model_free(model)


def quantize(path: bytes) -> str:
    params = lib.llama_model_quantize_default_params()
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = 1
    return f"quantized {lib.llama_model_quantize(path, path + b'.out', ctypes.byref(params))}"


def main() -> None:
    file, listed, first, last, every = sys.argv[1:]
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    flips = json.loads(Path(listed).read_text())
    for index in range(int(first), int(last)):
        position, value = flips[index]
        with Path(file).open("r+b") as handle:
            handle.seek(position)
            before = handle.read(1)
            handle.seek(position)
            handle.write(bytes([value]))
        print("start", index, flush=True)
        did = decode(os.fsencode(file))
        if index % int(every) == 0:
            did += ", " + quantize(os.fsencode(file))
        print("end", index, did, flush=True)
        with Path(file).open("r+b") as handle:
            handle.seek(position)
            handle.write(before)


if __name__ == "__main__":
    main()
