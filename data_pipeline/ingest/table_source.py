"""Tables of addresses and captions, such as LAION's Parquet and YFCC's csv or tsv: mapping, plan, rows.

Every table is cut in runs of rows by number before any work starts. The recipe says which column is what; a
column that the table does not have is an error before the first row is read.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import unquote_plus

import pyarrow as pa

from cluster.errors import ConfigError, DataError
from cluster.store import ObjectStore
from data_pipeline.ingest.captions import CaptionChoice, choose_caption
from data_pipeline.ingest.csv_table import CsvForm, CsvMark, Malformed, read_csv, scan_csv
from data_pipeline.ingest.parquet_table import parquet_shape, read_parquet
from data_pipeline.ingest.sample_files import key_fault, storable
from data_pipeline.records import Reject, SourceRow, sample_id

TABLE_EXTENSIONS = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Which column of a table is what. Names are as in the file, upper and lower case being different."""

    url_column: str
    """Address of the image. LAION: URL."""
    caption_columns: tuple[str, ...]
    """One or more columns of text. LAION: TEXT. YFCC: title and description."""
    caption_choice: CaptionChoice = "first"
    """Of several caption columns: first takes the first that is not blank; draw takes one of those that are
    not blank, by a keyed draw per sample; join takes all of them, a space between."""
    caption_seed: int = 0
    """Another seed draws other captions."""
    percent_encoded: bool = False
    """Caption columns are written as in an address, `+` for a space and `%41` for A, as in YFCC100M's own
    files."""
    key_column: str | None = None
    """Name of the sample in the shard, for example a photo id; null: the number of the row in its table."""
    meta_columns: tuple[str, ...] | Literal["all"] = ()
    """Columns that stay with the sample as metadata, and that filters.metadata can test; all: every column
    that is neither address nor caption."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of csv and tsv files that have no header line; null: the first line has them."""
    quoted: bool = True
    """csv and tsv: fields may stand in double quotes and then hold newlines. false: a line is a row, and
    quotes are text, as in YFCC100M's own files."""

    def __post_init__(self) -> None:
        if not self.url_column or not self.caption_columns:
            raise ValueError(
                "source.table needs names: set source.table.url_column and source.table.caption_columns"
            )
        if self.columns is not None and len(set(self.columns)) != len(self.columns):
            raise ValueError("source.table.columns has a name twice: give every column its own")

    def named(self) -> dict[str, str]:
        """Every column that the mapping names, with the key that names it."""
        meta = () if self.meta_columns == "all" else self.meta_columns
        named = dict.fromkeys(meta, "meta_columns")
        if self.key_column is not None:
            named[self.key_column] = "key_column"
        return {
            **named,
            **dict.fromkeys(self.caption_columns, "caption_columns"),
            self.url_column: "url_column",
        }


@dataclass(frozen=True)
class TablePart:
    """A run of rows of one table."""

    start: int
    """Number of the first row in the table, from 0."""
    rows: int
    table_size: int
    """Bytes of the whole file, by which a later change is noticed."""
    columns: tuple[str, ...]
    """Of the table, in its order."""
    offset: int = 0
    """csv and tsv: first byte of the run; in a .gz of what it unpacks to."""
    end: int = 0
    """csv and tsv: the byte after the run."""
    line: int = 0
    """csv and tsv: line of the text at which the run begins, from 1."""


def is_table(name: str) -> bool:
    """Whether the object is read: marks of other programs, which begin with _ or a dot, are not."""
    return name.lower().endswith(TABLE_EXTENSIONS) and name.rpartition("/")[2][0] not in "._"


def plan_table(store: ObjectStore, name: str, config: TableConfig, rows_per_chunk: int) -> list[TablePart]:
    """Cut a table in runs of `rows_per_chunk` rows. Parquet: by its footer; csv and tsv: by reading it once.
    A table without rows is cut in none, and an empty csv is one.

    Raises:
        ConfigError: a column of the mapping is not there, or is no text.
        DataError: the file is broken.
    """
    size = store.size(name)
    if name.lower().endswith(".parquet"):
        schema, rows = parquet_shape(store, name)
        _check_columns(f"{store.uri}/{name}", schema.names, config)
        _check_types(f"{store.uri}/{name}", schema, config)
        starts = range(0, rows, rows_per_chunk)
        return [TablePart(s, min(rows_per_chunk, rows - s), size, tuple(schema.names)) for s in starts]
    header, marks, last = scan_csv(store, name, _form(name, config), config.columns is None, rows_per_chunk)
    if not header and not marks:
        return []
    columns = tuple(header) if config.columns is None else config.columns
    _check_columns(f"{store.uri}/{name}", columns, config)
    return [
        TablePart(mark.row, after.row - mark.row, size, columns, mark.offset, after.offset, mark.line)
        for mark, after in pairwise([*marks, last])
    ]


def read_part(
    store: ObjectStore, name: str, part: TablePart, config: TableConfig, chunk: int
) -> Iterator[SourceRow | Reject]:
    """Yield the rows of `part` in order, each once; what cannot be a row is a `Reject`.

    Raises:
        DataError: the table is broken, or not the one that was planned.
    """
    size = store.size(name)
    if size != part.table_size:
        raise DataError(
            f"{store.uri}/{name}: had {part.table_size} bytes, now {size}; "
            "do not change the input while it is read"
        )
    columns = list(part.columns)
    if name.lower().endswith(".parquet"):
        wanted = None if config.meta_columns == "all" else list(config.named())
        values = read_parquet(store, name, wanted, part.start, part.rows)
        columns = columns if wanted is None else wanted
    else:
        mark = CsvMark(part.start, part.offset, part.line)
        values = read_csv(store, name, _form(name, config), len(columns), mark, part.end)
    row = 0
    for row, one in enumerate(values, start=1):
        source = f"{storable(name)}#{part.start + row - 1}"
        if isinstance(one, Malformed):
            yield Reject(chunk, row - 1, _number(part, row - 1), source, "malformed_row", str(one))
        else:
            yield _to_row(dict(zip(columns, one, strict=True)), config, part, chunk, row - 1, source)
    if row != part.rows:
        raise DataError(f"{store.uri}/{name}: {row} rows from row {part.start} on, {part.rows} were planned")


def _form(name: str, config: TableConfig) -> CsvForm:
    return CsvForm("\t" if ".tsv" in name.lower()[-7:] else ",", config.quoted)


def _number(part: TablePart, row: int) -> str:
    return f"{part.start + row:09d}"


def _to_row(
    values: dict[str, Any], config: TableConfig, part: TablePart, chunk: int, row: int, source: str
) -> SourceRow | Reject:
    raw_key = None if config.key_column is None else values[config.key_column]
    key = _number(part, row) if config.key_column is None else str(raw_key).strip()
    url = _text(values[config.url_column])
    url = url.strip() if url is not None else None

    def reject(reason: str, detail: str) -> Reject:
        return Reject(chunk, row, storable(key), source, reason, detail, url=url or None)

    if config.key_column is not None and (raw_key is None or not key):
        return reject("no_key", f"column {config.key_column} is empty")
    fault = key_fault(key)
    if fault is not None:
        return reject("unsafe_key", fault)
    if not url:
        return reject("no_url", f"column {config.url_column} is empty")
    texts = [_text(values[name]) for name in config.caption_columns]
    if config.percent_encoded:
        texts = [text and unquote_plus(text, errors="replace") for text in texts]
    caption = choose_caption(texts, config.caption_choice, sample_id(source), config.caption_seed)
    if not caption:
        reason = "empty_caption" if any(texts) else "no_caption"
        return reject(reason, f"nothing in {', '.join(config.caption_columns)}")
    if config.meta_columns == "all":
        names = [c for c in values if c != config.url_column and c not in config.caption_columns]
    else:
        names = list(config.meta_columns)
    meta = {name: _plain(values[name]) for name in names}
    return SourceRow(chunk, row, key, source, caption, meta, None, url)


def _text(value: Any) -> str | None:
    # Text in a binary column: checked at the plan to be text or bytes, so nothing else comes here.
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    """As JSON has it: what it cannot hold is text, NaN and infinities are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _check_columns(shown: str, there: list[str] | tuple[str, ...], config: TableConfig) -> None:
    for column, key in config.named().items():
        count = list(there).count(column)
        if not count:
            raise ConfigError(
                f"{shown}: no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}: "
                f"change source.table.{key}"
            )
        if count > 1:
            raise ConfigError(f"{shown}: {count} columns are {column!r}: change source.table.{key}")


def _check_types(shown: str, schema: pa.Schema, config: TableConfig) -> None:
    for column, key in config.named().items():
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = any(test(kind) for test in _TEXT) or (key == "key_column" and pa.types.is_integer(kind))
        if key != "meta_columns" and not text:
            raise ConfigError(f"{shown}: column {column!r} is {kind}, not text: change source.table.{key}")


_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_null,
)
