"""The quantization loop: plan, forecast, ladder, gate, choice."""
