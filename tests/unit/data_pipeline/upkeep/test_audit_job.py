"""The audit of a job that has not committed: what has a fate, what is pending, what is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ManifestMismatch
from cluster.store import open_store
from data_pipeline.fetch.download import DownloadConfig
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig, plan_chunks
from data_pipeline.job import ledger
from data_pipeline.job.filters import FilterConfig
from data_pipeline.job.ledger import StageRecord
from data_pipeline.job.staging import StageSettings, StageTask, stage_chunk
from data_pipeline.records import STAGED_SCHEMA, sample_id
from data_pipeline.upkeep.audit_job import audit
from tests.support.raw_input import members, write_tar

RECIPE = {"transform": {"short_side": 48}}
DIGEST = ledger.digest(RECIPE)


def begin(folder: Path) -> None:
    ledger.claim(open_store(str(folder)), RECIPE)


def row(number: int, fate: str, source: str | None = None) -> dict[str, Any]:
    """A staged row: kept, or dropped for the reason `fate`; one that timed out may pass in another round."""
    source = source or f"t.csv#{number}"
    base = {"chunk": 0, "row": number, "key": str(number), "source": source, "retriable": fate == "timeout"}
    if fate != "kept":
        return {**base, "reason": fate, "detail": "why"}
    image = {"image_file": "staging/chunk", "image_offset": 0, "image_size": 4}
    return {**base, **image, "id": sample_id(source)}


def stage(
    folder: Path, round: int, rows: list[dict[str, Any]], chunk: int = 0, **changes: Any
) -> StageRecord:
    """What a round of a chunk leaves behind."""
    store = open_store(str(folder))
    rows = [{**row, "chunk": chunk} for row in rows]
    name, images = f"staging/rows-{chunk}-{round}", f"staging/chunk-{chunk}-{round}"
    path = folder / "rows"
    pq.write_table(pa.Table.from_pylist(rows, schema=STAGED_SCHEMA), path)
    store.put_file(name, path)
    store.put(images, b"data")
    dropped = [row["reason"] for row in rows if "reason" in row]
    record = StageRecord(
        chunk=chunk,
        round=round,
        inputs="",
        rows_in=len(rows),
        kept=len(rows) - len(dropped),
        dropped=dict(Counter(dropped)),
        retriable=dict(Counter(row["reason"] for row in rows if row["retriable"])),
        rows=name,
        rows_size=path.stat().st_size,
        images=images,
        images_size=4,
    )
    record = replace(record, **changes)
    path.unlink()
    store.put(ledger.stage_key(DIGEST, chunk, round), ledger.canonical(asdict(record)))
    return record


def test_rows_in_are_kept_dropped_or_pending_and_later_rounds_win(tmp_path: Path) -> None:
    begin(tmp_path)
    stage(
        tmp_path,
        0,
        [row(0, "kept"), row(1, "timeout"), row(2, "small"), row(3, "timeout"), row(4, "timeout")],
    )
    first = audit(str(tmp_path))
    assert (first.committed, first.whole, first.problems) == (False, False, ())
    assert (first.rows_in, first.kept, first.dropped, first.pending) == (5, 1, 1, 3)
    stage(tmp_path, 1, [row(1, "kept"), row(3, "gone"), row(4, "timeout")])
    second = audit(str(tmp_path))
    assert (second.rows_in, second.kept, second.dropped, second.pending) == (5, 2, 2, 1)
    assert second.reasons == {"gone": 1, "small": 1}
    assert second.problems == ()
    open_store(str(tmp_path)).put(ledger.select_key(DIGEST), b"{}")
    decided = audit(str(tmp_path))
    assert (decided.rows_in, decided.kept, decided.dropped, decided.pending) == (5, 2, 3, 0)
    assert (decided.retriable, decided.pending_chunks) == (1, 0)


def test_chunks_between_are_pending(tmp_path: Path) -> None:
    begin(tmp_path)
    assert (audit(str(tmp_path)).rows_in, audit(str(tmp_path)).pending_chunks) == (0, None)
    stage(tmp_path, 0, [row(0, "kept", "a")], chunk=0)
    stage(tmp_path, 0, [row(0, "kept", "b")], chunk=3)
    found = audit(str(tmp_path))
    assert (found.chunks, found.pending_chunks, found.problems) == (2, 2, ())


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    record = stage(tmp_path, 0, [row(0, "kept", "a"), row(1, "kept", "a")], chunk=0)
    (problem,) = audit(str(tmp_path)).problems
    assert problem == "row 0 of chunk 0 and row 1 of chunk 0 have one source"
    stage(tmp_path, 0, [row(0, "kept", "b")], chunk=1, rows_in=2)
    stage(tmp_path, 0, [row(0, "kept", "c"), row(2, "kept", "d")], chunk=2)
    stage(tmp_path, 0, [row(0, "timeout", "e")], chunk=3)
    stage(tmp_path, 1, [row(0, "kept", "e"), row(1, "kept", "f")], chunk=3)
    (tmp_path / record.rows).unlink()
    problems = "\n".join(audit(str(tmp_path)).problems)
    assert f"{record.rows}: missing or of another size" in problems
    assert "staging/rows-1-0: not the rows that chunk 1 round 0 recorded" in problems
    assert "chunk 2: its staged rows are not those of the chunk in order" in problems
    assert "chunk 3 round 1: 1 rows to do, but its record says 2" in problems


def test_what_the_stage_leaves_is_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "raw/a.tar", [*members("a", 0), ("b.jpg", b"no image"), ("b.txt", b"broken")])
    write_tar(tmp_path / "raw/b.tar", members("c", 1))
    output = tmp_path / "set"
    begin(output)
    source = SourceConfig(uri=str(tmp_path / "raw"))
    settings = StageSettings(
        output=str(output),
        recipe=DIGEST,
        source=source,
        filters=FilterConfig(),
        download=DownloadConfig(),
        transform=TransformConfig(short_side=48),
    )
    for chunk in plan_chunks(source):
        stage_chunk(StageTask(chunk, settings))
    found = audit(str(output))
    assert found.problems == ()
    assert (found.rows_in, found.kept, found.dropped, found.pending, found.chunks) == (3, 2, 1, 0, 2)


def test_an_unreadable_record_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    key = ledger.stage_key(DIGEST, 0, 0)
    open_store(str(tmp_path)).put(key, b"{")
    with pytest.raises(ManifestMismatch, match=key):
        audit(str(tmp_path))
