"""Stage 3 of the pipeline: which staged rows stay, and in which shard at which place.

It reads and writes metadata only. Beside the store it needs no state: the same staged rows give the same
bytes of every file, whatever the number of workers, their order or their deaths, and a call that finds the
record of an equal one returns it.

    <folder>/part-000000.parquet   plan of the shards 0 to k - 1: PLAN_SCHEMA, by (shard, index), a row group
                                   per shard, so the writer of a shard reads its rows alone (`read_plan`)
    <folder>/dropped-*.parquet     the duplicates of a chunk (see dedup.py)
    <folder>/selection-*.json      the record of a finished call
    rows/rows-000000.parquet       the fate of each row of chunk 0: ROWS_SCHEMA, by row
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from cluster.errors import DataError
from cluster.manifest import FileEntry
from cluster.ray_tasks import run_bounded
from cluster.store import ObjectStore, open_store
from data_pipeline.job.dedup import DuplicateConfig, drop_duplicates
from data_pipeline.job.selection_writer import (
    PLACES_SCHEMA,
    PLAN_SCHEMA,
    Fates,
    Layout,
    Written,
    empty_part,
    part_name,
    write_by_chunk,
    write_by_hash,
    write_rows,
)
from data_pipeline.job.staged_rows import StagedRows, read_row_group
from data_pipeline.records import ShardFormat, rows_name

__all__ = ["PLAN_SCHEMA", "Selection", "ShardConfig", "part_name", "read_plan", "rows_name", "select_rows"]

_PART_ROWS = 1 << 16
_COUNT_CHUNKS = 16  # chunks that one task counts
_RETRIES = 2


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How kept rows are laid into shards."""

    format: ShardFormat = "tar"
    """tar: WebDataset tar with an Arrow index beside it; arrow: one Arrow IPC file, read by memory map."""
    samples_per_shard: int = 4096
    """Samples of a shard, on average: the global shuffle draws the shard of each sample. Where `shuffle` is
    none, a chunk of the source becomes a shard, whatever it holds."""
    shuffle: Literal["none", "global"] = "none"
    """global: samples are shuffled over the whole set once, here; none: they keep the order of the source."""
    seed: int = 0
    """Seed of the global shuffle."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(
                f"samples_per_shard is {self.samples_per_shard}: set samples_per_shard to 1 or more"
            )

    @property
    def shards_per_part(self) -> int:
        """Shards whose plan lies in one file."""
        return max(1, _PART_ROWS // self.samples_per_shard)


@dataclass(frozen=True)
class Selection:
    """What was decided. rows_in == samples + sum(dropped.values())."""

    num_shards: int
    samples: int
    rows_in: int
    dropped: dict[str, int]
    """Number of dropped rows by reason, those that staging refused included."""
    shard_sizes: tuple[int, ...]
    """Samples of each shard. One can be 0 under the global shuffle when shards are tiny; nothing is written
    for it."""
    parts: tuple[FileEntry, ...]
    """The plan; `parts[i]` holds the shards from i * shards_per_part."""
    rows: tuple[FileEntry, ...]
    """`rows[i]` holds the fates of chunk i."""
    shards_per_part: int

    def to_bytes(self) -> bytes:
        """JSON; equal selections give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Selection:
        """The inverse of `to_bytes`."""
        document = json.loads(data)
        for name in ("parts", "rows"):
            document[name] = tuple(FileEntry(**entry) for entry in document[name])
        document["shard_sizes"] = tuple(document["shard_sizes"])
        return cls(**document)


def select_rows(
    store_uri: str,
    staged: Sequence[Sequence[str]],
    duplicates: DuplicateConfig,
    shards: ShardConfig,
    folder: str = "staging/plan",
    *,
    partitions: int | None = None,
    guard: Callable[[], None] | None = None,
) -> Selection:
    """Decide the fate of every staged row and write the plan and the final rows.

    `staged[i]` are the objects with the rows of chunk i (STAGED_SCHEMA), in the order of the rounds: of a row
    that is in several, the last counts. `partitions` sets the number of tables of each exchange (tests).
    `guard` is called in a worker before each final file of rows is put, and may raise.
    Needs a ray_session. The memory of the caller grows with the numbers of chunks and shards, not of rows.

    Raises:
        DataError: two rows have one id, a staged file is broken or lacks what the recipe needs, or a search
            for near duplicates would not end.
    """
    store = open_store(store_uri)
    record_name = _record_name(store, staged, duplicates, shards, folder)
    if (recorded := _recorded(store, record_name, folder)) is not None:
        return recorded

    rows = StagedRows.of(store_uri, staged)
    counts = _count(rows)
    lost = drop_duplicates(
        rows, duplicates, folder, rows=sum(c.candidates for c in counts), partitions=partitions
    )
    kept = np.array([c.candidates - lost.get(i, Counter()).total() for i, c in enumerate(counts)], np.int64)
    samples = int(kept.sum())
    by_chunk = shards.shuffle == "none"
    num_shards = int((kept > 0).sum()) if by_chunk else math.ceil(samples / shards.samples_per_shard)
    layout = Layout(store_uri, folder, num_shards, shards.shards_per_part, shards.seed)
    fates = Fates(rows, frozenset(lost), folder, guard)
    write = write_by_chunk if by_chunk else write_by_hash
    written = write(fates, layout, kept, partitions)
    _write_rest(fates, layout, written)
    planned = sum(written.shard_sizes.values())
    if planned != samples:
        raise DataError(
            f"{store_uri}: {samples} rows were selected but {planned} were planned; the staged rows changed "
            "meanwhile, run the job again"
        )
    dropped: Counter[str] = Counter()
    for refused in (*(c.refused for c in counts), *lost.values()):
        dropped.update(refused)
    selection = Selection(
        num_shards=num_shards,
        samples=samples,
        rows_in=sum(c.rows for c in counts),
        dropped=dict(sorted(dropped.items())),
        shard_sizes=tuple(written.shard_sizes.get(shard, 0) for shard in range(num_shards)),
        parts=tuple(written.parts[part] for part in sorted(written.parts)),
        rows=tuple(written.rows[chunk] for chunk in sorted(written.rows)),
        shards_per_part=shards.shards_per_part,
    )
    store.put(record_name, selection.to_bytes())
    return selection


def read_plan(store: ObjectStore, shard: int, shards_per_part: int, folder: str = "staging/plan") -> pa.Table:
    """The rows of one shard in the order of `index` (PLAN_SCHEMA), by range reads of its part."""
    name = part_name(folder, shard // shards_per_part)
    return read_row_group(store, name, shard % shards_per_part)


def _record_name(
    store: ObjectStore,
    staged: Sequence[Sequence[str]],
    duplicates: DuplicateConfig,
    shards: ShardConfig,
    folder: str,
) -> str:
    """Key of the record of a call: another one for other objects, other sizes of them, or another recipe."""
    folders = sorted({os.path.dirname(name) for rounds in staged for name in rounds})
    sizes = {key: size for prefix in folders for key, size in store.list(prefix)}
    inputs = [[(name, sizes.get(name)) for name in rounds] for rounds in staged]
    text = json.dumps([inputs, asdict(duplicates), asdict(shards)], separators=(",", ":"))
    return f"{folder}/selection-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _recorded(store: ObjectStore, record_name: str, folder: str) -> Selection | None:
    """The selection of an earlier call, if its files are there."""
    if not store.exists(record_name):
        return None
    selection = Selection.from_bytes(store.get(record_name))
    sizes = {**dict(store.list(f"{folder}/part-")), **dict(store.list("rows/"))}
    whole = all(sizes.get(entry.name) == entry.size for entry in (*selection.parts, *selection.rows))
    return selection if whole else None


@dataclass(frozen=True)
class _Count:
    """What staging left of a chunk: all rows, those with an image, and the others by reason."""

    rows: int
    candidates: int
    refused: dict[str, int]


def _count(rows: StagedRows) -> list[_Count]:
    """The counts of each chunk."""

    def count(start: int) -> list[_Count]:
        return [_count_chunk(rows, i) for i in range(start, min(start + _COUNT_CHUNKS, rows.num_chunks))]

    starts = range(0, rows.num_chunks, _COUNT_CHUNKS)
    found = dict(run_bounded(count, starts, window=None, retries=_RETRIES))
    return [one for i in sorted(found) for one in found[i]]


def _count_chunk(rows: StagedRows, chunk: int) -> _Count:
    table = rows.read(chunk, ["image_file", "reason"])
    has_image, has_reason = (table[name].is_valid().to_numpy() for name in ("image_file", "reason"))
    if not (has_image ^ has_reason).all():
        raise DataError(
            f"{rows.uri}: chunk {chunk} has staged rows with both an image and a reason, or neither; delete "
            "its staged files and run the job again"
        )
    reasons = table["reason"].drop_null().value_counts().to_pylist()
    refused = {line["values"]: line["counts"] for line in reasons}
    return _Count(table.num_rows, int(has_image.sum()), refused)


def _write_rest(fates: Fates, layout: Layout, written: Written) -> None:
    """Chunks that keep no row, and parts that were drawn no sample, met no other row on the way."""
    jobs = [("rows", i) for i in range(fates.staged.num_chunks) if i not in written.rows]
    jobs += [("part", i) for i in range(layout.num_parts) if i not in written.parts]

    no_places = PLACES_SCHEMA.empty_table()

    def write(job: tuple[str, int]) -> FileEntry:
        return write_rows(fates, job[1], no_places) if job[0] == "rows" else empty_part(layout, job[1])

    for i, entry in run_bounded(write, jobs, window=None, retries=_RETRIES):
        kind, number = jobs[i]
        (written.rows if kind == "rows" else written.parts)[number] = entry
