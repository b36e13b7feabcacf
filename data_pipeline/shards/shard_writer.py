"""Writes one shard: a WebDataset tar with the Arrow index that finds every sample in it, or one Arrow file.

The bytes depend on the samples alone: time stamps, owners and modes are fixed and the members of a sample are
in one order, so the same samples give the same sha256 on every machine. Both forms hold the same columns.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc

from cluster.errors import DataError
from data_pipeline.records import INDEX_SCHEMA, SHARD_SCHEMA, Sample, ShardFormat, ShardInfo
from data_pipeline.row_checksum import metadata, rows_crc32

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
# A record batch of an Arrow shard ends when it holds so much; the rest of the writer's memory is small.
_BATCH_BYTES = 16 << 20
_BATCH_ROWS = 1024

Columns = dict[str, list[Any]]


def write_shard(samples: Iterable[Sample], path: Path, index_path: Path, format: ShardFormat) -> ShardInfo:
    """Write `samples`, in their order, to `path` and in format tar their index to `index_path`.

    In format arrow the two paths are equal. One sample (tar) or 16 MB of them (arrow) are held in memory at a
    time, besides the rows of the index. Nothing is committed here.

    Raises:
        DataError: two samples have one id.
    """
    if format == "arrow":
        count = _write_arrow(_unique(samples, path), path)
    else:
        count = _write_tar(_unique(samples, path), path, index_path)
    return ShardInfo(path.name, index_path.name, count, path.stat().st_size)


def json_text(document: dict[str, Any]) -> str:
    """JSON on one line with sorted keys; what JSON or UTF-8 cannot hold is replaced, never an error."""
    try:
        text = json.dumps(
            document, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
        )
        text.encode()
    except (ValueError, TypeError):  # NaN, infinities, lone surrogates, keys of several types
        plain = _plain(document)
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _unique(samples: Iterable[Sample], path: Path) -> Iterator[Sample]:
    sources: dict[int, str] = {}
    for sample in samples:
        if sample.id in sources:
            raise DataError(
                f"{path.name}: {sample.source!r} and {sources[sample.id]!r} have the same id; "
                "rename one in the input"
            )
        sources[sample.id] = sample.source
        yield sample


def _write_tar(samples: Iterable[Sample], path: Path, index_path: Path) -> int:
    columns = _columns(INDEX_SCHEMA)
    names: set[str] = set()
    with open(path, "wb") as tar:
        for sample in samples:
            name = _member_name(sample, names)
            names.add(name)
            offset = _add_member(tar, f"{name}.{sample.extension}", sample.image)
            _add_member(tar, f"{name}.txt", sample.caption.encode())
            _add_member(tar, f"{name}.json", _describe(sample))
            _append(columns, {**_row(sample), "image_offset": offset})
        tar.write(_END_OF_ARCHIVE)
    # One uncompressed record batch: a reader maps the file and reaches any row without reading the others.
    with pa.OSFile(str(index_path), "wb") as sink, pyarrow.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(_batch(columns, INDEX_SCHEMA))
    return len(names)


def _write_arrow(samples: Iterable[Sample], path: Path) -> int:
    columns = _columns(SHARD_SCHEMA)
    waiting = count = crc = 0
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        for sample in samples:
            _append(columns, {**_row(sample), "meta": json_text(sample.meta), "image": sample.image})
            count += 1
            waiting += len(sample.image)
            if waiting >= _BATCH_BYTES or len(columns["id"]) >= _BATCH_ROWS:
                crc = _write_rows(writer, columns, crc)
                columns, waiting = _columns(SHARD_SCHEMA), 0
        if columns["id"] or not count:
            _write_rows(writer, columns, crc)
    return count


def _write_rows(writer: pyarrow.ipc.RecordBatchFileWriter, columns: Columns, before: int) -> int:
    """Append a record batch; from the checksum of the rows before it to its own."""
    batch = _batch(columns, SHARD_SCHEMA)
    crc = rows_crc32(batch, before)
    writer.write_batch(batch, custom_metadata=metadata(crc))
    return crc


def _member_name(sample: Sample, taken: set[str]) -> str:
    """The key; or the id in hexadecimal, where another input file had the same key or WebDataset would end
    the name at a dot within it."""
    if sample.key in taken or "." in sample.key.rpartition("/")[2]:
        return f"{sample.id:016x}"
    return sample.key


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
        "url": sample.url,
        "sha256": sample.sha256.hex(),
        "width": sample.width,
        "height": sample.height,
        "meta": sample.meta,
    }
    return json_text(document).encode()


def _row(sample: Sample) -> dict[str, Any]:
    """The columns that both forms have."""
    return {
        "id": sample.id,
        "key": sample.key,
        "caption": sample.caption,
        "width": sample.width,
        "height": sample.height,
        "image_size": len(sample.image),
        "image_crc32": zlib.crc32(sample.image),
        "extension": sample.extension,
        "source": sample.source,
        "url": sample.url,
        "sha256": sample.sha256,
    }


def _columns(schema: pa.Schema) -> Columns:
    return {name: [] for name in schema.names}


def _append(columns: Columns, row: dict[str, Any]) -> None:
    for name, value in row.items():
        columns[name].append(value)


def _batch(columns: Columns, schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
