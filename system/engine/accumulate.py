"""Gradient accumulation whose negatives come from the whole global batch (GradCache, Gao et al., 2021; not
from the paper).

The features of all micro-batches are computed first, without autograd. They meet as in one pass, which gives
the contrastive loss and its gradient with respect to them. Then each micro-batch is run again, now with
autograd, with that gradient and with its shares of the other terms. Masks and stochastic depth are keyed by
sample, so the second run sees what the first one saw. Memory is that of one micro-batch and of the features;
the price is one more forward of the contrastive passes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.global_batch import Features, MicroBatch, OnePass
from model.losses import Collectives, mean_factors
from model.objective import Output, Shares
from model.teacher import Teacher
from system.engine.engine import Engine

Batch = Mapping[str, Tensor]


class _Contrast(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]
    slopes: list[Features]
    """Gradient with respect to the features of each micro-batch."""


class Accumulator:
    """One step's forward, and all of its backward but the last part, which is `Engine.step`'s."""

    def __init__(self, engine: Engine, micro_batches: int) -> None:
        self._engine, self._count = engine, micro_batches

    def forward(
        self, batch: Batch, teacher: Teacher | None, teacher_temperature: float, comm: Collectives
    ) -> Output:
        """As `model.objective.Objective.loss`, with its value and its gradient for the whole batch.

        Returns:
            The loss is to be given to `Engine.step` or `Engine.discard`, which end the step.
        """
        if self._count == 1:
            return self._engine.forward(batch, teacher, teacher_temperature, comm)
        parts = split(batch, self._count)
        found = [self._engine.features(part) for part in parts]
        factors_2 = mean_factors(torch.stack([counts_2 for _, counts_2 in found]).sum(dim=0), comm)
        share_B = batch["weight"].float() * factors_2[0]
        contrast = _contrast([features for features, _ in found], share_B, comm)
        passes: list[Shares] = []
        for part, slopes in zip(parts, contrast.slopes, strict=True):
            if passes:
                self._engine.add_gradient(passes[-1].loss)
                passes[-1] = _detached(passes[-1])
            known = MicroBatch(factors_2, slopes)
            passes.append(self._engine.shares(part, teacher, teacher_temperature, known))
        return self._engine.objective.report(_sum(passes, contrast), comm)


def split(batch: Batch, count: int) -> list[dict[str, Tensor]]:
    """Micro-batches, whose sizes differ by at most one row; equally many on every rank."""
    parts = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: tensors[index] for name, tensors in parts.items()} for index in range(count)]


def _contrast(found: list[Features], share_B: Tensor, comm: Collectives) -> _Contrast:
    """All features of this rank meet those of the others."""
    image_BE = torch.cat([features.image_BE for features in found])
    text_BE = torch.cat([features.text_BE for features in found])
    whole = [tensor for tensor in (image_BE, text_BE, *found[0][2:]) if tensor is not None]
    for tensor in whole:
        tensor.requires_grad_()
    bias = whole[3] if len(whole) == 4 else None
    terms = OnePass(comm).contrast(Features(whole[0], whole[1], whole[2], bias), share_B)
    loss = torch.stack(list(terms.values())).sum()
    slopes = torch.autograd.grad(loss, whole)
    sizes = [len(features.image_BE) for features in found]
    # Every micro-batch meets the same scale and bias: an equal part of their gradient each.
    shared = [slope / len(found) for slope in slopes[2:]]
    parts = [
        Features(image_bE, text_bE, shared[0], shared[1] if bias is not None else None)
        for image_bE, text_bE in zip(slopes[0].split(sizes), slopes[1].split(sizes), strict=True)
    ]
    return _Contrast(loss.detach(), {name: term.detach() for name, term in terms.items()}, parts)


def _detached(shares: Shares) -> Shares:
    terms = {name: term.detach() for name, term in shares.terms.items()}
    return shares._replace(loss=shares.loss.detach(), terms=terms)


def _sum(passes: list[Shares], contrast: _Contrast) -> Shares:
    """The shares of the whole step, as one pass would give them; its gradient is that of the last pass."""
    last, fixed = passes[-1], [_detached(shares) for shares in passes]
    terms = {name: torch.stack([shares.terms[name] for shares in fixed]).sum() for name in last.terms}
    averages = {name: torch.stack([s.averages[name] for s in fixed]).sum(dim=0) for name in last.averages}
    others = torch.stack([shares.loss for shares in fixed[:-1]]).sum()
    loss = last.loss + (others - terms.pop("contrast") + contrast.loss)
    return Shares(loss, contrast.terms | terms, averages, last.scale)
