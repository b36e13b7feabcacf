"""Reading tars: the samples of a whole one, and every way in which one can be cut or broken."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ShardCorrupt
from data_pipeline.ingest.tar_source import read_tar
from tests.support.raw_input import members, write_tar


def keys(path: Path) -> list[str]:
    return [files.key for files in read_tar(path, str(path))]


def offsets(path: Path) -> list[tuple[str, int, int, int]]:
    """(name, start of the headers, start of the payload, size) of every member."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset, m.offset_data, m.size) for m in tar]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "00000.tar", [file for i in range(4) for file in members(f"{i:09d}", i)])


def test_a_tar_gives_its_samples_in_order(tar: Path) -> None:
    samples = list(read_tar(tar, "shown"))
    assert [files.key for files in samples] == [f"{i:09d}" for i in range(4)]
    assert samples[1].extensions == ["jpg", "txt", "json"]
    assert samples[1].payloads == {name.partition(".")[2]: data for name, data in members("000000001", 1)}


def test_a_tar_cut_at_any_block_is_corrupt(tar: Path) -> None:
    """At a member boundary, in a pax header, a header, a payload, the end of the archive."""
    data = tar.read_bytes()
    _, _, data_offset, size = offsets(tar)[-1]
    end = data_offset + size + -size % 512 + 1024
    for cut in range(0, end, 512):
        for extra in (0, 1, 300):
            if cut + extra >= end:
                continue
            tar.write_bytes(data[: cut + extra])
            with pytest.raises(ShardCorrupt, match=r"00000\.tar: .*byte \d+"):
                keys(tar)
    tar.write_bytes(data[:end])
    assert len(keys(tar)) == 4


@pytest.mark.parametrize(
    ("member", "part"),
    [
        ("000000002.jpg", "boundary"),  # between two samples
        ("000000002.txt", "boundary"),  # between jpg and txt
        ("000000002.json", "boundary"),  # between txt and json
        ("000000002.jpg", "header"),
        ("000000002.txt", "header"),
        ("000000002.jpg", "payload"),
        ("000000002.txt", "payload"),
    ],
)
def test_a_cut_is_named_with_tar_and_byte_and_no_half_sample_is_given(
    tar: Path, member: str, part: str
) -> None:
    start, payload, size = next(rest for name, *rest in offsets(tar) if name == member)
    cut = {"boundary": start, "header": start + 100, "payload": payload + size // 2}[part]
    named = start if part == "header" else cut
    where = {"boundary": "between two members", "header": "", "payload": f"inside '{member}'"}[part]
    tar.write_bytes(tar.read_bytes()[:cut])
    given: list[str] = []
    with pytest.raises(ShardCorrupt, match=rf"{tar}: .*byte {named}\b.*{where}"):
        given.extend(files.key for files in read_tar(tar, str(tar)))
    assert given in (["000000000"], ["000000000", "000000001"])


def test_a_cut_in_the_end_of_the_archive_is_corrupt(tar: Path) -> None:
    _, _, payload, size = offsets(tar)[-1]
    end = payload + size + -size % 512
    for cut in (end, end + 1, end + 512, end + 1023):
        tar.write_bytes(tar.read_bytes()[:cut].ljust(cut, b"\0"))
        with pytest.raises(ShardCorrupt, match=rf"truncated at byte {cut}, between two members"):
            keys(tar)


def test_a_flipped_bit_in_a_header_is_corrupt(tar: Path) -> None:
    """A header has a checksum of its own; a payload has none, so a flip there is for the decoder to find."""
    data = tar.read_bytes()
    header = offsets(tar)[7][2] - 512
    for at in (*range(header, header + 148), *range(header + 156, header + 345)):  # all but the checksum
        flipped = bytearray(data)
        flipped[at] ^= 1
        tar.write_bytes(flipped)
        with pytest.raises(ShardCorrupt, match=r"00000\.tar: .*byte \d+"):
            keys(tar)


def test_whatever_the_bytes_are_nothing_but_shard_corrupt_is_raised(tar: Path) -> None:
    data = tar.read_bytes()
    starts = [start for _, start, _, _ in offsets(tar)]
    random = np.random.default_rng(0)
    corrupt = 0
    for _ in range(300):
        start = starts[random.integers(len(starts))]
        flipped = bytearray(data)
        for at in random.integers(start, start + 1536, 3):  # pax header, its records, header
            flipped[at] ^= int(random.integers(1, 256))
        tar.write_bytes(flipped)
        try:
            keys(tar)
        except ShardCorrupt:
            corrupt += 1
    assert corrupt > 100


def test_a_damaged_header_is_named_with_its_byte(tar: Path) -> None:
    start = offsets(tar)[3][1]
    data = bytearray(tar.read_bytes())
    data[start] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(ShardCorrupt, match=rf"byte {start}\b"):
        keys(tar)


def test_data_after_the_end_of_the_archive_is_corrupt(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ShardCorrupt, match="data follows"):
        keys(tar)


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"x" * 4096], ids=["empty", "short", "long"])
def test_what_is_no_tar_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardCorrupt, match=r"a\.tar"):
        keys(tmp_path / "a.tar")


def test_members_of_a_key_must_be_adjacent(tmp_path: Path) -> None:
    a, b = members("a", 0), members("b", 1)
    interleaved = write_tar(tmp_path / "0.tar", [a[0], b[0], a[1], b[1]])
    with pytest.raises(ShardCorrupt, match=r"key 'a' are not adjacent.*sort the tar"):
        keys(interleaved)
    twice = write_tar(tmp_path / "1.tar", [a[0], a[0], a[1]])
    with pytest.raises(ShardCorrupt, match=r"a\.jpg is there twice"):
        keys(twice)


def test_unsorted_keys_are_read_as_they_stand_if_each_is_in_one_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", members("b", 0) + members("a", 1))
    assert keys(path) == ["b", "a"]


def test_long_and_non_ascii_names_are_read(tmp_path: Path) -> None:
    names = ["très/" + "long" * 60, "日本語", "emoji 🦊"]
    path = write_tar(tmp_path / "0.tar", [file for i, key in enumerate(names) for file in members(key, i)])
    assert keys(path) == names


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x03\x04" + b"\0" * 600, "a zip"),
        (b"PK\x03\x04", "a zip"),
        (b"\x1f\x8b\x08" + b"z" * 2000, "compressed by gzip"),
        (b"PAR1" + b"z" * 2000, "a Parquet table"),
        (b"x" * 4096, "no header at byte 0"),
    ],
)
def test_another_file_under_the_name_of_a_tar_is_said_to_be_one(
    tmp_path: Path, data: bytes, what: str
) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardCorrupt, match=rf"a\.tar: is no tar.* {what}"):
        keys(tmp_path / "a.tar")


def test_a_tar_that_begins_as_a_zip_would_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", members("PK\x03\x04", 0))
    assert keys(path) == ["PK\x03\x04"]
