"""One rank that trains the `test` preset on made-up pairs and saves its state.

The argument is a JSON list of jobs, done one after the other: ``["train", RUN, STEPS, SETTINGS]`` continues
from the newest checkpoint of RUN; ``["resave", SOURCE, TARGET, SETTINGS]`` restores the newest checkpoint of
SOURCE into an engine of those settings and writes it to TARGET. SETTINGS are those of the engine, and
``gradient_clip``. Events are the real ones; only the data are made up, so that a test can compute the same
steps without our engine.
"""

import json
import math
import sys
from typing import Any

import torch

from cluster.store import open_store
from cluster.world import World
from model.config import TextConfig, preset
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpointer import Checkpointer
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.engine.accumulate import Accumulator
from system.engine.collectives import DistributedCollectives
from system.schedules import at

TEXT = preset("test").text
GLOBAL_BATCH = 11  # no number of ranks or micro-batches divides it


def worker_config(run: str, steps: int, settings: dict[str, Any]) -> TrainConfig:
    engine: dict[str, Any] = {"precision": "fp32", **settings}
    clip = engine.pop("gradient_clip", 0.0)
    return TrainConfig(
        run=RunConfig(uri=run, steps=steps, seed=3),
        data=DataConfig(uri="none", global_batch=GLOBAL_BATCH, streams=1),
        model=preset("test"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, gradient_clip=clip),
        engine=EngineConfig(**engine),
    )


def made_up_batch(step: int, text: TextConfig = TEXT) -> dict[str, torch.Tensor]:
    """The global batch of a step, a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.zeros(GLOBAL_BATCH, text.context_length, dtype=torch.int64)
    tokens[:, 0] = text.start_token
    tokens[:, 1:9] = torch.randint(1, 500, (GLOBAL_BATCH, 8), generator=generator)
    tokens[:, 9] = text.end_token
    slots = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    return {
        "image": torch.randint(0, 256, (GLOBAL_BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "tokens": tokens,
        "id": slots + 7,
        "epoch": torch.zeros(GLOBAL_BATCH, dtype=torch.int64),
        "weight": torch.ones(GLOBAL_BATCH),
        "slot": slots,
    }


def share(batch: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """This rank's rows, filled up with rows of weight 0 where the world size does not divide the batch."""
    rows = math.ceil(GLOBAL_BATCH / world.size)
    wanted = torch.arange(world.rank * rows, (world.rank + 1) * rows)
    part = {name: tensor[wanted.clamp(max=GLOBAL_BATCH - 1)] for name, tensor in batch.items()}
    part["weight"] = (wanted < GLOBAL_BATCH).float()
    return part


def train(run_uri: str, steps: int, settings: dict[str, Any], world: World) -> None:
    config, run = worker_config(run_uri, steps, settings), open_store(run_uri)
    with open_event_log(run, world, 1.0) as events:
        engine, teacher = build_engine(config, world)
        checkpointer = Checkpointer(run, engine, teacher, events, {})
        done, comm = checkpointer.restore().step, DistributedCollectives()
        accumulator = Accumulator(engine, config.engine.accumulation)
        for step in range(done, steps):
            values = at(step, config)
            batch = share(made_up_batch(step), world)
            output = accumulator.forward(
                batch, teacher=teacher.module, teacher_temperature=values.teacher_temperature, comm=comm
            )
            outcome = engine.step(output.loss, values.lr)
            assert outcome.applied
            teacher.update(values.momentum, output.centre_K, config.model.distill.centre_momentum)
            if world.rank == 0:
                events.scalar(step + 1, loss=float(output.total), grad_norm=outcome.grad_norm)
        meta = {"slot": steps * GLOBAL_BATCH, "samples_seen": 0}
        if steps > done and not checkpointer.save(steps, meta):
            raise SystemExit("the checkpoint was not committed")


def resave(source: str, target: str, settings: dict[str, Any], world: World) -> None:
    with open_event_log(open_store(target), world, 1.0) as events:
        engine, teacher = build_engine(worker_config(source, 1, settings), world)
        restored = Checkpointer(open_store(source), engine, teacher, events, {}).restore()
        meta = {"slot": restored.meta["slot"], "samples_seen": restored.meta["samples_seen"]}
        assert Checkpointer(open_store(target), engine, teacher, events, {}).save(restored.step, meta)


def main(jobs: str) -> None:
    world = World.from_env()
    with process_group(world):
        for name, *arguments in json.loads(jobs):
            {"train": train, "resave": resave}[name](*arguments, world)


if __name__ == "__main__":
    main(sys.argv[1])
