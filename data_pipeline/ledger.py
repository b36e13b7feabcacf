"""What is done of a preprocess job: one small record per chunk, beside the shards, and the rows behind it.

    ledger/recipe.json                    the recipe that this folder belongs to, claimed before any work
    ledger/<recipe>/chunk-000000.json     the chunk is done: its counts and its files with their checksums
    ledger/<recipe>/rows-000000.parquet   the fate of each of its input rows: an id, or a reason

A record is written after the files that it names, so one whose files have the right size needs no second
look. Readers of the data set never see the ledger; it may be deleted once the manifest is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ManifestMismatch
from cluster.manifest import FileEntry
from cluster.store import ObjectStore
from data_pipeline.records import REJECTS_SCHEMA, Reject
from data_pipeline.sources import Chunk

CLAIM = "ledger/recipe.json"
_ROW_GROUP = 50_000
_ROWS_SCHEMA = pa.schema([pa.field("id", pa.int64()), *REJECTS_SCHEMA])


@dataclass(frozen=True)
class ChunkRecord:
    """A finished chunk. `files` are the tar and the index, or nothing where every row was rejected."""

    inputs: tuple[str, ...]
    input_size: int
    rows_in: int
    kept: int
    rejected: dict[str, int]
    """Number of rejects by reason."""
    files: tuple[FileEntry, ...]
    rows: FileEntry

    def belongs_to(self, chunk: Chunk) -> bool:
        """Whether this is the record of that input, as far as names and sizes tell."""
        return (self.inputs, self.input_size) == (chunk.names, chunk.size)

    def to_bytes(self) -> bytes:
        return canonical(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> ChunkRecord:
        document = json.loads(data)
        document["inputs"] = tuple(document["inputs"])
        document["files"] = tuple(FileEntry(**entry) for entry in document["files"])
        document["rows"] = FileEntry(**document["rows"])
        return cls(**document)


def canonical(document: Any) -> bytes:
    """JSON of which equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def claim(store: ObjectStore, recipe: dict[str, Any]) -> None:
    """Make the folder belong to `recipe`, if it belongs to none.

    Raises:
        ManifestMismatch: it holds shards that no recipe claims, or the unfinished work of another recipe.
    """
    data = canonical(recipe)
    if store.list("shard-") and not store.exists(CLAIM):
        raise ManifestMismatch(
            f"{store.uri}: holds shards that were not made here; choose another output or move them away"
        )
    if not store.put_if_absent(CLAIM, data) and store.get(CLAIM) != data:
        raise ManifestMismatch(
            f"{store.uri}: holds unfinished work of another recipe; delete it or choose another output"
        )


def record_name(digest: str, index: int) -> str:
    """Key of the record of chunk `index` under the recipe's digest (sha256, hexadecimal)."""
    return f"ledger/{digest[:12]}/chunk-{index:06d}.json"


def rows_name(digest: str, index: int) -> str:
    """Key of the rows of chunk `index`."""
    return f"ledger/{digest[:12]}/rows-{index:06d}.parquet"


def finished(store: ObjectStore, digest: str, chunks: Sequence[Chunk]) -> dict[int, ChunkRecord]:
    """Records of the chunks that need no work, by index.

    What other attempts left is deleted, so that nobody takes it for a part of the set: shards without a
    record, and records whose input or files have changed.
    """
    sizes = dict(store.list())
    done: dict[int, ChunkRecord] = {}
    valid: set[str] = set()
    for chunk in chunks:
        name = record_name(digest, chunk.index)
        if name not in sizes:
            continue
        record = ChunkRecord.from_bytes(store.get(name))
        files = (*record.files, record.rows)
        if record.belongs_to(chunk) and all(sizes.get(file.name) == file.size for file in files):
            done[chunk.index] = record
            valid.update((name, *(file.name for file in files)))
    for name in sizes:
        if name not in valid and name.startswith(("shard-", f"ledger/{digest[:12]}/")):
            store.delete(name)
    return done


def write_rows(path: Path, ids: Sequence[int], rejects: Sequence[Reject]) -> None:
    """Write the rows of a chunk: the samples by id, then the rejects, each in input order."""
    samples = pa.table({"id": pa.array(ids, pa.int64())})
    refused = pa.Table.from_pylist([asdict(reject) for reject in rejects], schema=REJECTS_SCHEMA)
    pq.write_table(pa.concat_tables([samples, refused], promote_options="default").cast(_ROWS_SCHEMA), path)


def gather_rows(store: ObjectStore, names: Iterable[str], rejects_path: Path) -> tuple[np.ndarray, int]:
    """Gather the rejects of all rows files, in order, in the parquet file `rejects_path`.

    Returns the ids of the samples (int64, in order) and the number of rejects.
    """
    ids: list[np.ndarray] = [np.empty(0, np.int64)]
    num_rejects = 0
    waiting = REJECTS_SCHEMA.empty_table()
    with pq.ParquetWriter(rejects_path, REJECTS_SCHEMA) as writer:
        for name in names:
            table = pq.read_table(pa.BufferReader(store.get(name)))
            ids.append(table["id"].drop_null().to_numpy())
            rejects = table.filter(table["id"].is_null()).select(REJECTS_SCHEMA.names).cast(REJECTS_SCHEMA)
            num_rejects += rejects.num_rows
            waiting = pa.concat_tables([waiting, rejects])
            if waiting.num_rows >= _ROW_GROUP:
                writer.write_table(waiting)
                waiting = REJECTS_SCHEMA.empty_table()
        writer.write_table(waiting)
    return np.concatenate(ids), num_rejects
