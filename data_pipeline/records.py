"""The rows of the data pipeline and the schemas of what it stores.

A row comes in as a `RawSample`; it leaves as a `Sample` of a shard or as a `Reject` of
`rejects.parquet`, never as nothing. `docs/data-format.md` describes the files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

DATASET_KIND = "dataset"
DATASET_VERSION = 1
REJECTS_NAME = "rejects.parquet"

# One row per sample of a shard, in the order of the tar.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("image_offset", pa.int64(), nullable=False),
        pa.field("image_size", pa.int64(), nullable=False),
        pa.field("image_crc32", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("extension", pa.string(), nullable=False),
    ],
    metadata={"maskclip.index": str(DATASET_VERSION)},
)

# One row per input row that did not become a sample, in the order of the input.
REJECTS_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in ("key", "source", "reason", "detail")])


@dataclass(frozen=True)
class RawSample:
    """One input row: the image as it was stored, not decoded, and its caption."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]
    source: str
    """`<name of the tar>/<key>`, in a folder `<key>`; unique in the input, and what the id is made of."""


@dataclass(frozen=True)
class Reject:
    """An input row that will not be in the data set, and why."""

    key: str
    source: str
    reason: str
    """One of a small set of words such as "undecodable"; rejects are counted by it."""
    detail: str


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
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardInfo:
    """A committed shard: its tar, its Arrow index, the number of samples and the bytes of the tar."""

    name: str
    index_name: str
    num_samples: int
    size: int


def sample_id(source: str) -> int:
    """63-bit id of the input row `source`: the same in every run and data set (not from the paper)."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") >> 1


def shard_names(index: int) -> tuple[str, str]:
    """Names of the tar and of the Arrow index of shard number `index`."""
    return f"shard-{index:06d}.tar", f"shard-{index:06d}.arrow"
