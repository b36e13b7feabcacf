"""Parquet tables, read by row groups: of a file only its footer and the columns and groups that are asked
for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.store import ObjectStore
from data_pipeline.ingest.csv_table import Malformed
from data_pipeline.store_file import StoreFile

_BATCH_ROWS = 1024
# Pages are asked for in pieces of this size, so a row group of any size fits the memory.
_READ_BYTES = 4 << 20


def parquet_shape(store: ObjectStore, name: str) -> tuple[pa.Schema, int]:
    """Schema and number of rows, from the footer.

    Raises:
        DataError: the file is no Parquet file, or was cut.
    """
    with _opened(store, name) as file:
        return file.schema_arrow, file.metadata.num_rows


def read_parquet(
    store: ObjectStore, name: str, columns: list[str] | None, start: int, rows: int
) -> Iterator[list[Any] | Malformed]:
    """The values of rows [start, start + rows), in the order of `columns` (None: all, as the file has them).

    A row group that the range begins within is decoded from its first row on, so chunks far smaller than the
    groups cost more. Text that is not UTF-8 makes a row `Malformed`.

    Raises:
        DataError: a part of the file cannot be decoded.
    """
    with _opened(store, name) as file:
        groups, skip = _groups(file.metadata, start, rows)
        batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False)
        left = rows
        for batch in batches:
            first = min(skip, batch.num_rows)
            skip -= first
            batch = batch.slice(first, left)
            left -= batch.num_rows
            if batch.num_rows:
                yield from _rows(batch.columns if columns is None else [batch.column(c) for c in columns])
            if not left:
                return


def _groups(metadata: pq.FileMetaData, start: int, rows: int) -> tuple[list[int], int]:
    """The row groups that overlap the range, and the rows to skip in the first of them."""
    groups: list[int] = []
    skip = before = 0
    for i in range(metadata.num_row_groups):
        count = metadata.row_group(i).num_rows
        if before < start + rows and before + count > start:
            if not groups:
                skip = start - before
            groups.append(i)
        before += count
    return groups, skip


def _rows(columns: list[pa.Array]) -> Iterator[list[Any] | Malformed]:
    columns = [_without_time(column) for column in columns]
    try:
        yield from map(list, zip(*(column.to_pylist() for column in columns), strict=True))
        return
    except ValueError:
        pass  # before the first row was yielded: some row of the batch is to blame, find it
    for i in range(len(columns[0])):
        try:
            yield [column[i].as_py() for column in columns]
        except UnicodeDecodeError as error:
            yield Malformed(f"not UTF-8: {error.reason} at byte {error.start} of a value")
        except ValueError as error:
            yield Malformed(f"not readable: {error}")


def _without_time(column: pa.Array) -> pa.Array:
    """Times as text, in UTC, and durations as numbers: else it would matter whether pandas is installed."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp(column.type.unit))
    if pa.types.is_duration(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column


@contextmanager
def _opened(store: ObjectStore, name: str) -> Iterator[pq.ParquetFile]:
    try:
        raw = pa.PythonFile(StoreFile(store, name, 0, store.size(name)), mode="r")
        with pq.ParquetFile(raw, buffer_size=_READ_BYTES, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{store.uri}/{name}: not readable as Parquet ({reason}); fetch it again") from error
