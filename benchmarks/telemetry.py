"""What does telemetry cost a training step?

    python -m benchmarks.telemetry --preset tiny --batch 16

Two sides in turns, one thread each, the same steps of the real trainer in one process: with telemetry (all of
the registry, the event log on a local disk, the Prometheus and TensorBoard sinks) and with steps that record
nothing. CPU time includes the threads of the sinks. Steps scatter by more than telemetry costs, so its own
CPU time is measured too: of the training thread inside `Trainer.record`, and of the whole process over
recorded steps without a model in between. The goal: below 0.5 % of a step.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.common import Comparison, Measure, Snippet, arguments, report

_TRAINER = """
import contextlib, os, socket, tempfile, time
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
import torch
torch.set_num_threads(1)
from cluster.stop import StopRequest
from cluster.store import open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from model.config import preset
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpointer import Checkpointer
from system.config import DataConfig, EngineConfig, RunConfig, TrainConfig
from system.console import Console
from system.engine.collectives import DistributedCollectives
from system.health.monitor import Health
from system.observe import open_telemetry
from system.sinks.config import TelemetryConfig
from system.sinks.prometheus import PrometheusConfig
from system.sinks.tensorboard import TensorBoardConfig
from system.trainer import Trainer
from tests.unit.model.samples import make_tokens
folder, count, model = tempfile.mkdtemp(), ARGS["batch"], preset(ARGS["preset"])
side = model.vision.image_size
sinks = TelemetryConfig(
    peak_tflops=0.05, prometheus=PrometheusConfig(port=0), tensorboard=TensorBoardConfig(folder=folder)
)
config = TrainConfig(
    run=RunConfig(uri=folder + "/run", steps=10**6), model=model,
    data=DataConfig(uri="none", global_batch=count, streams=1), engine=EngineConfig(precision="fp32"),
    telemetry=sinks if ARGS["on"] else TelemetryConfig(norms_every=0))
if not ARGS["on"]:
    Trainer.record = lambda *_: None
batch = {"image": torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8),
         "tokens": make_tokens(ARGS["words"], model), "id": torch.arange(count), "slot": torch.arange(count),
         "epoch": torch.zeros(count).long(), "weight": torch.ones(count)}
stack, world = contextlib.ExitStack(), World.from_env()
stack.enter_context(process_group(world))
events = stack.enter_context(open_event_log(open_store(config.run.uri), world, 5.0))
stack.enter_context(open_telemetry(config, world, events))
engine, teacher = build_engine(config, world)
run, console = open_store(config.run.uri), Console(1, active=False)
checkpointer = Checkpointer(run, engine, teacher, events, {})
watchdog = Watchdog(config.watchdog, run, world, events)
health = Health(config, run, engine, teacher, events, console, watchdog)
trainer = Trainer(config, engine, teacher, DistributedCollectives(), checkpointer, events, console, health,
                  StopRequest(), lambda _: None)
NOTE = {"record_ms": 0.0, "records": 0}
record = trainer.record
def timed(*arguments):
    began = time.thread_time()
    record(*arguments)
    NOTE["record_ms"] += 1e3 * (time.thread_time() - began)
    NOTE["records"] += 1
trainer.record = timed
"""

_STEPS = (
    _TRAINER
    + """
def run():
    for _ in range(ARGS["steps"]):
        trainer.step_until_applied(batch, 0.001)
    return ARGS["steps"]
"""
)

# The same values over and over, without a model in between; it ends when the sinks have taken all of them.
_RECORDS = (
    _TRAINER
    + """
seen = []
trainer.record = lambda *arguments: seen.append(arguments)
for _ in range(3):
    trainer.step_until_applied(batch, 0.001)
trainer.record = timed
def run():
    for _ in range(2000):
        trainer.steps_done += 1
        record(*seen[-1])
    events.flush()
    while any(feed._events for feed in feeds):
        time.sleep(0.01)
    return 2000
"""
).replace("stack.enter_context(open_telemetry", "feeds = stack.enter_context(open_telemetry")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--preset", default="tiny", help="architecture")
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    options = parser.parse_args()
    words = [5 + 3 * number % 20 for number in range(options.batch)]
    args: dict[str, Any] = {"preset": options.preset, "batch": options.batch, "steps": options.steps}
    args |= {"words": words}
    on = Snippet("with", _STEPS, args | {"on": True})
    off = Snippet("without", _STEPS, args | {"on": False})
    alone = Snippet("alone", _RECORDS, args | {"on": True})
    sides = [on, off, alone]
    try:
        turns: list[list[Measure]] = [[side() for side in sides] for _ in range(options.rounds + 1)][1:]
    finally:
        for side in sides:
            side.close()
    ours, theirs, records = (list(column) for column in zip(*turns, strict=True))
    results = [
        Comparison("step without telemetry / with it", ours, theirs, []),
        Comparison("step without telemetry / telemetry alone", records, theirs, [], 200),
    ]
    report("Telemetry: CPU time of a step", results, ["torch", "deepspeed"], options.json)
    note = ours[-1].note
    Console().print(
        f"the training thread inside Trainer.record: {note['record_ms'] / note['records']:.3f} ms a step"
    )


if __name__ == "__main__":
    main()
