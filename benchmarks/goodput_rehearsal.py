"""Does the simulator agree with a run that is really killed at random moments?

    python -m benchmarks.goodput_rehearsal --kills 20 --mean-seconds 12 --data DATASET --folder FOLDER

A training of the smallest model is killed (SIGKILL) after lifetimes drawn from an exponential distribution,
started again at once, and stopped in good order after the last kill. The ledger of its events says where the
time went. The simulator then gets the means that the same run has measured and the lifetimes that its
attempts had: what is tested is whether these few means tell the whole story, not whether the dice fall alike.
What it says for lifetimes drawn anew stands beside that.

The attempts are forked from a process that has imported everything, so that minutes are enough for many
kills: the import of torch and DeepSpeed is no part of what is compared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from cluster.errors import exit_code_of
from cluster.events import read_events
from cluster.goodput import CLASSES, build_ledger
from cluster.local_launch import free_port
from cluster.simulate import poisson, simulate
from cluster.stop import end_at_once
from cluster.store import open_store
from system.config import TrainConfig, load_train_recipe
from system.report.costs import measured_costs
from system.train import train

INTERVAL_SECONDS = 2.0
RECIPE = f"""
command: train
run: {{uri: none, steps: 1000000, processes: 1, seed: 5, event_seconds: 0.1}}
data: {{uri: none, global_batch: 24, streams: 4, window_shards: 2}}
model: {{preset: test}}
engine: {{zero_stage: 1, precision: fp32}}
checkpoint: {{interval: seconds, every_seconds: {INTERVAL_SECONDS}, keep_last: 2}}
"""


def attempt(config: TrainConfig) -> None:
    """One start of the trainer, in a forked process."""
    world = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    end_at_once()
    try:
        train(config)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(exit_code_of(error))


def rehearse(run: Path, data: str, kills: int, mean_seconds: float, seed: int) -> None:
    """Spend the kills, then stop in good order."""
    recipe = run.with_suffix(".yaml")
    recipe.write_text(RECIPE)
    knobs = [f"run.uri={run}", f"data.uri={data}"]
    config = load_train_recipe(str(recipe), knobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["system.train", "deepspeed"])
    lifetimes = poisson(mean_seconds, seed)
    # The first start waits for the imports, the others do not.
    warm = context.Process(target=load_train_recipe, args=(str(recipe), knobs))
    warm.start()
    warm.join()
    for number in range(kills + 1):
        process = context.Process(target=attempt, args=(config,))
        process.start()
        last = number == kills
        process.join(2 * mean_seconds if last else next(lifetimes))
        if not process.is_alive():
            raise RuntimeError(f"attempt {number + 1} ended by itself with {process.exitcode}")
        if last:
            process.terminate()
        else:
            process.kill()
        process.join()
        print(f"{number + 1} of {kills + 1} attempts", file=sys.stderr, flush=True)


def compare(run: Path, seeds: int) -> dict[str, object]:
    """The run's ledger beside the simulated ones."""
    events = read_events(open_store(str(run)))
    ledger = build_ledger(events)
    costs = measured_costs(events, ledger)
    steps = max(event["step"] for event in events if event["name"] == "step")
    lives = [0.0] * max(stretch.attempt for stretch in ledger.stretches)
    for stretch in ledger.stretches:
        lives[stretch.attempt - 1] += stretch.seconds
    replayed = simulate(costs, INTERVAL_SECONDS, steps, lives[:-1])
    between = mean(lives[:-1])
    drawn = [simulate(costs, INTERVAL_SECONDS, steps, poisson(between, seed)) for seed in range(seeds)]
    return {
        "steps": steps,
        "attempts": len(lives),
        "costs": costs.__dict__,
        "wall_seconds": ledger.wall_seconds,
        "sum_of_classes": sum(ledger.seconds.values()),
        "real": ledger.goodput,
        "replayed": replayed.goodput,
        "drawn_mean": mean(outcome.goodput for outcome in drawn),
        "shares": {
            name: (ledger.seconds[name] / ledger.wall_seconds, replayed.seconds[name] / replayed.wall_seconds)
            for name in CLASSES
        },
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mean-seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    run = options.folder / "run"
    started = time.monotonic()
    if not run.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        rehearse(run, options.data, options.kills, options.mean_seconds, options.seed)
    found = compare(run, seeds=200)
    table = Table("share of the wall time", "real", "simulated")
    for name, (real, simulated) in found["shares"].items():  # type: ignore[union-attr]
        table.add_row(name, f"{100 * real:.2f} %", f"{100 * simulated:.2f} %")
    console = Console(width=110)
    console.print(table)
    console.print({key: value for key, value in found.items() if key != "shares"})
    console.print(f"{time.monotonic() - started:.0f} s, {os.cpu_count()} cores")
    if options.json is not None:
        options.json.write_text(json.dumps({"about": machine(["torch"]), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
