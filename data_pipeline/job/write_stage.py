"""The last stage of a preprocess job: one Ray task makes one output shard of staged images.

The plan names for each sample of a shard the staged object and the range of its image. Images are read in
windows of bounded size, so that memory does not grow with the shard, and ranges that touch are read as one.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.errors import ShardCorrupt
from cluster.manifest import file_entry
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.job import ledger
from data_pipeline.job.drivers import Driver, require_newest
from data_pipeline.job.ledger import ShardRecord
from data_pipeline.job.selection import read_plan
from data_pipeline.records import Sample, ShardFormat, shard_names
from data_pipeline.shards.shard_writer import write_shard

_WINDOW_BYTES = 8 << 20
_GAP_BYTES = 16 << 10  # cheaper to read than to ask for separately
_THREADS = 16
_ROWS_AT_ONCE = 1000

Row = dict[str, Any]


@dataclass(frozen=True)
class WriteTask:
    """What a worker needs to make one output shard."""

    index: int
    output: str
    recipe: str
    """Digest of the recipe."""
    plan: str
    """Digest of the decision that the shard belongs to."""
    shards_per_part: int
    """Shards whose plan lies in one object, as the decision has it."""
    format: ShardFormat
    folder: str
    """Where the plan lies."""
    driver: Driver | None = None
    """Whose task it is; it ends where that one was replaced."""

    def __str__(self) -> str:
        return shard_names(self.index, self.format)[0]


def write_output_shard(task: WriteTask) -> ShardRecord:
    """Write the files of one shard and enter it into the ledger; runs in a worker.

    Raises:
        ShardCorrupt: a staged image is not what was staged.
        StorageUnavailable: the store does not answer, or the disk for temporary files is full.
        Superseded: another driver took over, or the data set is committed. No file of it is touched.
    """
    store = open_store(task.output)
    require_newest(store, task.driver)
    name, index_name = shard_names(task.index, task.format)
    with scratch_folder() as folder:
        path, index_path = folder / name, folder / index_name
        info = write_shard(read_samples(store, _planned(store, task)), path, index_path, task.format)
        files = tuple(file_entry(file, file.name) for file in dict.fromkeys((path, index_path)))
        for file in files:
            require_newest(store, task.driver)  # a committed file never changes
            store.put_file(file.name, folder / file.name)
    record = ShardRecord(task.index, task.plan, info.num_samples, files)
    ledger.enter_shard(store, ledger.shard_key(task.recipe, task.index), record)
    return record


def _planned(store: ObjectStore, task: WriteTask) -> Iterator[Row]:
    table = read_plan(store, task.index, task.shards_per_part, task.folder)
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def read_samples(store: ObjectStore, rows: Iterable[Row]) -> Iterator[Sample]:
    """The samples of planned rows, in their order, with their staged images."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for window in _windows(rows):
            ranges = list(coalesce(window))
            # Nothing here keeps the blocks of a window while those of the next are read.
            yield from _samples(store, window, ranges, _fetch(store, ranges, pool))


def _fetch(store: ObjectStore, ranges: list[tuple[str, int, int]], pool: ThreadPoolExecutor) -> list[bytes]:
    if len(ranges) == 1:  # needs no thread; many small ones on a remote store are a matter of waiting
        return [store.get_range(*ranges[0])]
    return list(pool.map(lambda r: store.get_range(*r), ranges))


def coalesce(rows: Iterable[Row]) -> Iterator[tuple[str, int, int]]:
    """Ranges (object, start, length) that hold the images of `rows`; neighbours are read together."""
    spans = sorted((row["image_file"], row["image_offset"], row["image_size"]) for row in rows)
    name, start, end = spans[0][0], spans[0][1], spans[0][1]
    for file, offset, size in spans:
        if file != name or offset > end + _GAP_BYTES:
            yield name, start, end - start
            name, start, end = file, offset, offset
        end = max(end, offset + size)
    yield name, start, end - start


def _samples(
    store: ObjectStore, rows: list[Row], ranges: list[tuple[str, int, int]], blocks: list[bytes]
) -> Iterator[Sample]:
    starts = [(name, start) for name, start, _ in ranges]  # sorted, as `coalesce` yields them
    for row in rows:
        offset = row["image_offset"]
        found = bisect_right(starts, (row["image_file"], offset)) - 1
        start, block = starts[found][1], blocks[found]
        image = block[offset - start : offset - start + row["image_size"]]
        if len(image) != row["image_size"] or zlib.crc32(image) != row["image_crc32"]:
            raise ShardCorrupt(
                f"{store.uri}/{row['image_file']}: the image at byte {offset} is not what was staged; delete "
                "this object and run again"
            )
        yield Sample(
            id=row["id"],
            key=row["key"],
            source=row["source"],
            image=image,
            extension=row["extension"],
            caption=row["caption"],
            width=row["width"],
            height=row["height"],
            sha256=row["sha256"],
            url=row["url"],
            meta=json.loads(row["meta"] or "{}"),
        )


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Runs of rows whose images have together no more than the window's bytes; at least one row each."""
    window: list[Row] = []
    total = 0
    for row in rows:
        if window and total + row["image_size"] > _WINDOW_BYTES:
            yield window
            window, total = [], 0
        window.append(row)
        total += row["image_size"]
    if window:
        yield window
