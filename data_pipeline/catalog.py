"""Committed data sets: load one by its manifest, check it, describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from cluster import manifest as manifests
from cluster.errors import DataError, ManifestMismatch
from cluster.manifest import FileEntry, Manifest
from cluster.store import ObjectStore, open_store
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, ShardInfo

_QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class DatasetManifest:
    """What a reader needs to know about a committed data set; `digest` identifies it, whatever its place."""

    uri: str
    digest: str
    shards: tuple[ShardInfo, ...]
    num_samples: int
    recipe: dict[str, Any]
    counts: dict[str, int]
    """Rows by fate: rows_in, kept, rejected, and rejected/<reason>."""
    files: dict[str, FileEntry]
    """Every file of the set by name, with its size and sha256."""

    @property
    def rejects(self) -> dict[str, int]:
        """Number of rejected input rows by reason."""
        prefix = "rejected/"
        return {k.removeprefix(prefix): n for k, n in sorted(self.counts.items()) if k.startswith(prefix)}


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
    try:
        files = {entry.name: entry for entry in manifest.files}
        shards = tuple(
            ShardInfo(str(s["name"]), str(s["index_name"]), int(s["num_samples"]), int(s["size"]))
            for s in manifest.meta["shards"]
        )
        recipe, counts = dict(manifest.meta["recipe"]), dict(manifest.meta["counts"])
        unlisted = [name for s in shards for name in (s.name, s.index_name) if name not in files]
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
    return DatasetManifest(store.uri, manifest.digest, shards, num_samples, recipe, counts, files)


def read_index(data: bytes | pa.Buffer, name: str) -> pa.Table:
    """The index of a shard from the bytes of its file; a broken one is a ManifestMismatch that names it."""
    try:
        return pyarrow.ipc.open_file(pa.py_buffer(data)).read_all()
    except pa.ArrowInvalid as error:
        raise ManifestMismatch(f"{name}: no Arrow IPC file ({error}); run maskclip dataset verify") from error


def verify_dataset(uri: str) -> list[str]:
    """Check every file of the data set against its manifest; one line per problem, none when it is whole.

    Every byte is read. Raises as `load_dataset`.
    """
    store = open_store(uri)
    manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
    dataset = describe(store, manifest)
    problems = manifests.verify(store, manifest, deep=True)
    if problems:
        return problems
    for shard in dataset.shards:
        rows = read_index(store.get(shard.index_name), shard.index_name).num_rows
        if rows != shard.num_samples:
            problems.append(f"{shard.index_name}: {rows} rows, but the manifest says {shard.num_samples}")
    return problems


def dataset_stats(uri: str) -> dict[str, Any]:
    """Sizes of the data set and quantiles over all its samples (pixels, and characters of the captions).

    Reads every index and no image. Raises as `load_dataset`.
    """
    dataset = load_dataset(uri)
    store = open_store(uri)
    columns: dict[str, list[np.ndarray]] = {"width": [], "height": [], "caption_length": []}
    for shard in dataset.shards:
        index = read_index(store.get(shard.index_name), shard.index_name)
        columns["width"].append(index["width"].to_numpy())
        columns["height"].append(index["height"].to_numpy())
        columns["caption_length"].append(np.array([len(caption) for caption in index["caption"].to_pylist()]))
    return {
        "uri": dataset.uri,
        "digest": dataset.digest,
        "samples": dataset.num_samples,
        "shards": len(dataset.shards),
        "bytes": sum(entry.size for entry in dataset.files.values()),
        "rows_in": dataset.counts["rows_in"],
        "rejects": dataset.rejects,
        **{name: _quantiles(np.concatenate(parts)) for name, parts in columns.items()},
    }


def _quantiles(values: np.ndarray) -> dict[str, int]:
    # "nearest" keeps them whole numbers that occur in the data.
    found = np.quantile(values, list(_QUANTILES.values()), method="nearest")
    return {name: int(value) for name, value in zip(_QUANTILES, found, strict=True)}
