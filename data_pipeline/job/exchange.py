"""Grouping of tables over the whole cluster: rows with one key come together, group by group, in workers.

This is the one place that uses Ray Data, and only for metadata. A job is a `read` per source followed by
steps; before each step the rows are exchanged so that all rows with one value of its key column stand in one
table. A step must not depend on how the keys are spread over tables, nor on the order of rows: then neither
the number of partitions nor the number of cores shows in what it writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.errors import MaskClipError
from cluster.ray_tasks import run_bounded

_MIB = 1 << 20
_ONE_TASK_BYTES = 64 * _MIB
_READ_SOURCES = 4  # sources of one read task
_RETRIES = 2

TableFn = Callable[[pa.Table], Iterable[pa.Table]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bring the rows with one value of the integer column `key` together, then call `fn` on the tables.

    `fn` gets some number of whole groups, and yields tables of one schema, also for an empty table.
    """

    key: str
    fn: TableFn
    copies: float = 1.0
    """Rows that come into this step, as a multiple of the rows that were read; for the partitions' size."""


def exchange(
    num_sources: int,
    read: Callable[[int], Iterable[pa.Table]],
    steps: Sequence[Step],
    *,
    rows: int,
    row_bytes: int,
    partitions: int | None = None,
) -> list[pa.Table]:
    """Run `read(i)` for each i < num_sources, then the steps; returns what the last step yields.

    That comes to the caller's memory, so the last step must answer with little: names and counts. `rows` and
    `row_bytes` say how much is read; what fits in 64 MiB goes through one task without any exchange.
    `partitions` sets the number of tables per step (tests). Needs a ray_session.

    Raises the MaskClipError that a function raised, RayError for anything else that went wrong.
    """
    if num_sources == 0:
        return []
    if partitions is None and rows * row_bytes * max(s.copies for s in steps) <= _ONE_TASK_BYTES:

        def job(_: None) -> list[pa.Table]:
            tables = [table for i in range(num_sources) for table in read(i)]
            for step in steps:
                tables = list(step.fn(pa.concat_tables(tables)))
            return [table for table in tables if table.num_rows]

        return next(run_bounded(job, [None], window=1, retries=_RETRIES))[1]
    return _exchange_over_cluster(num_sources, read, steps, rows * row_bytes, partitions)


def _cores() -> int:
    """CPU cores of the Ray session."""
    return max(1, int(_resource("CPU", 1)))


def _resource(name: str, default: float) -> float:
    import ray

    return ray.cluster_resources().get(name, default)


def _exchange_over_cluster(
    num_sources: int,
    read: Callable[[int], Iterable[pa.Table]],
    steps: Sequence[Step],
    total_bytes: int,
    partitions: int | None,
) -> list[pa.Table]:
    import ray.data  # a second, which small jobs need not pay
    from ray.exceptions import RayError

    def read_batch(batch: pa.Table) -> Iterator[pa.Table]:
        for source in batch["id"].to_pylist():
            yield from read(source)

    with _quiet_context(total_bytes * max(step.copies for step in steps)):
        rows = ray.data.range(num_sources, override_num_blocks=math.ceil(num_sources / _READ_SOURCES))
        rows = rows.map_batches(read_batch, batch_size=_READ_SOURCES, batch_format="pyarrow")
        for step in steps:
            count = partitions or max(_cores(), math.ceil(total_bytes * step.copies / _partition_bytes()))
            rows = rows.repartition(count, keys=[step.key])
            rows = rows.map_batches(_whole(step.fn), batch_size=None, batch_format="pyarrow")
        try:
            batches: Iterable[Any] = rows.iter_batches(batch_size=None, batch_format="pyarrow")
            return [table for table in batches if table.num_rows]
        except RayError as exc:
            raise _own_error(exc) from None


def _whole(fn: TableFn) -> TableFn:
    """`fn` as a function with a name, which Ray Data asks of it."""

    def step(table: pa.Table) -> Iterable[pa.Table]:
        yield from fn(table)

    return step


def _partition_bytes() -> int:
    """A partition is copied a few times while it is sorted, so it takes a small part of a core's memory."""
    memory = _resource("memory", 0) / _cores()
    return int(min(max(memory / 32, 16 * _MIB), 256 * _MIB))


@contextmanager
def _quiet_context(total_bytes: float) -> Iterator[None]:
    """Ray Data's settings for the length of a block."""
    from ray.data import DataContext

    store = _resource("object_store_memory", 128 * _MIB)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    context.target_max_block_size = int(min(max(store / _cores() / 8, 4 * _MIB), 128 * _MIB))
    context.shuffle_input_batch_bytes = int(min(max(store / _cores() / 2, 16 * _MIB), 1024 * _MIB))
    # What does not fit in memory goes through files of the map tasks, not through the object store: that
    # would be one object per pair of tasks, each with an entry in the driver.
    context.use_disk_based_hash_shuffle = total_bytes > store / 2
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _own_error(exc: BaseException) -> BaseException:
    """The MaskClipError behind an exception of Ray, if there is one."""
    from ray.exceptions import RayTaskError

    cause: BaseException | None = exc
    while cause is not None:
        # Ray's own exception poses as one of the class that it wraps, with a page of text.
        if isinstance(cause, MaskClipError) and not isinstance(cause, RayTaskError):
            return cause
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return exc
