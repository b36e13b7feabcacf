"""Does the memory of a preprocess grow with its input? Peak memory of every Ray worker and of the driver over
the whole pipeline, for an input and for one with ten times more rows in as many tars and shards.

    python -m benchmarks.preprocess_memory [--rows 4000] [--json FILE]

Tars and shards grow with the input, so a stage that held one of them in memory would show. The slope is the
peak's growth per added row; an image has about 20 KB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.common import machine
from benchmarks.ray_overhead import make_input
from cluster.ray_tasks import ray_session
from data_pipeline.preprocess import PreprocessConfig, run_preprocess
from data_pipeline.selection import ShardConfig
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


def measure(rows: int) -> dict[str, float]:
    """Peaks of one whole run over `rows` rows, in a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        folder = Path(name)
        source = make_input(folder / "raw", _CHUNKS, rows // _CHUNKS)
        shards = ShardConfig(samples_per_shard=rows // _CHUNKS)
        config = PreprocessConfig(source=source, output=str(folder / "set"), shards=shards)
        start = time.monotonic()
        with ray_session(2), peaks() as found:
            run_preprocess(config)
        return dict(sorted(found.items())) | {"seconds": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Each in a process of its own: a peak never falls.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        small, large = pool.map(measure, (args.rows, args.rows * _FACTOR))
    print(f"{'peak MB':28} {args.rows:>10} {args.rows * _FACTOR:>10}   KB per added row")
    for name in sorted(small.keys() & large.keys()):
        slope = 1024 * (large[name] - small[name]) / (args.rows * (_FACTOR - 1))
        print(f"{name:28} {small[name]:10.1f} {large[name]:10.1f}   {slope:8.3f}")
    about = machine(["ray", "pyarrow"])
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    if args.json:
        args.json.write_text(
            json.dumps({"rows": args.rows, "small": small, "large": large, "about": about}) + "\n"
        )


if __name__ == "__main__":
    main()
