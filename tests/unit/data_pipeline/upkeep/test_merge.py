"""A merge is one whole set: every sample and every row of its origins, each once, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError, ManifestMismatch, ShardCorrupt, StorageUnavailable
from cluster.manifest import sha256_file
from cluster.store import open_store
from cluster.store_local import LocalStore
from data_pipeline.catalog import load_dataset, load_index
from data_pipeline.records import ShardFormat
from data_pipeline.upkeep import merge
from data_pipeline.upkeep.audit_job import audit
from data_pipeline.upkeep.merge import merge_datasets
from data_pipeline.upkeep.takedown import load_tombstones, remove_samples
from tests.support.small_dataset import flip_byte
from tests.support.small_set import small_sample, write_set

both_formats = pytest.mark.parametrize("format", get_args(ShardFormat))


def two(folder: Path, **changes: Any) -> list[str]:
    write_set(folder / "a", (3, 2), ("small", "timeout"), **changes)
    write_set(folder / "b", (1, 2, 1), ("small",), origin="b.tar", recipe={"other": 1}, **changes)
    return [str(folder / "a"), str(folder / "b")]


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}


def all_rows(folder: Path | str) -> list[dict[str, Any]]:
    return [row for path in sorted(Path(folder, "rows").iterdir()) for row in pq.read_table(path).to_pylist()]


def ids(uri: Path | str) -> list[int]:
    store, dataset = open_store(str(uri)), load_dataset(str(uri))
    return [i for shard in dataset.shards for i in load_index(store, shard, ["id"])["id"].to_pylist()]


@both_formats
def test_a_merge_is_whole_and_has_all_of_its_origins(tmp_path: Path, format: ShardFormat) -> None:
    origins = two(tmp_path, format=format)
    done = merge_datasets(origins, str(tmp_path / "c"))
    found = audit(str(tmp_path / "c"))
    assert found.problems == found.orphans == ()
    assert (found.rows_in, found.kept, found.dropped) == (12, 9, 3)
    assert found.reasons == {"small": 2, "timeout": 1}
    assert (done.shards, done.samples, done.copied) == (5, 9, 10 if format == "tar" else 5)
    assert ids(tmp_path / "c") == ids(origins[0]) + ids(origins[1])
    a, b, c = (files(Path(uri)) for uri in (*origins, tmp_path / "c"))
    shards = [name for name in c if name.startswith("shard-")]
    assert {c[name] for name in shards} == {v for f in (a, b) for k, v in f.items() if k in shards}
    rows = all_rows(tmp_path / "c")
    before = [row for uri in origins for row in all_rows(uri)]
    same = ("row", "key", "source", "url", "fate", "reason", "detail", "retriable", "id", "index", "sha256")
    assert [[row[n] for n in same] for row in rows] == [[row[n] for n in same] for row in before]


def test_the_manifest_tells_of_the_origins(tmp_path: Path) -> None:
    origins = two(tmp_path)
    merge_datasets(origins, str(tmp_path / "c"))
    dataset = load_dataset(str(tmp_path / "c"))
    digests = [load_dataset(uri).digest for uri in origins]
    assert dataset.recipe == {"merge": digests, "format": "tar"}
    assert dataset.counts["rows_in"] == 12
    from cluster.manifest import load

    parts = load(open_store(str(tmp_path / "c")), "dataset", 2).meta["merged_from"]
    assert [part["digest"] for part in parts] == digests
    assert [part["recipe"] for part in parts] == [load_dataset(uri).recipe for uri in origins]
    assert str(tmp_path) not in (tmp_path / "c/manifest.json").read_text()


def test_the_same_bytes_every_time_and_the_order_counts(tmp_path: Path) -> None:
    origins = two(tmp_path)
    merge_datasets(origins, str(tmp_path / "c"), workers=1)
    merge_datasets(origins, str(tmp_path / "d"), workers=8)
    merge_datasets(origins[::-1], str(tmp_path / "e"))
    assert files(tmp_path / "c") == files(tmp_path / "d") != files(tmp_path / "e")
    assert sorted(ids(tmp_path / "c")) == sorted(ids(tmp_path / "e"))


def test_a_merge_of_merges(tmp_path: Path) -> None:
    merge_datasets(two(tmp_path), str(tmp_path / "c"))
    write_set(tmp_path / "d", (2,), (), origin="d.tar")
    merge_datasets([str(tmp_path / "d"), str(tmp_path / "c")], str(tmp_path / "e"))
    assert audit(str(tmp_path / "e")).whole
    assert len(ids(tmp_path / "e")) == 11


def test_a_merge_that_dies_anywhere_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origins = two(tmp_path)
    merge_datasets(origins, str(tmp_path / "whole"))
    wanted = files(tmp_path / "whole")
    left = 0
    real = LocalStore._run

    def dying(self: LocalStore, operation: str, key: str, attempt: Any) -> Any:
        nonlocal left
        if self.root == tmp_path / "c" and operation in ("put", "put_if_absent", "delete"):
            if left == 0:
                raise StorageUnavailable("the machine is gone")
            left -= 1
        return real(self, operation, key, attempt)

    monkeypatch.setattr(LocalStore, "_run", dying)
    deaths = 0
    for survive in range(90):
        left = survive % 3  # the claim, one write, and dead again
        try:
            merge_datasets(origins, str(tmp_path / "c"), workers=2)
            break
        except StorageUnavailable:
            deaths += 1
    assert deaths > 5
    assert files(tmp_path / "c") == wanted


def test_ids_in_two_sets_are_refused_by_name(tmp_path: Path) -> None:
    write_set(tmp_path / "a", (3,))
    write_set(tmp_path / "b", (2,), origin="b.tar", changes={1: {"id": small_sample(2).id}})
    uris = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(DataError, match=f"id {small_sample(2).id} stands in {uris[0]} and in {uris[1]}"):
        merge_datasets(uris, str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()  # nor is it claimed: the next merge may be of other sets


def test_a_merge_that_comes_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen an empty output; another one commits there before it claims it."""
    origins, output = two(tmp_path), tmp_path / "c"
    committed: dict[str, str] = {}
    real = merge.require_disjoint

    def slow(planned: Any) -> list[str]:
        monkeypatch.setattr(merge, "require_disjoint", real)
        merge_datasets(origins[::-1], str(output))
        committed.update(files(output))
        return real(planned)

    monkeypatch.setattr(merge, "require_disjoint", slow)
    with pytest.raises(ManifestMismatch, match="another data set"):
        merge_datasets(origins, str(output))
    assert committed
    assert files(output) == committed


def test_a_source_that_one_set_kept_and_another_dropped_stands_once(tmp_path: Path) -> None:
    write_set(tmp_path / "a", (2,), ("small",), origin="x")  # keeps x/000, drops x/lost-000
    write_set(tmp_path / "b", (1,), ("small",), origin="x", changes={0: {"source": "y", "id": 1}})
    other = load_dataset(str(tmp_path / "b")).digest
    merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    tables = [pq.read_table(path) for path in sorted((tmp_path / "c/rows").iterdir())]
    sources = [source for table in tables for source in table["source"].to_pylist()]
    assert sorted(sources) == sorted(["x/000", "x/001", "x/lost-000", "y", f"{other[:16]}/x/lost-000"])


def test_tombstones_go_with_their_samples_also_later(tmp_path: Path) -> None:
    origins = two(tmp_path)

    def remove(uri: str, source: str) -> None:
        remove_samples(uri, "source", [source], reason="r", now=lambda: "now")

    remove(origins[0], "a.tar/001")
    remove(origins[1], "b.tar/002")
    done = merge_datasets(origins, str(tmp_path / "c"))
    expected = {small_sample(1).id, small_sample(2, "b.tar").id}
    assert done.tombstones == 2
    assert set(load_tombstones(open_store(str(tmp_path / "c"))).tolist()) == expected
    remove(origins[1], "b.tar/000")
    again = merge_datasets(origins, str(tmp_path / "c"))
    assert (again.already_committed, again.tombstones, again.manifest_digest) == (
        True,
        1,
        done.manifest_digest,
    )
    assert merge_datasets(origins, str(tmp_path / "c")).tombstones == 0
    assert audit(str(tmp_path / "c")).removed == 3


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    write_set(tmp_path / "arrow", (1,), origin="z", format="arrow")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for uris, output, error, says in (
        ([a], tmp_path / "c", ConfigError, "two data sets or more"),
        ([a, a], tmp_path / "c", ConfigError, "named twice"),
        ([a, b], a, ConfigError, "not apart"),
        ([a, b], f"{a}/inside", ConfigError, "not apart"),
        ([a, b], tmp_path, ConfigError, "not apart"),
        ([a, str(tmp_path / "arrow")], tmp_path / "c", DataError, "of format arrow, but"),
        ([a, b], tmp_path / "full", ManifestMismatch, "files of something else"),
        ([a, b], tmp_path / "arrow", ManifestMismatch, "another data set"),
    ):
        with pytest.raises(error, match=says):
            merge_datasets(uris, str(output))
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "full/file").read_text() == "mine"


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000000.arrow", "rows/rows-000001.parquet"])
def test_damage_is_not_passed_on(tmp_path: Path, name: str) -> None:
    a, b = two(tmp_path)
    flip_byte(Path(a, name), 200)
    with pytest.raises((ShardCorrupt, ManifestMismatch), match=name):
        merge_datasets([a, b], str(tmp_path / "c"))
    assert not (tmp_path / "c/manifest.json").exists()


def test_in_an_object_store(tmp_path: Path, s3_env: str) -> None:
    for name, origin in (("a", "a.tar"), ("b", "b.tar")):
        write_set(f"{s3_env}/{name}", (2, 1), ("small",), origin=origin, format="arrow")
        write_set(tmp_path / name, (2, 1), ("small",), origin=origin, format="arrow")
    merge_datasets([f"{s3_env}/{name}" for name in "ab"], f"{s3_env}/c")
    merge_datasets([str(tmp_path / name) for name in "ab"], str(tmp_path / "c"))
    remote = audit(f"{s3_env}/c")
    assert remote.whole
    assert remote.digest == audit(str(tmp_path / "c")).digest
    store = open_store(f"{s3_env}/c")
    assert {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list()} == files(
        tmp_path / "c"
    )
    assert remove_samples(f"{s3_env}/c", "source", ["b.tar/000"], reason="", now=lambda: "").removed == 1
    assert load_tombstones(store).tolist() == [small_sample(0, "b.tar").id]
