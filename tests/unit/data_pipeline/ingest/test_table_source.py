"""Tables: every row once however they are cut, the mapping of columns, and how little of a file is read."""

from __future__ import annotations

import datetime
import decimal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError, StorageUnavailable
from cluster.store import StoreConfig
from cluster.store_local import LocalStore
from data_pipeline.ingest.sources import SourceConfig, plan_chunks, plan_digest, read_chunk
from data_pipeline.ingest.table_source import TableConfig, plan_table, read_part
from data_pipeline.records import SourceRow
from tests.support.raw_input import laion, write_csv, write_parquet
from tests.support.table_rows import LAION, SMALL, CountingStore, kept, read_tables, rejects


def test_a_laion_table_becomes_rows_with_address_caption_and_metadata(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part-0.parquet", laion(5))
    meta = ("similarity", "punsafe")
    rows = kept(read_tables(tmp_path, key_column="SAMPLE_ID", meta_columns=meta))
    assert rows[3] == SourceRow(
        chunk=0,
        row=3,
        key="3",
        source="part-0.parquet#3",
        caption="caption 3",
        meta={"similarity": pytest.approx(0.23), "punsafe": 0.3},
        url="https://example.org/3.jpg",
    )
    assert rows[0].meta["punsafe"] is None


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10, 33, 1000])
def test_chunks_hold_each_parquet_row_once_wherever_row_groups_end(
    tmp_path: Path, rows_per_chunk: int
) -> None:
    write_parquet(tmp_path / "a.parquet", laion(25), rows_per_group=10)
    write_parquet(tmp_path / "b/c.parquet", laion(3, 25), rows_per_group=2)
    write_parquet(tmp_path / "d.parquet", laion(0))
    rows = kept(read_tables(tmp_path, rows_per_chunk))
    assert [row.caption for row in rows] == [f"caption {i}" for i in range(28)]
    names = [f"a.parquet#{i}" for i in range(25)] + [f"b/c.parquet#{i}" for i in range(3)]
    assert [row.source for row in rows] == names


def test_a_parquet_chunk_reads_only_its_row_groups_and_columns(tmp_path: Path) -> None:
    """Counted in bytes asked of the store: the footer, and those column chunks that the metadata name."""
    columns = laion(20_000)
    columns["blob"] = [f"{i}-{'x' * (i % 97)}" for i in range(20_000)]
    path = write_parquet(tmp_path / "t.parquet", columns, rows_per_group=1000)
    store, table = CountingStore(str(tmp_path)), TableConfig(**LAION)
    parts = plan_table(store, "t.parquet", table, 500)
    plan_bytes = store.asked
    assert plan_bytes < path.stat().st_size / 5
    metadata = pq.read_metadata(path)

    def size(groups: range) -> int:
        chosen = [metadata.row_group(g).column(c) for g in groups for c in range(metadata.num_columns)]
        return sum(c.total_compressed_size for c in chosen if c.path_in_schema in ("URL", "TEXT"))

    for number in (14, 15):  # the two halves of group 7
        store.asked = 0
        rows = list(read_part(store, "t.parquet", parts[number], table, 0))
        wanted = range(500 * number, 500 * number + 500)
        assert [row.url for row in rows] == [f"https://example.org/{i}.jpg" for i in wanted]
        assert size(range(7, 8)) <= store.asked <= plan_bytes + size(range(7, 8))
    wide = plan_table(store, "t.parquet", table, 1500)[1]  # rows 1500 to 3000: of groups 1 and 2
    store.asked = 0
    list(read_part(store, "t.parquet", wide, table, 0))
    assert size(range(1, 3)) <= store.asked <= plan_bytes + size(range(1, 3))


def test_a_parquet_that_is_cut_or_broken_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", laion(3000))
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:-1], b"", b"PAR1"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"t\.parquet: not readable as Parquet"):
            read_tables(tmp_path)
    metadata = pq.read_metadata(pa.BufferReader(data))
    text = metadata.row_group(1).column(2)
    at = (text.dictionary_page_offset or text.data_page_offset) + text.total_compressed_size // 2
    path.write_bytes(data[: at - 50] + bytes(100) + data[at + 50 :])
    with pytest.raises(DataError, match=r"t\.parquet: "):
        read_tables(tmp_path)


class AwayStore(CountingStore):
    """A store that stops answering after some bytes."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if self.asked > 30_000:
            raise StorageUnavailable("away")
        return super().get_range(key, start, length)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_store_that_is_away_is_no_broken_table(tmp_path: Path, name: str) -> None:
    count = 10_000
    if name == "t.csv":
        write_csv(tmp_path / name, [["URL", "TEXT"], *([f"http://x/{i}", "a" * 90] for i in range(count))])
    else:
        write_parquet(tmp_path / name, laion(count))
    table = TableConfig(**LAION)
    (part,) = plan_table(LocalStore(str(tmp_path), StoreConfig()), name, table, count)
    store = AwayStore(str(tmp_path))
    store.asked = 0 if name == "t.parquet" else 30_001
    with pytest.raises(StorageUnavailable, match="away"):
        list(read_part(store, name, part, table, 0))


def test_a_table_that_changed_since_the_plan_is_an_error(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [["url", "text"], ["http://x/0", "zero"], ["http://x/1", "one"]])
    source = SourceConfig(uri=str(tmp_path), kind="table", table=TableConfig(**SMALL))
    (chunk,) = plan_chunks(source)
    path.write_text(path.read_text() + "http://x/2,two\n")
    with pytest.raises(DataError, match=r"t\.csv: had 40 bytes, now 55"):
        list(read_chunk(chunk, source))
    path.write_text(path.read_text()[:40].replace("\nhttp://x/1", ";http://x/1"))
    with pytest.raises(DataError, match=r"t\.csv: 1 rows from row 0 on, 2 were planned"):
        list(read_chunk(chunk, source))


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("key", "mapping"),
    [
        ("url_column", {"url_column": "link"}),
        ("caption_columns", {"caption_columns": ("TEXT", "link")}),
        ("key_column", {"key_column": "link"}),
        ("meta_columns", {"meta_columns": ("similarity", "link")}),
    ],
)
def test_a_missing_column_is_an_error_at_the_plan(tmp_path: Path, name: str, key: str, mapping: dict) -> None:
    if name == "t.csv":
        write_csv(tmp_path / name, [["URL", "TEXT", "similarity"], ["u", "t", "0.3"]])
    else:
        write_parquet(tmp_path / name, {"URL": ["u"], "TEXT": ["t"], "similarity": [0.3]})
    source = SourceConfig(uri=str(tmp_path), kind="table", table=TableConfig(**{**LAION, **mapping}))
    wanted = rf"{name}: no column 'link'; it has 'URL', 'TEXT', 'similarity': change source\.table\.{key}"
    with pytest.raises(ConfigError, match=wanted):
        plan_chunks(source)


def test_a_column_that_is_there_twice_or_is_no_text_is_an_error_at_the_plan(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["url", "text", "text"], ["u", "t", "t"]])
    with pytest.raises(ConfigError, match=r"a\.csv: 2 columns are 'text': .*table\.caption_columns"):
        read_tables(tmp_path, **SMALL)
    (tmp_path / "a.csv").unlink()
    write_parquet(tmp_path / "a.parquet", {"url": ["u"], "text": [5]})
    with pytest.raises(ConfigError, match=r"'text' is int64, not text: .*source\.table\.caption_columns"):
        read_tables(tmp_path, **SMALL)


def test_rows_without_address_caption_or_key_are_rejects(tmp_path: Path) -> None:
    columns = {
        "id": ["0", None, "", "../3", "/4", "5", "6", "7", "8", "9.9"],
        "url": ["u0", "u1", "u2", "u3", "u4", None, " ", "u7", "u8", "u9"],
        "text": ["t0", "t1", "t2", "t3", "t4", "t5", "t6", None, " \n", "t9"],
    }
    write_parquet(tmp_path / "t.parquet", columns)
    rows = read_tables(tmp_path, 4, **SMALL, key_column="id")
    wanted = [
        "no_key",
        "no_key",
        "unsafe_key",
        "unsafe_key",
        "no_url",
        "no_url",
        "no_caption",
        "empty_caption",
    ]
    assert rejects(rows) == {f"t.parquet#{i}": reason for i, reason in enumerate(wanted, start=1)}
    assert [row.key for row in rows if isinstance(row, SourceRow)] == ["0", "9.9"]
    assert next(row.url for row in rows if row.source.endswith("#7")) == "u7"


def test_text_that_is_not_utf_8_costs_its_row_and_no_other(tmp_path: Path) -> None:
    offsets = pa.py_buffer(pa.array([0, 1, 2, 3], pa.int32()).buffers()[1])
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    write_parquet(tmp_path / "t.parquet", {"url": ["u0", "u1", "u2"], "text": broken})
    rows = read_tables(tmp_path, **SMALL)
    assert rejects(rows) == {"t.parquet#1": "malformed_row"}
    assert [row.caption for row in rows if isinstance(row, SourceRow)] == ["a", "c"]


def test_all_columns_become_plain_metadata(tmp_path: Path) -> None:
    columns = {
        "url": ["u"],
        "text": ["t"],
        "nan": [float("nan")],
        "when": [datetime.datetime(2014, 5, 6, 7, 8, 9)],
        "instant": pa.array([1], pa.timestamp("ns", "America/New_York")),
        "day": [datetime.date(2014, 5, 6)],
        "length": pa.array([7], pa.duration("ns")),
        "money": [decimal.Decimal("1.50")],
        "hash": [b"\x01\xff"],
        "tags": [["a", None]],
        "place": [{"lat": 1.5, "lon": float("inf")}],
        "kind": pa.array(["cat"]).dictionary_encode(),
        "count": [2**53 + 1],
    }
    write_parquet(tmp_path / "t.parquet", columns)
    (row,) = kept(read_tables(tmp_path, **SMALL, meta_columns="all"))
    assert row.meta == {
        "nan": None,
        "when": "2014-05-06 07:08:09.000000",
        "instant": "1970-01-01 00:00:00.000000001",
        "day": "2014-05-06",
        "length": 7,
        "money": "1.50",
        "hash": "01ff",
        "tags": ["a", None],
        "place": {"lat": 1.5, "lon": None},
        "kind": "cat",
        "count": 2**53 + 1,
    }


def test_yfcc_captions_are_drawn_by_id_from_what_is_not_blank(tmp_path: Path) -> None:
    lines = [[str(i), f"title+{i}", "" if i % 4 == 0 else f"what%2C+{i}%0A", "a,b"] for i in range(400)]
    lines.append(["400", "+", "only+this", ""])
    (tmp_path / "yfcc.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    mapping: dict[str, Any] = {
        "columns": ("photo", "title", "description", "tags"),
        "url_column": "photo",
        "caption_columns": ("title", "description"),
        "caption_choice": "draw",
        "percent_encoded": True,
        "quoted": False,
        "key_column": "photo",
        "meta_columns": ("tags",),
    }
    rows = kept(read_tables(tmp_path, **mapping))
    drawn = Counter("title" if row.caption.startswith("title ") else "description" for row in rows)
    assert all(row.caption == f"title {row.key}" for row in rows[:400:4])
    assert rows[1].caption in ("title 1", "what, 1\n")
    assert rows[400].caption == "only this"
    assert 110 <= drawn["title"] - 100 <= 190  # of 300 with both
    assert [row.caption for row in read_tables(tmp_path, 7, **mapping) if isinstance(row, SourceRow)] == [
        row.caption for row in rows
    ]
    other = kept(read_tables(tmp_path, **mapping, caption_seed=1))
    assert [row.caption for row in other] != [row.caption for row in rows]


def test_chunk_sizes_add_up_to_the_files_and_plans_differ_by_their_cuts(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["url", "text"], *([f"http://x/{i}", "t" * i] for i in range(50))])
    write_parquet(tmp_path / "b.parquet", {"url": ["u"] * 7, "text": ["t"] * 7})
    (tmp_path / "_metadata.parquet").write_bytes(b"of another program")
    (tmp_path / ".hidden.csv").write_bytes(b"\xff")
    files = sum((tmp_path / name).stat().st_size for name in ("a.csv", "b.parquet"))
    digests = set()
    for rows_per_chunk in (1, 3, 49, 50):
        config = SourceConfig(
            uri=str(tmp_path), kind="table", rows_per_chunk=rows_per_chunk, table=TableConfig(**SMALL)
        )
        chunks = plan_chunks(config)
        assert sum(chunk.size for chunk in chunks) == files
        digests.add(plan_digest(chunks))
    assert len(digests) == 4


def test_a_table_of_the_same_size_with_rows_elsewhere_is_another_plan(tmp_path: Path) -> None:
    source = SourceConfig(uri=str(tmp_path), kind="table", rows_per_chunk=1, table=TableConfig(**SMALL))
    digests = set()
    for text in ("url,text\nu,aaaa\nu,bb\n", "url,text\nu,aa\nu,bbbb\n"):
        (tmp_path / "t.csv").write_text(text)
        digests.add(plan_digest(plan_chunks(source)))
    assert len(digests) == 2
