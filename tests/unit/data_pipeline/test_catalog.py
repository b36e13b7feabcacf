"""Committed data sets: what loads, what is refused, what is found broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError, ManifestMismatch, ObjectNotFound
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.catalog import dataset_stats, load_dataset, verify_dataset
from data_pipeline.records import (
    DATASET_KIND,
    DATASET_VERSION,
    REJECTS_NAME,
    REJECTS_SCHEMA,
    Sample,
    shard_names,
)
from data_pipeline.shard_writer import write_shard


def make(folder: Path, sizes: list[int], **changes: Any) -> Path:
    """A committed data set of shards of these sizes; image i is 10 + i wide and 20 high."""
    folder.mkdir()
    entries, shards = [], []
    for index, size in enumerate(sizes):
        first = sum(sizes[:index])
        samples = [
            Sample(i, f"{i}", f"0.tar/{i}", b"x" * i, "jpg", "é" * (i + 1), 10 + i, 20)
            for i in range(first, first + size)
        ]
        tar, arrow = (folder / name for name in shard_names(index))
        shards.append(vars(write_shard(samples, tar, arrow)))
        entries += [file_entry(tar, tar.name), file_entry(arrow, arrow.name)]
    pq.write_table(REJECTS_SCHEMA.empty_table(), folder / REJECTS_NAME)
    entries.append(file_entry(folder / REJECTS_NAME, REJECTS_NAME))
    counts = {"rows_in": sum(sizes) + 3, "kept": sum(sizes), "rejected": 3, "rejected/a": 1, "rejected/b": 2}
    meta = {"recipe": {"transform": {}}, "counts": counts, "shards": shards, **changes}
    commit(open_store(str(folder)), Manifest(DATASET_KIND, DATASET_VERSION, tuple(entries), meta))
    return folder


def test_a_data_set_loads_from_its_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [3, 2])
    dataset = load_dataset(str(folder))
    assert dataset.uri == str(folder)
    assert dataset.num_samples == 5
    assert [(s.name, s.index_name, s.num_samples) for s in dataset.shards] == [
        ("shard-000000.tar", "shard-000000.arrow", 3),
        ("shard-000001.tar", "shard-000001.arrow", 2),
    ]
    assert all(dataset.files[s.name].size == s.size for s in dataset.shards)
    assert dataset.rejects == {"a": 1, "b": 2}
    assert dataset.recipe == {"transform": {}}


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    digests = {load_dataset(str(make(tmp_path / name, [2]))).digest for name in ("a", "b")}
    assert len(digests) == 1
    assert load_dataset(str(make(tmp_path / "c", [3]))).digest not in digests


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [1])
    (folder / "manifest.json").unlink()
    with pytest.raises(ObjectNotFound, match="not a committed dataset"):
        load_dataset(str(folder))


@pytest.mark.parametrize("sizes", [[], [0]])
def test_an_empty_data_set_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    with pytest.raises(DataError, match="is empty"):
        load_dataset(str(make(tmp_path / "set", sizes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [{"name": "shard-000000.tar"}]},
        {"shards": 7},
        {"counts": None},
        {"shards": [{"name": "other.tar", "index_name": "shard-000000.arrow", "num_samples": 1, "size": 1}]},
    ],
)
def test_a_manifest_that_describes_no_data_set_is_a_mismatch(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestMismatch, match=str(tmp_path / "set")):
        load_dataset(str(make(tmp_path / "set", [1], **changes)))


def test_verify_names_what_is_broken(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [3, 2])
    assert verify_dataset(str(folder)) == []
    tar = folder / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1
    tar.write_bytes(data)
    (folder / "shard-000000.arrow").unlink()
    problems = verify_dataset(str(folder))
    assert len(problems) == 2
    assert "shard-000000.arrow: missing" in problems[0]
    assert "shard-000001.tar: sha256" in problems[1]


def test_verify_compares_indexes_with_the_manifest(tmp_path: Path) -> None:
    shard = {"name": "shard-000000.tar", "index_name": "shard-000000.arrow", "num_samples": 9, "size": 1}
    folder = make(tmp_path / "set", [3], shards=[shard])
    assert verify_dataset(str(folder)) == ["shard-000000.arrow: 3 rows, but the manifest says 9"]


def test_stats_are_those_of_the_samples(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [3, 2])
    stats = dataset_stats(str(folder))
    assert (stats["samples"], stats["shards"], stats["rows_in"]) == (5, 2, 8)
    assert stats["rejects"] == {"a": 1, "b": 2}
    files = [*folder.glob("shard-*"), folder / REJECTS_NAME]
    assert stats["bytes"] == sum(f.stat().st_size for f in files)
    assert stats["width"] == {"min": 10, "p05": 10, "p50": 12, "p95": 14, "max": 14}
    assert stats["height"] == dict.fromkeys(("min", "p05", "p50", "p95", "max"), 20)
    assert stats["caption_length"]["max"] == 5


def test_plain_pyarrow_lists_the_samples(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", [2])
    table = pa.ipc.open_file(str(folder / "shard-000000.arrow")).read_all()
    assert table.select(["key", "caption"]).to_pylist() == [
        {"key": "0", "caption": "é"},
        {"key": "1", "caption": "éé"},
    ]
