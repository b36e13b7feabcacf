"""csv and tsv tables, streamed: rows are found byte by byte once, so that a chunk starts where it begins.

A row ends at a newline outside of quotes; a field is quoted if its first character is a double quote, and a
quote inside of quotes is doubled (RFC 4180). Blank lines are no rows. Bytes are UTF-8.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.errors import DataError
from cluster.store import ObjectStore
from data_pipeline.store_file import StoreFile

_BLOCK = 4 << 20
_LONGEST_ROW = 16 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class CsvForm:
    """How a file is written."""

    delimiter: str
    quoted: bool
    """False: a line is a row, and quotes are text."""


class Malformed(str):
    """What is wrong with a row, in place of its values."""


@dataclass(frozen=True)
class CsvMark:
    """Where a row begins."""

    row: int
    """Number of the row in the table, from 0, the header not counted."""
    offset: int
    """Byte of the file; in a .gz of what it unpacks to."""
    line: int
    """Line of the text, from 1, as an editor counts."""


def scan_csv(
    store: ObjectStore, name: str, form: CsvForm, has_header: bool, every: int
) -> tuple[list[str], list[CsvMark], CsvMark]:
    """Read a file once: the fields of its header, a mark at each `every`th row, and one after its last row.

    A file without a row has no mark; one without a byte has no header either.

    Raises:
        DataError: a quote is opened and never closed, the header cannot be read, lines end with a carriage
            return alone, or a .gz is broken; names the file, the line and the byte.
    """
    header: list[str] = []
    marks: list[CsvMark] = []
    row = 0
    end = CsvMark(0, 0, 1)
    with _opened(store, name) as file:
        first, records = b"", 0
        for offset, line, data in _records(file, form, f"{store.uri}/{name}", 0, 1):
            first, records = first or data, records + 1
            if has_header and not header:
                _refuse_returns(data, form, f"{store.uri}/{name}")
                fields = _fields(data, form)
                if isinstance(fields, Malformed):
                    raise DataError(f"{store.uri}/{name}: line {line}: the header is {fields}; mend it")
                header = [field.strip() for field in fields]
            else:
                if row % every == 0:
                    marks.append(CsvMark(row, offset, line))
                row += 1
            end = CsvMark(row, offset + len(data), line + data.count(b"\n"))
        if records == 1:  # without a header a carriage return may be text, but not in a file of one line
            _refuse_returns(first, form, f"{store.uri}/{name}")
    return header, marks, end


def read_csv(
    store: ObjectStore, name: str, form: CsvForm, width: int, start: CsvMark, end: int
) -> Iterator[list[str] | Malformed]:
    """The fields of the rows from `start` to the byte `end`; a row without `width` fields is `Malformed`.

    Reads those bytes and no others; a .gz must be unpacked from its beginning.
    """
    with _opened(store, name, start.offset, end) as file:
        records = _records(file, form, f"{store.uri}/{name}", start.offset, start.line)
        for offset, line, data in records:
            fields = _fields(data, form)
            if not isinstance(fields, Malformed) and len(fields) != width:
                fields = Malformed(f"has {len(fields)} fields, not {width}")
            if isinstance(fields, Malformed):
                fields = Malformed(f"line {line}, byte {offset}: {fields}")
            yield fields


@contextmanager
def _opened(store: ObjectStore, name: str, start: int = 0, end: int | None = None) -> Iterator[io.RawIOBase]:
    """Bytes [start, end) of the text of the file."""
    size = store.size(name)
    if not name.lower().endswith(".gz"):
        # A last line without newline ends, by its row, one byte after the file.
        yield StoreFile(store, name, start, size if end is None else min(size, end))
        return
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(StoreFile(store, name, 0, size), _BLOCK)) as file:
            left = start
            while left:
                skipped = len(file.read(min(left, _BLOCK)))
                if not skipped:
                    raise EOFError("ends too early")
                left -= skipped
            yield _Limited(file, None if end is None else end - start)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{store.uri}/{name}: not a whole gzip file ({error}); fetch it again") from error


class _Limited(io.RawIOBase):
    """The next `length` bytes of a file."""

    def __init__(self, file: gzip.GzipFile, length: int | None) -> None:
        super().__init__()
        self._file, self._left = file, length

    def read(self, size: int = -1) -> bytes:
        if self._left is None:
            return self._file.read(size)
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _records(
    file: io.RawIOBase, form: CsvForm, shown: str, offset: int, line: int
) -> Iterator[tuple[int, int, bytes]]:
    """(byte, line, bytes with the newline) of every row of `file`, whose first byte is `offset`."""
    match = _pattern(form).match
    buffer = b""
    position = 0
    while True:
        block = file.read(_BLOCK) or b""
        if not offset and not buffer and block.startswith(_BOM):
            offset, block = len(_BOM), block[len(_BOM) :]
        buffer = buffer[position:] + block
        position = 0
        if not block and buffer and not buffer.endswith(b"\n"):
            buffer += b"\n"  # the last line of many files has none
        while found := match(buffer, position):
            data = found[0]
            if data.strip(b"\r\n"):
                yield offset, line, data
            position = found.end()
            offset += len(data)
            line += data.count(b"\n")
        if position < len(buffer) and (not block or len(buffer) - position > _LONGEST_ROW):
            _refuse_returns(buffer[position : position + _LONGEST_ROW], form, shown)
            raise DataError(
                f"{shown}: line {line}, byte {offset}: a row begins here and does not end, so a quote is not "
                "closed; mend it, or set source.table.quoted to false if quotes are text there"
            )
        if not block:
            return


def _refuse_returns(data: bytes, form: CsvForm, shown: str) -> None:
    """Raise DataError if `data` is one line by its newlines and several by its carriage returns."""
    bare = re.sub(rb'"[^"]*+"', b"", data) if form.quoted else data
    bare = bare.rstrip(b"\r\n")
    if b"\r" in bare and b"\n" not in bare:
        raise DataError(
            f"{shown}: its lines end with a carriage return alone (CR, as on old Macs), and must end with a "
            "newline (LF or CRLF); convert its line ends"
        )


def _pattern(form: CsvForm) -> re.Pattern[bytes]:
    if not form.quoted:
        return re.compile(rb"[^\n]*+\n")
    d = re.escape(form.delimiter.encode())
    # Possessive throughout: a row that does not end in the buffer must not be tried in other ways.
    field = rb'(?>"[^"]*+(?:""[^"]*+)*+"[^%b\n]*+|(?!")[^%b\n]*+)' % (d, d)
    return re.compile(rb"%b(?:%b%b)*+\n" % (field, d, field))


def _fields(data: bytes, form: CsvForm) -> list[str] | Malformed:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8: {error.reason} at its byte {error.start}")
    text = text.removesuffix("\n").removesuffix("\r")
    if not form.quoted or '"' not in text:
        return text.split(form.delimiter)
    try:
        return next(csv.reader([text], delimiter=form.delimiter, strict=True))
    except csv.Error as error:
        return Malformed(f"not csv: {error}")
