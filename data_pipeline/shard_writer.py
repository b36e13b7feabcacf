"""Writes one shard: a WebDataset tar and the Arrow index that finds every sample in it.

The bytes depend on the samples alone: time stamps, owners and modes are fixed and the members of a sample are
in one order, so the same samples give the same sha256 on every machine.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc

from cluster.errors import DataError
from data_pipeline.records import INDEX_SCHEMA, Sample, ShardInfo

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


def write_shard(samples: Iterable[Sample], tar_path: Path, index_path: Path) -> ShardInfo:
    """Write `samples`, in their order, to `tar_path` and their index to `index_path`.

    One sample is held in memory at a time, besides the rows of the index. Nothing is committed here.

    Raises:
        DataError: two samples share a key or an id.
    """
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    keys: set[str] = set()
    ids: dict[int, str] = {}
    with open(tar_path, "wb") as tar:
        for sample in samples:
            if sample.key in keys:
                raise DataError(
                    f"{tar_path.name}: two samples have the key {sample.key!r}; rename one in the input"
                )
            if sample.id in ids:
                raise DataError(
                    f"{tar_path.name}: {sample.source!r} and {ids[sample.id]!r} have the same id; "
                    "rename one in the input"
                )
            keys.add(sample.key)
            ids[sample.id] = sample.source
            offset = _add_member(tar, f"{sample.key}.{sample.extension}", sample.image)
            _add_member(tar, f"{sample.key}.txt", sample.caption.encode())
            _add_member(tar, f"{sample.key}.json", _describe(sample))
            row = {
                "id": sample.id,
                "key": sample.key,
                "caption": sample.caption,
                "width": sample.width,
                "height": sample.height,
                "image_offset": offset,
                "image_size": len(sample.image),
                "image_crc32": zlib.crc32(sample.image),
                "source": sample.source,
                "extension": sample.extension,
            }
            for name, value in row.items():
                columns[name].append(value)
        tar.write(_END_OF_ARCHIVE)
        size = tar.tell()
    _write_index(columns, index_path)
    return ShardInfo(name=tar_path.name, index_name=index_path.name, num_samples=len(keys), size=size)


def _add_member(tar: BinaryIO, name: str, payload: bytes) -> int:
    """Append one regular file and return the offset of its payload."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner's names are empty
    info.size = len(payload)
    info.mode = 0o644
    # Plain ustar headers, except for a name that is too long or not ASCII: pax puts a header before it.
    tar.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    offset = tar.tell()
    tar.write(payload)
    tar.write(bytes(-len(payload) % tarfile.BLOCKSIZE))
    return offset


def _describe(sample: Sample) -> bytes:
    """The .json member: what the index knows about the sample, and the metadata that came with it."""
    document = {
        "id": sample.id,
        "source": sample.source,
        "width": sample.width,
        "height": sample.height,
        "meta": sample.meta,
    }
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _write_index(columns: dict[str, list[Any]], path: Path) -> None:
    # One uncompressed record batch: a reader maps the file and reaches any row without reading the others.
    batch = pa.record_batch([pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA], schema=INDEX_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(batch)
