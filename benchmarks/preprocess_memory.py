"""Does the memory of a preprocess grow with its input? Peak memory of every Ray worker and of the driver over
the whole pipeline.

    python -m benchmarks.preprocess_memory [--rows 200] [--rounds 5] [--json FILE]

Three inputs: 4 tars, ten times more tars (and as many shards: what a larger data set has), and 4 tars and
shards ten times larger. Only the last may grow, by the index rows of one shard: a stage that held the images
of a shard would show about 20 KB per row. Medians of the rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import arguments, machine
from benchmarks.ray_overhead import make_input
from cluster.ray_tasks import ray_session
from data_pipeline.job.preprocess import PreprocessConfig, run_preprocess
from data_pipeline.job.selection import ShardConfig
from tests.support.crash_rig import ray_workers

_CHUNKS = 4
_FACTOR = 10
_EVERY_SECONDS = 0.2


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """MB of peak resident memory: of the largest Ray worker for each kind of task, and of this process."""
    found: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_SECONDS):
            for pid, name in [(os.getpid(), "driver"), *((w.pid, _kind(w.title)) for w in ray_workers())]:
                with suppress(OSError):
                    found[name] = max(found.get(name, 0.0), _peak_mb(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _kind(title: str) -> str:
    """The function that a worker runs, from its title."""
    return title.removeprefix("ray::").partition("(")[0].split()[0]


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(chunks: int, rows: int) -> dict[str, float]:
    """Peaks of one whole run over `chunks` tars of `rows` rows, into as large shards, in a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        folder = Path(name)
        source = make_input(folder / "raw", chunks, rows)
        shards = ShardConfig(samples_per_shard=rows)
        config = PreprocessConfig(source=source, output=str(folder / "set"), shards=shards)
        with ray_session(2), peaks() as found:
            run_preprocess(config)
        return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=200, help="rows of a tar and of a shard")
    args = parser.parse_args()
    cases = {
        "small": (_CHUNKS, args.rows),
        "more": (_CHUNKS * _FACTOR, args.rows),
        "larger": (_CHUNKS, args.rows * _FACTOR),
    }
    # Each in a process of its own: a peak never falls.
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for _ in range(args.rounds):
            for name, size in cases.items():
                turns[name].append(pool.submit(measure, *size).result())
    kinds = sorted(set.intersection(*(set(turn) for column in turns.values() for turn in column)))
    peak = {
        name: {kind: statistics.median(turn[kind] for turn in column) for kind in kinds}
        for name, column in turns.items()
    }
    table = Table(
        "MB at the peak", *(f"{name}: {a} x {b} rows" for name, (a, b) in cases.items()), "more / small"
    )
    for kind in kinds:
        small, more, larger = (peak[name][kind] for name in cases)
        table.add_row(kind, f"{small:.1f}", f"{more:.1f}", f"{larger:.1f}", f"{more / small:.3f}")
    Console(width=120).print(table)
    about = machine(["ray", "pyarrow"])
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"cases": cases, "turns": turns, "about": about}) + "\n")


if __name__ == "__main__":
    main()
