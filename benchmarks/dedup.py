"""How many rows a second does the selection take, and does the memory of its processes grow with the rows?

    python -m benchmarks.dedup [--rows 100000 1000000] [--radius 3] [--json FILE]

Per number of rows the whole of `select_rows` (ids, duplicates of all kinds, global shuffle, plan and final
rows), in a Ray session and processes of its own, on staged rows with planted duplicates: 5 % equal files, 5 %
equal pixels, 5 % near, 1 % blank. CPU time is that of all workers and the driver, their start included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import machine
from cluster.ray_tasks import ray_session
from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.job.selection import ShardConfig, select_rows
from data_pipeline.keyed import mix
from data_pipeline.records import STAGED_SCHEMA
from tests.support.crash_rig import ray_workers

_CHUNK_ROWS = 10_000
_EVERY_SECONDS = 0.2
_TICK = os.sysconf("SC_CLK_TCK")


def make_staged(folder: Path, rows: int) -> list[list[str]]:
    """Staged rows, chunk by chunk; which are duplicates of which is a function of the row numbers."""
    names = []
    for chunk, start in enumerate(range(0, rows, _CHUNK_ROWS)):
        number = np.arange(start, min(start + _CHUNK_ROWS, rows))
        draw = mix(1, number) % np.uint64(100)
        like = np.where(draw < 15, (mix(2, number) % np.uint64(rows)).astype(np.int64), number)
        content = np.where(draw < 5, like, number)  # of the file
        picture = np.where(draw < 10, like, number)  # of the pixels
        hashes = mix(5, np.where(draw < 15, like, number))
        flips = np.where((draw >= 10) & (draw < 15), np.uint64(1) << (mix(6, number) % np.uint64(64)), 0)
        hashes = np.where(draw == 99, mix(7, number) & np.uint64(7), hashes ^ flips.astype(np.uint64))
        name = f"staging/rows-{chunk:06d}.parquet"
        (folder / "staging").mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(chunk, number, content, picture, hashes), folder / name)
        names.append([name])
    return names


def _table(
    chunk: int, number: np.ndarray, content: np.ndarray, picture: np.ndarray, hashes: np.ndarray
) -> pa.Table:
    n = number.size
    texts = [f"{i:09d}" for i in number.tolist()]
    columns: dict[str, Any] = {
        "chunk": np.full(n, chunk, np.int32),
        "row": np.arange(n),
        "key": texts,
        "source": [f"laion2B-en/part-{chunk:05d}.parquet#{text}" for text in texts],
        "url": [f"https://images.example.org/{text}/{mix(3, int(text)):016x}.jpg" for text in texts],
        "retriable": np.zeros(n, bool),
        "id": (mix(4, number) >> np.uint64(1)).astype(np.int64),
        "sha256": [mix(8, one, np.arange(4)).tobytes() for one in content.tolist()],
        "caption": [f"a photograph of thing number {one}, seen from the left" for one in picture.tolist()],
        "meta": [f'{{"similarity":0.3{text},"pwatermark":0.1,"punsafe":0.01}}' for text in texts],
        "width": np.full(n, 256, np.int32),
        "height": np.full(n, 256, np.int32),
        "extension": ["jpg"] * n,
        "image_file": [f"staging/chunk-{chunk:06d}.bin"] * n,
        "image_offset": np.arange(n) * 20_000,
        "image_size": np.full(n, 20_000),
        "image_crc32": (mix(9, number) >> np.uint64(32)).astype(np.int64),
        "pixels": [mix(10, one, np.arange(2)).tobytes() for one in picture.tolist()],
        "perceptual": hashes,
    }
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in STAGED_SCHEMA
    ]
    return pa.table(arrays, schema=STAGED_SCHEMA)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peak MB of the driver and of the largest worker, and CPU seconds of all workers, at the end."""
    found = {"driver_mb": 0.0, "worker_mb": 0.0}
    seconds: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY_SECONDS):
            for worker in ray_workers():
                with suppress(OSError, StopIteration):
                    found["worker_mb"] = max(found["worker_mb"], _peak_mb(worker.pid))
                    fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
                    seconds[worker.pid] = (int(fields[11]) + int(fields[12])) / _TICK
            found["driver_mb"] = _peak_mb(os.getpid())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["worker_cpu_s"] = sum(seconds.values())


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(rows: int, radius: int) -> dict[str, Any]:
    """One whole selection."""
    duplicates = DuplicateConfig(bytes=True, pixels=True, pair=True, near_radius=radius)
    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        names = make_staged(Path(name), rows)
        with ray_session(2):
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
            with watched() as found:
                selection = select_rows(name, names, duplicates, ShardConfig(shuffle="global"))
            seconds = time.monotonic() - start
            after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = found["worker_cpu_s"] + after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rows_per_cpu_second": rows / cpu,
        "driver_mb": found["driver_mb"],
        "worker_mb": found["worker_mb"],
        "dropped": selection.dropped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--radius", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Each in a process of its own: a peak never falls.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        results = list(pool.map(measure, args.rows, [args.radius] * len(args.rows)))
    print(f"{'rows':>10} {'seconds':>8} {'cpu s':>8} {'rows/s/core':>12} {'driver MB':>10} {'worker MB':>10}")
    for one in results:
        print(
            f"{one['rows']:10} {one['seconds']:8.1f} {one['cpu_seconds']:8.1f} "
            f"{one['rows_per_cpu_second']:12.0f} {one['driver_mb']:10.0f} {one['worker_mb']:10.0f}"
        )
        print("           dropped: " + ", ".join(f"{name} {count}" for name, count in one["dropped"].items()))
    about = machine(["ray", "pyarrow"])
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"results": results, "about": about}) + "\n")


if __name__ == "__main__":
    main()
