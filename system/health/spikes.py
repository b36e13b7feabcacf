"""Loss spikes: when one is there, and when one is near.

The towers' first layers meet gradients that change faster than Adam's second moment follows; when the root
mean square of g^2 / v rises above about 2.3, the loss jumps 1 to 8 steps later (Wortsman et al., "Stable and
low-precision training for large-scale vision-language models", 2023).
"""

import statistics
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from system.engine.fragments import Fragment

FEWEST_LOSSES = 20
SMALLEST_DEVIATION = 1e-3
"""As a share of the median: losses that hardly differ make no spike."""
WATCHED = {"vision": "vision.patch_embedding.weight", "text": "text.positions"}
"""A first layer of each tower. The word embeddings have no gradient for most words, so their ratio jumps by
itself."""
_FIXED_POINT = 2.0**16


class LossHistory:
    """The last losses of a run. Median and deviation are robust: a spike does not hide the next one."""

    def __init__(self, window: int) -> None:
        self._losses: deque[float] = deque(maxlen=window)

    def deviations(self, loss: float) -> float:
        """How many deviations `loss` lies above the median of those before it; 0 while there are too few."""
        if len(self._losses) < FEWEST_LOSSES:
            return 0.0
        median = statistics.median(self._losses)
        spread = statistics.median(abs(known - median) for known in self._losses)
        # 1.4826 makes of it the standard deviation of normally distributed losses.
        return (loss - median) / max(1.4826 * spread, SMALLEST_DEVIATION * abs(median), 1e-12)

    @property
    def known(self) -> list[float]:
        """Oldest first."""
        return list(self._losses)

    def add(self, loss: float) -> None:
        self._losses.append(loss)


class MomentRatio:
    """Root mean square of g / sqrt(v) of one layer of each tower, from what this rank owns of Adam's second
    moment: the square of the gradient is what the moment has taken up in a step."""

    def __init__(self, fragments: Sequence[Fragment], beta: float, eps: float) -> None:
        self._beta, self._floor = beta, eps**2
        self._now = [
            [f.state["exp_avg_sq"] for f in fragments if f.parameter == name] for name in WATCHED.values()
        ]
        self._before: list[list[Tensor]] = []
        self._measured: Tensor | None = None

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """After a step, the `step`-th that was applied, from 1. Nothing waits for the device."""
        if self._before:
            correction = 1 - self._beta**step
            sums = []
            for moments, before in zip(self._now, self._before, strict=True):
                total = torch.zeros(2, dtype=torch.float64)
                for v, old in zip(moments, before, strict=True):
                    squares = (v - self._beta * old).clamp(min=0) / (1 - self._beta)
                    ratios = squares / (v / correction).clamp(min=self._floor)
                    part = torch.stack([ratios.sum(dtype=torch.float64), ratios.new_tensor(ratios.numel())])
                    total = total.to(part.device) + part
                sums.append(total)
            self._measured = (
                (torch.stack([t.to(sums[0].device) for t in sums]) * _FIXED_POINT).long().view(-1)
            )
        self._before = [[v.clone() for v in moments] for moments in self._now]

    def share(self, device: torch.device) -> Tensor:
        """This rank's part of the last measurement, int64 [4], to be summed over ranks."""
        if self._measured is None:
            return torch.zeros(2 * len(WATCHED), dtype=torch.int64, device=device)
        return self._measured.to(device)


def ratios(sums: Sequence[int]) -> dict[str, float]:
    """By tower, from the sums over ranks; empty while nothing is measured."""
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {
        tower: (total / count) ** 0.5 for tower, (total, count) in zip(WATCHED, pairs, strict=True) if count
    }
