"""Which rank, and which of its samples, is not finite in a step that was refused.

The contrastive loss mixes all samples, so one that is not finite shows on every rank. Here rows go through
the model without the others: first in groups of about the square root of their number, then those of the
groups that are not finite one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.global_batch import Features, MicroBatch
from model.teacher import Teacher
from system.engine.accumulate import Batch, split
from system.engine.engine import Engine

MOST_NAMED = 8


class LocalGradients:
    """Whether this rank's own gradients are finite, before they meet those of the other ranks. Costs one
    reduction for each parameter, and no wait for the device unless somebody asks."""

    def __init__(self, module: nn.Module) -> None:
        self._sum: Tensor | None = None
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    @torch.no_grad()
    def _see(self, gradient: Tensor) -> None:
        # 0 where all is finite, else not a number. (A sum of fp16 may overflow, but it is asked for only when
        # a step was refused at the lowest loss scale.)
        zero = gradient.sum().float() * 0.0
        self._sum = zero if self._sum is None else self._sum + zero

    def finite(self) -> bool:
        """Of all gradients since `forget`."""
        return self._sum is None or bool(torch.isfinite(self._sum))

    def forget(self) -> None:
        self._sum = None


@dataclass(frozen=True)
class Culprit:
    """What a rank has found in itself."""

    rank: int
    loss: bool
    """Its share of the loss is not finite."""
    gradient: bool
    """Its own gradient is not finite."""
    slots: tuple[int, ...]
    ids: tuple[int, ...]
    """Of its samples that alone are not finite."""


def find(
    engine: Engine,
    teacher: Teacher | None,
    temperature: float,
    batch: Batch,
    loss_finite: bool,
    gradients_finite: bool,
) -> list[Culprit]:
    """All ranks call it after a refused step. Ranks with a sample or a gradient of their own that is not
    finite; if there is none, those whose loss is not."""
    bad = _bad_rows(engine, teacher, temperature, batch)
    mine = Culprit(
        dist.get_rank(),
        not loss_finite,
        not gradients_finite,
        tuple(int(row["slot"]) for row in bad),
        tuple(int(row["id"]) for row in bad),
    )
    everyone: list[Culprit] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    named = [culprit for culprit in everyone if culprit.ids]
    # With a loss that is not finite no rank gets as far as a gradient of its own.
    return named or [culprit for culprit in everyone if culprit.gradient or culprit.loss]


def describe(culprits: list[Culprit]) -> str:
    """Ranks and samples in words."""
    words = []
    for culprit in culprits:
        if culprit.ids:
            ids = ", ".join(map(str, culprit.ids[:MOST_NAMED]))
            more = f" and {len(culprit.ids) - MOST_NAMED} more" if len(culprit.ids) > MOST_NAMED else ""
            words.append(f"rank {culprit.rank}, sample ids {ids}{more}")
        else:
            words.append(f"rank {culprit.rank}, none of whose samples alone is the cause")
    return "; ".join(words)


@torch.no_grad()
def _bad_rows(engine: Engine, teacher: Teacher | None, temperature: float, batch: Batch) -> list[Batch]:
    """The rows whose own values are not finite, each as a batch of one. Where parameters are sharded the
    passes of the ranks meet, so all make equally many."""
    config, device = engine.objective.config, engine.device
    zeros = torch.zeros(1, config.embed_dim, device=device)
    bias = torch.zeros(1, device=device) if config.contrastive == "sigmoid" else None
    # Against slopes of zero the contrastive term is zero, or not finite where a feature is not.
    alone = MicroBatch(
        torch.ones(2, device=device), Features(zeros, zeros, torch.zeros(1, device=device), bias)
    )

    def finite(parts: Sequence[Batch]) -> list[bool]:
        losses = [engine.shares(part, teacher, temperature, alone).loss.reshape(()) for part in parts]
        return torch.isfinite(torch.stack(losses)).tolist() if losses else []

    groups = split(batch, math.isqrt(len(batch["id"])))
    bad = [group for group, good in zip(groups, finite(groups), strict=True) if not good]
    rows = [row for group in bad for row in split(group, len(group["id"]))]
    most = torch.tensor(len(rows), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    found = finite(rows + groups[:1] * (int(most) - len(rows)))
    return [row for row, good in zip(rows, found, strict=False) if not good]
