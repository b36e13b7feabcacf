"""One rank that trains the `test` preset on made-up pairs and saves its state.

``train RUN STAGE PRECISION STEPS`` continues from the newest checkpoint of RUN; ``resave SOURCE TARGET
STAGE`` restores the newest checkpoint of SOURCE into an engine of that stage and writes it to TARGET.
Events are the real ones; only the data are made up, so that a test can compute the same steps without our
engine.
"""

import math
import sys

import torch

from cluster.store import open_store
from cluster.world import World
from model.config import preset
from system.build import build_engine, open_event_log, process_group
from system.checkpointer import Checkpointer
from system.collectives import DistributedCollectives
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.schedules import at

GLOBAL_BATCH = 12


def worker_config(run: str, stage: int, precision: str, steps: int) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(uri=run, steps=steps, seed=3),
        data=DataConfig(uri="none", global_batch=GLOBAL_BATCH, streams=1),
        model=preset("test"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        engine=EngineConfig(zero_stage=stage, precision=precision),  # type: ignore[arg-type]
    )


def made_up_batch(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step, a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = preset("test").text
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


def train(run_uri: str, stage: str, precision: str, steps: str) -> None:
    config, world = worker_config(run_uri, int(stage), precision, int(steps)), World.from_env()
    with process_group(world):
        run = open_store(run_uri)
        with open_event_log(run, world, 1.0) as events:
            engine, teacher = build_engine(config, world)
            checkpointer = Checkpointer(run, engine, teacher, events, {})
            done, comm = checkpointer.restore().step, DistributedCollectives()
            for step in range(done, config.run.steps):
                values = at(step, config)
                batch = share(made_up_batch(step), world)
                output = engine.forward(
                    batch, teacher=teacher.module, teacher_temperature=values.teacher_temperature, comm=comm
                )
                outcome = engine.step(output.loss, values.lr)
                assert outcome.applied
                teacher.update(values.momentum, output.centre_K, config.model.distill.centre_momentum)
                if world.rank == 0:
                    events.scalar(step + 1, loss=float(output.total), grad_norm=outcome.grad_norm)
            meta = {"slot": config.run.steps * GLOBAL_BATCH, "samples_seen": 0}
            if config.run.steps > done and not checkpointer.save(config.run.steps, meta):
                raise SystemExit("the checkpoint was not committed")


def resave(source: str, target: str, stage: str) -> None:
    world = World.from_env()
    with process_group(world), open_event_log(open_store(target), world, 1.0) as events:
        engine, teacher = build_engine(worker_config(source, int(stage), "fp32", 1), world)
        restored = Checkpointer(open_store(source), engine, teacher, events, {}).restore()
        meta = {"slot": restored.meta["slot"], "samples_seen": restored.meta["samples_seen"]}
        assert Checkpointer(open_store(target), engine, teacher, events, {}).save(restored.step, meta)


if __name__ == "__main__":
    {"train": train, "resave": resave}[sys.argv[1]](*sys.argv[2:])
