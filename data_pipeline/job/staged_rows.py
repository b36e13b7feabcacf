"""Reading of staged rows and of other parquet objects of a store, by columns and row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.store import ObjectStore, open_store
from data_pipeline.store_file import StoreFile

if TYPE_CHECKING:
    from ray import ObjectRef

_WHOLE_BYTES = 1 << 20  # smaller objects are fetched in one piece


@dataclass(frozen=True)
class StagedRows:
    """The staged rows of every chunk. It is small wherever it goes: the names lie in Ray's object store."""

    uri: str
    num_chunks: int
    names: ObjectRef
    """Arrow list<string>: per chunk its objects in the order of the rounds."""

    @classmethod
    def of(cls, uri: str, names: Sequence[Sequence[str]]) -> StagedRows:
        """Needs a ray_session."""
        import ray

        array = pa.array([list(rounds) for rounds in names], pa.list_(pa.string()))
        return cls(uri, len(names), ray.put(array))

    def read(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows of a chunk, in the order of `row`; the last round that has a row wins.

        Raises DataError for a broken object, one of another chunk, or one with a row twice.
        """
        import ray

        store = open_store(self.uri)
        wanted = list(dict.fromkeys(["chunk", "row", *columns]))
        tables = []
        for name in ray.get(self.names)[chunk].as_py():
            where = f"{self.uri}/{name}"
            table = _read(store, name, where, wanted)
            if table.num_rows and not (table["chunk"].to_numpy() == chunk).all():
                raise DataError(f"{where}: holds rows of another chunk than {chunk}; run the job again")
            rows = table["row"].to_numpy()
            if np.unique(rows).size != rows.size:
                raise DataError(f"{where}: has a row twice; delete the object and run the job again")
            tables.append(table)
        if not tables:
            raise DataError(f"{self.uri}: chunk {chunk} has no staged rows; run the job again")
        rows = np.concatenate([table["row"].to_numpy() for table in tables])
        rounds = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
        order = np.lexsort((rounds, rows))
        last = np.append(np.diff(rows[order]) != 0, True)[: order.size]
        return pa.concat_tables(tables).take(pa.array(order[last])).select(list(dict.fromkeys(columns)))


def read_row_group(store: ObjectStore, name: str, group: int) -> pa.Table:
    """One row group of a parquet object, fetched by range reads."""
    with _open(store, name) as file:
        return pq.ParquetFile(file, pre_buffer=True).read_row_group(group)


def runs(sorted_values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each value of a sorted integer array and where it stands."""
    values, starts = np.unique(sorted_values, return_index=True)
    stops = np.append(starts[1:], sorted_values.size)
    for value, start, stop in zip(values, starts, stops, strict=False):
        yield int(value), slice(int(start), int(stop))


def _read(store: ObjectStore, name: str, where: str, columns: list[str]) -> pa.Table:
    try:
        with _open(store, name) as file:
            return pq.ParquetFile(file, pre_buffer=True).read(columns).select(columns)
    except (pa.ArrowException, KeyError) as exc:
        reason = " ".join(str(exc).split())
        raise DataError(
            f"{where}: not a file of staged rows ({reason}); delete it and run the job again"
        ) from exc


def _open(store: ObjectStore, name: str) -> Any:
    size = store.size(name)
    if size <= _WHOLE_BYTES:
        return pa.BufferReader(store.get(name))
    return pa.PythonFile(StoreFile(store, name, 0, size), mode="r")
