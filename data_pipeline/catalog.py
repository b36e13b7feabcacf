"""Committed data sets: load one by its manifest, read its index, check it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from cluster import manifest as manifests
from cluster.errors import DataError, ManifestMismatch, ObjectNotFound
from cluster.manifest import FileEntry, Manifest
from cluster.store import ObjectStore, open_store
from cluster.store_local import LocalStore
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, ShardFormat, ShardInfo
from data_pipeline.store_file import StoreFile

ROWS_FOLDER = "rows/"
DROPPED = "dropped/"
_BODY_COLUMNS = ("image", "meta")
_READ_AHEAD = 1 << 20


@dataclass(frozen=True)
class DatasetManifest:
    """What a reader needs to know about a committed data set; `digest` identifies it, whatever its place."""

    uri: str
    digest: str
    format: ShardFormat
    shards: tuple[ShardInfo, ...]
    num_samples: int
    recipe: dict[str, Any]
    counts: dict[str, int]
    """Rows by fate: rows_in, kept, dropped, and dropped/<reason>."""
    files: dict[str, FileEntry]
    """Every file of the set by name, with its size and sha256."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped input rows by reason."""
        return {k.removeprefix(DROPPED): n for k, n in sorted(self.counts.items()) if k.startswith(DROPPED)}

    @property
    def rows_files(self) -> tuple[str, ...]:
        """Names of the files that hold the fate of every source row, in the order of the chunks."""
        return tuple(sorted(name for name in self.files if name.startswith(ROWS_FOLDER)))


def load_dataset(uri: str) -> DatasetManifest:
    """Load the manifest of the data set at `uri`, and nothing else of it.

    Raises:
        ObjectNotFound: there is no manifest, so nothing was committed there.
        ManifestMismatch: the manifest is not one of a data set that this version reads.
        DataError: the data set has no samples.
    """
    store = open_store(uri)
    return describe(store, manifests.load(store, DATASET_KIND, DATASET_VERSION))


def describe(store: ObjectStore, manifest: Manifest) -> DatasetManifest:
    """Read the `meta` of a data set's manifest; raises as `load_dataset`."""
    if manifest.version != DATASET_VERSION:
        raise ManifestMismatch(
            f"{store.uri}: data set format {manifest.version} is older than {DATASET_VERSION}, the only one "
            "that this program reads; run maskclip preprocess again into another folder"
        )
    try:
        files = {entry.name: entry for entry in manifest.files}
        shards = tuple(
            ShardInfo(str(s["name"]), str(s["index_name"]), int(s["num_samples"]), int(s["size"]))
            for s in manifest.meta["shards"]
        )
        recipe, counts = dict(manifest.meta["recipe"]), dict(manifest.meta["counts"])
        format: ShardFormat = manifest.meta["format"]
        unlisted = [name for s in shards for name in (s.name, s.index_name) if name not in files]
        if format not in ("tar", "arrow") or any(
            (s.name == s.index_name) != (format == "arrow") for s in shards
        ):
            raise ValueError(f"format {format!r} does not fit its shards")
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestMismatch(
            f"{store.uri}: its manifest is not one of a data set ({error!r}); run maskclip preprocess again"
        ) from error
    if unlisted:
        raise ManifestMismatch(
            f"{store.uri}: manifest.json has no checksum of {unlisted[0]}; run maskclip preprocess again"
        )
    num_samples = sum(s.num_samples for s in shards)
    if num_samples == 0:
        raise DataError(f"{store.uri}: the data set is empty; make one with maskclip preprocess")
    return DatasetManifest(store.uri, manifest.digest, format, shards, num_samples, recipe, counts, files)


def read_index(data: bytes | pa.Buffer, name: str) -> pa.Table:
    """The index of a shard from the bytes of its file; a broken one is a ManifestMismatch that names it."""
    return _read_columns(pa.BufferReader(pa.py_buffer(data)), name, None)


def load_index(store: ObjectStore, shard: ShardInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """`columns` of the index of a shard of either format, one row per sample in stored order; without
    `columns` all but the images and their metadata.

    Only the bytes of these columns are read: a shard of format arrow is read by ranges, not whole.

    Raises:
        ObjectNotFound: the file is gone.
        ManifestMismatch: the file is no Arrow IPC file, or lacks a column.
    """
    name = shard.index_name
    if isinstance(store, LocalStore):
        return index_of_file(store.root / name, f"{store.uri}/{name}", columns)
    file = io.BufferedReader(StoreFile(store, name, 0, store.size(name)), _READ_AHEAD)
    with pa.PythonFile(file, mode="r") as source:
        return _read_columns(source, f"{store.uri}/{name}", columns or ())


def index_of_file(path: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """As `load_index`, of a local file; `name` is for the messages."""
    try:
        empty = path.stat().st_size == 0  # an empty file cannot be mapped
    except FileNotFoundError:
        raise ObjectNotFound(f"{name}: no such file, but the manifest lists it; restore it") from None
    with pa.BufferReader(b"") if empty else pa.memory_map(str(path)) as source:
        return _read_columns(source, name, columns or ())


def verify_dataset(uri: str) -> list[str]:
    """Check every file of the data set against its manifest; one line per problem, none when it is whole.

    Every byte is read. `audit` proves more. Raises as `load_dataset`.
    """
    store = open_store(uri)
    manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
    dataset = describe(store, manifest)
    problems = manifests.verify(store, manifest, deep=True)
    if problems:
        return problems
    for shard in dataset.shards:
        rows = load_index(store, shard, ["id"]).num_rows
        if rows != shard.num_samples:
            problems.append(f"{shard.index_name}: {rows} rows, but the manifest says {shard.num_samples}")
    return problems


def _read_columns(source: Any, name: str, columns: Sequence[str] | None) -> pa.Table:
    """None: every column, as it is; an empty list: all but the images and their metadata.

    Chosen columns are validated in full: the offsets of a damaged file may point anywhere.
    """
    with broken_file(name, "Arrow IPC"):
        reader = pyarrow.ipc.open_file(source)
        if columns is None:
            return reader.read_all()
        names = reader.schema.names
        wanted = list(columns) or [column for column in names if column not in _BODY_COLUMNS]
        fields = [names.index(column) for column in wanted]
        source.seek(0)
        reader = pyarrow.ipc.open_file(source, options=pyarrow.ipc.IpcReadOptions(included_fields=fields))
        table = reader.read_all().select(wanted)
        table.validate(full=True)
        return table


@contextmanager
def broken_file(name: str, kind: str) -> Iterator[None]:
    """Whatever a reader of files says of broken bytes, as a ManifestMismatch that names the file."""
    try:
        yield
    except (pa.ArrowException, ValueError, EOFError, KeyError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, and not what is on it
        reason = " ".join(str(error).split())[:200]
        raise ManifestMismatch(
            f"{name}: no whole {kind} file ({reason}); run maskclip dataset verify"
        ) from error
