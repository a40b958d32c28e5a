"""llama.cpp in this process: check, load, quantize, generate, score, measure divergence."""
