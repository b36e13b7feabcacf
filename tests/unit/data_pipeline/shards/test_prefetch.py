"""Laws of what is read in advance, over a real S3 server: the right bytes, each once, no more than is worth
it, and never an error of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ShardCorrupt
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset
from data_pipeline.records import ShardInfo
from data_pipeline.shards import prefetch
from data_pipeline.shards.dataset_reader import DatasetReader
from data_pipeline.shards.prefetch import Ahead, coalesced, worth_copying
from tests.support.small_dataset import sample, write_dataset

SIZES = (6, 6, 6, 6, 6, 6)
FIRST = np.cumsum([0, *SIZES])


@pytest.fixture
def dataset(s3_env: str) -> DatasetManifest:
    write_dataset(s3_env, SIZES)
    return load_dataset(s3_env)


def one_shard_a_step(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Step k needs the first four samples of shard k."""
    return np.full(4, step), np.arange(4)


def ahead(needs=one_shard_a_step, **changes) -> Ahead:
    given = {"needs": needs, "batches": 6, "transfers": 3, "share": 1.0, "last_step": 6}
    return Ahead(**given | changes)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def read(reader: DatasetReader, step: int, needs=one_shard_a_step) -> list[str]:
    found = dict(reader.samples(*needs(step)))
    return [found[k].key for k in range(len(found))]


def expected(step: int, needs=one_shard_a_step) -> list[str]:
    return [f"{FIRST[shard] + row:05d}" for shard, row in zip(*needs(step), strict=True)]


class Places:
    """What `coalesced` asks of a reader."""

    def __init__(self, sizes: list[int], gaps: list[int]) -> None:
        ends = np.cumsum(np.array(sizes) + gaps)
        self.places = [(int(end - size), size) for end, size in zip(ends, sizes, strict=True)]

    def place(self, row: int) -> tuple[int, int]:
        return self.places[row]


@given(
    images=st.lists(
        st.tuples(st.integers(0, 50_000), st.integers(0, 3 * prefetch.REQUEST_BYTES)), min_size=1, max_size=20
    ),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_ranges_hold_all_images_and_no_gap_that_costs_a_request(images, data: st.DataObject) -> None:
    reader = Places([size for size, _ in images], [gap for _, gap in images])
    rows = data.draw(st.lists(st.integers(0, len(images) - 1), max_size=30))
    ranges = coalesced(reader, rows)  # type: ignore[arg-type]
    assert sorted(row for part in ranges for row in part.rows) == sorted(set(rows))
    for part in ranges:
        places = sorted(reader.place(row) for row in part.rows)
        assert part.start == places[0][0]
        assert part.stop == max(offset + size for offset, size in places)
        stop = part.start
        for offset, size in places:
            assert offset - stop <= prefetch.REQUEST_BYTES
            stop = max(stop, offset + size)
    for left, right in pairwise(ranges):
        assert right.start - left.stop > prefetch.REQUEST_BYTES


def test_few_samples_of_a_large_shard_are_not_worth_a_copy() -> None:
    large = ShardInfo("a.tar", "a.arrow", 4096, 4096 * 20_000)
    assert worth_copying(4096, large)
    assert worth_copying(100, large)
    assert not worth_copying(20, large)
    assert worth_copying(1, ShardInfo("a.tar", "a.arrow", 50, 1 << 20))  # as cheap as a request


def test_shards_come_before_they_are_asked_for(dataset: DatasetManifest, tmp_path: Path) -> None:
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead())
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: reader.counters.misses == 6)  # the near half of six batches: three shards of two files
    for step in range(6):
        prefetcher.advance(step)
        assert read(reader, step) == expected(step)
    reader.close()
    assert reader.counters.misses == 12  # each file once
    assert threading.active_count() == 1 or not any(
        thread.name.startswith(("plan-shards", "copy-shards")) for thread in threading.enumerate()
    )


def test_two_workers_share_the_copying(dataset: DatasetManifest, tmp_path: Path) -> None:
    readers = [DatasetReader(dataset, str(tmp_path), 10**9) for _ in range(2)]
    for worker, reader in enumerate(readers):
        prefetcher = reader.look_ahead(ahead(batches=12, worker=worker, workers=2))
        assert prefetcher is not None
        prefetcher.advance(0)
    for reader in readers:
        until(lambda reader=reader: reader.counters.misses == 6)
        reader.close()
    assert len(list(tmp_path.glob("*/*.tar"))) == 6


def test_a_prefetcher_that_begins_anew_forgets_where_it_was(dataset: DatasetManifest, tmp_path: Path) -> None:
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead(batches=2))
    assert prefetcher is not None
    for step in (5, 0, 3):
        prefetcher.advance(step)
        until(lambda step=step: (next(tmp_path.iterdir()) / f"shard-{step:06d}.tar").exists())
    reader.close()


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests as cheap as they must be for a shard of a few kilobytes to be worth ranges."""
    monkeypatch.setattr("data_pipeline.shards.prefetch.REQUEST_BYTES", 64)


def few_of_each(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Each step needs one sample of each of the six shards."""
    return np.arange(6), np.full(6, step)


@pytest.mark.usefixtures("small_requests")
def test_few_samples_are_read_by_ranges(dataset: DatasetManifest, tmp_path: Path) -> None:
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead(few_of_each, last_step=2, batches=4))
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: reader.counters.range_reads == 12)
    for step in range(2):
        prefetcher.advance(step)
        found = dict(reader.samples(*few_of_each(step)))
        for shard in range(6):
            assert found[shard].image == sample(int(FIRST[shard]) + step).image
    assert reader.counters.range_reads == 12  # each image once, in advance
    assert reader.counters.bytes_ranged < sum(shard.size for shard in dataset.shards) / 2
    assert list(tmp_path.glob("*/*.tar")) == []  # the indices alone
    # What nobody foresaw is read all the same.
    assert reader.get(2, 5).key == "00017"
    reader.close()


@pytest.mark.usefixtures("small_requests")
def test_a_shard_that_is_needed_whole_after_all_is_copied(dataset: DatasetManifest, tmp_path: Path) -> None:
    reader = DatasetReader(dataset, str(tmp_path), 10**9)

    def needs(step: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.zeros(1, int), np.zeros(1, int)) if step == 0 else (np.zeros(6, int), np.arange(6))

    prefetcher = reader.look_ahead(ahead(needs, share=0.0, batches=1, last_step=9))
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: prefetcher.by_range(0))
    assert read(reader, 0, needs) == ["00000"]
    assert list(tmp_path.glob("*/*.tar")) == []
    prefetcher.advance(1)
    until(lambda: not prefetcher.by_range(0))
    assert read(reader, 1, needs) == expected(1, needs)
    assert len(list(tmp_path.glob("*/*.tar"))) == 1
    reader.close()


@pytest.mark.usefixtures("small_requests")
def test_what_a_range_brings_is_verified(dataset: DatasetManifest, tmp_path: Path) -> None:
    store = open_store(dataset.uri)
    data = bytearray(store.get("shard-000003.tar"))
    at = data.index(sample(18).image)
    data[at + 50] ^= 1
    store.put("shard-000003.tar", bytes(data))
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead(few_of_each, last_step=2, batches=4))
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: prefetcher.by_range(3))
    with pytest.raises(ShardCorrupt, match=rf"{dataset.uri}/shard-000003\.tar: the image of sample '00018'"):
        list(reader.samples(*few_of_each(0)))
    reader.close()


def test_a_failed_transfer_is_the_error_of_the_batch_that_needs_it(
    dataset: DatasetManifest, tmp_path: Path
) -> None:
    store = open_store(dataset.uri)
    store.put("shard-000001.tar", store.get("shard-000001.tar")[:-700])
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead())
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: (next(tmp_path.iterdir()) / "shard-000002.tar").exists())
    assert read(reader, 0) == expected(0)
    with pytest.raises(ShardCorrupt, match=r"shard-000001\.tar"):
        read(reader, 1)
    assert read(reader, 2) == expected(2)
    reader.close()


def test_a_slow_shard_holds_up_nobody_else(
    dataset: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    get_file = type(open_store(dataset.uri)).get_file

    def slow(store: ObjectStore, key: str, path: Path) -> None:
        if "000000" in key:
            assert go_on.wait(30)
        get_file(store, key, path)

    monkeypatch.setattr(type(open_store(dataset.uri)), "get_file", slow)
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    prefetcher = reader.look_ahead(ahead(few_of_each, batches=2, transfers=2))
    assert prefetcher is not None
    prefetcher.advance(0)
    until(lambda: len(list(tmp_path.glob("*/*.tar"))) == 5)
    samples = reader.samples(*few_of_each(0))
    first = [next(samples)[1].key for _ in range(5)]
    assert sorted(first) == [f"{FIRST[shard]:05d}" for shard in range(1, 6)]
    go_on.set()
    assert next(samples)[1].key == "00000"
    reader.close()
