"""Is every flipped bit and every truncation of a checkpoint found before the first step?

    python -m benchmarks.checkpoint_damage [--damages 10000] [--seed 0] [--json FILE]

A checkpoint of the `test` preset is damaged at a random place (in a file drawn at random, the manifest among
them: a flipped bit, or everything from there on gone) and restored, again and again. Every restore must
refuse it; the last one, of the undamaged files, must bring the state back to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from cluster.errors import CheckpointIncompatible
from cluster.events import EventLog, claim_attempt
from cluster.manifest import MANIFEST
from cluster.store import open_store
from model.config import preset
from model.objective import Objective
from system.checkpoints.checkpoint import step_folder
from system.checkpoints.restore import restore
from tests.support.held_state import HeldState, save_job

STEP = 8


def states() -> tuple[HeldState, HeldState]:
    """What is saved, and what is filled."""
    model = preset("test")
    model = replace(model, text=replace(model.text, vocab_size=1000))
    shapes = {name: list(value.shape) for name, value in Objective(model, seed=0).named_parameters()}
    return HeldState(1, shapes), HeldState(2, shapes)


def damage(folder: Path, count: int, seed: int, progressed: Callable[[int, int], None]) -> dict[str, Any]:
    run = open_store(str(folder))
    events = EventLog(run, claim_attempt(run), 0, flush_seconds=3600)
    saved, filled = states()
    job = save_job(run, events, STEP, saved)
    job.run()
    where = folder / "checkpoints" / step_folder(STEP)
    files = [where / MANIFEST, *where.glob("*.safetensors")]
    whole, draw = {path: path.read_bytes() for path in files}, random.Random(seed)
    found, missed = {"flips": 0, "truncations": 0}, []
    started = time.monotonic()
    for number in range(count):
        path = draw.choice(files)
        data = bytearray(whole[path])
        # A third of the damage goes to the first bytes, where the header is.
        at = draw.randrange(len(data) if number % 3 else min(len(data), 4096))
        kind = "flips" if number % 4 else "truncations"
        if kind == "flips":
            data[at] ^= 1 << draw.randrange(8)
        else:
            del data[at:]
        path.write_bytes(data)
        try:
            restore(run, filled, events, None)  # type: ignore[arg-type]
            missed.append(f"{kind} of {path.name} at {at}")
        except CheckpointIncompatible:
            found[kind] += 1
        for name in (path, where / MANIFEST):
            name.write_bytes(whole[name])
        for left in folder.glob("quarantine/*"):
            left.unlink()
        progressed(number + 1, len(missed))
    restore(run, filled, events, None)  # type: ignore[arg-type]
    if not filled.equals(saved):
        missed.append("the undamaged checkpoint did not come back")
    events.close()
    return {**found, "missed": missed, "bytes": job.bytes, "seconds": time.monotonic() - started}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="maskclip-") as folder, console.status("") as line:
        found = damage(
            Path(folder), args.damages, args.seed, lambda done, bad: line.update(f"{done}, {bad} missed")
        )
    for name, value in found.items():
        console.print(f"{name:15} {value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
