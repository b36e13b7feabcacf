"""Reads whole tables in tests, and counts what is asked of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.store import StoreConfig
from cluster.store_local import LocalStore
from data_pipeline.ingest.sources import REASONS, SourceConfig, plan_chunks, read_chunk
from data_pipeline.ingest.table_source import TableConfig
from data_pipeline.records import Reject, SourceRow

LAION: dict[str, Any] = {"url_column": "URL", "caption_columns": ("TEXT",)}
SMALL: dict[str, Any] = {"url_column": "url", "caption_columns": ("text",)}


class CountingStore(LocalStore):
    """A folder that counts the bytes that it is asked for."""

    def __init__(self, uri: str, config: StoreConfig | None = None) -> None:
        super().__init__(uri, config or StoreConfig())
        self.asked = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = super().get_range(key, start, length)
        self.asked += len(data)
        return data


def read_tables(folder: Path, rows_per_chunk: int = 10_000, **mapping: Any) -> list[SourceRow | Reject]:
    """The rows of all chunks of the tables of a folder; the numbers of chunks and rows are checked."""
    table = TableConfig(**{**LAION, **mapping})
    source = SourceConfig(uri=str(folder), kind="table", rows_per_chunk=rows_per_chunk, table=table)
    chunks = plan_chunks(source)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    given = [list(read_chunk(chunk, source)) for chunk in chunks]
    for chunk, rows in zip(chunks, given, strict=True):
        assert [(row.chunk, row.row) for row in rows] == [(chunk.index, i) for i in range(len(rows))]
        assert 1 <= len(rows) <= rows_per_chunk
    return [row for rows in given for row in rows]


def kept(rows: list[SourceRow | Reject]) -> list[SourceRow]:
    """All rows, none of which is a reject."""
    assert not [row for row in rows if isinstance(row, Reject)]
    return [row for row in rows if isinstance(row, SourceRow)]


def rejects(rows: list[SourceRow | Reject]) -> dict[str, str]:
    """Reasons by source of the row."""
    found = {row.source: row.reason for row in rows if isinstance(row, Reject)}
    assert set(found.values()) <= set(REASONS)
    return found
