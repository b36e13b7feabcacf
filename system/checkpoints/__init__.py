"""Checkpoints: snapshot, save, verify, restore, retention."""
