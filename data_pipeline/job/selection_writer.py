"""Writing of the plan and of the final rows, by chunk or after the global shuffle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.manifest import FileEntry, file_entry
from cluster.ray_tasks import run_bounded
from cluster.scratch import scratch_folder
from cluster.store import open_store
from data_pipeline.job.dedup import DROPPED_SCHEMA, dropped_name
from data_pipeline.job.exchange import Step, exchange
from data_pipeline.job.staged_rows import StagedRows, runs
from data_pipeline.keyed import mix
from data_pipeline.records import ROWS_SCHEMA, STAGED_SCHEMA, rows_name

_PLACE = [pa.field("shard", pa.int32(), nullable=False), pa.field("index", pa.int32(), nullable=False)]
PLAN_SCHEMA = pa.schema([*STAGED_SCHEMA, *_PLACE])
PLACES_SCHEMA = pa.schema([("row", pa.int64()), ("shard", pa.int32()), ("index", pa.int32())])

_ROW_BYTES = 1000  # of a staged row, roughly
_ROW_GROUP = 1 << 17
_RETRIES = 2
_ENTRY = [("name", pa.string()), ("size", pa.int64()), ("sha256", pa.string())]
_DONE_SCHEMA = pa.schema(
    [("kind", pa.string()), ("number", pa.int64()), *_ENTRY, ("shard_sizes", pa.list_(pa.int64()))]
)
# Between the two exchanges of the global shuffle: places of rows, and files that are done (chunk -1).
_MIXED_SCHEMA = pa.schema([("chunk", pa.int64()), *PLACES_SCHEMA, *_DONE_SCHEMA])


@dataclass(frozen=True)
class Layout:
    """Where the plan goes and how it is cut."""

    uri: str
    folder: str
    num_shards: int
    shards_per_part: int
    seed: int

    @property
    def num_parts(self) -> int:
        return -(-self.num_shards // self.shards_per_part)

    def shards_of(self, part: int) -> range:
        return range(part * self.shards_per_part, min((part + 1) * self.shards_per_part, self.num_shards))


@dataclass(frozen=True)
class Fates:
    """The staged rows and which of them went as duplicates."""

    staged: StagedRows
    lossy: frozenset[int]
    """Chunks that lose rows as duplicates."""
    folder: str
    guard: Callable[[], None] | None = None
    """Called before each file of the data set is put; raises where it must not be."""

    def dropped(self, chunk: int) -> pa.Table:
        """The duplicates of a chunk (DROPPED_SCHEMA, by row)."""
        if chunk not in self.lossy:
            return DROPPED_SCHEMA.empty_table()
        data = open_store(self.staged.uri).get(dropped_name(self.folder, chunk))
        return pq.read_table(pa.BufferReader(data))

    def kept(self, chunk: int) -> pa.Table:
        """The rows of a chunk that stay (STAGED_SCHEMA, by row)."""
        table = self.staged.read(chunk, STAGED_SCHEMA.names)
        lost = np.isin(table["row"].to_numpy(), self.dropped(chunk)["row"].to_numpy())
        stays = table["image_file"].is_valid().to_numpy() & ~lost
        return table.filter(pa.array(stays)).cast(STAGED_SCHEMA)


@dataclass
class Written:
    """The files that are done, by number, and the sizes of shards."""

    parts: dict[int, FileEntry] = field(default_factory=dict)
    rows: dict[int, FileEntry] = field(default_factory=dict)
    shard_sizes: dict[int, int] = field(default_factory=dict)

    def add(self, layout: Layout, done: pa.Table) -> None:
        """Enter what a task reports (_DONE_SCHEMA)."""
        for line in done.select(_DONE_SCHEMA.names).to_pylist():
            entry = FileEntry(line["name"], line["size"], line["sha256"])
            if line["kind"] == "part":
                self.parts[line["number"]] = entry
                self.shard_sizes.update(
                    zip(layout.shards_of(line["number"]), line["shard_sizes"], strict=True)
                )
            else:
                self.rows[line["number"]] = entry


def part_name(folder: str, part: int) -> str:
    """Key of a part of the plan."""
    return f"{folder}/part-{part:06d}.parquet"


def write_by_chunk(fates: Fates, layout: Layout, kept: np.ndarray, _: int | None) -> Written:
    """Shuffle none: each chunk that keeps rows is a shard; one task per part, nothing moves between tasks."""
    shards = np.flatnonzero(kept)

    def write(part: int) -> pa.Table:
        numbers = layout.shards_of(part)
        chunks = shards[numbers.start : numbers.stop].tolist()
        done: list[pa.Table] = []

        def groups() -> Iterator[pa.Table]:
            for shard, chunk in zip(numbers, chunks, strict=True):
                table = fates.kept(chunk)
                index = np.arange(table.num_rows)
                places = pa.table([table["row"], np.full(index.size, shard), index], schema=PLACES_SCHEMA)
                done.append(_done("rows", chunk, write_rows(fates, chunk, places)))
                yield _with_places(table, places)

        entry = _write(layout.uri, part_name(layout.folder, part), PLAN_SCHEMA, groups())
        done.append(_done("part", part, entry, kept[chunks].tolist()))
        return pa.concat_tables(done)

    written = Written()
    for _part, done in run_bounded(write, range(layout.num_parts), window=None, retries=_RETRIES):
        written.add(layout, done)
    return written


def write_by_hash(fates: Fates, layout: Layout, kept: np.ndarray, partitions: int | None) -> Written:
    """Shuffle global: the shard of a row is drawn by its id, its place there is its rank by the same hash."""
    written = Written()
    if layout.num_shards == 0:
        return written
    done = exchange(
        fates.staged.num_chunks,
        partial(_draw_shards, fates, layout),
        [
            Step(key="part", fn=partial(_write_parts, layout)),
            Step(key="chunk", fn=partial(_write_chunks, fates)),
        ],
        rows=int(kept.sum()),
        row_bytes=_ROW_BYTES,
        partitions=partitions,
    )
    for table in done:
        written.add(layout, table)
    return written


def write_rows(fates: Fates, chunk: int, places: pa.Table) -> FileEntry:
    """Write the final rows of a chunk; `places` (PLACES_SCHEMA) are those of its kept rows, in any order."""
    table = fates.staged.read(chunk, [name for name in ROWS_SCHEMA.names if name in STAGED_SCHEMA.names])
    dropped = fates.dropped(chunk)
    places = places.take(pa.array(np.argsort(places["row"].to_numpy())))
    lost, place = _find(table["row"], dropped["row"]), _find(table["row"], places["row"])
    columns = {name: table[name] for name in table.column_names}
    for name in ("reason", "detail"):
        columns[name] = pc.call_function("coalesce", [dropped[name].take(lost), table[name]])
    columns["fate"] = pa.array(["dropped", "kept"]).take(place.is_valid().cast(pa.int8()))
    for name in ("shard", "index"):
        columns[name] = places[name].take(place)
    final = pa.table([columns[name] for name in ROWS_SCHEMA.names], schema=ROWS_SCHEMA)
    groups = [final.slice(i, _ROW_GROUP) for i in range(0, max(final.num_rows, 1), _ROW_GROUP)]
    return _write(fates.staged.uri, rows_name(chunk), ROWS_SCHEMA, groups, fates.guard)


def _find(rows: pa.ChunkedArray, in_rows: pa.ChunkedArray) -> pa.Array:
    """Where each row number is in `in_rows`, which are ascending; null where it is not."""
    wanted, there = rows.to_numpy(), in_rows.to_numpy()
    place = np.searchsorted(there, wanted)
    found = place < there.size
    found[found] = there[place[found]] == wanted[found]
    return pa.array(place, mask=~found)


def empty_part(layout: Layout, part: int) -> FileEntry:
    """Write a part none of whose shards was drawn a sample."""
    groups = [PLAN_SCHEMA.empty_table()] * len(layout.shards_of(part))
    return _write(layout.uri, part_name(layout.folder, part), PLAN_SCHEMA, groups)


def shard_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """floor(hash * num_shards / 2^64) for uint64 hashes, exactly; num_shards below 2^31."""
    n, half = np.uint64(num_shards), np.uint64(32)
    low = (hashes & np.uint64(0xFFFFFFFF)) * n >> half
    return (((hashes >> half) * n + low) >> half).astype(np.int32)


def _draw_shards(fates: Fates, layout: Layout, chunk: int) -> Iterator[pa.Table]:
    table = fates.kept(chunk)
    shard = shard_of(mix(layout.seed, table["id"].to_numpy()), layout.num_shards)
    table = table.append_column("shard", pa.array(shard))
    yield table.append_column("part", pa.array(shard.astype(np.int64) // layout.shards_per_part))


def _write_parts(layout: Layout, table: pa.Table) -> Iterator[pa.Table]:
    """Rank the rows of whole parts within their shards, and write the parts."""
    yield _MIXED_SCHEMA.empty_table()
    ids, shard = table["id"].to_numpy(), table["shard"].to_numpy()
    order = np.lexsort((ids, mix(layout.seed, ids), shard))
    for part, where in runs(table["part"].to_numpy()[order]):
        rows = table.take(pa.array(order[where]))
        starts = np.searchsorted(rows["shard"].to_numpy(), [*layout.shards_of(part), layout.num_shards])
        starts[-1] = rows.num_rows
        sizes = np.diff(starts)
        index = np.arange(rows.num_rows) - np.repeat(starts[:-1], sizes)
        places = pa.table([rows["row"], rows["shard"], index], schema=PLACES_SCHEMA)
        plan = _with_places(rows.select(STAGED_SCHEMA.names), places)
        groups = [plan.slice(start, size) for start, size in zip(starts[:-1], sizes, strict=True)]
        entry = _write(layout.uri, part_name(layout.folder, part), PLAN_SCHEMA, groups)
        chunk = rows["chunk"].cast(pa.int64())
        yield _mixed(places.append_column("chunk", chunk))
        done = _done("part", part, entry, sizes.tolist())
        yield _mixed(done.append_column("chunk", pa.array([-1], pa.int64())))


def _write_chunks(fates: Fates, table: pa.Table) -> Iterator[pa.Table]:
    """Write the final rows of whole chunks, and pass on what is known of other files."""
    table = table.sort_by("chunk")
    yield _DONE_SCHEMA.empty_table()
    for chunk, where in runs(table["chunk"].to_numpy()):
        rows = table.slice(where.start, where.stop - where.start)
        if chunk < 0:
            yield rows.select(_DONE_SCHEMA.names)
        else:
            places = rows.select(PLACES_SCHEMA.names).combine_chunks()
            yield _done("rows", chunk, write_rows(fates, chunk, places))


def _with_places(rows: pa.Table, places: pa.Table) -> pa.Table:
    columns = [*rows.columns, places["shard"], places["index"]]
    return pa.table(columns, schema=PLAN_SCHEMA)


def _done(kind: str, number: int, entry: FileEntry, shard_sizes: list[int] | None = None) -> pa.Table:
    line = {"kind": kind, "number": number, **vars(entry), "shard_sizes": shard_sizes}
    return pa.Table.from_pylist([line], schema=_DONE_SCHEMA)


def _mixed(table: pa.Table) -> pa.Table:
    """The table with the columns of _MIXED_SCHEMA, null where it has none."""
    columns = [
        table[f.name] if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in _MIXED_SCHEMA
    ]
    return pa.table(columns, schema=_MIXED_SCHEMA)


def _write(
    uri: str,
    name: str,
    schema: pa.Schema,
    groups: Iterable[pa.Table],
    guard: Callable[[], None] | None = None,
) -> FileEntry:
    """Write a parquet object with a row group per table; equal tables give equal bytes."""
    with scratch_folder() as folder:
        path = folder / "table.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd", version="2.6") as writer:
            for table in groups:
                # One piece per column: page boundaries follow the pieces.
                writer.write_table(table.combine_chunks(), row_group_size=max(table.num_rows, 1))
        entry = file_entry(path, name)
        if guard is not None:
            guard()
        open_store(uri).put_file(name, path)
    return entry
