"""The composition root of MaskCLIP's training system: configuration, engine, trainer, checkpoints,
commands."""
