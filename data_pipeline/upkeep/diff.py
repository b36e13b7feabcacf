"""Compares two committed data sets by the ids of their samples, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset, load_index
from data_pipeline.records import ShardInfo
from data_pipeline.upkeep.scan import Buckets, Progress, in_order, text_hashes
from data_pipeline.upkeep.takedown import load_tombstones

EXAMPLES = 5
_RECORD = [
    ("id", "<i8"),
    ("side", "u1"),
    ("image", "V16"),  # first half of the sha256 of the original image
    ("caption", "V16"),
    ("shard", "<i4"),  # position in the manifest
    ("index", "<i4"),
]
_WORKERS = 4
_SHOWN = ("id", "key", "source", "url", "caption")


def diff_datasets(a: str, b: str, progress: Progress | None = None) -> dict[str, Any]:
    """What tells the data set at `a` from the one at `b`, as plain JSON.

    `only_a`, `only_b` and `changed` (the image's sha256 or the caption differ) have a `count` and the first
    few `examples` by id; `recipe` and `counts` have the values of both for each dotted key that differs. Only
    the indexes are read. Raises as `load_dataset` and `load_index`.
    """
    sets = [load_dataset(uri) for uri in (a, b)]
    stores = [open_store(uri) for uri in (a, b)]
    work = [(side, n) for side in (0, 1) for n in range(len(sets[side].shards))]
    found = {"only_a": _Found(), "only_b": _Found(), "changed": _Found()}
    common = 0
    with scratch_folder() as folder:
        records = Buckets(folder / "records", _RECORD, sum(s.num_samples for s in sets))

        def read(item: tuple[int, int]) -> dict[str, Any]:
            side, shard = item
            return {"side": side, "shard": shard, **_columns(stores[side], sets[side].shards[shard])}

        for done, columns in enumerate(in_order(read, work, _WORKERS), start=1):
            records.add(**columns)
            if progress is not None:
                progress(done, len(work), "")
        for bucket in records:
            left, right = (bucket[bucket["side"] == side] for side in (0, 1))
            _, at_left, at_right = np.intersect1d(left["id"], right["id"], return_indices=True)
            common += len(at_left)
            found["only_a"].add(np.delete(left, at_left))
            found["only_b"].add(np.delete(right, at_right))
            left, right = left[at_left], right[at_right]
            differs = (left["image"] != right["image"]) | (left["caption"] != right["caption"])
            found["changed"].add(left[differs], right[differs])
    changed = [
        {"id": one["id"], **{f: [one[f], two[f]] for f in ("image", "caption", "url") if one[f] != two[f]}}
        for one, two in zip(
            _examples(stores[0], sets[0], found["changed"].first),
            _examples(stores[1], sets[1], found["changed"].second),
            strict=True,
        )
    ]
    return {
        "a": _side(stores[0], sets[0]),
        "b": _side(stores[1], sets[1]),
        "same": common - found["changed"].count,
        "only_a": {
            "count": found["only_a"].count,
            "examples": _examples(stores[0], sets[0], found["only_a"].first),
        },
        "only_b": {
            "count": found["only_b"].count,
            "examples": _examples(stores[1], sets[1], found["only_b"].first),
        },
        "changed": {"count": found["changed"].count, "examples": changed},
        "recipe": differences(sets[0].recipe, sets[1].recipe),
        "counts": differences(sets[0].counts, sets[1].counts),
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """[value in a, value in b] of each dotted key whose values differ; None where there is no such key."""
    one, two = _flat(a), _flat(b)
    keys = sorted(one.keys() | two.keys())
    return {key: [one.get(key), two.get(key)] for key in keys if one.get(key) != two.get(key)}


class _Found:
    """Counts records and keeps the first few by id, with their counterparts."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.second = np.empty(0, np.dtype(_RECORD))

    def add(self, records: np.ndarray, others: np.ndarray | None = None) -> None:
        self.count += len(records)
        first = np.concatenate([self.first, records])
        second = np.concatenate([self.second, records if others is None else others])
        order = np.argsort(first["id"], kind="stable")[:EXAMPLES]
        self.first, self.second = first[order], second[order]


def _columns(store: ObjectStore, shard: ShardInfo) -> dict[str, Any]:
    index = load_index(store, shard, ["id", "sha256", "caption"])
    images = b"".join(value[:16] for value in index["sha256"].to_pylist())
    return {
        "id": index["id"].to_numpy(),
        "image": np.frombuffer(images, "V16"),
        "caption": np.ascontiguousarray(text_hashes(index["caption"])).view("V16").ravel(),
        "index": np.arange(index.num_rows),
    }


def _examples(store: ObjectStore, dataset: DatasetManifest, records: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for record in records:
        index: pa.Table = load_index(store, dataset.shards[record["shard"]], [*_SHOWN, "sha256"])
        row = index.slice(int(record["index"]), 1).to_pylist()[0]
        found.append({**{name: row[name] for name in _SHOWN}, "image": row["sha256"].hex()})
    return found


def _side(store: ObjectStore, dataset: DatasetManifest) -> dict[str, Any]:
    return {
        "uri": dataset.uri,
        "digest": dataset.digest,
        "samples": dataset.num_samples,
        "removed": len(load_tombstones(store)),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
