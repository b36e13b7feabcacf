"""Laws of random access: what was written comes back, in any order, and damage is named."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from cluster.errors import ConfigError, ManifestMismatch, ObjectNotFound, ShardCorrupt
from data_pipeline.catalog import load_dataset
from data_pipeline.shard_reader import DatasetReader, ShardReader
from data_pipeline.shard_writer import write_shard
from tests.support.small_dataset import flip_byte, sample, write_dataset

SIZES = (7, 1, 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(str(tmp_path / "set"), SIZES)
    return tmp_path / "set"


def local_reader(folder: Path) -> DatasetReader:
    return DatasetReader(load_dataset(str(folder)), None, 0)


def image_offset(tar: Path, key: str) -> int:
    with tarfile.open(tar) as archive:
        return archive.getmember(f"{key}.jpg").offset_data


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(9)]
    write_shard(samples, tmp_path / "a.tar", tmp_path / "a.arrow")
    reader = ShardReader(tmp_path / "a.tar", tmp_path / "a.arrow")
    assert len(reader) == 9
    for number in (8, 0, 5, 5, 1):
        found, written = reader.sample(number), samples[number]
        assert found._asdict() == {name: getattr(written, name) for name in found._fields}
    for row in (-1, 9):
        with pytest.raises(IndexError, match="the shard has 9"):
            reader.sample(row)
    reader.close()


def test_a_data_set_is_read_in_any_order(folder: Path) -> None:
    reader = local_reader(folder)
    places = [(shard, index) for shard, size in enumerate(SIZES) for index in range(size)]
    for number, (shard, index) in reversed(list(enumerate(places))):
        assert reader.get(shard, index).key == f"{number:05d}"
    reader.close()
    assert reader.get(2, 4).key == "00012"  # opens again
    reader.close()


def test_a_flipped_byte_is_named(folder: Path) -> None:
    tar = folder / "shard-000002.tar"
    flip_byte(tar, image_offset(tar, "00010") + 100)
    reader = local_reader(folder)
    assert reader.get(2, 1).key == "00009"
    with pytest.raises(ShardCorrupt, match=r"shard-000002\.tar: the image of sample '00010'.*checksum"):
        reader.get(2, 2)


def test_a_cut_shard_is_named(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    end = image_offset(tar, "00006")
    tar.write_bytes(tar.read_bytes()[: end + 10])
    with pytest.raises(ShardCorrupt, match=r"shard-000000\.tar: \d+ bytes, but the manifest says"):
        local_reader(folder).get(0, 0)
    # A reader of the shard alone knows no size, and meets the end.
    reader = ShardReader(tar, folder / "shard-000000.arrow")
    with pytest.raises(ShardCorrupt, match=r"sample '00006' .* ends after 10 of"):
        reader.sample(6)


def test_a_damaged_index_is_named(folder: Path) -> None:
    index = folder / "shard-000001.arrow"
    flip_byte(index, index.stat().st_size // 2)
    with pytest.raises(ShardCorrupt, match=r"shard-000001\.arrow: sha256"):
        local_reader(folder).get(1, 0)
    for content, error in ((b"", ShardCorrupt), (b"no arrow file", ManifestMismatch)):
        index.write_bytes(content)
        with pytest.raises(error, match=r"shard-000001\.arrow"):
            ShardReader(folder / "shard-000001.tar", index)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.arrow"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ObjectNotFound, match=name):
        local_reader(folder).get(1, 0)


def test_many_shards_stay_within_the_limit_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(str(tmp_path), [1] * 12)
    monkeypatch.setattr("data_pipeline.shard_reader.OPEN_SHARDS", 3)
    reader = local_reader(tmp_path)
    before = open_files()
    for shard in [*range(12), *range(12)]:
        assert reader.get(shard, 0).key == f"{shard:05d}"
    assert open_files() - before <= 3 * 2
    reader.close()
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_remote_data_set_without_a_cache_is_refused(s3_env: str) -> None:
    write_dataset(s3_env, [2])
    with pytest.raises(ConfigError, match=r"set data\.loader\.cache$"):
        DatasetReader(load_dataset(s3_env), None, 10**9)
