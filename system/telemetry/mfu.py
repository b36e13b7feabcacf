"""Model FLOP utilisation of a step, against a peak that the operator states."""

import torch

from model.config import ModelConfig
from model.flops import flops_per_pair
from model.text import caption_lengths


class MfuMeter:
    """Of the first rank: captions of its own rows stand for those of the global batch."""

    def __init__(self, model: ModelConfig, global_batch: int, peak_flops: float) -> None:
        """`peak_flops` in FLOP/s, of all devices of the run together."""
        self._model, self._batch, self._peak = model, global_batch, peak_flops

    def mfu(self, tokens_BL: torch.Tensor, seconds: float) -> float:
        """Of a step that took `seconds`, whose captions are `tokens_BL` (in host memory)."""
        lengths_B = caption_lengths(tokens_BL, self._model.text)
        words = float(lengths_B.float().mean()) - 2  # without start and end
        flops = flops_per_pair(self._model, int(lengths_B.max()), words * self._model.mlm.mask_ratio)
        return flops.training * self._batch / (seconds * self._peak)
