"""The parts of a merge that move data: the check that no sample stands in two sets, the copies of the shards,
and the files of rows with their new numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError, ShardCorrupt
from cluster.manifest import FileEntry, file_entry, sha256_file
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore
from data_pipeline.catalog import DatasetManifest
from data_pipeline.records import ROWS_SCHEMA, ShardInfo, rows_name, shard_names
from data_pipeline.upkeep.audit_files import number_of
from data_pipeline.upkeep.scan import Buckets, Progress, in_order, local_file, pc, read_rows, text_hashes

_ID = [("id", "<i8"), ("origin", "<i4")]
_SOURCE = [("high", "<u8"), ("low", "<u8"), ("origin", "<i4"), ("kept", "?")]


@dataclass(frozen=True)
class Origin:
    """One of the data sets that go in, and where its parts go."""

    store: ObjectStore
    dataset: DatasetManifest
    meta: dict[str, Any]
    shards: dict[int, int]
    """New number of each shard by the old one."""
    chunks: dict[str, int]
    """New number of each file of rows by its name."""


def require_disjoint(origins: Sequence[Origin]) -> list[str]:
    """No id in two sets; returns what goes before the sources of dropped rows, per set ("" for nothing)."""
    clashing = np.zeros(len(origins), bool)
    with scratch_folder() as folder:
        ids = Buckets(folder / "ids", _ID, sum(o.dataset.num_samples for o in origins))
        rows_in = sum(o.dataset.counts.get("rows_in", 0) for o in origins)
        sources = Buckets(folder / "sources", _SOURCE, rows_in)
        for number, origin in enumerate(origins):
            for name in origin.dataset.rows_files:
                with local_file(origin.store, name) as path:
                    for batch in read_rows(path, ("source", "fate", "id"), f"{origin.store.uri}/{name}"):
                        kept = pc.equal(batch["fate"], "kept")
                        ids.add(id=batch.filter(kept)["id"].to_numpy(), origin=number)
                        hashes = text_hashes(batch["source"])
                        sources.add(
                            high=hashes[:, 0],
                            low=hashes[:, 1],
                            origin=number,
                            kept=kept.to_numpy(zero_copy_only=False),
                        )
        for bucket in ids:
            again = np.flatnonzero(bucket["id"][1:] == bucket["id"][:-1])
            if len(again):
                first, second = (origins[int(bucket["origin"][again[0] + n])].dataset.uri for n in (0, 1))
                raise DataError(
                    f"id {bucket['id'][again[0]]} stands in {first} and in {second}, and it is not the only "
                    "one if they overlap; merge sets that share no samples"
                )
        for bucket in sources:
            bucket = bucket[np.lexsort((bucket["origin"], bucket["low"], bucket["high"]))]
            same = (bucket["high"][1:] == bucket["high"][:-1]) & (bucket["low"][1:] == bucket["low"][:-1])
            pair = np.flatnonzero(same)
            # Of a kept and a dropped row the dropped one changes, of two dropped ones the later.
            first, second = bucket[pair], bucket[pair + 1]
            clashing[np.where(second["kept"], first["origin"], second["origin"])] = True
    return [
        f"{origin.dataset.digest[:16]}/" if here else ""
        for origin, here in zip(origins, clashing, strict=True)
    ]


def copy_shards(
    target: ObjectStore, origins: Sequence[Origin], workers: int, progress: Progress | None
) -> tuple[list[FileEntry], int]:
    """Entries of all shard files under their new names, and how many were copied."""
    there = dict(target.list("shard-"))
    work = [
        (origin, origin.dataset.files[old], new)
        for origin in origins
        for info in origin.dataset.shards
        for old, new in dict.fromkeys(renamed(origin, info))
    ]

    def copy(item: tuple[Origin, FileEntry, str]) -> bool:
        origin, entry, name = item
        if there.get(name) == entry.size:
            return False
        with local_file(origin.store, entry.name) as path:
            if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
                raise ShardCorrupt(
                    f"{origin.store.uri}/{entry.name}: not what its manifest says; restore it and merge again"
                )
            target.put_file(name, path)
        return True

    copied = 0
    for done, new in enumerate(in_order(copy, work, workers), start=1):
        copied += new
        if progress is not None:
            progress(done, len(work), work[done - 1][2])
    return [FileEntry(name, entry.size, entry.sha256) for _, entry, name in work], copied


def renamed(origin: Origin, info: ShardInfo) -> list[tuple[str, str]]:
    """(old, new) name of the shard's file and of its index."""
    new = shard_names(origin.shards[number_of(info.name)], origin.dataset.format)
    return list(zip((info.name, info.index_name), new, strict=True))


def write_rows(
    target: ObjectStore, origins: Sequence[Origin], prefixes: Sequence[str], workers: int
) -> list[FileEntry]:
    """Entries of all files of rows, written with their new numbers; `prefixes` are of `require_disjoint`."""
    there = dict(target.list("rows/"))
    work = [
        (origin, prefix, name)
        for origin, prefix in zip(origins, prefixes, strict=True)
        for name in origin.dataset.rows_files
    ]

    def write(item: tuple[Origin, str, str]) -> FileEntry:
        origin, prefix, old = item
        new = rows_name(origin.chunks[old])
        with (
            scratch_folder() as folder,
            local_file(origin.store, old) as source,
        ):
            if sha256_file(source) != origin.dataset.files[old].sha256:
                raise ShardCorrupt(
                    f"{origin.store.uri}/{old}: is not what its manifest says; restore it and merge again"
                )
            path = folder / "rows"
            _renumber(source, path, origin, origin.chunks[old], prefix)
            entry = file_entry(path, new)
            if there.get(new) != entry.size:
                target.put_file(new, path)
        return entry

    return list(in_order(write, work, workers))


def _renumber(source: Path, path: Path, origin: Origin, chunk: int, prefix: str) -> None:
    old = np.array(sorted(origin.shards), np.int32)
    new = pa.array([origin.shards[number] for number in old], pa.int32())
    with pq.ParquetWriter(path, ROWS_SCHEMA, compression="zstd") as writer:
        for batch in read_rows(source, ROWS_SCHEMA.names, f"{origin.store.uri} rows"):
            table = pa.Table.from_batches([batch])
            shards = new.take(pc.index_in(table["shard"].combine_chunks(), pa.array(old)))
            columns = {name: table[name] for name in ROWS_SCHEMA.names}
            columns["chunk"] = pa.array(np.full(table.num_rows, chunk, np.int32))
            columns["shard"] = shards
            if prefix:
                dropped = pc.not_equal(table["fate"], "kept")
                named = pc.binary_join_element_wise(prefix, table["source"], "")
                columns["source"] = pc.if_else(dropped, named, table["source"])
            writer.write_table(pa.table(columns).cast(ROWS_SCHEMA))
