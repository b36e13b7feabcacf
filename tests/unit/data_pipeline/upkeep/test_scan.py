"""The walk through all rows in bounded memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.upkeep import scan
from data_pipeline.upkeep.scan import Buckets, Problems, in_order, text_hashes


@pytest.mark.parametrize("bucket_bytes", [1 << 30, 4096, 256])
def test_buckets_hold_every_record_once_sorted_and_equal_keys_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(scan, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(scan, "_FLUSH_BYTES", 3000)
    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.integers(-(1 << 62), 1 << 62, 900), np.arange(300), np.arange(200)])
    buckets = Buckets(tmp_path / "buckets", [("id", "<i8"), ("at", "<i4"), ("side", "u1")], len(keys))
    for start in range(0, len(keys), 100):
        buckets.add(id=keys[start : start + 100], at=np.arange(start, start + 100), side=7)
    found = list(buckets)
    assert (len(found) > 4) == (bucket_bytes < 1 << 30)
    for bucket in found:
        assert np.array_equal(bucket["id"], np.sort(bucket["id"]))
        assert bool((bucket["side"] == 7).all())
    joined = np.concatenate(found)
    assert np.array_equal(joined["id"], keys[joined["at"]])
    assert np.array_equal(np.sort(joined["at"]), np.arange(len(keys)))
    assert sum(len(np.unique(bucket["id"])) for bucket in found) == len(np.unique(keys))


def test_in_order_keeps_the_order_and_holds_few() -> None:
    taken, lock = [], threading.Lock()

    def slow(number: int) -> int:
        with lock:
            taken.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    for count, number in enumerate(in_order(slow, range(50), 3)):
        assert number == count
        assert len(taken) <= count + 7
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda n: 1 // (n - 3), range(10), 2))


def test_the_hash_of_a_source_holds_its_sample_id() -> None:
    from data_pipeline.records import sample_id

    sources = ["a.tar/001", "é", ""]
    import pyarrow as pa

    high = text_hashes(pa.array([*sources, None]))[:, 0]
    assert (high >> np.uint64(1)).tolist() == [sample_id(source) for source in [*sources, ""]]


def test_problems_show_a_few_and_count_the_rest() -> None:
    problems, others = Problems(), Problems()
    for number in range(7):
        problems.add("small", f"line {number}")
    others.add_some("small", ["another"], 10)
    others.add("large", "big")
    problems.extend(others)
    assert problems.lines() == [*(f"line {n}" for n in range(5)), "small: 12 more", "big"]
