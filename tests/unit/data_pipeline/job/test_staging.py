"""Staging a chunk, and making shards of what was staged: every row has its fate, every image its place."""

from __future__ import annotations

import csv
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import ShardCorrupt
from cluster.store import ObjectStore, open_store
from data_pipeline.fetch.download import DownloadConfig
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import SourceConfig, plan_chunks
from data_pipeline.ingest.table_source import TableConfig
from data_pipeline.job import ledger, write_stage
from data_pipeline.job.filters import FilterConfig
from data_pipeline.job.ledger import StageRecord
from data_pipeline.job.staging import StageSettings, StageTask, retriable_rows, stage_chunk
from data_pipeline.job.write_stage import coalesce, read_samples
from data_pipeline.records import STAGED_SCHEMA, sample_id
from tests.support.raw_input import encode, members, noise, write_tar
from tests.support.web_server import WebServer, in_turn, page

RECIPE = "0" * 64


def settings(source: SourceConfig, output: Path, **changes: Any) -> StageSettings:
    base = StageSettings(
        output=str(output),
        recipe=RECIPE,
        source=source,
        filters=FilterConfig(),
        download=DownloadConfig(),
        transform=TransformConfig(short_side=48),
    )
    return replace(base, **changes)


def stage_tar(tmp_path: Path, files: list[tuple[str, bytes]], **changes: Any) -> StageRecord:
    """Stage one tar of these files."""
    write_tar(tmp_path / "raw" / "a.tar", files)
    source = SourceConfig(uri=str(tmp_path / "raw"))
    (chunk,) = plan_chunks(source)
    return stage_chunk(StageTask(chunk, settings(source, tmp_path / "set", **changes)))


def staged(tmp_path: Path, record: StageRecord) -> tuple[ObjectStore, list[dict[str, Any]]]:
    store = open_store(str(tmp_path / "set"))
    table = pq.read_table(pa.BufferReader(store.get(record.rows)))
    assert table.schema.equals(STAGED_SCHEMA)
    return store, table.to_pylist()


def test_every_row_is_staged_once_in_order(tmp_path: Path) -> None:
    files = members("a", 0)
    files += [("b.jpg", b"no image"), ("b.txt", b"broken"), ("c.txt", b"no image at all")]
    files += [("d.png", encode(Image.new("1", (14_000, 14_000)), "PNG")), ("d.txt", b"huge")]
    files += [("e.png", encode(noise(200, 120), "PNG")), ("e.txt", b" two \n words "), ("e.json", b"{}")]
    files += [("f.jpg", encode(noise(9, 9))), ("f.txt", b" \n\x00 ")]
    record = stage_tar(tmp_path, files)
    store, rows = staged(tmp_path, record)
    assert [row["row"] for row in rows] == list(range(6))
    assert [row["reason"] for row in rows] == [
        None,
        "not_an_image",
        "no_image",
        "too_many_pixels",
        None,
        "empty_caption",
    ]
    assert all(row["detail"] for row in rows if row["reason"])
    assert (record.rows_in, record.kept, record.retriable) == (6, 2, {})
    assert record.dropped == {"empty_caption": 1, "no_image": 1, "not_an_image": 1, "too_many_pixels": 1}
    payloads = dict(files)
    for row in (rows[0], rows[4]):
        image = store.get_range(row["image_file"], row["image_offset"], row["image_size"])
        assert zlib.crc32(image) == row["image_crc32"]
        original = payloads[f"{row['key']}.{'jpg' if row['key'] == 'a' else 'png'}"]
        assert row["sha256"] == hashlib.sha256(original).digest()
        assert row["id"] == sample_id(row["source"]) == sample_id(f"a.tar/{row['key']}")
        assert row["retriable"] is False
    assert rows[4]["caption"] == "two words"
    assert (rows[4]["width"], rows[4]["height"], rows[4]["meta"]) == (80, 48, "{}")
    assert rows[0]["url"] == "https://example.org/a.jpg"
    assert store.size(str(record.images)) == record.images_size


def test_filters_see_the_cleaned_caption(tmp_path: Path) -> None:
    files = [*members("a", 0)[:1], ("a.txt", b" \n a   b "), *members("b", 1)]
    filters = FilterConfig(caption_max_chars=3)
    record = stage_tar(tmp_path, files, filters=filters)
    assert record.dropped == {"caption_too_long": 1}
    assert [row["caption"] for row in staged(tmp_path, record)[1]] == ["a b", None]


def test_a_chunk_without_images_has_no_image_object(tmp_path: Path) -> None:
    record = stage_tar(tmp_path, [("a.txt", b"a")])
    assert (record.images, record.images_size, record.kept) == (None, 0, 0)


def test_a_twin_gets_the_record_that_was_first(tmp_path: Path) -> None:
    first = stage_tar(tmp_path, members("a", 0))
    assert stage_tar(tmp_path, members("a", 0)) == first


def test_a_broken_tar_leaves_no_record(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "raw" / "a.tar", members("a", 0))
    tar.write_bytes(tar.read_bytes()[:3000])
    source = SourceConfig(uri=str(tmp_path / "raw"))
    (chunk,) = plan_chunks(source)
    with pytest.raises(ShardCorrupt, match="byte"):
        stage_chunk(StageTask(chunk, settings(source, tmp_path / "set")))
    assert open_store(str(tmp_path / "set")).list() == []


class Web:
    """Images 0 to 5 of a server that is busy when it is asked for 1 and 4 for the first time."""

    def __init__(self, server: WebServer) -> None:
        self.server = server
        for number in range(6):
            image = page(encode(noise(60, 50, number)))
            server.pages[f"/{number}.jpg"] = in_turn(page(b"", 503), image) if number in (1, 4) else image

    def seen(self) -> list[int]:
        return [self.server.seen(f"/{number}.jpg") for number in range(6)]

    def table(self, folder: Path) -> SourceConfig:
        folder.mkdir(parents=True)
        with (folder / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("URL", "TEXT"))
            writer.writerows((self.server.url(f"/{number}.jpg"), f"caption {number}") for number in range(6))
        return SourceConfig(
            uri=str(folder), kind="table", table=TableConfig(url_column="URL", caption_columns=("TEXT",))
        )


LOCAL = DownloadConfig(allow_private_addresses=True, respect_robots_txt=False, retries=0, per_host_rate=None)


@pytest.fixture
def web() -> Iterator[Web]:
    with WebServer() as server:
        yield Web(server)


def test_a_later_round_does_only_what_may_pass(tmp_path: Path, web: Web) -> None:
    source = web.table(tmp_path / "raw")
    (chunk,) = plan_chunks(source)
    shared = settings(source, tmp_path / "set", download=LOCAL)
    first = stage_chunk(StageTask(chunk, shared))
    store, rows = staged(tmp_path, first)
    assert [row["retriable"] for row in rows] == [number in (1, 4) for number in range(6)]
    assert (first.rows_in, first.kept, first.retriable) == (6, 4, {"http_503": 2})
    assert json.loads(rows[1]["fetch"])["status"] == 503
    assert retriable_rows(store, first) == {1, 4}
    second = stage_chunk(StageTask(chunk, shared, previous=first))
    assert (second.round, second.rows_in, second.kept, second.retriable) == (1, 2, 2, {})
    assert [row["row"] for row in staged(tmp_path, second)[1]] == [1, 4]
    assert web.seen() == [1, 2, 1, 1, 2, 1]
    assert ledger.staged_rounds(store, RECIPE, [chunk]) == [[first, second]]


def test_ranges_that_touch_are_read_as_one() -> None:
    rows = [
        {"image_file": file, "image_offset": offset, "image_size": 10}
        for file, offset in (("b", 10), ("a", 50_000), ("b", 0), ("b", 20), ("a", 0), ("a", 15))
    ]
    assert list(coalesce(rows)) == [("a", 0, 25), ("a", 50_000, 10), ("b", 0, 30)]


def test_staged_images_come_back_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file for i in range(9) for file in members(f"{i}", i)]
    store, rows = staged(tmp_path, stage_tar(tmp_path, files))
    monkeypatch.setattr(write_stage, "_WINDOW_BYTES", 3000)  # three or so images
    monkeypatch.setattr(write_stage, "_GAP_BYTES", 0)
    shuffled = [rows[i] for i in (4, 0, 8, 1, 2, 7, 3, 6, 5)]
    samples = list(read_samples(store, shuffled))
    assert [sample.id for sample in samples] == [row["id"] for row in shuffled]
    assert [zlib.crc32(sample.image) for sample in samples] == [row["image_crc32"] for row in shuffled]
    assert samples[0].meta == {"key": "4", "url": "https://example.org/4.jpg"}
    assert list(read_samples(store, [])) == []


@pytest.mark.parametrize("damage", ["cut", "flipped bit"])
def test_a_damaged_staged_image_is_named(tmp_path: Path, damage: str) -> None:
    store, rows = staged(tmp_path, stage_tar(tmp_path, members("a", 0)))
    name = rows[0]["image_file"]
    data = bytearray(store.get(name))
    if damage == "cut":
        del data[-1]
    else:
        data[100] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(ShardCorrupt, match=f"{name}: the image at byte 0 is not what was staged"):
        list(read_samples(store, rows))
