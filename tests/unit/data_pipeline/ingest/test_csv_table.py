"""csv and tsv: where rows end, whatever stands in quotes, and what becomes of broken lines and files."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError, DataError
from data_pipeline.ingest import csv_table
from data_pipeline.ingest.table_source import TableConfig, plan_table, read_part
from data_pipeline.records import Reject, SourceRow
from tests.support.raw_input import write_csv
from tests.support.table_rows import SMALL, CountingStore, kept, read_tables, rejects

TEXT = st.text(st.sampled_from("ab\",\t\n\r é日🦊'\\;\u2028\0"), max_size=8)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=12),
    rows_per_chunk=st.integers(1, 13),
    form=st.sampled_from([("t.csv", ",", "\n"), ("t.tsv", "\t", "\r\n"), ("t.csv.gz", ",", "\r\n")]),
    cut_last_newline=st.booleans(),
    block=st.sampled_from([3, 7, 1 << 20]),
)
def test_chunks_hold_each_csv_row_once_whatever_is_quoted(
    rows: list[tuple[str, str, str]],
    rows_per_chunk: int,
    form: tuple[str, str, str],
    cut_last_newline: bool,
    block: int,
) -> None:
    """What Python's csv module wrote comes back, newlines, quotes and delimiters in the fields included."""
    name, delimiter, end = form
    if end == "\n":  # then Python writes \r without quotes, and nobody can tell whose it is
        rows = [tuple(text.replace("\r", "") for text in row) for row in rows]  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        path = write_csv(Path(folder) / name, [["url", "text", "more"], *rows], delimiter, end)
        if cut_last_newline and not name.endswith(".gz"):
            path.write_bytes(path.read_bytes().removesuffix(end.encode()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(csv_table, "_BLOCK", block)  # rows end anywhere in a block
            given = read_tables(Path(folder), rows_per_chunk, **SMALL, meta_columns=("text", "more"))
    assert [row.source for row in given] == [f"{name}#{i}" for i in range(len(rows))]
    for row, (url, text, more) in zip(given, rows, strict=True):
        if isinstance(row, SourceRow):
            assert row.meta == {"text": text, "more": more}
            assert (row.url, row.caption) == (url.strip(), text)
        else:
            assert row.reason == ("no_url" if not url.strip() else "empty_caption" if text else "no_caption")


def test_every_cut_of_a_csv_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [[f"http://x/{i}", f'line one\n"line" {i}', "é" * i] for i in range(40)]
    write_csv(tmp_path / "t.csv", [["url", "text", "more"], *rows])
    whole = [(row.source, row.caption) for row in kept(read_tables(tmp_path, **SMALL))]
    assert whole == [(f"t.csv#{i}", row[1]) for i, row in enumerate(rows)]
    for rows_per_chunk in (1, 3, 39, 40, 41):
        cut = kept(read_tables(tmp_path, rows_per_chunk, **SMALL))
        assert [(row.source, row.caption) for row in cut] == whole


def test_a_csv_chunk_reads_its_own_bytes_and_no_others(tmp_path: Path) -> None:
    rows = [[f"http://x/{i}", f"text {i}" * 50] for i in range(1000)]
    path = write_csv(tmp_path / "t.csv", [["url", "text"], *rows])
    store, table = CountingStore(str(tmp_path)), TableConfig(**SMALL)
    parts = plan_table(store, "t.csv", table, 100)
    assert store.asked == path.stat().st_size
    store.asked = 0
    given = list(read_part(store, "t.csv", parts[7], table, 0))
    assert [row.url for row in given] == [f"http://x/{i}" for i in range(700, 800)]
    assert store.asked == parts[7].end - parts[7].offset < path.stat().st_size / 9


def test_csv_without_header_takes_the_names_of_the_recipe(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.tsv", [["http://x/0", "zero"], ["http://x/1", "one"]], "\t")
    rows = kept(read_tables(tmp_path, **SMALL, columns=("url", "text")))
    assert [row.caption for row in rows] == ["zero", "one"]


def test_quotes_are_text_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b'1\thttp://x/1\t"half\n2\thttp://x/2\ta 5" pipe\r\n')
    rows = kept(read_tables(tmp_path, **SMALL, columns=("id", "url", "text"), key_column="id", quoted=False))
    assert [(row.key, row.caption) for row in rows] == [("1", '"half'), ("2", 'a 5" pipe')]


def test_a_quote_inside_an_unquoted_field_is_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('url,text\nhttp://x/0,a 5" pipe\nhttp://x/1,one\n')
    assert [row.caption for row in kept(read_tables(tmp_path, **SMALL))] == ['a 5" pipe', "one"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbf"url",text\r\n\r\nhttp://x/0,zero\r\n\n\nhttp://x/1,one\n\n'
    )
    rows = kept(read_tables(tmp_path, 1, **SMALL))
    assert [(row.source, row.caption) for row in rows] == [("t.csv#0", "zero"), ("t.csv#1", "one")]


def test_malformed_lines_are_rejects_that_name_line_and_byte(tmp_path: Path) -> None:
    text = (
        b'url,text\nhttp://x/0,zero\nhttp://x/1\nhttp://x/2,two,2\nhttp://x/3,\xff\n"a"b,4\nhttp://x/5,five\n'
    )
    (tmp_path / "t.csv").write_bytes(text)
    rows = read_tables(tmp_path, 2, **SMALL)
    assert rejects(rows) == dict.fromkeys([f"t.csv#{i}" for i in range(1, 5)], "malformed_row")
    details = [row.detail for row in rows if isinstance(row, Reject)]
    assert details[0] == "line 3, byte 25: has 1 fields, not 2"
    assert details[1] == f"line 4, byte {text.index(b'http://x/2')}: has 3 fields, not 2"
    assert "not UTF-8" in details[2]
    assert "not csv" in details[3]
    assert [row.caption for row in rows if isinstance(row, SourceRow)] == ["zero", "five"]


def test_lines_are_counted_as_an_editor_counts_them_in_every_chunk(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('url,text\n\nu0,"one\ntwo\nthree"\nu1,"a\nb"\nbroken\n')
    for rows_per_chunk in (1, 2, 3):
        (reject,) = (row for row in read_tables(tmp_path, rows_per_chunk, **SMALL) if isinstance(row, Reject))
        assert reject.detail.startswith("line 8, ")


def test_a_quote_that_is_never_closed_is_an_error_with_file_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('url,text\nhttp://x/0,zero\nhttp://x/1,"one\nhttp://x/2,two\n')
    with pytest.raises(DataError, match=r"t\.csv: line 3, byte 25: .*quote is not closed.*table\.quoted"):
        read_tables(tmp_path, **SMALL)


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_table, "_BLOCK", 1000)
    monkeypatch.setattr(csv_table, "_LONGEST_ROW", 5000)
    (tmp_path / "t.csv").write_text('url,text\nhttp://x/0,"zero\n' + "http://x/1,one\n" * 10_000)
    store = CountingStore(str(tmp_path))
    with pytest.raises(DataError, match=r"t\.csv: line 2, byte 9: "):
        plan_table(store, "t.csv", TableConfig(**SMALL), 10)
    assert store.asked <= 7000


def test_a_packed_table_that_is_cut_or_broken_is_an_error(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv.gz", [["url", "text"], *([f"http://x/{i}", "t"] for i in range(2000))])
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:-3], b"no gzip", data[:2000] + b"\xff" + data[2001:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"t\.csv\.gz: not a whole gzip file"):
            read_tables(tmp_path, **SMALL)


def test_a_packed_table_gives_the_rows_of_the_plain_one(tmp_path: Path) -> None:
    rows = [["url", "text"], *([f"http://x/{i}", f"a\n{i}"] for i in range(30))]
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    write_csv(tmp_path / "plain/t.csv", rows)
    packed = write_csv(tmp_path / "packed/t.csv.gz", rows)
    assert gzip.decompress(packed.read_bytes()) == (tmp_path / "plain/t.csv").read_bytes()
    plain, unpacked = (kept(read_tables(tmp_path / name, 7, **SMALL)) for name in ("plain", "packed"))
    assert [(row.chunk, row.url, row.caption) for row in plain] == [
        (row.chunk, row.url, row.caption) for row in unpacked
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("text", [b"", b"\n\r\n", b"url,text\n", b"url,text", b"\xef\xbb\xbfurl,text\r\n\n"])
def test_a_table_without_rows_is_no_chunk(tmp_path: Path, name: str, text: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert plan_table(CountingStore(str(tmp_path)), name, TableConfig(**SMALL), 10) == []
    write_csv(tmp_path / "u.csv", [["url", "text"], ["http://x/0", "zero"]])
    assert [row.source for row in read_tables(tmp_path, **SMALL)] == ["u.csv#0"]


def test_an_empty_table_without_header_is_no_chunk(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"")
    table = TableConfig(**SMALL, columns=("url", "text"))
    assert plan_table(CountingStore(str(tmp_path)), "t.csv", table, 10) == []


def test_a_table_without_rows_must_still_have_the_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"url,caption\n")
    with pytest.raises(ConfigError, match="no column 'text'"):
        plan_table(CountingStore(str(tmp_path)), "t.csv", TableConfig(**SMALL), 10)


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize("columns", [None, ("url", "text")])
@pytest.mark.parametrize("text", [b"url,text\rhttp://x/0,zero\r", b'url,text\rhttp://x/0,"a, b"\ru,v'])
def test_lines_that_end_with_a_carriage_return_alone_are_an_error_that_says_so(
    tmp_path: Path, text: bytes, columns: tuple[str, ...] | None, quoted: bool
) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(DataError, match=r"t\.csv: its lines end with a carriage return alone"):
        read_tables(tmp_path, **SMALL, columns=columns, quoted=quoted)


def test_a_long_file_of_carriage_returns_is_told_from_an_open_quote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_table, "_BLOCK", 1000)
    monkeypatch.setattr(csv_table, "_LONGEST_ROW", 5000)
    (tmp_path / "t.csv").write_bytes(b"url,text\r" + b"http://x/1,one\r" * 10_000)
    with pytest.raises(DataError, match="carriage return"):
        read_tables(tmp_path, **SMALL)
