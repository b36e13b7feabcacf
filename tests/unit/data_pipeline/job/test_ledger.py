"""The ledger trusts a record only where everything that it names is still so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ManifestMismatch
from cluster.manifest import FileEntry
from cluster.store import ObjectStore, open_store
from data_pipeline.ingest.sources import Chunk, plan_digest
from data_pipeline.job import ledger
from data_pipeline.job.ledger import ShardRecord, StageRecord

RECIPE = "ab" * 32
CHUNKS = [Chunk(i, "/raw", "webdataset", (f"{i}.tar",), 100 + i) for i in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "set"))


def stage(store: ObjectStore, chunk: int, round: int = 0, **changes: Any) -> StageRecord:
    """A finished round with its two objects."""
    record = StageRecord(
        chunk=chunk,
        round=round,
        inputs=plan_digest([CHUNKS[chunk]]),
        rows_in=5,
        kept=3,
        dropped={"timeout": 2},
        retriable={"timeout": 2},
        rows=f"staging/rows-{chunk}-{round}",
        rows_size=4,
        images=f"staging/chunk-{chunk}-{round}",
        images_size=6,
    )
    record = replace(record, **changes)
    store.put(record.rows, b"rows")
    if record.images:
        store.put(record.images, b"images")
    return ledger.enter(store, ledger.stage_key(RECIPE, chunk, round), record)


def test_finished_rounds_are_found_in_order(store: ObjectStore) -> None:
    records = [stage(store, 2, 1), stage(store, 0), stage(store, 2, 0, images=None, images_size=0)]
    assert ledger.staged_rounds(store, RECIPE, CHUNKS) == [[records[1]], [], [records[2], records[0]]]


@pytest.mark.parametrize("change", ["input", "rows gone", "images cut", "first round gone"])
def test_a_record_that_no_longer_holds_is_done_again(store: ObjectStore, change: str) -> None:
    stage(store, 0)
    first, second = stage(store, 1), stage(store, 1, 1)
    chunks = list(CHUNKS)
    kept = []
    if change == "input":
        chunks[1] = replace(chunks[1], size=7)
    elif change == "rows gone":
        store.delete(first.rows)
    elif change == "images cut":
        store.put(str(second.images), b"imag")
        kept = [first]
    else:
        store.delete(ledger.stage_key(RECIPE, 1, 0))
    assert ledger.staged_rounds(store, RECIPE, chunks)[1] == kept
    left = [key for key, _ in store.list(f"ledger/{RECIPE[:12]}/stage-000001")]
    assert left == [ledger.stage_key(RECIPE, 1, record.round) for record in kept]
    # What was deleted makes room for the record of the new attempt.
    again = stage(store, 1, len(kept), inputs=plan_digest([chunks[1]]), rows="staging/again")
    assert ledger.staged_rounds(store, RECIPE, chunks)[1] == [*kept, again]


def test_of_twins_the_first_counts(store: ObjectStore) -> None:
    first = stage(store, 0, rows="staging/first")
    assert stage(store, 0, rows="staging/second", kept=4, dropped={"timeout": 1}) == first
    assert ledger.staged_rounds(store, RECIPE, CHUNKS)[0] == [first]


def test_a_record_of_other_input_gives_way(store: ObjectStore) -> None:
    """A driver that was replaced may enter one at the last moment."""
    stage(store, 0, rows="staging/old", inputs="of the input before")
    second = stage(store, 0, rows="staging/new")
    assert second.rows == "staging/new"
    assert ledger.staged_rounds(store, RECIPE, CHUNKS)[0] == [second]


def test_a_shard_counts_for_its_decision_and_while_its_files_are_whole(store: ObjectStore) -> None:
    for index in range(4):
        files = tuple(FileEntry(f"shard-{index:06d}.{e}", 3, "0" * 64) for e in ("tar", "arrow"))
        for file in files:
            store.put(file.name, b"abc")
        record = ShardRecord(index, "old" if index == 3 else "plan", 9, files)
        ledger.enter_shard(store, ledger.shard_key(RECIPE, index), record)
    store.put("shard-000001.arrow", b"ab")
    store.delete("shard-000002.tar")
    done = ledger.written_shards(store, RECIPE, "plan")
    assert list(done) == [0]
    assert done[0].files[1] == FileEntry("shard-000000.arrow", 3, "0" * 64)
    assert [key for key, _ in store.list("ledger/")] == [ledger.shard_key(RECIPE, 0)]


def test_a_folder_belongs_to_one_recipe(store: ObjectStore) -> None:
    ledger.claim(store, {"a": 1, "b": 2})
    ledger.claim(store, {"b": 2, "a": 1})
    store.put("shard-000000.tar", b"")
    ledger.claim(store, {"a": 1, "b": 2})
    with pytest.raises(ManifestMismatch, match="unfinished work of another recipe"):
        ledger.claim(store, {"a": 1})


@pytest.mark.parametrize("name", ["shard-000000.tar", "rows/rows-000000.parquet", "staging/x", "ledger/x"])
def test_what_is_not_ours_is_left_alone(store: ObjectStore, name: str) -> None:
    store.put(name, b"precious")
    with pytest.raises(ManifestMismatch, match="not made here"):
        ledger.claim(store, {})
    assert [key for key, _ in store.list()] == [name]


def test_only_what_is_not_kept_is_deleted(store: ObjectStore) -> None:
    for name in ("shard-0", "shard-1", "rows/0"):
        store.put(name, b"")
    ledger.delete_under(store, "shard-", keep=["shard-1"])
    assert [key for key, _ in store.list()] == ["rows/0", "shard-1"]


def test_a_decision_holds_for_exactly_these_rounds(store: ObjectStore) -> None:
    rounds = [[stage(store, 0)], [stage(store, 1)]]
    assert not ledger.decided(store, RECIPE, rounds)
    ledger.decide(store, RECIPE, rounds)
    assert ledger.decided(store, RECIPE, rounds)
    assert not ledger.decided(store, RECIPE, [rounds[0], [*rounds[1], stage(store, 1, 1)]])


def test_the_clean_up_takes_only_what_the_job_needed(store: ObjectStore, tmp_path: Path) -> None:
    stage(store, 0)
    for name in ("shard-000000.tar", "shard-000001.tar", "rows/rows-000000.parquet", "tombstones/a.json"):
        store.put(name, b"")
    for name in ("staging/.tmp-1", ".tmp-2", "rows/.tmp-3"):
        (tmp_path / "set" / name).write_bytes(b"of a process that was killed")
    ledger.clean_up(store, ["shard-000000.tar", "rows/rows-000000.parquet"])
    left = {str(p.relative_to(store.uri)) for p in Path(store.uri).rglob("*") if p.is_file()}
    assert left == {"shard-000000.tar", "rows/rows-000000.parquet", "tombstones/a.json"}
