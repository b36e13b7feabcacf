"""How long does a save hold training up, against `dcp.async_save` and DeepSpeed's `save_checkpoint`?

    python -m benchmarks.checkpoint_stall --preset vit_s_16 --batch 8

One process trains the preset (ZeRO stage 1, fp32, CPU) and saves the same state, its EMA teacher included, in
three ways that take turns: ours, dcp.async_save, and DeepSpeed (which knows nothing of the teacher, so it
writes less). The stall is the time that the call takes; what the steps beside the write take, as a multiple
of the median undisturbed step, stands next to it: both need the same cores. The raw disk is a write of as
many bytes, with fsync, in the same rounds. Figure asked for: a stall of less than one step.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from cluster.store import open_store
from cluster.world import World
from model.config import preset
from model.losses import SingleProcess
from system.build import build_engine, open_event_log, process_group
from system.checkpoints.checkpointer import Checkpointer
from system.checkpoints.config import CheckpointConfig
from system.config import DataConfig, EngineConfig, OptimizerConfig, RunConfig, TrainConfig
from system.schedules import at

_FASTEST_WRITE = 1 << 23


class Job:
    """The training, as far as a save can tell."""

    def __init__(self, name: str, batch: int, run: str) -> None:
        model = preset(name)
        self.config = TrainConfig(
            run=RunConfig(uri=run, steps=10_000),
            data=DataConfig(uri="none", global_batch=batch, streams=1),
            model=model,
            optimizer=OptimizerConfig(),
            engine=EngineConfig(zero_stage=1, precision="fp32"),
        )
        self.engine, self.teacher = build_engine(self.config, World.from_env())
        tokens = torch.zeros(batch, model.text.context_length, dtype=torch.int64)
        tokens[:, 0], tokens[:, 1:9], tokens[:, 9] = model.text.start_token, 77, model.text.end_token
        side = model.vision.image_size
        self.batch = {
            "image": torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8),
            "tokens": tokens,
            "id": torch.arange(batch),
            "epoch": torch.zeros(batch, dtype=torch.int64),
            "weight": torch.ones(batch),
        }
        self.steps = 0

    def step(self) -> float:
        """One training step; its seconds."""
        started, values = time.perf_counter(), at(self.steps, self.config)
        output = self.engine.forward(
            self.batch,
            teacher=self.teacher.module,
            teacher_temperature=values.teacher_temperature,
            comm=SingleProcess(),
        )
        self.engine.step(output.loss, values.lr)
        self.teacher.update(values.momentum, output.centre_K, 0.9)
        self.steps += 1
        return time.perf_counter() - started


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def turn(job: Job, call: Callable[[], Callable[[], bool]], folder: Path) -> dict[str, float]:
    """One save: `call` begins it and gives what says whether it has ended."""
    started = time.perf_counter()
    ended = call()
    held = time.perf_counter() - started
    beside, at = [], []

    def watch() -> None:  # a step is long, the save may end in its middle
        while not ended():
            time.sleep(0.01)
        at.append(time.perf_counter() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    while watcher.is_alive():
        beside.append(job.step())
    found = {"call": held, "total": at[0], "beside": statistics.median(beside) if beside else 0.0}
    found |= {"steps": len(beside), "over": sum(beside), "bytes": folder_bytes(folder)}
    return found


def measure(name: str, batch: int, rounds: int, where: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    run = where / "run"
    with process_group(World.from_env()), open_event_log(open_store(str(run)), World.from_env(), 5) as events:
        job = Job(name, batch, str(run))
        store = open_store(str(run))
        ours = Checkpointer(store, job.engine, job.teacher, events, {}, CheckpointConfig(verify="size"))
        ours.prepare()
        places = {side: where / side for side in ("dcp", "deepspeed", "raw")}

        def save_ours() -> Callable[[], bool]:
            ours.begin(job.steps, {})
            return lambda: not ours.votes(0).busy

        def save_dcp() -> Callable[[], bool]:
            state = ours._state.saved_tensors()
            writer = FileSystemWriter(str(places["dcp"]))
            future: Any = async_save(state, storage_writer=writer, no_dist=True)
            return future.done

        def save_deepspeed() -> Callable[[], bool]:
            job.engine._engine.save_checkpoint(str(places["deepspeed"]), tag="x")
            return lambda: True

        def save_raw() -> Callable[[], bool]:
            places["raw"].mkdir()
            data = memoryview(bytearray(_FASTEST_WRITE))
            with (places["raw"] / "data").open("wb") as out:
                for _ in range(sizes["ours"] // _FASTEST_WRITE):
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())
            return lambda: True

        sides = {"ours": save_ours, "dcp": save_dcp, "deepspeed": save_deepspeed, "raw": save_raw}
        turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        sizes, plain = {"ours": 0}, []
        for number in range(rounds + 1):
            for side, call in sides.items():
                plain.append(job.step())
                folder = run / "checkpoints" if side == "ours" else places[side]
                shutil.rmtree(folder, ignore_errors=True)
                found = turn(job, call, folder)
                sizes[side] = int(found["bytes"])
                if number:
                    turns[side].append(found)
                shutil.rmtree(folder, ignore_errors=True)
        return {"plain": statistics.median(plain[4:]), "turns": turns, "bytes": sizes}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--preset", default="vit_s_16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder if not given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
        }
        alone["MASTER_PORT"] = probe.getsockname()[1]
    os.environ |= {name: str(value) for name, value in alone.items()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.preset, args.batch, args.rounds, Path(folder))
    step = found["plain"]
    table = Table(
        "side", "call s", "share of a step", "beside, per step", "in all s", "GB", "MB/s", title="save"
    )
    for side, turns in found["turns"].items():
        call = statistics.median(t["call"] for t in turns)
        total = statistics.median(t["total"] for t in turns)
        beside = [t["beside"] / step for t in turns if t["steps"]]
        size = found["bytes"][side]
        table.add_row(
            side,
            f"{call:.3f}",
            f"{call / step:.1%}",
            f"{statistics.median(beside):.2f}x" if beside else "",
            f"{total:.2f}",
            f"{size / 1e9:.2f}",
            f"{size / total / 1e6:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    about = machine(["torch", "deepspeed"]) | {"preset": args.preset, "step": f"{step:.2f} s"}
    console.print("; ".join(f"{key} {value}" for key, value in about.items()))
    if args.json is not None:
        args.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
