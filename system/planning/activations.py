"""What the forward leaves alive for the backward, measured on this machine with the model's own code.

Only the shapes matter, so a few pairs at a few layers are enough: what a pair takes is the same in every
batch, and what a layer takes the same in every layer. The device does not matter either, as long as attention
keeps no matrix of scores, which every kernel but `math` fulfils.
"""

from dataclasses import replace

import torch

from model.config import ModelConfig
from model.losses import SingleProcess
from model.objective import Objective
from model.teacher import Teacher
from system.engine.engine import TYPES
from system.planning.storage_tracker import StorageTracker

_PAIRS = 2


def activation_bytes(config: ModelConfig, precision: str, caption_tokens: int) -> float:
    """Bytes that one pair of a batch takes between forward and backward.

    Args:
        caption_tokens: columns that the captions of a batch are cut to.
    """
    # With recomputation only every n-th block is cheap, so n blocks are the unit.
    unit = max(1, config.recompute_every)
    vision, text = config.vision.layers / unit, config.text.layers / unit

    def alive(vision_units: int, text_units: int) -> float:
        small = replace(
            config,
            vision=replace(config.vision, layers=vision_units * unit),
            text=replace(config.text, layers=text_units * unit),
        )
        return _alive(small, precision, caption_tokens)

    least = alive(1, 1)
    return least + (vision - 1) * (alive(2, 1) - least) + (text - 1) * (alive(1, 2) - least)


def _alive(config: ModelConfig, precision: str, caption_tokens: int) -> float:
    objective = Objective(config, seed=0).to(TYPES[precision])
    teacher = Teacher(config).to(TYPES[precision]) if config.distill.needs_teacher else None
    batch = made_up_batch(config, _PAIRS, caption_tokens)
    with StorageTracker() as tracker:
        output = objective(batch, teacher, config.distill.teacher_temperature, SingleProcess())
        found = tracker.alive
    del output
    return found / _PAIRS


def made_up_batch(config: ModelConfig, pairs: int, caption_tokens: int) -> dict[str, torch.Tensor]:
    """Black images, captions of one length."""
    side, text = config.vision.image_size, config.text
    tokens = torch.zeros(pairs, text.context_length, dtype=torch.int64)
    tokens[:, 0] = text.start_token
    tokens[:, 1 : caption_tokens - 1] = 1
    tokens[:, caption_tokens - 1] = text.end_token
    return {
        "image": torch.zeros(pairs, 3, side, side, dtype=torch.uint8),
        "tokens": tokens,
        "id": torch.arange(pairs),
        "epoch": torch.zeros(pairs, dtype=torch.int64),
        "weight": torch.ones(pairs),
    }
