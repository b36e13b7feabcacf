"""One rank that trains a few steps and checks its teacher against a whole fp32 EMA that it keeps beside.

``teacher_worker.py LIST``: settings of engine_worker, one job each; an assertion that fails ends the rank.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from cluster.world import World
from system.build import build_engine, process_group
from system.engine.accumulate import Accumulator
from system.engine.collectives import DistributedCollectives
from system.engine.fragments import Fragment
from system.schedules import at
from tests.support.engine_worker import made_up_batch, share, worker_config


def whole(
    fragments: list[tuple[str, int, torch.Tensor]], shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Parameters out of the runs of all ranks."""
    everyone: list[list[tuple[str, int, torch.Tensor]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, fragments)
    values = {name: torch.full((shape.numel(),), float("nan")) for name, shape in shapes.items()}
    for runs in everyone:
        for name, start, run in runs:
            values[name][start : start + run.numel()] = run
    assert all(not torch.isnan(value).any() for value in values.values())
    return values


def runs(fragments: list[Fragment], tensors: list[torch.Tensor]) -> list[tuple[str, int, torch.Tensor]]:
    return [(f.parameter, f.start, tensor.clone()) for f, tensor in zip(fragments, tensors, strict=True)]


def follow(settings: dict[str, Any], world: World) -> None:
    config = worker_config("none", 5, settings)
    engine, teacher = build_engine(config, world)
    assert teacher.module is not None
    copies = dict(teacher.module.named_parameters())
    shapes = {name: parameter.shape for name, parameter in copies.items()}
    accumulator = Accumulator(engine, config.engine.accumulation)
    expected = whole(runs(teacher.held, teacher.masters), shapes)
    for step in range(config.run.steps):
        values = at(step, config)
        output = accumulator.forward(
            share(made_up_batch(step), world),
            teacher=teacher.module,
            teacher_temperature=values.teacher_temperature,
            comm=DistributedCollectives(),
        )
        assert engine.step(output.loss, values.lr).applied
        teacher.update(values.momentum, output.centre_K, config.model.distill.centre_momentum)
        student = whole(runs(teacher.held, [f.state["master"] for f in teacher.held]), shapes)
        for name, value in expected.items():
            value.lerp_(student[name], 1 - values.momentum)
        found = whole(runs(teacher.held, teacher.masters), shapes)
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{settings}, step {step}: {name}"
            copy = copies[name].flatten()
            assert torch.equal(copy, value.to(copy.dtype)), f"{settings}, step {step}: copy of {name}"


def main(every_settings: str) -> None:
    world = World.from_env()
    with process_group(world):
        for settings in json.loads(every_settings):
            follow(settings, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
