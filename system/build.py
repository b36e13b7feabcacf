"""From a configuration to the parts of a training job."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cluster.errors import ConfigError, Hang
from cluster.event_spool import Spool
from cluster.events import EventLog, claim_attempt
from cluster.stop import StopRequest
from cluster.store import ObjectStore
from cluster.watchdog import Watchdog
from cluster.world import World, process_clocks
from data_pipeline.image.augment import AugmentConfig
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.order import OrderConfig
from model.blocks import compile_blocks
from model.objective import Objective
from model.teacher import Teacher
from system.agreement import on_rank_zero
from system.checkpoints.checkpointer import Checkpointer
from system.config import TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.engine.engine import TYPES, Engine
from system.engine.teacher_state import ShardedTeacher
from system.evaluation.training import TrainingEvaluation
from system.export.initial_weights import fill, initial_weights
from system.health.monitor import Health
from system.observe import step_sources
from system.run_folder import claim_run, describe_run
from system.sinks.config import TelemetryConfig
from system.sinks.feed import Feed
from system.trainer import Trainer

JOIN_SECONDS = 300.0
"""How long a rank waits for the others at its start."""


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """torch.distributed under DeepSpeed's roof: NCCL where there is CUDA, gloo elsewhere."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if cuda:
        torch.cuda.set_device(world.local_rank)
    # DeepSpeed would compile an operator that only inference uses, under a lock file that a process killed
    # meanwhile leaves behind, and every later run would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It also calls what torch has renamed: no news for the user.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}`", FutureWarning)
    _meet(world, "nccl" if cuda else "gloo")
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(world: World, backend: str) -> None:
    """Join the other ranks. Raises Hang when they do not come, ConfigError when nobody says where."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        store.set_timeout(dist.default_pg_timeout)  # from here on, a rank may be long at its work
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except ValueError as error:
        raise ConfigError(f"environment: {error}; set MASTER_ADDR and MASTER_PORT as torchrun does") from None
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise Hang(
            f"{world.size} ranks did not meet at {where} within {JOIN_SECONDS:g} s ({reason}); start all of "
            "them, or unset RANK and WORLD_SIZE"
        ) from None


def build_loader(config: TrainConfig, world: World) -> Loader:
    return Loader(
        config.data.parts,
        OrderConfig(
            seed=config.run.seed, streams=config.data.streams, window_shards=config.data.window_shards
        ),
        AugmentConfig(image_size=config.model.vision.image_size, scale=config.data.crop_scale),
        config.data.loader,
        config.data.global_batch,
        world.rank,
        world.size,
    )


def build_engine(
    config: TrainConfig, world: World, parameters: Mapping[str, torch.Tensor] | None = None
) -> tuple[Engine, ShardedTeacher]:
    """Student, optimizer and teacher, freshly initialised from run.seed, but for the given parameters; the
    same on every rank."""
    objective = Objective(config.model, seed=config.run.seed)
    fill(objective, parameters or {})
    if config.engine.compile:
        compile_blocks(objective)
    teacher = None
    if config.model.distill.needs_teacher:
        teacher = Teacher(config.model)
        if config.engine.compile:
            compile_blocks(teacher)
        teacher.load_student(objective)  # while its parameters are whole on every rank
    engine = Engine(objective, config, math.ceil(config.data.global_batch / world.size))
    if teacher is not None:
        teacher = teacher.to(engine.device, TYPES[config.engine.precision])
    return engine, ShardedTeacher(teacher, engine.fragments)


@contextmanager
def open_event_log(
    run: ObjectStore, world: World, flush_seconds: float, telemetry: TelemetryConfig | None = None
) -> Iterator[EventLog]:
    """The log of this rank in a new attempt, by way of the spool if `telemetry` names one."""
    attempt = on_rank_zero(lambda: claim_attempt(run))
    spool = telemetry.spool if telemetry is not None else ""
    target = Spool(Path(spool), run, world.rank, telemetry.spool_bytes) if telemetry and spool else run
    events = EventLog(target, attempt, world.rank, flush_seconds)
    events.instant("attempt_opened", **process_clocks())
    try:
        yield events
    finally:
        events.close()
        if isinstance(target, Spool):
            target.close()


@contextmanager
def build_trainer(
    config: TrainConfig,
    world: World,
    run: ObjectStore,
    events: EventLog,
    watchdog: Watchdog,
    stop: StopRequest,
    feeds: Sequence[Feed],
) -> Iterator[tuple[Trainer, Loader]]:
    """A trainer at step 0 and the loader that feeds it. Call `Trainer.resume` next."""
    loader = build_loader(config, world)
    initial = initial_weights(config, run)
    on_rank_zero(lambda: claim_run(run, config, loader.manifest_digest, initial.digest))
    engine, teacher = build_engine(config, world, initial.parameters)
    description = describe_run(config, loader.manifest_digest, initial.digest)
    checkpointer = Checkpointer(run, engine, teacher, events, description, config.checkpoint)
    with (
        Console(config.run.steps, active=world.rank == 0) as console,
        step_sources(config, loader, events, feeds) as sources,
    ):
        events.subscribe(console.event)
        comm = DistributedCollectives()
        evaluation = TrainingEvaluation(config, engine, teacher, events, console)
        health = Health(config, run, engine, teacher, events, console, watchdog)
        yield (
            Trainer(
                config,
                engine,
                teacher,
                comm,
                checkpointer,
                events,
                console,
                health,
                stop,
                evaluation,
                sources,
            ),
            loader,
        )
