"""The first stage of a preprocess job: one Ray task reads a chunk and stages its images and its rows.

Rows stream: filters by what the row says, download, header gate, decode and encode, one after the other, and
of a chunk of any length no more is in memory than the look-ahead of the download. Every source row leaves one
staged row, kept or dropped with its reason. A later round of a chunk does only the rows that it is given.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.fetch.download import DownloadConfig, fetch_rows
from data_pipeline.image.header import HeaderError, read_header
from data_pipeline.image.transforms import TransformConfig, clean_caption, prepare
from data_pipeline.ingest.sources import Chunk, SourceConfig, plan_digest, read_chunk
from data_pipeline.job import ledger
from data_pipeline.job.drivers import Driver, require_newest
from data_pipeline.job.filters import FilterConfig, RowFilter, check_header
from data_pipeline.job.ledger import StageRecord
from data_pipeline.records import STAGED_SCHEMA, Prepared, Reject, SourceRow, sample_id
from data_pipeline.shards.shard_writer import json_text

_ROWS_PER_GROUP = 1000


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What all tasks of the stage share."""

    output: str
    """Address of the data set's folder."""
    recipe: str
    """Digest of the recipe."""
    source: SourceConfig
    filters: FilterConfig
    download: DownloadConfig
    transform: TransformConfig
    driver: Driver | None = None
    """Whose tasks these are; they end where that one was replaced."""


@dataclass(frozen=True)
class StageTask:
    """One round of one chunk."""

    chunk: Chunk
    settings: StageSettings
    previous: StageRecord | None = None
    """The round before, whose retriable rows are done again; None: round 0, which does all rows."""

    @property
    def round(self) -> int:
        return 0 if self.previous is None else self.previous.round + 1

    def __str__(self) -> str:
        again = f", round {self.round}" if self.round else ""
        return f"chunk {self.chunk.index} ({', '.join(self.chunk.names[:1])}{again})"


def stage_chunk(task: StageTask) -> StageRecord:
    """Stage the rows of one chunk and enter the round into the ledger; runs in a worker.

    Raises as `read_chunk`; StorageUnavailable, also when the disk for temporary files is full; Superseded.
    """
    settings = task.settings
    store = open_store(settings.output)
    require_newest(store, settings.driver)
    only = None if task.previous is None else retriable_rows(store, task.previous)
    # Of tasks that race (one of them of a driver that was killed), each has objects of its own: downloads
    # need not end alike, and images of one must never be read with the offsets of the other.
    attempt = secrets.token_hex(4)
    suffix = f"{task.chunk.index:06d}{f'-r{task.round}' if task.round else ''}-{attempt}"
    images, rows = f"{ledger.STAGING}chunk-{suffix}.bin", f"{ledger.STAGING}rows-{suffix}.parquet"
    with scratch_folder() as folder:
        writer = _StagedWriter(folder, images)
        # The generators own temporary files and connections, which end with this block and not with garbage.
        with closing(writer), closing(_prepared(_rows(task, only), settings)) as results:
            for result in results:
                writer.add(*result)
        if writer.images_size:
            store.put_file(images, writer.images_path)
        store.put_file(rows, writer.rows_path)
        record = StageRecord(
            chunk=task.chunk.index,
            round=task.round,
            inputs=plan_digest([task.chunk]),
            rows_in=writer.rows_in,
            kept=writer.rows_in - writer.dropped.total(),
            dropped=dict(sorted(writer.dropped.items())),
            retriable=dict(sorted(writer.retriable.items())),
            rows=rows,
            rows_size=writer.rows_path.stat().st_size,
            images=images if writer.images_size else None,
            images_size=writer.images_size,
        )
    require_newest(store, settings.driver)
    return ledger.enter(store, ledger.stage_key(settings.recipe, record.chunk, record.round), record)


def retriable_rows(store: ObjectStore, record: StageRecord) -> frozenset[int]:
    """Numbers of the rows that this round dropped for what may pass."""
    with scratch_folder() as folder:
        path = folder / "rows"
        store.get_file(record.rows, path)
        table = pq.read_table(path, columns=["row", "retriable"])
        return frozenset(table.filter(table["retriable"])["row"].to_pylist())


def _rows(task: StageTask, only: frozenset[int] | None) -> Iterator[SourceRow | Reject]:
    rows = read_chunk(task.chunk, task.settings.source)
    return rows if only is None else (row for row in rows if row.row in only)


def _prepared(
    rows: Iterable[SourceRow | Reject], settings: StageSettings
) -> Generator[tuple[SourceRow, Prepared] | tuple[Reject, None], None, None]:
    """What becomes of each row, in their order."""
    row_filter = RowFilter(settings.filters)
    wanted = (_wanted(row, row_filter) for row in rows)
    # Tars and folders have their images; reading them ahead would only take memory.
    fetched = fetch_rows(wanted, settings.download) if settings.source.kind == "table" else wanted
    with closing(cast("Generator[SourceRow | Reject]", fetched)):
        for row in fetched:
            result = row if isinstance(row, Reject) else _prepare(row, settings)
            if isinstance(result, Reject):
                yield result, None
            else:
                assert isinstance(row, SourceRow)
                yield row, result


def _wanted(row: SourceRow | Reject, row_filter: RowFilter) -> SourceRow | Reject:
    """`row` with its caption in order, or why it is not fetched."""
    if isinstance(row, Reject):
        return row
    caption = clean_caption(row.caption)
    if not caption:
        return Reject.of(row, "empty_caption", "nothing but white space and control characters")
    row = row if caption == row.caption else replace(row, caption=caption)
    return row_filter(row) or row


def _prepare(row: SourceRow, settings: StageSettings) -> Prepared | Reject:
    assert row.image is not None  # sources and downloads give an image or a Reject
    try:
        header = read_header(row.image)
    except HeaderError as error:
        return Reject.of(row, error.reason, error.detail)
    reject = check_header(row, header, settings.filters)
    return prepare(row, header, settings.transform) if reject is None else reject


class _StagedWriter:
    """Appends images to one local file and rows to another, and counts."""

    def __init__(self, folder: Path, images_key: str) -> None:
        self.images_path, self.rows_path = folder / "images", folder / "rows"
        self.rows_in = self.images_size = 0
        self.dropped: Counter[str] = Counter()
        self.retriable: Counter[str] = Counter()
        self._key = images_key
        self._images = self.images_path.open("wb")
        self._rows = pq.ParquetWriter(self.rows_path, STAGED_SCHEMA, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def add(self, row: SourceRow | Reject, prepared: Prepared | None) -> None:
        """One source row: kept with its image, or dropped."""
        self.rows_in += 1
        common = {
            "chunk": row.chunk,
            "row": row.row,
            "key": row.key,
            "source": row.source,
            "url": row.url,
            "fetch": None if row.fetch is None else json_text(row.fetch),
        }
        if isinstance(row, Reject):
            self.dropped[row.reason] += 1
            if row.retriable:
                self.retriable[row.reason] += 1
            why = {"reason": row.reason, "detail": row.detail, "retriable": row.retriable}
            self._append({**common, **why})
            return
        assert prepared is not None
        assert row.image is not None
        self._images.write(prepared.image)
        self._append(
            {
                **common,
                "retriable": False,
                "id": sample_id(row.source),
                "sha256": hashlib.sha256(row.image).digest(),
                "caption": row.caption,
                "meta": json_text(row.meta),
                "width": prepared.width,
                "height": prepared.height,
                "extension": prepared.extension,
                "image_file": self._key,
                "image_offset": self.images_size,
                "image_size": len(prepared.image),
                "image_crc32": zlib.crc32(prepared.image),
                "pixels": prepared.pixels,
                "perceptual": prepared.perceptual,
            }
        )
        self.images_size += len(prepared.image)

    def close(self) -> None:
        """Write what waits and finish both files."""
        self._flush()
        self._rows.close()
        self._images.close()

    def _append(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._rows.write_table(pa.Table.from_pylist(self._waiting, schema=STAGED_SCHEMA))
            self._waiting.clear()
