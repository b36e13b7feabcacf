"""What a run measures: the registry of its metrics, and what takes them in the training loop."""
