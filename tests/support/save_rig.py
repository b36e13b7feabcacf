"""A run of several attempts, each of which may be killed at a named point or moment, in forked ranks.

``save_rig.py RUN CONFIG ATTEMPT...``: CONFIG is JSON (fields of `Rig`, and of a checkpoint section), ATTEMPT
is ``POINT:STEP:VICTIM`` (see `faulty_rank.POINTS`; the victim is a rank, or ``all``),
``moment:SECONDS:VICTIM`` after the ranks have met, or ``whole``. The trainer, the checkpointer and the store
are the real ones; only the batches are made up. Torch and DeepSpeed are imported once, so that an attempt
takes a second. Prints a line of JSON per attempt: exit codes (negative: the signal), committed steps, what is
wrong with them.
"""

import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import deepspeed.runtime.zero.muon.original_muon
import torch
import torch._dynamo

from cluster.errors import exit_code_of
from cluster.local_launch import free_port
from cluster.stop import StopRequest
from cluster.store import StoreConfig, open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from data_pipeline.loading.loader import Batch
from model.config import TextConfig, preset
from system.agreement import Verdict, peer_lost
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpoint import committed_steps
from system.checkpoints.checkpointer import Checkpointer
from system.checkpoints.commands import check
from system.checkpoints.config import CheckpointConfig
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.engine.engine import StepOutcome
from system.health.monitor import Health
from system.run_folder import describe_run
from system.trainer import Trainer
from tests.support import faulty_rank
from tests.support.engine_worker import GLOBAL_BATCH, made_up_batch, share

GRACE_SECONDS = 15.0
MET, RESUMED, TRAINED = range(3)
progress = memoryview(mmap.mmap(-1, 24)).cast("q")
"""What the ranks tell the rig: whether they have met, the step they resumed from, their last step."""


@dataclass(frozen=True, kw_only=True)
class Rig:
    """The run; `checkpoint` and `store` are sections of its configuration."""

    processes: int = 2
    zero_stage: int = 1
    steps: int = 12
    pause: float = 0.0
    """Seconds before each step."""
    vocabulary: int = 1000
    """Words; 49,408 make a file of more than one part of an upload."""
    patience: float = 90.0
    """Seconds after which an attempt is ended by force."""
    log: str = ""
    """File for what the ranks print; empty: where the rig prints."""
    checkpoint: CheckpointConfig
    store: StoreConfig = field(default_factory=StoreConfig)


def batches(first: int, rig: Rig, world: World, text: TextConfig) -> Iterator[dict[str, torch.Tensor]]:
    for step in range(first, rig.steps):
        time.sleep(rig.pause)
        yield share(made_up_batch(step, text), world)


class WatchedTrainer(Trainer):
    def resume(self, records: Sequence[dict[str, Any]] = ()) -> int | None:
        resumed = super().resume(records)
        progress[RESUMED] = progress[TRAINED] = self.steps_done
        return resumed

    def step(self, batch: Batch, data_seconds: float) -> tuple[Verdict, StepOutcome]:
        done = super().step(batch, data_seconds)
        progress[TRAINED] = self.steps_done
        return done


def rank(run_uri: str, rig: Rig) -> None:
    model = preset("test")
    model = replace(model, text=replace(model.text, vocab_size=rig.vocabulary))
    config = TrainConfig(
        run=RunConfig(uri=run_uri, steps=rig.steps, seed=3),
        data=DataConfig(uri="none", global_batch=GLOBAL_BATCH, streams=1),
        model=model,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        engine=EngineConfig(zero_stage=rig.zero_stage, precision="fp32"),  # type: ignore[arg-type]
        checkpoint=rig.checkpoint,
    )
    world, run = World.from_env(), open_store(run_uri, rig.store)
    torch.set_num_threads(1)
    with process_group(world), open_event_log(run, world, 0.2) as events:
        progress[MET] = 1
        engine, teacher = build_engine(config, world)
        about = describe_run(config, "none")
        checkpointer = Checkpointer(run, engine, teacher, events, about, config.checkpoint)
        with Console(rig.steps, active=False) as console, StopRequest() as stop:
            comm = DistributedCollectives()
            watchdog = Watchdog(config.watchdog, run, world, events)
            health = Health(config, run, engine, teacher, events, console, watchdog)
            trainer = WatchedTrainer(
                config, engine, teacher, comm, checkpointer, events, console, health, stop, lambda _: None
            )
            resumed = trainer.resume()
            events.instant(
                "attempt_started",
                resumed_step=resumed,
                processes=world.size,
                zero_stage=config.engine.zero_stage,
                precision=config.engine.precision,
            )
            trainer.fit(batches(trainer.steps_done, rig, world, model.text))
        events.instant("attempt_ended", reason="finished", exit_code=0)


def start(run_uri: str, rig: Rig, number: int, port: int, kill: str, group: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        os.setpgid(0, group)
        if rig.log:
            os.dup2(os.open(rig.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        size = rig.processes
        ranks = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if kill != "whole":
            point, at, victim = kill.split(":")
            if point != "moment" and victim in (str(number), "all"):
                faulty_rank.arm(point, int(at), with_group=victim == "all")
        rank(run_uri, rig)
    except BaseException as error:
        known = peer_lost(error)
        code = exit_code_of(known or error)
        if known is None:
            traceback.print_exception(error)
    os._exit(code)


def attempt(run_uri: str, rig: Rig, kill: str) -> list[int]:
    """Exit codes by rank. `progress` tells how far it came; the step that it resumed from is -1 if none."""
    port = free_port()
    progress[MET], progress[RESUMED], progress[TRAINED] = 0, -1, -1
    children: list[int] = []
    for number in range(rig.processes):
        children.append(start(run_uri, rig, number, port, kill, children[0] if children else 0))
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(children[-1], children[0])  # both do it: neither knows who is first
    try:
        return _ends(children, kill, rig.patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(children[0], signal.SIGKILL)


def _ends(children: list[int], kill: str, patience: float) -> list[int]:
    codes: dict[int, int] = {}
    point, seconds, victim = kill.split(":") if kill != "whole" else ("", "0", "all")
    victims = children if victim == "all" else [children[int(victim)]]
    strike = float("inf")
    give_up = time.monotonic() + patience
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    give_up = min(give_up, time.monotonic() + GRACE_SECONDS)
        now = time.monotonic()
        if point == "moment" and progress[MET] and strike == float("inf"):
            strike, point = now + float(seconds), ""
        if now > min(give_up, strike):
            for child in set(victims if now > strike else children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            strike, give_up = float("inf"), float("inf") if now > give_up else give_up
        time.sleep(0.005)
    return [codes[child] for child in children]


def rig_of(settings: dict[str, Any]) -> Rig:
    """From one flat dictionary, as tests write it."""
    own = {name: settings.pop(name) for name in list(settings) if name in Rig.__dataclass_fields__}
    own["store"] = StoreConfig(**own.get("store", {}))
    return Rig(**own, checkpoint=CheckpointConfig(**settings))


if __name__ == "__main__":
    wanted_rig = rig_of(json.loads(sys.argv[2]))
    _ = deepspeed.ops.__compatible_ops__  # is asked of the compiler once, and not in every rank
    for wanted in sys.argv[3:]:
        ended = attempt(sys.argv[1], wanted_rig, wanted)
        store = open_store(sys.argv[1])
        steps = committed_steps(store)
        found = [line for step in steps for line in check(store, step)]
        print(json.dumps({"codes": ended, "committed": steps, "problems": found}), flush=True)
