"""Reading raw input: what counts as a row, and every way in which a tar can be broken."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from cluster.errors import DataError, ShardCorrupt
from data_pipeline.records import RawSample, Reject
from data_pipeline.sources import SourceConfig, plan_chunks, plan_digest, read_chunk
from tests.support.raw_input import members, write_tar


def read_all(folder: Path) -> list[RawSample | Reject]:
    (chunk,) = plan_chunks(SourceConfig(uri=str(folder)), 1)
    return list(read_chunk(chunk))


def offsets(path: Path) -> list[tuple[int, int, int]]:
    """(start of the headers, start of the payload, size) of every member."""
    with tarfile.open(path) as tar:
        return [(m.offset, m.offset_data, m.size) for m in tar]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "00000.tar", [file for i in range(4) for file in members(f"{i:09d}", i)])


def test_a_tar_gives_its_samples_in_order(tar: Path) -> None:
    rows = read_all(tar.parent)
    assert all(isinstance(row, RawSample) for row in rows)
    assert [row.key for row in rows] == [f"{i:09d}" for i in range(4)]
    first = rows[0]
    assert isinstance(first, RawSample)
    assert first.source == "00000.tar/000000000"
    assert first.caption == "caption of 000000000"
    assert first.meta["url"] == "https://example.org/000000000.jpg"
    assert [("000000000.jpg", first.image)] == members("000000000", 0)[:1]


def test_a_tar_cut_at_any_block_is_corrupt(tar: Path) -> None:
    """At a member boundary, in a pax header, a header, a payload, the end of the archive."""
    data = tar.read_bytes()
    _, data_offset, size = offsets(tar)[-1]
    end = data_offset + size + -size % 512 + 1024
    for cut in range(0, end, 512):
        for extra in (0, 1, 300):
            if cut + extra >= end:
                continue
            tar.write_bytes(data[: cut + extra])
            with pytest.raises(ShardCorrupt, match=r"00000\.tar: .*byte \d+"):
                read_all(tar.parent)
    tar.write_bytes(data[:end])
    assert len(read_all(tar.parent)) == 4


@pytest.mark.parametrize("part", ["boundary", "header", "payload"])
def test_the_message_of_a_cut_names_the_tar_and_the_byte(tar: Path, part: str) -> None:
    start, payload, size = offsets(tar)[6]
    cut = {"boundary": start, "header": start + 100, "payload": payload + size // 2}[part]
    named = start if part == "header" else cut
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ShardCorrupt, match=rf"{tar}: .*byte {named}\b"):
        read_all(tar.parent)


def test_a_damaged_header_is_corrupt(tar: Path) -> None:
    start = offsets(tar)[3][0]
    data = bytearray(tar.read_bytes())
    data[start] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(ShardCorrupt, match=rf"byte {start}\b"):
        read_all(tar.parent)


def test_data_after_the_end_of_the_archive_is_corrupt(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ShardCorrupt, match="data follows"):
        read_all(tar.parent)


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"x" * 4096], ids=["empty", "short", "long"])
def test_what_is_no_tar_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardCorrupt, match=r"a\.tar"):
        read_all(tmp_path)


def test_members_of_a_key_must_be_adjacent(tmp_path: Path) -> None:
    a, b = members("a", 0), members("b", 1)
    write_tar(tmp_path / "0.tar", [a[0], b[0], a[1], b[1]])
    with pytest.raises(ShardCorrupt, match="key 'a' are not adjacent"):
        read_all(tmp_path)
    write_tar(tmp_path / "0.tar", [a[0], a[0], a[1]])
    with pytest.raises(ShardCorrupt, match=r"a\.jpg is there twice"):
        read_all(tmp_path)


def test_rows_that_are_no_sample_are_rejected_by_reason(tmp_path: Path) -> None:
    image = members("x", 0)[0][1]
    files = [
        ("a.txt", b"no image"),
        ("b.jpg", image),
        ("c.jpg", image),
        ("c.png", image),
        ("c.txt", b"two images"),
        ("d.jpg", image),
        ("d.txt", b"\xff\xfe"),
        ("e.jpg", image),
        ("e.json", b"[1]"),
        ("e.txt", b"not an object"),
        ("../f.jpg", image),
        ("../f.txt", b"leaves the folder"),
        ("g.gif", image),
        ("README", b"has no key"),
        (".hidden.jpg", image),
        ("sub/h.JPG", image),
        ("sub/h.TXT", b"kept"),
    ]
    write_tar(tmp_path / "0.tar", files)
    rows = read_all(tmp_path)
    assert {row.key: row.reason for row in rows if isinstance(row, Reject)} == {
        "a": "no_image",
        "b": "no_caption",
        "c": "several_images",
        "d": "bad_caption",
        "e": "bad_metadata",
        "../f": "unsafe_key",
        "g": "no_image",
    }
    assert [row.key for row in rows if isinstance(row, RawSample)] == ["sub/h"]


def test_long_and_non_ascii_names_are_read(tmp_path: Path) -> None:
    keys = ["très/" + "long" * 60, "日本語", "emoji 🦊"]
    write_tar(tmp_path / "0.tar", [file for i, key in enumerate(keys) for file in members(key, i)])
    assert [row.key for row in read_all(tmp_path)] == keys


def test_a_folder_is_cut_in_runs_of_samples(tmp_path: Path) -> None:
    for i in range(5):
        for name, payload in members(f"sub/{i}", i)[:2]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(payload)
    source = SourceConfig(uri=str(tmp_path), kind="folder")
    chunks = plan_chunks(source, 2)
    assert [len(c.names) for c in chunks] == [4, 4, 2]
    cut = [row for c in chunks for row in read_chunk(c)]
    whole = [row for c in plan_chunks(source, 100) for row in read_chunk(c)]
    assert cut == whole
    assert [row.source for row in whole] == [f"sub/{i}" for i in range(5)]


def test_a_plan_is_one_tar_per_chunk_by_name_and_changes_with_the_input(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        write_tar(tmp_path / f"{name}.tar", members(name, 0))
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    chunks = plan_chunks(SourceConfig(uri=str(tmp_path)), 1)
    assert [c.names for c in chunks] == [("a.tar",), ("b.tar",), ("sub/c.tar",)]
    assert plan_digest(chunks) == plan_digest(plan_chunks(SourceConfig(uri=f"file://{tmp_path}"), 7))
    write_tar(tmp_path / "b.tar", members("b", 0) + members("bb", 1, 900, 900))
    assert plan_digest(chunks) != plan_digest(plan_chunks(SourceConfig(uri=str(tmp_path)), 1))
    with pytest.raises(DataError, match=r"b\.tar: had \d+ bytes, now"):
        list(read_chunk(chunks[1]))


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_no_input_is_a_data_error_that_names_the_place(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/none: no "):
        plan_chunks(SourceConfig(uri=f"{tmp_path}/none", kind=kind), 1)  # pyright: ignore[reportArgumentType]
