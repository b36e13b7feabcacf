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
from data_pipeline.job import dedup
from data_pipeline.upkeep.merge import merge_datasets
from data_pipeline.upkeep.takedown import (
    TWIN_REASONS,
    By,
    load_tombstones,
    read_tombstones,
    remove_samples,
    tombstone_problems,
)
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
        "twins": [],
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
        (line,) = tombstone_problems(open_store(str(tmp_path)))
        assert name in line
    (tmp_path / name).write_bytes(data)
    assert tombstone_problems(open_store(str(tmp_path))) == []
    (tmp_path / "tombstones/note.txt").write_text("hello")
    with pytest.raises(ManifestMismatch, match=r"note\.txt"):
        gone(tmp_path)


def test_a_damaged_file_of_rows_is_an_error_and_not_a_miss(tmp_path: Path) -> None:
    write_set(tmp_path)
    flip_byte(tmp_path / "rows/rows-000001.parquet", 0)
    with pytest.raises(ManifestMismatch, match="rows-000001"):
        remove(tmp_path, "source", "a.tar/001")


def test_the_reasons_that_have_a_twin_are_those_of_the_search_for_duplicates() -> None:
    assert ("", *TWIN_REASONS) == dedup.REASONS


@pytest.mark.parametrize("reason", TWIN_REASONS)
def test_the_sample_that_stayed_for_a_duplicate_goes_too(tmp_path: Path, reason: str) -> None:
    write_set(tmp_path, dropped=("small", reason), details={0: "a.tar/000", 1: "a.tar/003"})
    url = "https://example.org/a.tar/lost-001.jpg"
    done = remove(tmp_path, "url", url)
    assert (done.removed, done.twins, done.dropped, done.not_found) == (1, 1, 1, ())
    assert done.near_twins == (("a.tar/003",) if reason == "near_duplicate" else ())
    assert gone(tmp_path) == [small_sample(3).id]
    ((_, document),) = read_tombstones(open_store(str(tmp_path)))
    assert document["twins"] == [small_sample(3).id]
    again = remove(tmp_path, "url", url)
    assert (again.removed, again.twins, again.already_removed, again.near_twins) == (0, 0, 1, ())


def test_what_was_dropped_for_another_reason_has_no_twin(tmp_path: Path) -> None:
    write_set(tmp_path, dropped=("small", "duplicate_bytes"), details={0: "a.tar/000", 1: "a.tar/003"})
    done = remove(tmp_path, "source", "a.tar/lost-000")
    assert (done.removed, done.twins, done.tombstone) == (0, 0, None)


def test_a_twin_that_was_asked_for_itself_counts_as_asked(tmp_path: Path) -> None:
    write_set(tmp_path, dropped=("near_duplicate",), details={0: "a.tar/003"})
    done = remove(tmp_path, "source", "a.tar/lost-000", "a.tar/003")
    assert (done.removed, done.twins, done.near_twins) == (1, 0, ())


def test_twins_are_followed_over_several_comparisons_and_rings_end(tmp_path: Path) -> None:
    reasons = ("duplicate_bytes", "duplicate_pixels", "near_duplicate", "duplicate_pair", "duplicate_pair")
    ways = ("lost-001", "lost-002", "004", "lost-004", "lost-003")  # the last two name each other
    details = {n: f"a.tar/{name}" for n, name in enumerate(ways)}
    write_set(tmp_path, dropped=reasons, details=details)
    assert remove(tmp_path, "source", "a.tar/lost-003").removed == 0
    done = remove(tmp_path, "source", "a.tar/lost-000")
    assert (done.removed, done.twins, done.near_twins) == (1, 1, ("a.tar/004",))
    assert gone(tmp_path) == [small_sample(4).id]


def test_twins_are_found_where_a_merge_renamed_the_dropped_rows(tmp_path: Path) -> None:
    reasons, details = ("duplicate_bytes", "duplicate_pixels"), {0: "b.tar/lost-001", 1: "b.tar/003"}
    write_set(tmp_path / "b", dropped=reasons, details=details, origin="b.tar")
    write_set(tmp_path / "a")
    write_set(tmp_path / "c", (1,), ("small", "small"), origin="b.tar", changes={0: {"id": 7, "source": "x"}})
    parts = [str(tmp_path / name) for name in ("a", "c", "b")]
    merge_datasets(parts, str(tmp_path / "m"))
    digest = load_dataset(str(tmp_path / "b")).digest[:16]
    done = remove(tmp_path / "m", "source", f"{digest}/b.tar/lost-000")
    assert (done.dropped, done.removed) == (1, 1)
    assert gone(tmp_path / "m") == [small_sample(3, "b.tar").id]
