"""The files of a shard, as this project and as others read them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import webdataset as wds
from PIL import Image

from cluster.errors import DataError
from data_pipeline.records import INDEX_SCHEMA, SHARD_SCHEMA, Sample, ShardFormat, sample_id
from data_pipeline.row_checksum import rows_are_whole
from data_pipeline.shards import shard_writer
from data_pipeline.shards.shard_writer import json_text, write_shard
from tests.support.raw_input import encode, noise


def sample(key: str, seed: int = 0, source: str | None = None) -> Sample:
    source = source or f"0.tar/{key}"
    return Sample(
        id=sample_id(source),
        key=key,
        source=source,
        image=encode(noise(40 + seed, 30, seed)),
        extension="jpg",
        caption=f"caption «{key}» 🦊",
        width=40 + seed,
        height=30,
        sha256=hashlib.sha256(key.encode()).digest(),
        url=None if seed == 1 else f"https://example.org/{seed}",
        meta={"similarity": 0.5, "n": seed},
    )


SAMPLES = [
    sample(key, i)
    for i, key in enumerate(
        ["000000000", "sub/one", "日本語", "long/" + "n" * 200, "with space", "000000005"]
    )
]
STORED = ("id", "key", "caption", "width", "height", "source", "extension", "url", "sha256")


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Path]:
    tar, index = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.arrow"
    info = write_shard(iter(SAMPLES), tar, index, "tar")
    assert (info.name, info.index_name, info.num_samples) == (tar.name, index.name, len(SAMPLES))
    assert info.size == tar.stat().st_size
    return tar, index


def test_the_index_finds_every_image(shard: tuple[Path, Path]) -> None:
    tar, index = shard
    table = pyarrow.ipc.open_file(pa.memory_map(str(index))).read_all()
    assert table.schema.equals(INDEX_SCHEMA, check_metadata=True)
    assert len(table.to_batches()) == 1
    data = tar.read_bytes()
    for row, expected in zip(table.to_pylist(), SAMPLES, strict=True):
        image = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
        assert image == expected.image
        assert row["image_crc32"] == zlib.crc32(image)
        for name in STORED:
            assert row[name] == getattr(expected, name)


def test_an_arrow_shard_holds_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_BATCH_ROWS", 4)
    path = tmp_path / "shard-000000.arrow"
    info = write_shard(iter(SAMPLES), path, path, "arrow")
    assert (info.name, info.index_name) == (path.name, path.name)
    assert (info.num_samples, info.size) == (len(SAMPLES), path.stat().st_size)
    table = pyarrow.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.schema.equals(SHARD_SCHEMA, check_metadata=True)
    assert [batch.num_rows for batch in table.to_batches()] == [4, 2]
    assert rows_are_whole(path, 6)
    assert not rows_are_whole(path, 5)
    for row, expected in zip(table.to_pylist(), SAMPLES, strict=True):
        assert row["image"] == expected.image
        assert row["image_crc32"] == zlib.crc32(expected.image)
        assert json.loads(row["meta"]) == expected.meta
        for name in STORED:
            assert row[name] == getattr(expected, name)


def test_plain_webdataset_reads_the_tar(shard: tuple[Path, Path]) -> None:
    dataset: Any = wds.WebDataset(str(shard[0]), shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    rows = list(dataset.decode("rgb8").to_tuple("jpg", "txt", "json", "__key__"))
    assert [row[3] for row in rows] == [s.key for s in SAMPLES]
    for (image, caption, document, _), expected in zip(rows, SAMPLES, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(expected.image))))
        assert caption == expected.caption
        assert document == {
            "id": expected.id,
            "source": expected.source,
            "url": expected.url,
            "sha256": expected.sha256.hex(),
            "width": expected.width,
            "height": expected.height,
            "meta": expected.meta,
        }


def test_plain_tar_lists_the_members_in_one_order(shard: tuple[Path, Path]) -> None:
    with tarfile.open(shard[0]) as tar:
        found = tar.getmembers()
        document = tar.extractfile("000000000.json")
        assert document is not None
        assert json.loads(document.read())["source"] == "0.tar/000000000"
    assert [m.name for m in found] == [f"{s.key}.{e}" for s in SAMPLES for e in ("jpg", "txt", "json")]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in found} == {(0, 0, 0, 0o644, "", "")}


@pytest.mark.parametrize("format", ["tar", "arrow"])
def test_equal_samples_give_equal_bytes(tmp_path: Path, format: ShardFormat) -> None:
    digests = []
    for name in ("one", "other"):
        path, index = tmp_path / name, tmp_path / f"{name}.arrow"
        write_shard(SAMPLES, path, index if format == "tar" else path, format)
        files = (path, index) if format == "tar" else (path,)
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("format", ["tar", "arrow"])
def test_an_empty_shard_is_valid(tmp_path: Path, format: ShardFormat) -> None:
    index = tmp_path / "a.arrow"
    info = write_shard([], tmp_path / f"a.{format}", index, format)
    assert info.num_samples == 0
    if format == "tar":
        with tarfile.open(tmp_path / "a.tar") as tar:
            assert tar.getmembers() == []
    assert pyarrow.ipc.open_file(str(index)).read_all().num_rows == 0
    assert rows_are_whole(index, 0) == (format == "arrow")


def test_members_of_one_name_never_meet(tmp_path: Path) -> None:
    """A global shuffle brings equal keys of two input tars together; a dot would end a key too early."""
    samples = [sample("a"), sample("a", source="1.tar/a"), sample("b.c/part.parquet#7"), sample("d.e/f")]
    tar, index = tmp_path / "a.tar", tmp_path / "a.arrow"
    write_shard(samples, tar, index, "tar")
    dataset: Any = wds.WebDataset(str(tar), shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    rows = list(dataset.decode().to_tuple("json", "__key__"))
    assert [document["id"] for document, _ in rows] == [s.id for s in samples]
    assert [key for _, key in rows] == ["a", f"{samples[1].id:016x}", f"{samples[2].id:016x}", "d.e/f"]
    assert pyarrow.ipc.open_file(str(index)).read_all()["key"].to_pylist() == [s.key for s in samples]


def test_ids_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "shard-000003.tar"
    with pytest.raises(DataError, match=r"shard-000003\.tar: .* have the same id"):
        write_shard([sample("a"), replace(sample("b"), id=sample("a").id)], path, tmp_path / "i", "tar")


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"b": 1, "a": "é"}, '{"a":"é","b":1}'),
        ({"a": [float("nan"), 1.5], "b": float("-inf")}, '{"a":[null,1.5],"b":null}'),
        ({"a": "\ud800"}, '{"a":"\\ud800"}'),
        ({1: "x", "a": {"b": float("inf")}}, '{"1":"x","a":{"b":null}}'),
    ],
)
def test_metadata_always_become_json(document: dict[Any, Any], text: str) -> None:
    assert json_text(document) == text
    text.encode()
