"""One rank that trains a few steps: ``norms_worker.py RUN SETTINGS...``, SETTINGS are JSON of the engine's
section. Writes RUN/0/found.json and so on: what the log says of norms, and what the weights' are."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.stop import StopRequest
from cluster.store import open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from model.config import preset
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpointer import Checkpointer
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.health.monitor import Health
from system.sinks.config import TelemetryConfig
from system.trainer import Trainer
from tests.support.engine_worker import GLOBAL_BATCH, made_up_batch, share

STEPS = 3


def square(fragments: list, named: str, values: Any) -> float:
    """Sum over the ranks of the squares of what each saves, of parameters whose name begins so."""
    total = torch.zeros((), dtype=torch.float64)
    for fragment, flat in zip(fragments, values, strict=True):
        start = fragment.saved_start - fragment.start
        if fragment.parameter.startswith(named):
            total += flat[start : start + fragment.saved_length].double().square().sum()
    dist.all_reduce(total)
    return float(total)


def main(run_uri: str, settings: dict[str, Any], world: World) -> None:
    config = TrainConfig(
        run=RunConfig(uri=run_uri, steps=STEPS, seed=3),
        data=DataConfig(uri="none", global_batch=GLOBAL_BATCH, streams=1),
        model=preset("test"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        engine=EngineConfig(**settings),
        telemetry=TelemetryConfig(norms_every=2, peak_tflops=1.0),
    )
    run = open_store(run_uri)
    logged: list[dict[str, Any]] = []
    with open_event_log(run, world, 1.0) as events, StopRequest() as stop:
        events.subscribe(logged.append)
        engine, teacher = build_engine(config, world)
        checkpointer = Checkpointer(run, engine, teacher, events, {})
        console = Console(STEPS, active=False)
        comm = DistributedCollectives()
        watchdog = Watchdog(config.watchdog, run, world, events)
        health = Health(config, run, engine, teacher, events, console, watchdog)
        trainer = Trainer(
            config, engine, teacher, comm, checkpointer, events, console, health, stop, lambda _: None
        )
        for step in range(STEPS):
            trainer.step_until_applied(share(made_up_batch(step), world), 0.25)
        masters = [fragment.state["master"] for fragment in engine.fragments]
        known = {
            "param_square_vision": square(engine.fragments, "vision.", masters)
            + square(engine.fragments, "image_projection.", masters),
            "param_square": square(engine.fragments, "", masters),
        }
    if world.rank == 0:
        steps = [event for event in logged if event["name"] == "step"]
        found = {"settings": settings, "steps": steps, "known": known}
        Path(run_uri, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    own = World.from_env()
    torch.set_num_threads(1)
    with process_group(own):
        for number, given in enumerate(sys.argv[2:]):
            main(f"{sys.argv[1]}/{number}", json.loads(given), own)
