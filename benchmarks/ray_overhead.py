"""What does Ray cost? The same stage tasks over the same chunks, by our bounded window of Ray tasks and by a
plain pool of as many spawned processes, after warm-up.

    python -m benchmarks.ray_overhead [--chunks 64] [--rows 64] [--rounds 5] [--json FILE]

The ratio is the pool's time over ours; the goal is 0.97 in wall time. CPU time is that of all processes of
the side, Ray's own daemons included.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.common import Measure, alternate, arguments, report
from benchmarks.images import synthetic_jpeg
from cluster.ray_tasks import ray_session, run_bounded
from data_pipeline.fetch.download import DownloadConfig
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig, plan_chunks
from data_pipeline.job.filters import FilterConfig
from data_pipeline.job.ledger import StageRecord
from data_pipeline.job.staging import StageSettings, StageTask, stage_chunk
from tests.support.crash_rig import process_table
from tests.support.raw_input import write_tar

_WORKERS = 2
_IMAGES = 16
_GOAL = 0.97

Run = Callable[[list[StageTask]], Iterable[StageRecord]]


def make_input(folder: Path, chunks: int, rows: int) -> SourceConfig:
    """`chunks` tars of `rows` rows each, of a few different images of 480 x 360 pixels."""
    images = [synthetic_jpeg(480, 360, seed) for seed in range(_IMAGES)]
    for tar in range(chunks):
        files: list[tuple[str, bytes]] = []
        for row in range(rows):
            key = f"{tar:05d}{row:04d}"
            files += [(f"{key}.jpg", images[row % _IMAGES]), (f"{key}.txt", f"caption {key}".encode())]
        write_tar(folder / f"{tar:05d}.tar", files)
    return SourceConfig(uri=str(folder))


def settings(source: SourceConfig, output: Path) -> StageSettings:
    """Stage tasks with everything at its default."""
    return StageSettings(
        output=str(output),
        recipe="0" * 64,
        source=source,
        filters=FilterConfig(),
        download=DownloadConfig(),
        transform=TransformConfig(),
    )


class Side:
    """One way to run the tasks; each call is one turn into an output of its own."""

    def __init__(self, source: SourceConfig, folder: Path, run: Run) -> None:
        self._source, self._folder, self._run = source, folder, run
        self._chunks = plan_chunks(source)
        self._turns = count()

    def __call__(self) -> Measure:
        output = self._folder / f"turn-{next(self._turns)}"
        shared = settings(self._source, output)
        tasks = [StageTask(chunk, shared) for chunk in self._chunks]
        cpu, wall = tree_cpu(), time.perf_counter()
        rows = sum(record.kept for record in self._run(tasks))
        cpu, wall = tree_cpu() - cpu, time.perf_counter() - wall
        shutil.rmtree(output)
        return Measure(rows, cpu, wall, 0.0)


def tree_cpu() -> float:
    """CPU seconds so far of this process and all processes below it that live."""
    table = process_table()
    ticks = 0
    for process in table.values():
        if os.getpid() in (process.pid, *process.ancestors(table)):
            ticks += process.ticks
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64, help="rows per chunk")
    args = parser.parse_args()

    def by_ray(tasks: list[StageTask]) -> Iterable[StageRecord]:
        return (record for _, record in run_bounded(stage_chunk, tasks, window=None, retries=2))

    with tempfile.TemporaryDirectory(prefix="maskclip-") as name, ray_session(_WORKERS):
        folder = Path(name)
        source = make_input(folder / "raw", args.chunks, args.rows)
        with multiprocessing.get_context("spawn").Pool(_WORKERS) as pool:

            def by_pool(tasks: list[StageTask]) -> Iterable[Any]:
                return pool.imap_unordered(stage_chunk, tasks, chunksize=1)

            result = alternate(
                f"{args.chunks} chunks of {args.rows} rows",
                Side(source, folder / "ray", by_ray),
                Side(source, folder / "pool", by_pool),
                rounds=args.rounds,
            )
    report("Ray against a pool of 2 processes", [result], ["ray"], args.json, goal=f"{_GOAL} of wall time")


if __name__ == "__main__":
    main()
