"""Random access to the samples of one committed shard, of either format: a row of its index, one read, one
checksum. `dataset_reader.py` reads a whole data set.

Columns are read where Arrow put them, in the mapped file: opening a shard costs the same for any number of
samples, and a sample costs a read, a CRC and a few slices.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from zlib_ng.zlib_ng import crc32  # the CRC of zlib, four times as fast; it is most of a read's time

from cluster.errors import ShardCorrupt
from data_pipeline.catalog import read_index

FetchImage = Callable[[int, int, int], "bytes | memoryview"]
"""Row, offset in the shard's file, size -> the bytes there."""


class StoredSample(NamedTuple):
    """One sample as it is stored; `image` is the encoded file, in format arrow a view of the mapped shard."""

    id: int
    key: str
    caption: str
    image: bytes | memoryview
    width: int
    height: int


_make = tuple.__new__  # what StoredSample(...) calls, without the call in between


class ShardReader:
    """One shard: the index mapped into memory, images read in place. `close` frees the descriptor.

    In format arrow the two paths are equal and images are views of the mapping: no byte is copied, and a file
    that somebody shortens while it is open kills the process (SIGBUS). Committed files do not change.
    With `fetch` images are read by it, and `path` only names the shard in errors.

    Raises FileNotFoundError when a file is absent, ShardCorrupt or ManifestMismatch when the index cannot be
    read.
    """

    def __init__(self, path: Path | str, index_path: Path, fetch: FetchImage | None = None) -> None:
        self._name = str(path)
        self._descriptor: int | None = None
        mapped = _mapped(index_path)
        table = read_index(mapped, str(index_path))
        self.table = table.drop_columns("image") if path == index_path else table
        """The columns of the index, without the images: one row per sample."""
        self._rows = table.num_rows
        self._ids, self._widths, self._heights, self._sizes, self._crcs = (
            _numbers(table[name]) for name in ("id", "width", "height", "image_size", "image_crc32")
        )
        self._keys, self._captions = _texts(table["key"]), _texts(table["caption"])
        self._fetch = fetch
        self._whole = memoryview(mapped).cast("B")
        if path == index_path:
            self._offsets = _places(table["image"], mapped)
        else:
            self._offsets = _numbers(table["image_offset"])
            if fetch is None:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return self._rows

    def close(self) -> None:
        """Close the file; the reader cannot be used afterwards. Images that it gave stay valid."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def place(self, index: int) -> tuple[int, int]:
        """Offset and size of the image of row `index` in the shard's file."""
        return self._offsets[index], self._sizes[index]

    def sample(self, index: int) -> StoredSample:
        """The sample in row `index`.

        Raises:
            IndexError: there is no such row.
            ShardCorrupt: the image's bytes are not those that were written; names the shard and the key.
        """
        return next(self.samples((index,)))

    def samples(self, indices: Iterable[int]) -> Iterator[StoredSample]:
        """The samples in these rows (Python ints), in this order; raises as `sample`, at the one concerned.

        They come one by one: the memory of an image that was let go serves the next.
        """
        # Local names: this loop is the whole cost of reading.
        ids, widths, heights, rows = self._ids, self._widths, self._heights, self._rows
        offsets, sizes, crcs = self._offsets, self._sizes, self._crcs
        (key_ends, keys), (caption_ends, captions) = self._keys, self._captions
        descriptor, whole, fetch, pread, make = self._descriptor, self._whole, self._fetch, os.pread, _make
        for row in indices:
            if not 0 <= row < rows:
                raise IndexError(f"{self._name}: no row {row}, the shard has {rows}")
            offset, size = offsets[row], sizes[row]
            if descriptor is not None:
                image = pread(descriptor, size, offset)
            elif fetch is not None:
                image = fetch(row, offset, size)
            else:
                image = whole[offset : offset + size]
            if crc32(image) != crcs[row]:
                raise self._damaged(row, len(image))
            key = str(keys[key_ends[row] : key_ends[row + 1]], "utf-8")
            caption = str(captions[caption_ends[row] : caption_ends[row + 1]], "utf-8")
            yield make(StoredSample, (ids[row], key, caption, image, widths[row], heights[row]))

    def _damaged(self, row: int, got: int) -> ShardCorrupt:
        size, key = self._sizes[row], self.table["key"][row].as_py()
        what = f"ends after {got} of {size} bytes" if got != size else "has a wrong checksum"
        return ShardCorrupt(
            f"{self._name}: the image of sample {key!r} at byte {self._offsets[row]} {what}; "
            "restore the shard or preprocess again"
        )


def _mapped(path: Path) -> pa.Buffer:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        raise ShardCorrupt(f"{path}: the index is empty; copy the shard again")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()  # keeps the mapping


def _numbers(column: pa.ChunkedArray) -> memoryview:
    # An item of a memoryview is a Python int, several times faster than an item of an array.
    joined = _joined(column)
    kind = "q" if joined.type == pa.int64() else "i"
    return memoryview(joined.buffers()[1]).cast(kind)[joined.offset : joined.offset + len(joined)]


def _texts(column: pa.ChunkedArray) -> tuple[memoryview, memoryview]:
    """Where the strings begin and end in the UTF-8 that follows: string k in [ends[k], ends[k + 1])."""
    joined = _joined(column)
    _, offsets, data = joined.buffers()
    ends = memoryview(offsets).cast("i")[joined.offset : joined.offset + len(joined) + 1]
    return ends, memoryview(data if data is not None else b"").cast("B")


def _places(column: pa.ChunkedArray, mapped: pa.Buffer) -> memoryview:
    """Where in the mapped file the image of each row begins."""
    places = array("q")
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        start = data.address - mapped.address if data is not None else 0
        begins = memoryview(offsets).cast("q")[chunk.offset : chunk.offset + len(chunk)]
        places.extend(start + begin for begin in begins)
    return memoryview(places)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """One array; without a copy where there is one chunk."""
    if column.num_chunks == 1:
        return column.chunk(0)
    joined = column.combine_chunks()
    return joined if isinstance(joined, pa.Array) else pa.concat_arrays(joined.chunks)
