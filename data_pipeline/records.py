"""The rows of the data pipeline and the schemas of what it stores.

A row comes in as a `SourceRow`; it leaves as a `Sample` of a shard or as a dropped row with its reason, never
as nothing. `docs/data-format.md` describes the files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

DATASET_KIND = "dataset"
DATASET_VERSION = 2

ShardFormat = Literal["tar", "arrow"]

_SAMPLE_FIELDS = [
    pa.field("id", pa.int64(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("caption", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("image_size", pa.int64(), nullable=False),
    pa.field("image_crc32", pa.int64(), nullable=False),
    pa.field("extension", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("url", pa.string()),
    pa.field("sha256", pa.binary(32), nullable=False),  # of the original image's bytes
]

# Beside a tar: one row per sample, in the order of the tar; the image lies at image_offset of the tar.
INDEX_SCHEMA = pa.schema(
    [*_SAMPLE_FIELDS, pa.field("image_offset", pa.int64(), nullable=False)],
    metadata={"maskclip.index": str(DATASET_VERSION)},
)

# A shard in one Arrow IPC file: the same columns, with the image and the metadata in the row.
SHARD_SCHEMA = pa.schema(
    [
        *_SAMPLE_FIELDS,
        pa.field("meta", pa.string(), nullable=False),  # JSON object
        pa.field("image", pa.large_binary(), nullable=False),
    ],
    metadata={"maskclip.shard": str(DATASET_VERSION)},
)

# The fate of every source row: one file per chunk, in source order.
ROWS_SCHEMA = pa.schema(
    [
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("fate", pa.string(), nullable=False),  # kept | dropped
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("retriable", pa.bool_(), nullable=False),  # dropped for what might pass another day
        pa.field("id", pa.int64()),
        pa.field("shard", pa.int32()),
        pa.field("index", pa.int32()),
        pa.field("sha256", pa.binary(32)),  # of the original image's bytes, where there were any
        pa.field("fetch", pa.string()),  # JSON: what the download decided
    ],
    metadata={"maskclip.rows": str(DATASET_VERSION)},
)

# The same while the job runs: one row per source row and round, with what later stages need.
STAGED_SCHEMA = pa.schema(
    [
        *(ROWS_SCHEMA.field(name) for name in ("chunk", "row", "key", "source", "url", "reason", "detail")),
        *(ROWS_SCHEMA.field(name) for name in ("retriable", "id", "sha256", "fetch")),
        pa.field("caption", pa.string()),
        pa.field("meta", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("extension", pa.string()),
        pa.field("image_file", pa.string()),  # object that holds the encoded image; null: the row is dropped
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("image_crc32", pa.int64()),
        pa.field("pixels", pa.binary(16)),  # hash of the stored pixels and their size
        pa.field("perceptual", pa.uint64()),  # near images differ in few bits
    ]
)


@dataclass(frozen=True)
class SourceRow:
    """One input row: the image as it was stored, not decoded, or the address to fetch it from."""

    chunk: int
    row: int
    """Number of the row in its chunk, from 0, in stored order."""
    key: str
    source: str
    """`<tar>/<key>`, `<table>#<row of the table>`, in a folder `<key>`; unique in the input, and what the id
    is made of."""
    caption: str
    meta: dict[str, Any]
    image: bytes | None = None
    url: str | None = None
    fetch: dict[str, Any] | None = None
    """What the download decided: status, final_url, robots, x_robots_tag; nothing that differs from run to
    run."""


@dataclass(frozen=True)
class Reject:
    """An input row that will not be in the data set, and why."""

    chunk: int
    row: int
    key: str
    source: str
    reason: str
    """One of a small set of words such as "undecodable"; rejects are counted by it."""
    detail: str
    retriable: bool = False
    """The cause may pass: a timeout, a busy server. A rerun tries the row again."""
    url: str | None = None
    fetch: dict[str, Any] | None = None

    @classmethod
    def of(cls, row: SourceRow, reason: str, detail: str, retriable: bool = False) -> Reject:
        """Reject `row`, keeping where it came from."""
        return cls(row.chunk, row.row, row.key, row.source, reason, detail, retriable, row.url, row.fetch)


@dataclass(frozen=True)
class Prepared:
    """What is stored of an image: the encoded bytes, their size in pixels, and the marks of its content."""

    image: bytes
    extension: str
    width: int
    height: int
    pixels: bytes | None = None
    """16 bytes; equal for equal stored pixels. None where fingerprints were not asked for."""
    perceptual: int | None = None
    """64-bit perceptual hash."""


@dataclass(frozen=True)
class Sample:
    """One row of a shard: an encoded image of `width` x `height` pixels and its caption."""

    id: int
    key: str
    source: str
    image: bytes
    extension: str
    caption: str
    width: int
    height: int
    sha256: bytes
    """Of the original image's bytes."""
    url: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardInfo:
    """A committed shard: its file, its Arrow index (the same name in format arrow), the number of samples and
    the bytes of the file."""

    name: str
    index_name: str
    num_samples: int
    size: int


def sample_id(source: str) -> int:
    """63-bit id of the input row `source`: the same in every run and data set (not from the paper)."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") >> 1


def shard_names(index: int, format: ShardFormat) -> tuple[str, str]:
    """Names of the file and of the Arrow index of shard number `index`."""
    arrow = f"shard-{index:06d}.arrow"
    return (f"shard-{index:06d}.tar" if format == "tar" else arrow), arrow


def rows_name(chunk: int) -> str:
    """Key of the final rows of a chunk."""
    return f"rows/rows-{chunk:06d}.parquet"
