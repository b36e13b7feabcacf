"""Raw input of every kind: what is a row, how the input is cut, and that a plan is known before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DataError, ShardCorrupt
from cluster.store import open_store
from data_pipeline.ingest.sources import REASONS, SourceConfig, plan_chunks, plan_digest, read_chunk
from data_pipeline.ingest.table_source import TableConfig
from data_pipeline.records import Reject, SourceRow
from tests.support.raw_input import encode, members, noise, write_csv, write_parquet, write_tar


def read_all(source: SourceConfig) -> list[SourceRow | Reject]:
    return [row for chunk in plan_chunks(source) for row in read_chunk(chunk, source)]


def write_files(folder: Path, files: list[tuple[str, bytes]]) -> None:
    for name, payload in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)


def test_a_tar_gives_its_samples_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [file for i in range(4) for file in members(f"{i:09d}", i)])
    rows = read_all(SourceConfig(uri=str(tmp_path)))
    assert [(row.chunk, row.row, row.key) for row in rows] == [(0, i, f"{i:09d}") for i in range(4)]
    first = rows[0]
    assert isinstance(first, SourceRow)
    assert first.source == "00000.tar/000000000"
    assert first.caption == "caption of 000000000"
    assert first.url == first.meta["url"] == "https://example.org/000000000.jpg"
    assert [("000000000.jpg", first.image)] == members("000000000", 0)[:1]


@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_rows_that_are_no_sample_are_rejected_by_reason_and_counted(tmp_path: Path, kind: Any) -> None:
    image = members("x", 0)[0][1]
    files = [
        ("a.txt", b"no image"),
        ("b.jpg", image),
        ("b.json", b'{"url": "https://example.org/b"}'),
        ("c.jpg", image),
        ("c.png", image),
        ("c.txt", b"two images"),
        ("d.jpg", image),
        ("d.txt", b"\xff\xfe"),
        ("e.jpg", image),
        ("e.json", b"[1]"),
        ("e.txt", b"not an object"),
        ("g.bmp", image),
        ("g.txt", b"no image that is read"),
        ("README", b"has no key"),
        (".hidden.jpg", image),
        ("sub/h.JPG", image),
        ("sub/h.TXT", b"kept"),
    ]
    if kind == "webdataset":
        write_tar(tmp_path / "0.tar", [*files, ("../f.jpg", image), ("../f.txt", b"leaves the folder")])
    else:
        write_files(tmp_path, files)
    rows = read_all(SourceConfig(uri=str(tmp_path), kind=kind))
    reasons = {row.key: row.reason for row in rows if isinstance(row, Reject)}
    assert reasons.pop("../f", "unsafe_key") == "unsafe_key"
    assert reasons == {
        "a": "no_image",
        "b": "no_caption",
        "c": "several_images",
        "d": "bad_caption",
        "e": "bad_metadata",
        "g": "no_image",
    }
    assert [row.key for row in rows if isinstance(row, SourceRow)] == ["sub/h"]
    assert set(reasons.values()) <= set(REASONS)
    assert [row.row for row in rows] == list(range(len(rows)))
    assert next(row.url for row in rows if row.key == "b") == "https://example.org/b"


@pytest.mark.parametrize(("extension", "format"), [("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF")])
def test_images_of_every_extension_are_rows(tmp_path: Path, extension: str, format: str) -> None:
    image = encode(noise(8, 8).convert("P" if format == "GIF" else "RGB"), format)
    write_files(tmp_path, [(f"a.{extension}", image), ("a.txt", b"one")])
    (row,) = read_all(SourceConfig(uri=str(tmp_path), kind="folder"))
    assert isinstance(row, SourceRow)
    assert (row.image, row.meta, row.url) == (image, {}, None)


@pytest.mark.parametrize("url", [5, None, "", " ", ["https://example.org"]])
def test_an_address_that_is_no_text_is_none(tmp_path: Path, url: object) -> None:
    meta = {"url": url, "sha256": "ab", "original_width": 7}
    write_files(tmp_path, [*members("a", 0)[:2], ("a.json", json.dumps(meta).encode())])
    (row,) = read_all(SourceConfig(uri=str(tmp_path), kind="folder"))
    assert isinstance(row, SourceRow)
    assert (row.url, row.meta) == (None, meta)


def test_metadata_that_no_encoding_holds_are_a_reject_or_written_out(tmp_path: Path) -> None:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    write_files(tmp_path, [*members("a", 0)[:2], ("a.json", deep)])
    write_files(tmp_path, [*members("b", 0)[:2], ("b.json", b'{"url": "http://x/\\ud800", "n": NaN}')])
    a, b = read_all(SourceConfig(uri=str(tmp_path), kind="folder"))
    assert isinstance(a, Reject)
    assert a.reason == "bad_metadata"
    assert isinstance(b, SourceRow)
    assert b.url == "http://x/\\ud800"
    assert b.meta["n"] is None


def test_a_broken_tar_ends_its_chunk_with_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", members("a", 0) + members("b", 1))
    tar.write_bytes(tar.read_bytes()[:-9000])
    source = SourceConfig(uri=str(tmp_path))
    (chunk,) = plan_chunks(source)
    with pytest.raises(ShardCorrupt, match=r"a\.tar: .*byte \d+"):
        list(read_chunk(chunk, source))


def test_a_folder_is_cut_in_runs_of_samples(tmp_path: Path) -> None:
    write_files(tmp_path, [file for i in range(5) for file in members(f"sub/{i}", i)[:2]])
    source = SourceConfig(uri=str(tmp_path), kind="folder", rows_per_chunk=2)
    assert [len(c.names) for c in plan_chunks(source)] == [4, 4, 2]
    cut = read_all(source)
    whole = read_all(SourceConfig(uri=str(tmp_path), kind="folder"))
    assert [(row.chunk, row.row) for row in cut] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert [row.source for row in cut] == [row.source for row in whole] == [f"sub/{i}" for i in range(5)]


def test_a_plan_is_one_tar_per_chunk_by_name_and_changes_with_the_input(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        write_tar(tmp_path / f"{name}.tar", members(name, 0))
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    source = SourceConfig(uri=str(tmp_path))
    chunks = plan_chunks(source)
    assert [c.names for c in chunks] == [("a.tar",), ("b.tar",), ("sub/c.tar",)]
    assert plan_digest(chunks) == plan_digest(plan_chunks(SourceConfig(uri=f"file://{tmp_path}")))
    write_tar(tmp_path / "b.tar", members("b", 0) + members("bb", 1, 900, 900))
    assert plan_digest(chunks) != plan_digest(plan_chunks(source))
    with pytest.raises(DataError, match=r"b\.tar: had \d+ bytes, now"):
        list(read_chunk(chunks[1], source))


@pytest.mark.parametrize("kind", ["webdataset", "folder", "table"])
def test_no_input_is_a_data_error_that_names_the_place(tmp_path: Path, kind: Any) -> None:
    table = TableConfig(url_column="u", caption_columns=("c",)) if kind == "table" else None
    with pytest.raises(DataError, match=rf"{tmp_path}/none: no .*source\.uri"):
        plan_chunks(SourceConfig(uri=f"{tmp_path}/none", kind=kind, table=table))


def test_every_kind_reads_the_same_from_an_object_store(tmp_path: Path, s3_env: str) -> None:
    write_tar(tmp_path / "a.tar", members("a", 0) + members("b", 1))
    write_files(tmp_path, members("sub/c", 2))
    write_parquet(tmp_path / "t.parquet", {"u": ["u0", None, "u2"], "c": ["c0", "c1", "c2"]})
    write_csv(tmp_path / "t.csv", [["u", "c"], ["u0", "c\n0"], ["u1", "c1"]])
    write_csv(tmp_path / "t.tsv.gz", [["u", "c"], ["u0", "c\n0"], ["u1", "c1"]], "\t")
    local, remote = open_store(str(tmp_path)), open_store(s3_env)
    for one in local.list():
        remote.put(one.key, local.get(one.key))
    table = TableConfig(url_column="u", caption_columns=("c",))
    sources: list[dict[str, Any]] = [
        {"kind": "webdataset"},
        {"kind": "folder"},
        {"kind": "table", "rows_per_chunk": 2, "table": table},
    ]
    for source in sources:
        here, there = (SourceConfig(uri=store.uri, **source) for store in (local, remote))
        assert read_all(here) == read_all(there)
        assert plan_digest(plan_chunks(here)) == plan_digest(plan_chunks(there))


def test_a_table_needs_a_mapping_and_nothing_else_takes_one() -> None:
    with pytest.raises(ValueError, match=r"add source\.table"):
        SourceConfig(uri="x", kind="table")
    with pytest.raises(ValueError, match=r"remove source\.table"):
        SourceConfig(uri="x", table=TableConfig(url_column="u", caption_columns=("c",)))
    with pytest.raises(ValueError, match=r"source\.rows_per_chunk"):
        SourceConfig(uri="x", rows_per_chunk=0)
