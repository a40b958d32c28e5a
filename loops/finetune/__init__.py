"""From raw text to a model worth pressing: data, training, merging, conversion, parity."""
