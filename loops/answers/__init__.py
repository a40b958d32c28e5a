"""How well a model answers the rows of a dataset: one interface for both kinds of models, and the metrics."""
