"""What is asked to go is gone: found by any of its names, for ever, without touching the set."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ConfigError, ManifestMismatch, ObjectNotFound
from cluster.manifest import sha256_file
from cluster.store import open_store
from data_pipeline.catalog import load_dataset
from data_pipeline.takedown import By, load_tombstones, read_tombstones, remove_samples
from tests.support.small_dataset import flip_byte
from tests.support.small_set import small_sample, write_set


def remove(
    folder: Path, by: By, *values: str, time: str = "2026-01-02T03:04:05+00:00", reason: str = "asked"
):
    return remove_samples(str(folder), by, values, reason=reason, now=lambda: time)


def gone(folder: Path) -> list[int]:
    return load_tombstones(open_store(str(folder))).tolist()


NAMES: dict[By, Callable[[Any], str]] = {
    "url": lambda sample: sample.url,
    "sha256": lambda sample: sample.sha256.hex(),
    "id": lambda sample: str(sample.id),
    "source": lambda sample: sample.source,
}


@pytest.mark.parametrize("by", NAMES)
def test_samples_are_found_by_each_of_their_names(tmp_path: Path, by: By) -> None:
    write_set(tmp_path, format="arrow" if by == "url" else "tar")
    assert gone(tmp_path) == []
    samples = [small_sample(number) for number in (1, 4)]
    done = remove(tmp_path, by, *(NAMES[by](sample) for sample in samples))
    assert (done.asked, done.removed, done.not_found, done.removed_in_all) == (2, 2, (), 2)
    assert gone(tmp_path) == sorted(sample.id for sample in samples)
    assert load_tombstones(open_store(str(tmp_path))).dtype == np.int64


def test_nothing_of_the_set_changes(tmp_path: Path) -> None:
    write_set(tmp_path)
    before = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    digest = load_dataset(str(tmp_path)).digest
    remove(tmp_path, "source", "a.tar/001")
    after = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert load_dataset(str(tmp_path)).digest == digest
    assert after.items() > before.items()
    assert [path.parent.name for path in after.keys() - before.keys()] == ["tombstones"]


def test_all_that_have_the_same_image_go(tmp_path: Path) -> None:
    same = small_sample(0).sha256
    write_set(tmp_path, changes={3: {"sha256": same}})
    assert remove(tmp_path, "sha256", same.hex()).removed == 2
    assert gone(tmp_path) == sorted([small_sample(0).id, small_sample(3).id])


def test_what_is_found_goes_and_the_rest_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    done = remove(tmp_path, "source", "a.tar/001", "a.tar/none", " a.tar/001 ", "a.tar/lost-000", "zebra", "")
    assert (done.asked, done.removed, done.dropped) == (4, 1, 1)
    assert done.not_found == ("a.tar/none", "zebra")
    assert gone(tmp_path) == [small_sample(1).id]
    only_lost = remove(tmp_path, "source", "a.tar/lost-001")
    assert (only_lost.removed, only_lost.dropped, only_lost.tombstone) == (0, 1, None)


def test_to_ask_again_changes_nothing(tmp_path: Path) -> None:
    write_set(tmp_path)
    first = remove(tmp_path, "source", "a.tar/001", "a.tar/002")
    files = sorted((tmp_path / "tombstones").iterdir())
    again = remove(tmp_path, "id", str(small_sample(2).id), time="later", reason="another")
    assert (again.removed, again.already_removed, again.tombstone) == (0, 1, None)
    assert sorted((tmp_path / "tombstones").iterdir()) == files
    more = remove(tmp_path, "source", "a.tar/002", "a.tar/003")
    assert (more.removed, more.already_removed, more.removed_in_all) == (1, 1, 3)
    names = [name for name, _ in read_tombstones(open_store(str(tmp_path)))]
    assert names == [first.tombstone, more.tombstone]
    assert [name[:18] for name in names] == ["tombstones/000001-", "tombstones/000002-"]


def test_a_tombstone_says_what_was_asked(tmp_path: Path) -> None:
    write_set(tmp_path)
    remove(tmp_path, "source", "a.tar/001", "nowhere", reason="claim 17")
    ((_, document),) = read_tombstones(open_store(str(tmp_path)))
    assert document == {
        "by": "source",
        "values": ["a.tar/001", "nowhere"],
        "reason": "claim 17",
        "time": "2026-01-02T03:04:05+00:00",
        "ids": [small_sample(1).id],
        "dataset": load_dataset(str(tmp_path)).digest,
    }


def test_requests_at_once_all_count(tmp_path: Path) -> None:
    write_set(tmp_path, (10, 10))
    start = threading.Barrier(10)

    def ask(number: int) -> None:
        start.wait()
        remove(tmp_path, "source", f"a.tar/{number:03d}", time=str(threading.get_ident()))

    threads = [threading.Thread(target=ask, args=(number // 2,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gone(tmp_path) == sorted(small_sample(number).id for number in range(5))


@pytest.mark.parametrize(
    ("by", "value", "says"),
    [
        ("id", "x1", "not an id"),
        ("id", "-1", "not an id"),
        ("id", str(1 << 63), "not an id"),
        ("sha256", "abcd", "64 hexadecimal digits"),
        ("sha256", "g" * 64, "64 hexadecimal digits"),
        ("url", " ", "nothing to remove"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, by: By, value: str, says: str) -> None:
    write_set(tmp_path)
    with pytest.raises(ConfigError, match=says):
        remove(tmp_path, by, value)
    assert not (tmp_path / "tombstones").exists()


def test_only_a_committed_set_has_samples(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="not a committed dataset"):
        remove(tmp_path / "nowhere", "id", "1")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tombstone_lets_nothing_through(tmp_path: Path) -> None:
    write_set(tmp_path)
    name = remove(tmp_path, "source", "a.tar/001").tombstone
    assert name is not None
    data = (tmp_path / name).read_bytes()
    for damage in (data[:-5], b"", data.replace(b"a.tar", b"b.tar"), b"[]", b"{}"):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(ManifestMismatch, match=name):
            gone(tmp_path)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "tombstones/note.txt").write_text("hello")
    with pytest.raises(ManifestMismatch, match=r"note\.txt"):
        gone(tmp_path)


def test_a_damaged_file_of_rows_is_an_error_and_not_a_miss(tmp_path: Path) -> None:
    write_set(tmp_path)
    flip_byte(tmp_path / "rows/rows-000001.parquet", 0)
    with pytest.raises(ManifestMismatch, match="rows-000001"):
        remove(tmp_path, "source", "a.tar/001")
