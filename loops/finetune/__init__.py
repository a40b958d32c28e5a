"""From raw text to a model worth pressing: datasets, training, merging, conversion, parity."""
