"""Raw input, cut into chunks that are known before any work starts: start at `plan_chunks`.

WebDataset tars are read by `tar_source.py`, loose files by `folder_source.py`, tables of addresses (Parquet,
csv, tsv) by `table_source.py`. `docs/sources.md` describes what each may hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count
from typing import Literal

from cluster.errors import DataError
from cluster.scratch import scratch_folder
from cluster.store import ObjectInfo, ObjectStore, open_store
from data_pipeline.ingest.folder_source import cut_folder, read_folder
from data_pipeline.ingest.sample_files import to_row
from data_pipeline.ingest.table_source import (
    TABLE_EXTENSIONS,
    TableConfig,
    TablePart,
    is_table,
    plan_table,
    read_part,
)
from data_pipeline.ingest.tar_source import read_tar
from data_pipeline.records import Reject, SourceRow

SourceKind = Literal["webdataset", "folder", "table"]

_WANTED = {
    "webdataset": "*.tar file",
    "folder": "image or caption file",
    "table": f"table ({', '.join(TABLE_EXTENSIONS)})",
}
_TABLES_AT_ONCE = 8

REASONS = {
    "no_image": "no .jpg, .jpeg, .png, .webp or .gif",
    "several_images": "more than one of them",
    "no_caption": "no .txt; in a table, null in every caption column",
    "several_captions": "two .txt that differ in case",
    "empty_caption": "in a table, blank in every caption column",
    "bad_caption": "a .txt that is not UTF-8",
    "bad_metadata": "a .json that is no JSON object",
    "unsafe_key": "a key that is not UTF-8, absolute, or holds .. or an empty part",
    "no_key": "in a table, nothing in the key column",
    "no_url": "in a table, nothing in the column of the address",
    "malformed_row": "a line of a table with too few or too many fields, broken quotes, or no UTF-8",
}
"""Every reason for which an input row is no row of a data set, before any filter."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the raw rows are."""

    uri: str
    """A local folder, or s3://bucket/prefix; its subfolders are read too."""
    kind: SourceKind = "webdataset"
    """webdataset: tars. folder: loose image, .txt and .json files. table: Parquet, csv or tsv files with the
    addresses of the images."""
    rows_per_chunk: int = 10_000
    """Rows that one task reads where the source is a folder or a table; a tar is one chunk, whatever it
    holds."""
    table: TableConfig | None = None
    """Which column is what; for tables only, and needed there."""

    def __post_init__(self) -> None:
        if not self.uri:
            raise ValueError("source.uri is empty: set source.uri to the folder of the raw data")
        if self.rows_per_chunk < 1:
            raise ValueError(
                f"source.rows_per_chunk is {self.rows_per_chunk}: set source.rows_per_chunk to 1 or more"
            )
        if (self.kind == "table") != (self.table is not None):
            raise ValueError(
                "source.kind is table, but the columns are not named: add source.table"
                if self.table is None
                else f"source.kind is {self.kind}, but source.table is given: remove source.table"
            )


@dataclass(frozen=True)
class Chunk:
    """A part of the input that one task reads: a tar, a run of the samples of a folder, or of the rows of a
    table."""

    index: int
    uri: str
    """Absolute, so that a worker anywhere opens the same store."""
    kind: SourceKind
    names: tuple[str, ...]
    """Keys of the objects in the store at `uri`, sorted."""
    size: int
    """Bytes of these objects; of a table the share of these rows, so the sum over chunks is the input's."""
    part: TablePart | None = None
    """Which rows of the table."""


def plan_chunks(source: SourceConfig) -> list[Chunk]:
    """Cut the input into chunks, in order of name. Lists the store; of tables it also reads the footers, and
    csv and tsv once in full.

    Raises:
        ConfigError: a table lacks a column of the mapping.
        DataError: there is nothing of this kind at the uri, or a table is broken.
    """
    store = open_store(source.uri)
    objects = store.list()
    if source.kind == "table":
        chunks = _plan_tables(store, [o for o in objects if is_table(o.key)], source)
    else:
        tars = ([o] for o in objects if o.key.endswith(".tar"))
        groups = tars if source.kind == "webdataset" else cut_folder(objects, source.rows_per_chunk)
        chunks = [
            Chunk(i, store.uri, source.kind, tuple(o.key for o in group), sum(o.size for o in group))
            for i, group in enumerate(groups)
        ]
    if not chunks:
        raise DataError(
            f"{store.uri}: no {_WANTED[source.kind]} there that has rows; "
            "set source.uri to the folder of the raw data"
        )
    return chunks


def plan_digest(chunks: Iterable[Chunk]) -> str:
    """sha256 over names, sizes and cuts: plans of one digest read the same rows, as far as a listing can
    tell."""
    lines = [[list(c.names), c.size, None if c.part is None else astuple(c.part)] for c in chunks]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def read_chunk(chunk: Chunk, source: SourceConfig) -> Iterator[SourceRow | Reject]:
    """Yield every row of the chunk once, in stored order; a row that cannot be one sample is a `Reject`.

    Raises:
        ShardCorrupt: the tar is truncated or broken, or the members of a key are not adjacent; the message
            has the byte offset.
        DataError: the input is broken, or not what was planned.
    """
    store = open_store(chunk.uri)
    if chunk.part is not None:
        assert source.table is not None  # checked by SourceConfig
        return read_part(store, chunk.names[0], chunk.part, source.table, chunk.index)
    if chunk.kind == "folder":
        files = read_folder(store, chunk.names)
        return (to_row(one, chunk.index, row, one.key) for row, one in enumerate(files))
    return _read_tar_chunk(store, chunk)


def _read_tar_chunk(store: ObjectStore, chunk: Chunk) -> Iterator[SourceRow | Reject]:
    (name,) = chunk.names
    with scratch_folder() as folder:
        path = folder / "input.tar"
        store.get_file(name, path)
        if path.stat().st_size != chunk.size:
            raise DataError(
                f"{store.uri}/{name}: had {chunk.size} bytes, now {path.stat().st_size}; "
                "do not change the input while it is read"
            )
        for row, files in enumerate(read_tar(path, f"{store.uri}/{name}")):
            # With the .tar in it: a.tar may hold b/c, and a/b.tar may hold c.
            yield to_row(files, chunk.index, row, f"{name}/{files.key}")


def _plan_tables(store: ObjectStore, tables: list[ObjectInfo], source: SourceConfig) -> list[Chunk]:
    assert source.table is not None  # checked by SourceConfig
    plan = partial(plan_table, store, config=source.table, rows_per_chunk=source.rows_per_chunk)
    with ThreadPoolExecutor(_TABLES_AT_ONCE) as pool:
        planned = pool.map(lambda one: plan(one.key), tables)
        number = count()
        return [
            Chunk(next(number), store.uri, source.kind, (table.key,), _share(part, parts), part)
            for table, parts in zip(tables, planned, strict=True)
            for part in parts
        ]


def _share(part: TablePart, parts: list[TablePart]) -> int:
    rows = parts[-1].start + parts[-1].rows
    first, last = (part.table_size * row // rows for row in (part.start, part.start + part.rows))
    return last - first
