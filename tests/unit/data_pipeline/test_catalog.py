"""Committed data sets: what loads, what is refused, what is found broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from cluster.errors import DataError, ManifestMismatch, ObjectNotFound
from cluster.store import open_store
from data_pipeline.catalog import load_dataset, load_index, read_index, verify_dataset
from data_pipeline.records import ShardFormat
from tests.support.small_set import small_sample, write_set

both_formats = pytest.mark.parametrize("format", get_args(ShardFormat))


@both_formats
def test_a_data_set_loads_from_its_manifest(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path, [3, 2], ("b", "a", "b"), format=format)
    dataset = load_dataset(str(tmp_path))
    first = "shard-000000.tar" if format == "tar" else "shard-000000.arrow"
    assert dataset.uri == str(tmp_path)
    assert dataset.format == format
    assert dataset.num_samples == 5
    assert next((s.name, s.index_name, s.num_samples) for s in dataset.shards) == (
        first,
        "shard-000000.arrow",
        3,
    )
    assert all(dataset.files[s.name].size == s.size for s in dataset.shards)
    assert dataset.dropped == {"a": 1, "b": 2}
    assert dataset.rows_files == ("rows/rows-000000.parquet", "rows/rows-000001.parquet")


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    for name, sizes in (("a", [2]), ("b", [2]), ("c", [3])):
        write_set(tmp_path / name, sizes)
    a, b, c = (load_dataset(str(tmp_path / name)).digest for name in "abc")
    assert a == b != c


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    write_set(tmp_path, [1])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ObjectNotFound, match="not a committed dataset"):
        load_dataset(str(tmp_path))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [1])
    path = tmp_path / "manifest.json"
    for version, says in ((1, "older"), (3, "newer")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
        with pytest.raises(ManifestMismatch, match=says):
            load_dataset(str(tmp_path))


@pytest.mark.parametrize("sizes", [[], [0]])
def test_an_empty_data_set_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    write_set(tmp_path, sizes)
    with pytest.raises(DataError, match="is empty"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "meta",
    [
        {"shards": [{"name": "shard-000000.tar"}]},
        {"shards": 7},
        {"counts": None},
        {"format": "zip"},
        {"format": "arrow"},
        {"shards": [{"name": "other.tar", "index_name": "shard-000000.arrow", "num_samples": 1, "size": 1}]},
    ],
)
def test_a_manifest_that_describes_no_data_set_is_a_mismatch(tmp_path: Path, meta: dict[str, Any]) -> None:
    write_set(tmp_path, [1], meta=meta)
    with pytest.raises(ManifestMismatch, match=str(tmp_path)):
        load_dataset(str(tmp_path))


@both_formats
def test_the_index_is_the_same_in_both_formats(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path, [3, 2], format=format)
    store, dataset = open_store(str(tmp_path)), load_dataset(str(tmp_path))
    table = load_index(store, dataset.shards[1])
    assert set(table.column_names).isdisjoint({"image", "meta"})
    samples = [small_sample(number) for number in (3, 4)]
    for name in ("id", "key", "caption", "width", "height", "source", "url", "sha256"):
        assert table[name].to_pylist() == [getattr(sample, name) for sample in samples]
    columns = ["width", "id"]
    assert load_index(store, dataset.shards[1], columns).equals(table.select(columns))


@both_formats
def test_a_broken_or_absent_index_is_named(tmp_path: Path, format: ShardFormat) -> None:
    write_set(tmp_path, [1], format=format)
    store, shard = open_store(str(tmp_path)), load_dataset(str(tmp_path)).shards[0]
    path = tmp_path / shard.index_name
    for data in (b"", b"no index", path.read_bytes()[:-20]):
        path.write_bytes(data)
        with pytest.raises(ManifestMismatch, match=shard.index_name):
            load_index(store, shard)
        with pytest.raises(ManifestMismatch, match="here"):
            read_index(data, "here")
    path.unlink()
    with pytest.raises(ObjectNotFound, match=shard.index_name):
        load_index(store, shard)


def test_verify_names_what_is_broken(tmp_path: Path) -> None:
    write_set(tmp_path, [3, 2])
    assert verify_dataset(str(tmp_path)) == []
    tar = tmp_path / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    (tmp_path / "shard-000000.arrow").unlink()
    problems = verify_dataset(str(tmp_path))
    assert len(problems) == 2
    assert "shard-000000.arrow: missing" in problems[0]
    assert "shard-000001.tar: sha256" in problems[1]


@both_formats
def test_verify_compares_indexes_with_the_manifest(tmp_path: Path, format: ShardFormat) -> None:
    name = "shard-000000.tar" if format == "tar" else "shard-000000.arrow"
    shard = {"name": name, "index_name": "shard-000000.arrow", "num_samples": 9, "size": 1}
    write_set(tmp_path, [3], format=format, meta={"shards": [shard]})
    assert verify_dataset(str(tmp_path)) == ["shard-000000.arrow: 3 rows, but the manifest says 9"]


def test_plain_pyarrow_lists_the_samples(tmp_path: Path) -> None:
    write_set(tmp_path, [2])
    table = pa.ipc.open_file(str(tmp_path / "shard-000000.arrow")).read_all()
    assert table.select(["key", "caption"]).to_pylist() == [
        {"key": "000", "caption": "é"},
        {"key": "001", "caption": "é é"},
    ]
