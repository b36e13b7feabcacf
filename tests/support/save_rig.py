"""A run of several attempts, each of which may be killed at a named point, in forked ranks.

``save_rig.py RUN CONFIG ATTEMPT...``: CONFIG is JSON (a checkpoint section, and `processes`, `zero_stage`,
`pause` in seconds before each step), ATTEMPT is ``POINT:STEP:RANK`` (see `faulty_rank.POINTS`) or ``whole``.
The trainer, the checkpointer and the store are the real ones; only the batches are made up. Torch and
DeepSpeed are imported once, so that an attempt takes seconds. Prints a line of JSON per attempt: exit codes
(negative: the signal), committed steps, what is wrong with them.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: F401
import torch

from cluster.errors import exit_code_of
from cluster.stop import StopRequest
from cluster.store import open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from model.config import preset
from system.agreement import peer_lost
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpoint import committed_steps
from system.checkpoints.checkpointer import Checkpointer
from system.checkpoints.commands import check
from system.checkpoints.config import CheckpointConfig
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.health.monitor import Health
from system.run_folder import describe_run
from system.trainer import Trainer
from tests.support import faulty_rank
from tests.support.engine_worker import GLOBAL_BATCH, made_up_batch, share

STEPS, PATIENCE_SECONDS = 12, 90.0


def batches(first: int, world: World, pause: float) -> Iterator[dict[str, torch.Tensor]]:
    for step in range(first, STEPS):
        time.sleep(pause)
        yield share(made_up_batch(step), world)


def rank(run_uri: str, config: dict) -> None:
    pause, stage = config.pop("pause"), config.pop("zero_stage")
    whole = TrainConfig(
        run=RunConfig(uri=run_uri, steps=STEPS, seed=3),
        data=DataConfig(uri="none", global_batch=GLOBAL_BATCH, streams=1),
        model=preset("test"),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        engine=EngineConfig(zero_stage=stage, precision="fp32"),
        checkpoint=CheckpointConfig(**config),
    )
    world, run = World.from_env(), open_store(run_uri)
    torch.set_num_threads(1)
    with process_group(world), open_event_log(run, world, 0.2) as events:
        engine, teacher = build_engine(whole, world)
        about = describe_run(whole, "none")
        checkpointer = Checkpointer(run, engine, teacher, events, about, whole.checkpoint)
        with Console(STEPS, active=False) as console, StopRequest() as stop:
            comm = DistributedCollectives()
            watchdog = Watchdog(whole.watchdog, run, world, events)
            health = Health(whole, run, engine, teacher, events, console, watchdog)
            trainer = Trainer(
                whole, engine, teacher, comm, checkpointer, events, console, health, stop, lambda _: None
            )
            resumed = trainer.resume()
            events.instant(
                "attempt_started",
                resumed_step=resumed,
                processes=world.size,
                zero_stage=whole.engine.zero_stage,
                precision=whole.engine.precision,
            )
            trainer.fit(batches(trainer.steps_done, world, pause))
        events.instant("attempt_ended", reason="finished", exit_code=0)


def start(run_uri: str, config: dict, processes: int, number: int, port: int, kill: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        ranks = {"RANK": number, "WORLD_SIZE": processes, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if kill != "whole":
            point, step, victim = kill.split(":")
            if int(victim) == number:
                faulty_rank.POINTS[point](int(step))
        rank(run_uri, dict(config))
    except BaseException as error:
        known = peer_lost(error)
        code = exit_code_of(known or error)
        if known is None:
            traceback.print_exception(error)
    os._exit(code)


def attempt(run_uri: str, config: dict, processes: int, kill: str) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [start(run_uri, config, processes, number, port, kill) for number in range(processes)]
    codes: dict[int, int] = {}
    give_up = time.monotonic() + PATIENCE_SECONDS
    while len(codes) < processes:
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    give_up = min(give_up, time.monotonic() + 15)
        if time.monotonic() > give_up:
            for child in set(children) - codes.keys():
                os.kill(child, 9)
            give_up = float("inf")
        time.sleep(0.02)
    return [codes[child] for child in children]


if __name__ == "__main__":
    settings = {"pause": 0.0, "zero_stage": 1, **json.loads(sys.argv[2])}
    processes = settings.pop("processes", 2)
    for wanted in sys.argv[3:]:
        codes = attempt(sys.argv[1], settings, processes, wanted)
        store = open_store(sys.argv[1])
        steps = committed_steps(store)
        found = [line for step in steps for line in check(store, step)]
        print(json.dumps({"codes": codes, "committed": steps, "problems": found}), flush=True)
