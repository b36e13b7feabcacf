"""What does it cost to verify a checkpoint while it is loaded, and how close is a save or a load to the disk?

    python -m benchmarks.checkpoint_rates [--preset vit_b_16] [--store s3] [--rounds 5] [--json FILE]

The state of the preset, without a job around it, is saved to and restored from a local disk or an S3 server
(one process, on this machine), in turns with: the same bytes written and read by nothing but the store; the
restore without the checksums of its files; and without the digest of the filled state either, which proves
the restore. The page cache is asked to forget local files before each read. Goal: checksums at most 5 % of
the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from cluster.events import EventLog, claim_attempt
from cluster.store import open_store
from model.config import preset
from model.objective import Objective
from system.checkpoints import restore as restoring
from system.checkpoints.checkpoint import open_checkpoint, step_folder
from system.checkpoints.restore import restore
from system.checkpoints.retention import delete_checkpoint
from tests.support.held_state import HeldState, save_job
from tests.support.s3_server import S3Server

STEP = 8
_PIECE_BYTES = 8 << 20


class Nothing:
    """The checksum that costs nothing and is always right."""

    name = "none"

    def update(self, data: object, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of the wall, and of this process's CPU time in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def forget(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(uri: str, state: HeldState, rounds: int) -> dict[str, Any]:
    """See `seconds`, by side; and the bytes of the checkpoint."""
    run = open_store(uri)
    events = EventLog(run, claim_attempt(run), 0, flush_seconds=3600)
    job = save_job(run, events, STEP, state, verify="size")
    raw, data = run.child("raw"), [bytes(_PIECE_BYTES)] * (job.snapshot.size // _PIECE_BYTES)

    def save() -> None:
        delete_checkpoint(run, STEP)
        job.run()
        if job.error is not None:
            raise job.error

    def read() -> None:
        _, manifest = open_checkpoint(run, STEP)
        folder = run.child(f"checkpoints/{step_folder(STEP)}")
        for entry in manifest.files:
            for at in range(0, entry.size, _PIECE_BYTES):
                folder.get_range(entry.name, at, _PIECE_BYTES)

    def load(*left_out: Any) -> None:
        with ExitStack() as stack:
            for part in left_out:
                stack.enter_context(part)
            restore(run, state, events, None)  # type: ignore[arg-type]

    save()
    saved = open_checkpoint(run, STEP)[1].meta["state_digest"]
    unproved = patch.object(HeldState, "digest", lambda _: saved)
    unchecked = patch.object(restoring, "expected", lambda *_: (Nothing(), ""))
    sides = {
        "raw write": lambda: raw.put_pieces("data.safetensors", lambda: iter(data)),
        "save": save,
        "raw read": read,
        "load alone": lambda: load(unproved, unchecked),
        "load, checksums": lambda: load(unproved),
        "load, checksums, proof": load,
    }
    turns: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, work in sides.items():
            forget(Path(uri))
            spent = seconds(work)
            if number:
                turns[side].append(spent)
    events.close()
    return {"bytes": job.snapshot.size, "turns": turns}


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", default="vit_b_16")
    parser.add_argument("--store", choices=("local", "s3"), default="local")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parameters = Objective(preset(args.preset), seed=0).named_parameters()
    state = HeldState(1, {name: list(value.shape) for name, value in parameters})
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.store == "local":
            found = measure(f"{name}/run", state, args.rounds)
        else:
            server = S3Server(Path(name, "server"))
            server.start()
            try:
                os.environ |= server.env
                found = measure(f"{server.make_bucket('runs')}/run", state, args.rounds)
            finally:
                server.kill()
    columns = ("side", "s", "CPU s", "MB/s", "of raw", "over the load", "in CPU time")
    table = Table(*columns, title=f"{args.preset}, {args.store}")
    median = {
        side: [statistics.median(t) for t in zip(*turns, strict=True)]
        for side, turns in found["turns"].items()
    }
    for side, (wall, cpu) in median.items():
        raw = median["raw write" if side == "save" else "raw read"][0]
        share = "" if side.startswith("raw") else f"{raw / wall:.0%}"
        over = [
            f"{spent / alone - 1:+.1%}" if side.startswith("load,") else ""
            for spent, alone in zip((wall, cpu), median["load alone"], strict=True)
        ]
        rate = f"{found['bytes'] / wall / 1e6:.0f}"
        table.add_row(side, f"{wall:.2f}", f"{cpu:.2f}", rate, share, *over)
    console = Console(width=120)
    console.print(table)
    about = machine(["torch", "zlib-ng"]) | {"bytes": str(found["bytes"])}
    console.print("; ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
