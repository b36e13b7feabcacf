"""Walks through all rows of a data set in bounded memory.

Files are read one after the other, a few at a time. Where rows of different files must meet, to find one that
stands twice, their fixed-size records are spread over buckets on local disk by a hash of the key, and one
bucket at a time is looked at (Grace hash join: Kitsuregawa, Tanaka, Moto-oka, 1983). The disk needed is the
size of the records, in the folder that TMPDIR names.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.errors import ObjectNotFound
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore
from cluster.store_local import LocalStore
from data_pipeline.catalog import broken_file
from data_pipeline.keyed import GOLDEN

BATCH_ROWS = 1 << 16
BUCKET_BYTES = 64 << 20
MOST_BUCKETS = 256
LINES_PER_KIND = 5
_FLUSH_BYTES = 16 << 20

Progress = Callable[[int, int, str], None]
"""Told of work: done, in all, a note."""

pc: Any = pyarrow.compute  # most of its functions are made at run time, where no type checker sees them

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def local_file(store: ObjectStore, name: str) -> Iterator[Path]:
    """A local path of the object: the file itself where the store is a folder, or a copy for the time being.

    Raises ObjectNotFound when there is none.
    """
    if isinstance(store, LocalStore):
        path = store.root / name
        if not path.is_file():
            raise ObjectNotFound(f"{store.uri}/{name}: no such file")
        yield path
        return
    with scratch_folder() as folder:
        path = folder / "file"
        store.get_file(name, path)
        yield path


def read_rows(path: Path, columns: Sequence[str], name: str) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file, some at a time; a broken one is a ManifestMismatch that names it."""
    with broken_file(name, "parquet"), pq.ParquetFile(path) as file:
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            batch.validate(full=True)
            yield batch


def in_order(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """`function` of each item by `workers` threads, results in order; at most 2 x `workers` are held."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def text_hashes(column: Any) -> np.ndarray:
    """First 16 bytes of the SHA-256 of each string of an Arrow column (null: of the empty one), uint64 [n, 2]
    big-endian, so that the first number shifted right by one is the `sample_id` of a source."""
    joined = b"".join(hashlib.sha256((text or "").encode()).digest()[:16] for text in column.to_pylist())
    return np.frombuffer(joined, ">u8").reshape(-1, 2).astype(np.uint64)


class Buckets:
    """Records of one dtype, whose first field is an 8-byte integer key, spread over files by that key.

    `expected` is about how many records will come; more only makes the buckets larger. Iterating gives each
    bucket once, sorted by key; records with equal keys are in one bucket and in the order of their coming.
    """

    def __init__(self, folder: Path, dtype: Any, expected: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = np.dtype(dtype)
        wanted = min(MOST_BUCKETS, -(-expected * self._dtype.itemsize // BUCKET_BYTES))
        self._bits = max(0, int(wanted - 1).bit_length())
        self._waiting: list[np.ndarray] = []

    def add(self, **columns: Any) -> None:
        """Add records, given as one array per field; a field that is the same for all may be a number."""
        names = self._dtype.names
        assert names is not None
        records = np.empty(len(columns[names[0]]), self._dtype)
        for name in names:
            records[name] = columns[name]
        self._waiting.append(records)
        if sum(part.nbytes for part in self._waiting) >= _FLUSH_BYTES:
            self._flush()

    def __iter__(self) -> Iterator[np.ndarray]:
        self._flush()
        for number in range(1 << self._bits):
            path = self._path(number)
            if path.exists():
                records = np.fromfile(path, self._dtype)
                path.unlink()
                yield records[np.argsort(records[self._key], kind="stable")]

    @property
    def _key(self) -> str:
        assert self._dtype.names is not None
        return self._dtype.names[0]

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}"

    def _flush(self) -> None:
        if not self._waiting:
            return
        records = np.concatenate(self._waiting)
        self._waiting.clear()
        if self._bits == 0:
            number = np.zeros(len(records), np.int64)
        else:
            keys = np.ascontiguousarray(records[self._key]).view(np.uint64)
            number = ((keys * GOLDEN) >> np.uint64(64 - self._bits)).astype(np.int64)
        order = np.argsort(number, kind="stable")
        records, ends = records[order], np.cumsum(np.bincount(number, minlength=1 << self._bits))
        for n, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
            if end > start:
                with self._path(n).open("ab") as file:
                    records[start:end].tofile(file)


class Problems:
    """Lines of what is wrong: a few of each kind, and how many more there are."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        """One problem of the kind `kind` ("id twice")."""
        self._counts[kind] += 1
        lines = self._lines.setdefault(kind, [])
        if len(lines) < LINES_PER_KIND:
            lines.append(line)

    def add_some(self, kind: str, lines: Iterable[str], count: int) -> None:
        """`count` problems of one kind, of which only some need to be written out."""
        shown = list(lines)
        for line in shown:
            self.add(kind, line)
        if count > len(shown):
            self._counts[kind] += count - len(shown)

    def extend(self, other: Problems) -> None:
        """Add what another one found."""
        self._counts += other._counts
        for kind, lines in other._lines.items():
            mine = self._lines.setdefault(kind, [])
            mine += lines[: LINES_PER_KIND - len(mine)]

    def __bool__(self) -> bool:
        return bool(self._counts)

    def lines(self) -> list[str]:
        """All of them, by kind in the order of finding."""
        found = []
        for kind, lines in self._lines.items():
            found += lines
            if self._counts[kind] > len(lines):
                found.append(f"{kind}: {self._counts[kind] - len(lines)} more")
        return found
