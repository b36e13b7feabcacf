"""Committed data sets of small pictures, written by the shard writer and the manifest that real ones come
from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.manifest import Manifest, commit, file_entry
from cluster.store import open_store
from data_pipeline.records import (
    DATASET_KIND,
    DATASET_VERSION,
    Sample,
    ShardFormat,
    sample_id,
    shard_names,
)
from data_pipeline.shards.shard_writer import write_shard
from tests.support.raw_input import encode, noise


def picture(number: int, width: int = 48, height: int = 40) -> bytes:
    """A JPEG that shows its number: smooth colours, different for each."""
    return encode(noise(width, height, number), quality=90)


def sample(number: int, width: int = 48, height: int = 40) -> Sample:
    image = picture(number, width, height)
    return Sample(
        id=sample_id(f"small/{number:05d}"),
        key=f"{number:05d}",
        source=f"small/{number:05d}",
        image=image,
        sha256=hashlib.sha256(image).digest(),
        extension="jpg",
        caption=f"picture number {number}",
        width=width,
        height=height,
    )


def write_dataset(uri: str, shard_sizes: Sequence[int], format: ShardFormat = "tar", first: int = 0) -> None:
    """Commit a data set with these numbers of samples at `uri`; sample k in stored order has the key
    first + k."""
    store = open_store(uri)
    files, shards, rows = [], [], sum(shard_sizes)
    with tempfile.TemporaryDirectory() as name:
        for shard, size in enumerate(shard_sizes):
            path, index = (Path(name, part) for part in shard_names(shard, format))
            info = write_shard((sample(first + k) for k in range(size)), path, index, format)
            first += size
            shards.append(vars(info))
            for file in dict.fromkeys((path, index)):
                files.append(file_entry(file, file.name))
                store.put_file(file.name, file)
    meta = {
        "format": format,
        "shards": shards,
        "recipe": {},
        "counts": {"rows_in": rows, "kept": rows, "dropped": 0},
    }
    commit(store, Manifest(DATASET_KIND, DATASET_VERSION, tuple(files), meta))


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
