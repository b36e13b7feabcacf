"""The files of a shard, as this project and as others read them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import webdataset as wds
from PIL import Image

from cluster.errors import DataError
from data_pipeline.records import INDEX_SCHEMA, Sample, sample_id
from data_pipeline.shard_writer import write_shard
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
        meta={"url": "https://example.org", "n": seed},
    )


SAMPLES = [
    sample(key, i)
    for i, key in enumerate(
        ["000000000", "sub/one", "日本語", "long/" + "n" * 200, "with space", "000000005"]
    )
]


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Path]:
    tar, index = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.arrow"
    info = write_shard(iter(SAMPLES), tar, index)
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
        for name in ("id", "key", "caption", "width", "height", "source", "extension"):
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


def test_equal_samples_give_equal_bytes(shard: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.tar", tmp_path / "again.arrow"
    write_shard(SAMPLES, *again)
    for one, other in zip(shard, again, strict=True):
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_an_empty_shard_is_a_valid_tar_and_index(tmp_path: Path) -> None:
    info = write_shard([], tmp_path / "a.tar", tmp_path / "a.arrow")
    assert info.num_samples == 0
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getmembers() == []
    assert pyarrow.ipc.open_file(str(tmp_path / "a.arrow")).read_all().num_rows == 0


def test_keys_and_ids_are_unique(tmp_path: Path) -> None:
    paths = tmp_path / "shard-000003.tar", tmp_path / "shard-000003.arrow"
    with pytest.raises(DataError, match=r"shard-000003\.tar: two samples have the key 'a'"):
        write_shard([sample("a"), sample("a", source="1.tar/a")], *paths)
    with pytest.raises(DataError, match="have the same id"):
        write_shard([sample("a"), sample("b", source="0.tar/a")], *paths)
