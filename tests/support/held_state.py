"""A job that is nothing but its state: what saves and restores need of `JobState`, in one process."""

import math
from collections.abc import Mapping, Sequence

import torch

from system.checkpoints.state_digest import add, run_sum

SHAPES = {"a.weight": [40, 30], "b": [1]}
KINDS = ("master", "exp_avg", "exp_avg_sq", "teacher")


class HeldState:
    def __init__(self, seed: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes = {name: list(shape) for name, shape in shapes.items()}
        self.values = {
            (kind, name): torch.randn(math.prod(shape), generator=generator)
            for kind in KINDS
            for name, shape in self.shapes.items()
        }

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        return {f"{kind}/{name}/0": values for (kind, name), values in self.values.items()}

    def targets(self) -> list[tuple[tuple[str, str, int, int], torch.Tensor]]:
        return [((kind, name, 0, values.numel()), values) for (kind, name), values in self.values.items()]

    def filled(self, step: int) -> None:
        pass

    def digest(self) -> str:
        sums = []
        for (kind, name), values in self.values.items():
            if kind in ("master", "teacher"):
                sums.append(run_sum(name if kind == "master" else f"teacher/{name}", 0, values.numpy()))
        return add(sums)

    def equals(self, other: "HeldState") -> bool:
        return all(torch.equal(values, other.values[key]) for key, values in self.values.items())
