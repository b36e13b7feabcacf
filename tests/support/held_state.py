"""A job that is nothing but its state: what saves and restores need of `JobState`, in one process."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cluster.events import EventLog
from cluster.store import ObjectStore
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.local_tier import LocalTier
from system.checkpoints.retention import Retention
from system.checkpoints.save import Place, SaveJob
from system.checkpoints.snapshot import Snapshot
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


def save_job(
    run: ObjectStore,
    events: EventLog,
    step: int,
    state: HeldState,
    local: LocalTier | None = None,
    **knobs: Any,
) -> SaveJob:
    """What saves `state`, with these settings of a checkpoint section."""
    config = CheckpointConfig(**knobs)
    place = Place(run, 0, 1, events, config, local, Retention(run, config, events))
    snapshot = Snapshot(state.saved_tensors())
    snapshot.take(state.saved_tensors())
    meta = {"slot": step * 8, "samples_seen": step * 8, "parameters": state.shapes}
    return SaveJob(place, step, meta, snapshot, time.monotonic(), 0.0)
