"""Bytes that a rank holds, by part and ZeRO stage.

What DeepSpeed keeps was found out by measuring runs on a CPU at every stage in fp32 and bf16, and a test
compares this page with such runs (tests/numerics/test_memory.py). The most of a step is estimated: the state
and the larger of two moments, when the backward begins and when gradients are reduced. Libraries, kernels'
workspaces, the CUDA context and fragmentation come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model.objective import Objective
from model.teacher import Teacher
from system.config import TrainConfig
from system.engine.optim import build_optimizer

_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which ours does not set."""
_PERSISTENT_ELEMENTS = 100_000
"""Parameters up to this size stay whole at stage 3 (DeepSpeed's stage3_param_persistence_threshold)."""

_LIVE_ELEMENTS = 1_000_000_000
"""As many gathered ones may be there at once (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Shapes:
    """Numbers of elements that decide how much is where."""

    groups: tuple[tuple[tuple[str, int], ...], ...]
    """Name and size of every trained parameter, by optimizer group, in its order."""
    teacher: frozenset[str]
    """Names of the parameters that the teacher averages."""

    @classmethod
    def of(cls, config: TrainConfig) -> Shapes:
        """Allocates nothing."""
        with torch.device("meta"):
            objective = Objective(config.model, seed=0)
            teacher = Teacher(config.model) if config.model.distill.needs_teacher else None
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        groups = build_optimizer(objective, config.optimizer).param_groups
        followed = () if teacher is None else (name for name, _ in teacher.named_parameters())
        return cls(
            tuple(tuple((names[id(p)], p.numel()) for p in group["params"]) for group in groups),
            frozenset(followed),
        )

    @property
    def parameters(self) -> int:
        return sum(size for group in self.groups for _, size in group)

    @property
    def averaged(self) -> int:
        """Of the teacher."""
        return sum(size for group in self.groups for name, size in group if name in self.teacher)

    def share(self, world_size: int) -> int:
        """Elements that a rank holds of what is shared out at stages 1 and 2; each group is padded."""
        return sum(math.ceil(sum(size for _, size in group) / world_size) for group in self.groups)

    def averaged_share(self, world_size: int) -> int:
        """Elements of the teacher at the rank that holds most of them: groups are cut in equal runs, and the
        teacher's parameters lie close together."""
        held = [0] * world_size
        for group in self.groups:
            length, position = math.ceil(sum(size for _, size in group) / world_size), 0
            for name, size in group:
                if name in self.teacher:
                    for rank in range(position // length, (position + size - 1) // length + 1):
                        start, end = rank * length, (rank + 1) * length
                        held[rank] += min(end, position + size) - max(start, position)
                position += size
        return max(held)

    def small(self) -> int:
        """Elements of parameters that stay whole at stage 3."""
        return sum(size for group in self.groups for _, size in group if size <= _PERSISTENT_ELEMENTS)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device, but for `host`."""

    parameters: float
    """The copy that the passes compute with."""
    optimizer: float
    """fp32 masters (none beside fp32 parameters at stage 0) and Adam's two moments."""
    gradients: float
    teacher: float
    """Compute copy, which is whole on every rank, and fp32 master."""
    activations: float
    """What the forward leaves for the backward."""
    gathered: float
    """Stage 3: parameters of the other ranks that are there while the passes run."""
    reduction: float
    """Copies of gradients while they are summed over ranks, in fp32."""
    bucket: float
    """DeepSpeed's buffer for that; held on to at stage 3."""
    host: float
    """Offloaded parts, and the copy that a save writes from."""

    resident_gradients: bool
    """Stage 3 keeps the buffers of gradients, and the bucket, between steps."""

    @property
    def state(self) -> float:
        """Between two steps."""
        kept = (self.gradients + self.bucket) * self.resident_gradients
        return self.parameters + self.optimizer + self.teacher + kept

    @property
    def device(self) -> float:
        """The most of a step."""
        always = self.parameters + self.optimizer + self.teacher + self.gradients + self.bucket
        return always + max(self.activations + self.gathered, self.reduction)


def rank_memory(
    config: TrainConfig, shapes: Shapes, stage: int, world_size: int, bytes_per_pair: float
) -> Memory:
    """Of the rank that holds most.

    Args:
        bytes_per_pair: `activations.activation_bytes` of this model and precision.
    """
    engine, width = config.engine, 4 if config.engine.precision == "fp32" else 2
    whole, averaged = shapes.parameters, shapes.averaged
    share = shapes.share(world_size)
    rows = math.ceil(math.ceil(config.data.global_batch / world_size) / engine.accumulation)
    fp32_gradients = engine.accumulation > 1 or width == 4
    gradient_width = 4 if fp32_gradients else width
    in_fp32 = 4 * min(whole, _BUCKET_ELEMENTS) * (width == 2)
    gathered, reduction = 0, in_fp32
    match stage:
        case 0:
            parameters, masters, teacher = width * whole, 4 * whole * (width == 2), 4 * averaged
            optimizer, gradients, bucket = masters + 8 * whole, gradient_width * whole, 0
            reduction = 6 * whole * (width == 2)
        case 1 | 2:
            parameters, teacher = width * whole, 4 * shapes.averaged_share(world_size)
            optimizer, gradients = 12 * share, gradient_width * whole
            bucket = width * _BUCKET_ELEMENTS
        case _:
            parameters, teacher = width * (share + shapes.small()), 4 * math.ceil(averaged / world_size)
            optimizer, gradients = 12 * share, gradient_width * share
            gathered = width * min(whole - shapes.small(), _LIVE_ELEMENTS)
            bucket = 4 * _BUCKET_ELEMENTS
    snapshot = 12 * share + teacher if stage else (12 * whole + teacher) / world_size
    offloaded = (optimizer + teacher) * engine.offload_optimizer + parameters * engine.offload_parameters
    return Memory(
        parameters=parameters * (not engine.offload_parameters),
        optimizer=optimizer * (not engine.offload_optimizer),
        gradients=gradients,
        teacher=width * averaged + teacher * (not engine.offload_optimizer),
        activations=bytes_per_pair * rows,
        gathered=gathered,
        reduction=reduction,
        bucket=bucket,
        host=snapshot + offloaded,
        resident_gradients=stage == 3,
    )


def checkpoint_bytes(shapes: Shapes) -> int:
    """Masters, moments and the teacher in fp32, over all ranks."""
    return 12 * shapes.parameters + 4 * shapes.averaged
