"""One rank that refuses steps: ``refusal_worker.py FOLDER``; an assertion that fails ends the rank.

A refused step must leave nothing behind, at any stage: neither of its gradient nor of its loss scale's count.
"""

import sys
from dataclasses import replace
from typing import Any

import torch

from cluster.errors import NonFinite
from cluster.events import EventLog, read_events
from cluster.stop import StopRequest
from cluster.store import ObjectStore, open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpointer import Checkpointer
from system.config import TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.health.monitor import Health
from system.trainer import Trainer
from tests.support.engine_worker import made_up_batch, share, worker_config

STEPS = 2


def build(config: TrainConfig, world: World, run: ObjectStore, events: EventLog) -> Trainer:
    engine, teacher = build_engine(config, world)
    checkpointer = Checkpointer(run, engine, teacher, events, {})
    console = Console(STEPS, active=False)
    watchdog = Watchdog(config.watchdog, run, world, events)
    return Trainer(
        config,
        engine,
        teacher,
        DistributedCollectives(),
        checkpointer,
        events,
        console,
        Health(config, run, engine, teacher, events, console, watchdog),
        StopRequest(),
        lambda step: None,
    )


def state(trainer: Trainer) -> list[torch.Tensor]:
    fragments = [values.clone() for f in trainer.engine.fragments for values in f.state.values()]
    return fragments + [master.clone() for master in trainer.teacher.masters]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def poisoned(batch: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """The loss of the last rank's last micro-batch is not finite."""
    if world.rank != world.size - 1:
        return batch
    image = batch["image"].float() / 255
    image[-2:] = float("nan")
    return batch | {"image": image}


def non_finite_loss(config: TrainConfig, world: World, run: ObjectStore, events: EventLog) -> None:
    """The steps around a refused one are, to the bit, those of a run without it."""
    states = []
    for disturbed in (False, True):
        trainer = build(config, world, run, events)
        for step in range(STEPS):
            batch = share(made_up_batch(step), world)
            if disturbed and step == 1:
                before = state(trainer)
                try:
                    trainer.step_until_applied(poisoned(batch, world), 0.0)
                    raise AssertionError("the step was applied")
                except NonFinite:
                    pass
                assert equal(state(trainer), before)
            trainer.step_until_applied(batch, 0.0)
        assert trainer.refused_steps == config.engine.max_refused_steps * disturbed
        states.append(state(trainer))
    assert equal(*states), f"a refused step left something behind with {config.engine}"
    events.flush()
    if world.rank == 0:
        (told,) = (event for event in read_events(run) if event.get("name") == "step_refused")
        last = replace(world, rank=world.size - 1)
        assert told["ids"] == share(made_up_batch(1), last)["id"][-2:].tolist(), told
        assert told["ranks"] == [last.rank], told


def overflow(config: TrainConfig, world: World, run: ObjectStore, events: EventLog) -> None:
    """In fp16 the first scales are too large: refusals, counted; the scale goes with the checkpoint."""
    trainer = build(config, world, run, events)
    before = state(trainer)
    batch = share(made_up_batch(0), world)
    _, outcome = trainer.step(batch, 0.0)
    assert (outcome.applied, outcome.scale_lowered, outcome.loss_scale) == (False, True, 2**16)
    assert (trainer.refused_steps, trainer.steps_done) == (1, 0)
    assert equal(state(trainer), before)
    trainer.step_until_applied(batch, 0.0)
    assert trainer.steps_done == 1
    scaling = trainer.engine.loss_scaling()
    assert scaling is not None
    assert scaling["cur_scale"] == 2 ** (16 - trainer.refused_steps)
    assert trainer.last_save() == 1
    events.flush()
    if world.rank == 0:
        told = [event for event in read_events(run) if event.get("name") == "step_refused"]
        assert len(told) == trainer.refused_steps, told
        assert "loss scale 65536" in told[0]["reason"]
    again = build(config, world, run, events)
    assert again.resume() == 1
    assert again.engine.loss_scaling() == scaling
    assert again.refused_steps == trainer.refused_steps
    assert equal(state(again), state(trainer))


def main(folder: str) -> None:
    world = World.from_env()
    settings: list[dict[str, Any]] = [
        {"zero_stage": 0, "accumulation": 2},
        {"zero_stage": 1, "accumulation": 2},
        {"zero_stage": 2, "accumulation": 2, "offload_optimizer": True},
        {"zero_stage": 3, "accumulation": 2},
        {"zero_stage": 3},
    ]
    jobs: list[tuple[Any, dict[str, Any]]] = [
        (non_finite_loss, {"max_refused_steps": 1, **engine}) for engine in settings
    ]
    jobs.append((overflow, {"zero_stage": 3, "precision": "fp16"}))
    with process_group(world):
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed asks for fast fp16 kernels; any CPU computes in it.
        get_accelerator().is_fp16_supported = lambda: True  # type: ignore[union-attr]
        for number, (job, engine) in enumerate(jobs):
            uri = f"{folder}/{number}"
            config, run = worker_config(uri, STEPS, engine), open_store(uri)
            with open_event_log(run, world, 1.0) as events:
                job(config, world, run, events)


if __name__ == "__main__":
    main(sys.argv[1])
