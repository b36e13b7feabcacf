"""Weights out of checkpoints, and into new runs."""
