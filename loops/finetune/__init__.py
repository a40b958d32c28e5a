"""From raw text to a model worth pressing: datasets, fine-tuning, merging, conversion."""
