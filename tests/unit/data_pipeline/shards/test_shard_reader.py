"""Laws of random access: what was written comes back, in any order and either format, and damage is named."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.ipc
import pytest

from cluster.errors import ConfigError, ManifestMismatch, ObjectNotFound, ShardCorrupt
from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.catalog import load_dataset
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, ShardFormat, shard_names
from data_pipeline.row_checksum import rows_are_whole
from data_pipeline.shards.dataset_reader import DatasetReader
from data_pipeline.shards.shard_reader import ShardReader
from data_pipeline.shards.shard_writer import write_shard
from tests.support.small_dataset import flip_byte, sample, write_dataset

SIZES = (7, 1, 5)
FORMATS = get_args(ShardFormat)
both_formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> ShardFormat:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, format: ShardFormat) -> Path:
    write_dataset(str(tmp_path / "set"), SIZES, format)
    return tmp_path / "set"


def local_reader(folder: Path) -> DatasetReader:
    return DatasetReader(load_dataset(str(folder)), None, 0)


def place(path: Path, row: int) -> tuple[int, int]:
    """Where the image of a row lies in its shard."""
    return ShardReader(path, path.with_suffix(".arrow")).place(row)


def test_a_shard_gives_back_what_was_written(tmp_path: Path, format: ShardFormat) -> None:
    samples = [sample(number) for number in range(9)]
    path, index = (tmp_path / name for name in shard_names(0, format))
    write_shard(samples, path, index, format)
    reader = ShardReader(path, index)
    assert len(reader) == 9
    order = (8, 0, 5, 5, 1)
    for found, number in zip(reader.samples(order), order, strict=True):
        written = samples[number]
        assert found._replace(image=bytes(found.image))._asdict() == {
            name: getattr(written, name) for name in found._fields
        }
        assert reader.sample(number) == found
        offset, size = reader.place(number)
        assert path.read_bytes()[offset : offset + size] == written.image
    for row in (-1, 9):
        with pytest.raises(IndexError, match="the shard has 9"):
            reader.sample(row)
    assert reader.table["sha256"].to_pylist() == [written.sha256 for written in samples]
    assert "image" not in reader.table.column_names
    reader.close()


def test_images_of_an_arrow_shard_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_shard([sample(number) for number in range(3)], path, path, "arrow")
    reader = ShardReader(path, path)
    view = reader.sample(1).image
    assert isinstance(view, memoryview)
    with path.open("r+b") as file:  # the view shows the file itself
        file.seek(reader.place(1)[0])
        file.write(b"\xaa")
    assert view[0] == 0xAA
    reader.close()
    assert view[1:] == sample(1).image[1:]  # and outlives the reader


def test_an_arrow_shard_of_several_batches_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shards.shard_writer._BATCH_ROWS", 4)
    path = tmp_path / "a.arrow"
    write_shard((sample(number) for number in range(10)), path, path, "arrow")
    assert pyarrow.ipc.open_file(path).num_record_batches == 3
    reader = ShardReader(path, path)
    assert [found.image for found in reader.samples(range(10))] == [sample(k).image for k in range(10)]
    assert [found.caption for found in reader.samples(range(10))] == [sample(k).caption for k in range(10)]


def test_a_data_set_is_read_in_any_order(folder: Path) -> None:
    reader = local_reader(folder)
    places = [(shard, index) for shard, size in enumerate(SIZES) for index in range(size)]
    for number, (shard, index) in reversed(list(enumerate(places))):
        assert reader.get(shard, index).key == f"{number:05d}"
    order = np.random.default_rng(0).permutation(len(places))
    shards, indices = np.array(places)[order].T
    found = dict(reader.samples(shards, indices))
    assert [found[k].key for k in range(len(places))] == [f"{number:05d}" for number in order]
    reader.close()
    assert reader.get(2, 4).key == "00012"  # opens again
    assert reader.table(2)["key"].to_pylist() == [f"{number:05d}" for number in range(8, 13)]
    reader.close()


# Where shard 2 is cut. A tar: before the second sample's first member, inside that member's header, between
# its jpg and its txt, inside its jpg. An Arrow file has other parts: at half its length, inside the footer,
# behind the last image, inside an image.
def member_boundary(path: Path) -> int:
    return tar_members(path)[3].offset if path.suffix == ".tar" else path.stat().st_size // 2 // 64 * 64


def inside_a_header(path: Path) -> int:
    return tar_members(path)[3].offset + 100 if path.suffix == ".tar" else path.stat().st_size - 40


def between_jpg_and_txt(path: Path) -> int:
    return tar_members(path)[4].offset if path.suffix == ".tar" else sum(place(path, 4))


def inside_a_payload(path: Path) -> int:
    return place(path, 1)[0] + 20


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as archive:
        return archive.getmembers()


def cut(where: Callable[[Path], int]) -> Callable[[Path], bytes]:
    return lambda path: path.read_bytes()[: where(path)]


def flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    offset, size = place(path, 1)
    data[offset + size // 2] ^= 1 << 3
    return bytes(data)


damages = pytest.mark.parametrize(
    "damage",
    [
        cut(member_boundary),
        cut(inside_a_header),
        cut(between_jpg_and_txt),
        cut(inside_a_payload),
        flipped,
    ],
    ids=["member boundary", "inside a header", "between jpg and txt", "inside a payload", "one bit"],
)


@damages
def test_a_damaged_shard_is_found_and_named(folder: Path, format: ShardFormat, damage) -> None:
    path = folder / shard_names(2, format)[0]
    path.write_bytes(damage(path))
    reader = local_reader(folder)
    with pytest.raises(ShardCorrupt, match=path.name):
        [reader.get(2, index) for index in range(SIZES[2])]
    assert reader.get(0, 0).key == "00000"  # the others are as good as before
    with pytest.raises(ShardCorrupt, match=path.name):
        list(reader.samples(np.full(5, 2), np.arange(5)))


@damages
def test_a_damaged_copy_is_fetched_again(s3_env: str, tmp_path: Path, format: ShardFormat, damage) -> None:
    write_dataset(s3_env, SIZES, format)
    dataset = load_dataset(s3_env)
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    assert reader.get(2, 0).key == "00008"
    reader.close()
    path = tmp_path / dataset.digest[:16] / shard_names(2, format)[0]
    path.write_bytes(damage(path))
    reader = DatasetReader(dataset, str(tmp_path), 10**9)
    found = [reader.get(2, index) for index in range(SIZES[2])]
    assert [bytes(one.image) for one in found] == [sample(number).image for number in range(8, 13)]
    assert path.stat().st_size == dataset.shards[2].size


@damages
def test_a_damaged_object_is_refused(s3_env: str, tmp_path: Path, format: ShardFormat, damage) -> None:
    write_dataset(s3_env, SIZES, format)
    store, (name, index) = open_store(s3_env), shard_names(2, format)
    for file in {name, index}:
        store.get_file(file, tmp_path / file)
    store.put(name, damage(tmp_path / name))
    reader = DatasetReader(load_dataset(s3_env), str(tmp_path / "cache"), 10**9)
    with pytest.raises(ShardCorrupt, match=rf"{s3_env}/{name}"):
        reader.get(2, 0)
    assert reader.get(0, 0).key == "00000"


def test_a_shard_shortened_while_it_is_open_is_named(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), SIZES)
    path = tmp_path / "shard-000000.tar"
    reader = ShardReader(path, path.with_suffix(".arrow"))
    end = place(path, 6)[0]
    path.write_bytes(path.read_bytes()[: end + 10])
    with pytest.raises(ShardCorrupt, match=r"sample '00006' .* ends after 10 of"):
        reader.sample(6)


def test_a_damaged_index_is_named(folder: Path) -> None:
    index = folder / "shard-000001.arrow"
    flip_byte(index, index.stat().st_size // 2)
    with pytest.raises(ShardCorrupt, match=r"shard-000001\.arrow"):
        local_reader(folder).get(1, 0)


@pytest.mark.parametrize(("content", "error"), [(b"", ShardCorrupt), (b"no arrow file", ManifestMismatch)])
def test_what_is_no_index_is_named(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    index = tmp_path / "a.arrow"
    index.write_bytes(content)
    with pytest.raises(error, match=r"a\.arrow"):
        ShardReader(tmp_path / "a.tar", index)


def test_no_flipped_bit_of_an_arrow_shard_changes_what_is_read(tmp_path: Path) -> None:
    """Captions, ids and where the images lie are in the shard itself, so opening it must prove them."""
    write_dataset(str(tmp_path), [3], "arrow")
    path = tmp_path / "shard-000000.arrow"
    whole, written = path.read_bytes(), [sample(number) for number in range(3)]
    images = {at for row in range(3) for at in range(place(path, row)[0], sum(place(path, row)))}
    rows = [at for at in range(len(whole)) if at not in images][::3]
    found = []
    for number, at in enumerate(rows):
        data = bytearray(whole)
        data[at] ^= 1 << number % 8
        path.write_bytes(data)
        try:
            read = list(local_reader(tmp_path).samples(np.zeros(3, np.int64), np.arange(3)))
        except ShardCorrupt as error:
            found.append(str(error))
        else:  # a bit that fills up, or one that Arrow has no use for
            assert [(s.id, s.caption, bytes(s.image)) for _, s in read] == [
                (s.id, s.caption, s.image) for s in written
            ]
    assert len(found) > len(rows) / 2
    assert all(path.name in message for message in found)
    for needle in (b"picture number 1", b"small/00002", written[0].id.to_bytes(8, "little")):
        data = bytearray(whole)
        data[data.index(needle)] ^= 1
        path.write_bytes(data)
        with pytest.raises(ShardCorrupt, match=r"shard-000000\.arrow"):
            local_reader(tmp_path).get(0, 0)


def test_opening_an_arrow_shard_reads_none_of_its_images(tmp_path: Path) -> None:
    """Its cost must not grow with them; a damaged one is found when it is read."""
    write_dataset(str(tmp_path), [3], "arrow")
    path = tmp_path / "shard-000000.arrow"
    path.write_bytes(flipped(path))
    reader = local_reader(tmp_path)
    assert reader.get(0, 0).image == sample(0).image
    with pytest.raises(ShardCorrupt, match=r"sample '00001' .* has a wrong checksum"):
        reader.get(0, 1)


def test_an_arrow_shard_without_checksums_is_proven_whole(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.arrow"
    write_shard([sample(number) for number in range(3)], path, path, "arrow")
    table = pyarrow.ipc.open_file(path).read_all()
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    shards = [{"name": path.name, "index_name": path.name, "num_samples": 3, "size": path.stat().st_size}]
    counts = {"rows_in": 3, "kept": 3, "dropped": 0}
    meta = {"format": "arrow", "shards": shards, "recipe": {}, "counts": counts}
    files = (file_entry(path, path.name),)
    commit(open_store(str(tmp_path)), Manifest(DATASET_KIND, DATASET_VERSION, files, meta))
    assert not rows_are_whole(path, 3)
    assert local_reader(tmp_path).get(0, 2).caption == sample(2).caption
    path.write_bytes(flipped(path))
    with pytest.raises(ShardCorrupt, match=r"shard-000000\.arrow: sha256"):
        local_reader(tmp_path).get(0, 2)


def test_a_missing_file_is_named(folder: Path, format: ShardFormat) -> None:
    for name in set(shard_names(1, format)):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ObjectNotFound, match=name):
            local_reader(folder).get(1, 0)
        (folder / name).write_bytes(data)


def test_many_shards_stay_within_the_limit_of_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(str(tmp_path), [1] * 12)
    monkeypatch.setattr("data_pipeline.shards.dataset_reader.OPEN_SHARDS", 3)
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
