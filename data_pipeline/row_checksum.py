"""A checksum of the rows of an Arrow shard, so that opening one reads its rows and none of its images.

Each record batch carries the CRC-32 of all that it and those before it hold, but for the bytes of the images:
each of these has a CRC-32 of its own.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
from zlib_ng.zlib_ng import crc32

from data_pipeline.records import SHARD_SCHEMA

KEY = b"rows_crc32"


def rows_crc32(batch: pa.RecordBatch, before: int) -> int:
    """The checksum of `batch`, of SHARD_SCHEMA; `before` is that of the batch before it, 0 for the first."""
    crc = crc32(struct.pack("<q", batch.num_rows), before)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for number, buffer in enumerate(column.buffers()):
            # Of a column of binaries: validity, where each begins and ends, and their bytes.
            if buffer is not None and not (name == "image" and number == 2):
                crc = crc32(buffer, crc)
    return crc


def metadata(crc: int) -> dict[bytes, bytes]:
    """What the batch with this checksum carries."""
    return {KEY: f"{crc:08x}".encode()}


def rows_are_whole(path: Path, rows: int) -> bool:
    """Whether the Arrow shard at `path` has so many rows, and those that were written.

    False also where that cannot be told: no Arrow file, or one without checksums. Raises FileNotFoundError.
    """
    crc = 0
    try:
        with pa.memory_map(str(path)) as file:
            reader = pyarrow.ipc.open_file(file)
            if not reader.schema.equals(SHARD_SCHEMA, check_metadata=True):
                return False
            for number in range(reader.num_record_batches):
                batch, carried = reader.get_batch_with_custom_metadata(number)
                crc, rows = rows_crc32(batch, crc), rows - batch.num_rows
                if carried is None or carried.get(KEY) != metadata(crc)[KEY]:
                    return False
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, OSError):  # an empty file cannot be mapped
        return False
    return rows == 0
