"""Is every flipped bit and every truncation of a checkpoint found before the first step, and at what cost?

    python -m benchmarks.checkpoint_damage [--damages 10000] [--preset vit_b_16] [--rounds 5] [--json FILE]

Damage: a checkpoint of the `test` preset is damaged at a random place (a file drawn at random, the manifest
among them; a flipped bit, or everything from there on gone) and restored, again and again. A restore must
refuse it and hand nothing to the job.

Cost: the state of `--preset` is restored from a local disk and from an S3 server, in turns with and without
the checksums of its files, and with and without the digest of the filled state, which proves the restore. The
page cache is asked to forget the local files before each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from cluster.errors import CheckpointIncompatible
from cluster.events import EventLog, claim_attempt
from cluster.manifest import MANIFEST
from cluster.store import ObjectStore, open_store
from model.config import preset
from model.objective import Objective
from system.checkpoints import restore as restoring
from system.checkpoints.checkpoint import open_checkpoint, step_folder
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.restore import restore
from system.checkpoints.retention import Retention
from system.checkpoints.save import Place, SaveJob
from system.checkpoints.snapshot import Snapshot
from tests.support.held_state import HeldState
from tests.support.s3_server import S3Server

STEP = 8


def state_of(name: str, vocabulary: int | None = None, seed: int = 1) -> HeldState:
    model = preset(name)
    if vocabulary:
        model = replace(model, text=replace(model.text, vocab_size=vocabulary))
    shapes = {key: list(value.shape) for key, value in Objective(model, seed=0).named_parameters()}
    return HeldState(seed, shapes)


def save(run: ObjectStore, events: EventLog, state: HeldState) -> int:
    """Bytes."""
    config = CheckpointConfig(verify="size")
    place = Place(run, 0, 1, events, config, None, Retention(run, config, events))
    snapshot = Snapshot(state.saved_tensors())
    snapshot.take(state.saved_tensors())
    meta = {"slot": 0, "samples_seen": 0, "parameters": state.shapes}
    job = SaveJob(place, STEP, meta, snapshot, time.monotonic(), 0.0)
    job.run()
    if job.error is not None:
        raise job.error
    return job.bytes


def damage(folder: Path, count: int, seed: int, progressed: Callable[[int, int], None]) -> dict[str, Any]:
    run = open_store(str(folder))
    events = EventLog(run, claim_attempt(run), 0, flush_seconds=3600)
    state, before = state_of("test", 1000, 1), state_of("test", 1000, 2)
    size = save(run, events, state)
    where = folder / "checkpoints" / step_folder(STEP)
    files = [where / MANIFEST, *where.glob("*.safetensors")]
    whole, draw = {path: path.read_bytes() for path in files}, random.Random(seed)
    found = {"flips": 0, "truncations": 0}
    missed: list[str] = []
    started = time.monotonic()
    for number in range(count):
        path = draw.choice(files)
        data = bytearray(whole[path])
        # A third of the damage goes to the first bytes, where the headers are.
        at = draw.randrange(len(data) if number % 3 else min(len(data), 4096))
        kind = "truncations" if number % 4 == 0 else "flips"
        if kind == "truncations":
            del data[at:]
        else:
            data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            restore(run, before, events, None)  # type: ignore[arg-type]
            missed.append(f"{kind} of {path.name} at {at}")
        except CheckpointIncompatible:
            found[kind] += 1
        for name in (path, where / MANIFEST):
            name.write_bytes(whole[name])
        for left in (folder / "quarantine").glob("*"):
            left.unlink()
        progressed(number + 1, len(missed))
    restore(run, before, events, None)  # type: ignore[arg-type]
    if not before.equals(state):
        missed.append("the undamaged checkpoint did not come back")
    events.close()
    return {**found, "missed": missed, "bytes": size, "seconds": time.monotonic() - started}


class Nothing:
    """The checksum that costs nothing and is always right."""

    name = "none"

    def update(self, data: object, /) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def cost(uri: str, state: HeldState, rounds: int) -> dict[str, Any]:
    """Seconds of a restore, by what is left out of it; medians of `rounds` turns."""
    run = open_store(uri)
    events = EventLog(run, claim_attempt(run), 0, flush_seconds=3600)
    size = save(run, events, state)
    saved = open_checkpoint(run, STEP)[1].meta["state_digest"]
    no_checksum = lambda: patch.object(restoring, "expected", lambda *_: (Nothing(), ""))  # noqa: E731
    no_proof = lambda: patch.object(HeldState, "digest", lambda _: saved)  # noqa: E731
    sides = {"whole": (), "no proof": (no_proof,), "load alone": (no_checksum, no_proof)}
    turns: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, left_out in sides.items():
            forget(Path(uri))
            with ExitStack() as stack:
                for make in left_out:
                    stack.enter_context(make())
                started = time.perf_counter()
                restore(run, state, events, None)  # type: ignore[arg-type]
                if number:
                    turns[side].append(time.perf_counter() - started)
    events.close()
    return {"bytes": size, "turns": turns}


def forget(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--preset", default="vit_b_16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    console, results = Console(width=120), {}
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name, console.status("") as line:
        folder = Path(name)
        results["damage"] = damage(
            folder / "damaged", args.damages, args.seed, lambda n, m: line.update(f"{n} damages, {m} missed")
        )
        line.update("what verifying costs")
        state = state_of(args.preset)
        results["local"] = cost(str(folder / "run"), state, args.rounds)
        server = S3Server(folder / "server")
        server.start()
        try:
            os.environ |= server.env
            results["s3"] = cost(f"{server.make_bucket('runs')}/run", state, args.rounds)
        finally:
            server.kill()
    damaged = results["damage"]
    console.print(
        f"{damaged['flips']} flips and {damaged['truncations']} truncations found, "
        f"{len(damaged['missed'])} missed, {damaged['seconds']:.0f} s"
    )
    table = Table("restore from", "GB", "load alone s", "MB/s", "checksums", "proof", title=args.preset)
    for side in ("local", "s3"):
        median = {name: statistics.median(turns) for name, turns in results[side]["turns"].items()}
        alone, size = median["load alone"], results[side]["bytes"]
        table.add_row(
            side,
            f"{size / 1e9:.2f}",
            f"{alone:.2f}",
            f"{size / alone / 1e6:.0f}",
            f"{median['no proof'] / alone - 1:+.1%}",
            f"{(median['whole'] - median['no proof']) / alone:+.1%}",
        )
    console.print(table)
    about = machine(["torch", "zlib-ng"])
    console.print("; ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"about": about, **results}, indent=1) + "\n")
    return 1 if damaged["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
