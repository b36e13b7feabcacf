"""Scores of a checkpoint or of a run in training."""
