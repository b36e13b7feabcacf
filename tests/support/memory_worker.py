"""One rank that trains the `tiny` preset for two steps and prints the bytes of its tensors as JSON, for each
of the engine settings in its argument (a JSON list)."""

import gc
import json
import sys
from typing import Any

from cluster.world import World
from model.config import preset
from system.build import build_engine, process_group
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.engine.collectives import DistributedCollectives
from system.planning.activations import made_up_batch
from system.planning.storage_tracker import StorageTracker
from system.schedules import at

BATCH, CAPTION_TOKENS = 16, 20


def worker_config(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(uri="none", steps=9, seed=3),
        data=DataConfig(uri="none", global_batch=BATCH, streams=1),
        model=preset("tiny"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        engine=EngineConfig(**settings),
    )


def measured(settings: dict[str, Any], world: World) -> dict[str, int]:
    """Bytes of this rank: between two steps, what the forward leaves alive, the most of a whole step."""
    config = worker_config(settings)
    batch = made_up_batch(config.model, BATCH // world.size, CAPTION_TOKENS)
    with StorageTracker() as tracker:
        engine, teacher = build_engine(config, world)
        found = {}
        for step in range(2):
            values = at(step, config)
            gc.collect()  # cycles of the step before would end at any time
            found["state"] = tracker.peak = tracker.alive
            output = engine.forward(
                batch, teacher.module, values.teacher_temperature, DistributedCollectives()
            )
            found["activations"] = tracker.alive - found["state"]
            assert engine.step(output.loss, values.lr).applied
            teacher.update(values.momentum, output.centre_K, config.model.distill.centre_momentum)
            found["peak"] = tracker.peak
            del output
    return found


if __name__ == "__main__":
    here = World.from_env()
    with process_group(here):
        results = [measured(settings, here) for settings in json.loads(sys.argv[1])]
    if here.rank == 0:
        print(json.dumps(results))
