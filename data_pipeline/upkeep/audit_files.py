"""The checks that an audit makes of one file: of rows, or of a shard. What they find meets in `audit`."""

from __future__ import annotations

import hashlib
import mmap
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from cluster.errors import ManifestMismatch, ObjectNotFound
from cluster.manifest import FileEntry, sha256_file
from cluster.store import ObjectStore
from data_pipeline.catalog import DatasetManifest, broken_file, index_of_file, load_index
from data_pipeline.records import ShardInfo
from data_pipeline.upkeep.scan import Problems, local_file, pc, read_rows, text_hashes

_ROW_COLUMNS = ("chunk", "row", "source", "fate", "reason", "retriable", "id", "shard", "index")


@dataclass
class RowsFound:
    """What a file of rows says."""

    problems: Problems = field(default_factory=Problems)
    rows_in: int = 0
    retriable: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Dropped rows by reason."""
    places: list[dict[str, Any]] = field(default_factory=list)
    """id, shard and index of the kept rows."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Hash of the source, chunk and row of every row."""
    broken: bool = False
    """The file could not be read to its end."""


@dataclass
class ShardFound:
    """What stands in a shard."""

    name: str
    number: int
    problems: Problems = field(default_factory=Problems)
    ids: np.ndarray | None = None
    """int64 [samples]; None where the index cannot be read."""


def number_of(name: str) -> int:
    """The number in the name of a shard or of a file of rows."""
    match = re.search(r"-(\d+)\.", name)
    if match is None:
        raise ManifestMismatch(f"{name}: no number in the name of the file; run maskclip preprocess again")
    return int(match[1])


def check_file(store: ObjectStore, entry: FileEntry) -> Problems:
    """Size and SHA-256 of one file."""
    problems = Problems()
    try:
        with local_file(store, entry.name) as path:
            _compare_bytes(path, entry, problems)
    except ObjectNotFound as error:
        problems.add("files", str(error))
    return problems


def check_rows(store: ObjectStore, entry: FileEntry) -> RowsFound:
    """The file of rows of one chunk: whole, in source order, each row with one fate, each id its source's."""
    found, chunk = RowsFound(), number_of(entry.name)
    try:
        with local_file(store, entry.name) as path:
            _compare_bytes(path, entry, found.problems)
            for batch in read_rows(path, _ROW_COLUMNS, entry.name):
                _check_batch(batch, chunk, entry.name, found)
    except (ObjectNotFound, ManifestMismatch) as error:
        found.broken = True
        found.problems.add("files", str(error))
    return found


def check_shard(store: ObjectStore, dataset: DatasetManifest, shard: ShardInfo) -> ShardFound:
    """One shard: its files whole, as many samples as promised, every image as it was written."""
    found = ShardFound(shard.name, number_of(shard.name))
    tar = dataset.format == "tar"
    columns = ["id", "key", "image_size", "image_crc32", *(["image_offset"] if tar else [])]
    try:
        if tar:
            found.problems.extend(check_file(store, dataset.files[shard.index_name]))
        with local_file(store, shard.name) as path:
            _compare_bytes(path, dataset.files[shard.name], found.problems)
            index = load_index(store, shard, columns) if tar else index_of_file(path, shard.name, columns)
            found.ids = index["id"].to_numpy()
            if index.num_rows != shard.num_samples:
                line = f"{shard.index_name}: {index.num_rows} rows, but the manifest says {shard.num_samples}"
                found.problems.add("shards", line)
            _check_images(_tar_images(path, index) if tar else _arrow_images(path, shard.name), index, found)
    except (ObjectNotFound, ManifestMismatch) as error:
        found.problems.add("files", str(error))
    return found


def _compare_bytes(path: Path, entry: FileEntry, problems: Problems) -> None:
    size = path.stat().st_size
    if size != entry.size:
        problems.add("files", f"{entry.name}: {size} bytes, but the manifest says {entry.size}")
    elif (found := sha256_file(path)) != entry.sha256:
        problems.add("files", f"{entry.name}: sha256 {found}, but the manifest says {entry.sha256}")


def _check_batch(batch: pa.RecordBatch, chunk: int, name: str, found: RowsFound) -> None:
    count, first, problems = batch.num_rows, found.rows_in, found.problems
    found.rows_in += count
    numbers = batch["row"].to_numpy()
    in_place = np.array_equal(numbers, np.arange(first, first + count)) and bool(
        (batch["chunk"].to_numpy() == chunk).all()
    )
    if not in_place:
        line = f"{name}: rows {first} to {first + count - 1} are not those of chunk {chunk} in their order"
        problems.add("rows", line)
    hashes = text_hashes(batch["source"])
    found.sources.append(
        {"high": hashes[:, 0], "low": hashes[:, 1], "row": numbers, "chunk": np.full(count, chunk)}
    )
    is_kept = pc.equal(batch["fate"], "kept")
    kept, dropped = batch.filter(is_kept), batch.filter(pc.equal(batch["fate"], "dropped"))
    found.kept += kept.num_rows
    found.retriable += dropped["retriable"].true_count
    for item in pc.value_counts(pc.fill_null(dropped["reason"], "")).to_pylist():
        found.reasons[item["values"]] += item["counts"]
    if other := count - kept.num_rows - dropped.num_rows:
        problems.add("fates", f"{name}: {other} rows are neither kept nor dropped")
    if unsaid := dropped["reason"].null_count:
        problems.add("fates", f"{name}: {unsaid} dropped rows have no reason")
    if any(kept[column].null_count for column in ("id", "shard", "index")):
        problems.add("fates", f"{name}: a kept row has no id, shard or index")
        return
    ids = kept["id"].to_numpy()
    should_be = (hashes[is_kept.to_numpy(zero_copy_only=False), 0] >> np.uint64(1)).astype(np.int64)
    for at in np.flatnonzero(ids != should_be):
        source = kept["source"][int(at)].as_py()
        problems.add("ids", f"{name}: id {ids[at]} is not that of its source {source!r}")
    found.places.append({"id": ids, "shard": kept["shard"].to_numpy(), "index": kept["index"].to_numpy()})


def _check_images(images: Iterator[memoryview], index: pa.Table, found: ShardFound) -> None:
    sizes, sums = index["image_size"].to_numpy(), index["image_crc32"].to_numpy()
    for at, image in enumerate(images):
        if len(image) != sizes[at] or zlib.crc32(image) != sums[at]:
            key = index["key"][at].as_py()
            line = f"{found.name}: the image of sample {key!r} (index {at}) is not what was written"
            found.problems.add("images", line)


def _tar_images(path: Path, index: pa.Table) -> Iterator[memoryview]:
    places = zip(index["image_offset"].to_pylist(), index["image_size"].to_pylist(), strict=True)
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        for _ in places:
            yield memoryview(b"")
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        for offset, size in places:
            with view[offset : offset + size] as image:
                yield image


def _arrow_images(path: Path, name: str) -> Iterator[memoryview]:
    with broken_file(name, "Arrow IPC"), pa.memory_map(str(path)) as source:
        reader = pyarrow.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            images = reader.get_batch(number)["image"]
            images.validate(full=True)
            for image in images:
                yield memoryview(image.as_buffer())


def joined_inputs(parts: Sequence[dict[str, Any]]) -> str:
    """Digest of the inputs of a merge, from those of its parts."""
    joined = "".join(str(part.get("inputs", {}).get("digest", "")) for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()
