"""Audits a preprocess job that has not committed yet, from its ledger and its staged rows.

Of every chunk that was staged, each source row must have been read once and the files of each round must be
there; rows that another round may still keep are pending. Nothing is changed, so a job may go on meanwhile.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import ManifestMismatch, ObjectNotFound
from cluster.manifest import MANIFEST
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.job import ledger
from data_pipeline.job.ledger import StageRecord
from data_pipeline.upkeep.audit import SOURCE, Audit, Progress, audit_dataset, report_twice
from data_pipeline.upkeep.scan import Buckets, Problems, in_order, local_file, pc, read_rows, text_hashes

_COLUMNS = ("chunk", "row", "source", "reason", "retriable", "image_file", "image_offset", "image_size")


def audit(uri: str, workers: int = 4, progress: Progress | None = None) -> Audit:
    """Audit the folder at `uri`: a committed data set, or a job that is not finished.

    Raises:
        ObjectNotFound: neither was ever begun there.
        ManifestMismatch, DataError: the manifest is not one of a data set; see `load_dataset`.
    """
    store = open_store(uri)
    if store.exists(MANIFEST):
        return audit_dataset(uri, workers, progress)
    if not store.exists(ledger.CLAIM):
        raise ObjectNotFound(f"{store.uri}: no {MANIFEST} and no job that was begun; correct the URI")
    return _audit_job(store, workers, progress)


@dataclass
class _Chunk:
    """What the rounds of one chunk say of its rows, the last round of each row."""

    number: int
    problems: Problems = field(default_factory=Problems)
    rows_in: int = 0
    kept: int = 0
    retriable: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Dropped rows that no round will try again, by reason."""
    late: Counter[str] = field(default_factory=Counter)
    """Dropped rows that another round may keep, by reason."""
    sources: dict[str, Any] | None = None


def _audit_job(store: ObjectStore, workers: int, progress: Progress | None) -> Audit:
    recipe = ledger.digest(json.loads(store.get(ledger.CLAIM)))
    sizes = dict(store.list())
    prefix = ledger.folder(recipe)
    chunks = _rounds(store, [name for name in sizes if name.startswith(f"{prefix}stage-")])
    decided = ledger.select_key(recipe) in sizes
    problems, late, reasons = Problems(), Counter[str](), Counter[str]()
    rows_in = kept = 0
    with scratch_folder() as folder:
        expected = sum(records[0].rows_in for records in chunks.values())
        sources = Buckets(folder / "sources", SOURCE, expected)
        read = in_order(lambda item: _chunk(store, sizes, *item), sorted(chunks.items()), workers)
        for done, chunk in enumerate(read, start=1):
            rows_in, kept = rows_in + chunk.rows_in, kept + chunk.kept
            reasons += chunk.reasons
            late += chunk.late
            problems.extend(chunk.problems)
            if chunk.sources is not None:
                sources.add(**chunk.sources)
            if progress is not None:
                progress(done, len(chunks), f"{rows_in} rows")
        report_twice(sources, problems)
    pending = 0 if decided else late.total()
    reasons += late if decided else Counter()
    if rows_in != kept + reasons.total() + pending:
        problems.add("books", f"{rows_in} rows in, {kept} kept, {reasons.total()} dropped, {pending} pending")
    gaps = max(chunks, default=-1) + 1 - len(chunks)
    return Audit(
        uri=store.uri,
        committed=False,
        rows_in=rows_in,
        kept=kept,
        dropped=reasons.total(),
        pending=pending,
        reasons=dict(sorted(reasons.items())),
        retriable=late.total(),
        chunks=len(chunks),
        pending_chunks=0 if decided else (gaps or None),
        shards=sum(name.startswith(f"{prefix}shard-") for name in sizes),
        files=len(sizes),
        bytes=sum(sizes.values()),
        problems=tuple(problems.lines()),
    )


def _rounds(store: ObjectStore, names: Sequence[str]) -> dict[int, list[StageRecord]]:
    """The records by chunk, in the order of the rounds."""
    found: dict[int, list[StageRecord]] = {}
    for name, data in zip(names, in_order(store.get, names, 16), strict=True):
        try:
            record = StageRecord(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise ManifestMismatch(
                f"{store.uri}/{name}: not a record of the ledger ({error}); delete it and run again"
            ) from None
        found.setdefault(record.chunk, []).append(record)
    return {chunk: sorted(records, key=lambda record: record.round) for chunk, records in found.items()}


def _chunk(store: ObjectStore, sizes: dict[str, int], number: int, records: list[StageRecord]) -> _Chunk:
    chunk = _Chunk(number)
    tables: list[pa.Table] = []
    open_rows = records[0].rows_in
    for round, record in enumerate(records):
        where = f"chunk {number} round {round}"
        if record.round != round or record.rows_in != open_rows:
            chunk.problems.add(
                "rounds", f"{where}: {open_rows} rows to do, but its record says {record.rows_in}"
            )
        open_rows = sum(record.retriable.values())
        files = [(record.rows, record.rows_size), (record.images, record.images_size)]
        bad = [name for name, size in files if name is not None and sizes.get(name) != size]
        if bad:
            chunk.problems.add("files", f"{bad[0]}: missing or of another size than {where} left it")
            return chunk
        with local_file(store, record.rows) as path:
            batches = list(read_rows(path, _COLUMNS, record.rows))
        if not batches:
            continue
        table = pa.Table.from_batches(batches)
        beyond = pc.greater(pc.add(table["image_offset"], table["image_size"]), record.images_size)
        if table.num_rows != record.rows_in or pc.any(beyond).as_py():
            chunk.problems.add("rows", f"{record.rows}: not the rows that {where} recorded")
        tables.append(table)
    if tables:
        _settle(pa.concat_tables(tables), tables[0], chunk)
    return chunk


def _settle(rows: pa.Table, first: pa.Table, chunk: _Chunk) -> None:
    """Count the rows by fate; of a row that several rounds did, the last one counts."""
    numbers, chunk.rows_in = rows["row"].to_numpy(), first.num_rows
    in_place = np.array_equal(first["row"].to_numpy(), np.arange(first.num_rows))
    if (
        not in_place
        or not bool((rows["chunk"].to_numpy() == chunk.number).all())
        or numbers.max() >= first.num_rows
    ):
        chunk.problems.add(
            "rows", f"chunk {chunk.number}: its staged rows are not those of the chunk in order"
        )
        return
    last = np.empty(first.num_rows, np.int64)
    last[numbers] = np.arange(len(numbers))
    final = rows.take(last)
    hashes = text_hashes(first["source"])
    chunk.sources = {
        "high": hashes[:, 0],
        "low": hashes[:, 1],
        "row": np.arange(first.num_rows),
        "chunk": chunk.number,
    }
    kept = pc.is_valid(final["image_file"])
    chunk.kept = pc.sum(kept).as_py() or 0
    lost = final.filter(pc.invert(kept))
    for counter, part in (
        (chunk.late, lost.filter(lost["retriable"])),
        (chunk.reasons, lost.filter(pc.invert(lost["retriable"]))),
    ):
        for item in pc.value_counts(pc.fill_null(part["reason"].combine_chunks(), "")).to_pylist():
            counter[item["values"]] += item["counts"]
