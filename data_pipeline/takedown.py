"""Takes samples out of a committed data set: a tombstone for each, beside the set and never in it.

    tombstones/000001-<sha256>.json     what was asked, why, when, and the ids of the samples that it took out

The files of the set do not change and neither does its digest, so the order of all other samples stays; a
loader skips the ids that it finds here. Tombstones are only ever added. The name holds the first half of the
SHA-256 of what was asked and found, so the same request, made twice or at once by two, is one file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError, ManifestMismatch
from cluster.manifest import sha256_file
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset
from data_pipeline.scan import in_order, local_file, pc, read_rows

TOMBSTONES = "tombstones/"
By = Literal["url", "sha256", "id", "source"]
Progress = Callable[[int, int, str], None]

_NAME = re.compile(rf"{TOMBSTONES}(\d{{6,}})-([0-9a-f]{{32}})\.json")
_WORKERS = 4


@dataclass(frozen=True)
class Removal:
    """What a request to remove did. Counts are of samples, `not_found` are the values that no row has."""

    uri: str
    by: str
    asked: int
    """Different values that were asked for."""
    removed: int
    """Samples that this request took out."""
    already_removed: int
    """Samples that it found, but that an earlier request had taken out."""
    dropped: int
    """Rows that it found, but that never became a sample."""
    not_found: tuple[str, ...]
    tombstone: str | None
    """Name of the file that was written; None where nothing was left to remove."""
    removed_in_all: int
    """Samples that are out now, by all requests."""


def load_tombstones(store: ObjectStore) -> np.ndarray:
    """Ids of the samples that were taken out of the data set in `store`: int64, sorted, each once.

    Raises ManifestMismatch when a tombstone is damaged: a sample that must not be seen is never let through.
    """
    found = [document["ids"] for _, document in read_tombstones(store)]
    return np.unique(np.array([i for ids in found for i in ids], np.int64))


def read_tombstones(store: ObjectStore) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each tombstone, in the order of their names; raises as `load_tombstones`."""
    names = [key for key, _ in store.list(TOMBSTONES)]
    return [
        (name, _parse(store, name, data)) for name, data in zip(names, _get_all(store, names), strict=True)
    ]


def remove_samples(
    uri: str,
    by: By,
    values: Iterable[str],
    *,
    reason: str,
    now: Callable[[], str],
    progress: Progress | None = None,
) -> Removal:
    """Take every sample whose `by` is one of `values` out of the data set at `uri`.

    sha256 is that of the original image's bytes, in hexadecimal; `now` gives the time that the tombstone
    names. All that is found is removed, whatever is not; to ask again changes nothing. The fate of every row
    is read, no shard.

    Raises:
        ConfigError: there are no values, or one is no id or no sha256.
        As `load_dataset`, and ManifestMismatch for a damaged file of rows.
    """
    wanted = sorted({value.strip() for value in values} - {""})
    if not wanted:
        raise ConfigError(f"{uri}: nothing to remove; give values=a,b or list=FILE with one value per line")
    parsed = pa.array([_parse_value(by, value) for value in wanted], _TYPES[by])
    dataset, store = load_dataset(uri), open_store(uri)
    ids, dropped, seen = _find(store, dataset, by, parsed, progress)
    not_found = tuple(value for value, found in zip(wanted, seen, strict=True) if not found)
    gone = load_tombstones(store)
    new = np.setdiff1d(ids, gone)
    name = None
    if len(new):
        document = {
            "by": by,
            "values": wanted,
            "reason": reason,
            "ids": new.tolist(),
            "dataset": dataset.digest,
        }
        name = _write(store, document, now())
    return Removal(
        uri=store.uri,
        by=by,
        asked=len(wanted),
        removed=len(new),
        already_removed=len(ids) - len(new),
        dropped=dropped,
        not_found=not_found,
        tombstone=name,
        removed_in_all=len(np.union1d(gone, new)),
    )


def carry_tombstones(source: ObjectStore, target: ObjectStore) -> int:
    """Copy the tombstones that `target` lacks, under new numbers; how many."""
    there = {match[2] for key, _ in target.list(TOMBSTONES) if (match := _NAME.fullmatch(key))}
    carried = 0
    for _, document in read_tombstones(source):
        digest = _digest(document)
        if digest not in there:
            target.put_if_absent(_next_name(target, digest), _canonical(document))
            carried += 1
    return carried


def _find(
    store: ObjectStore, dataset: DatasetManifest, by: By, wanted: pa.Array, progress: Progress | None
) -> tuple[np.ndarray, int, np.ndarray]:
    """Ids of the kept rows that match, the number of dropped ones, and which values were seen at all."""
    names = dataset.rows_files

    def matches(name: str) -> tuple[list[int], int, np.ndarray]:
        ids: list[int] = []
        dropped, seen = 0, np.zeros(len(wanted), bool)
        with local_file(store, name) as path:
            if sha256_file(path) != dataset.files[name].sha256:  # a changed value would be a missed sample
                raise ManifestMismatch(
                    f"{store.uri}/{name}: not what the manifest says; restore it and ask again"
                )
            for batch in read_rows(path, ("fate", "id", by) if by != "id" else ("fate", "id"), name):
                at = pc.index_in(batch[by], wanted)
                hits = batch.filter(pc.is_valid(at))
                if hits.num_rows:
                    seen[at.drop_null().to_numpy(zero_copy_only=False)] = True
                    kept = hits.filter(pc.equal(hits["fate"], "kept"))
                    ids += kept["id"].to_pylist()
                    dropped += hits.num_rows - kept.num_rows
        return ids, dropped, seen

    every: list[int] = []
    total, seen = 0, np.zeros(len(wanted), bool)
    for done, (ids, dropped, here) in enumerate(in_order(matches, names, _WORKERS), start=1):
        every += ids
        total += dropped
        seen |= here
        if progress is not None:
            progress(done, len(names), f"{len(every)} found")
    return np.unique(np.array(every, np.int64)), total, seen


_TYPES: dict[By, pa.DataType] = {
    "url": pa.string(),
    "source": pa.string(),
    "id": pa.int64(),
    "sha256": pa.binary(32),
}


def _parse_value(by: By, value: str) -> Any:
    try:
        if by == "id":
            number = int(value)
            if not 0 <= number < 1 << 63:
                raise ValueError
            return number
        if by == "sha256":
            data = bytes.fromhex(value)
            if len(data) != 32:
                raise ValueError
            return data
    except ValueError:
        what = "an id: a whole number from 0 to 2^63 - 1" if by == "id" else "a sha256: 64 hexadecimal digits"
        raise ConfigError(f"{value!r} is not {what}; correct values or by") from None
    return value


def _write(store: ObjectStore, document: dict[str, Any], time: str) -> str:
    digest = _digest(document)
    for key, _ in store.list(TOMBSTONES):
        if (match := _NAME.fullmatch(key)) and match[2] == digest:
            return key  # another one made the same request meanwhile
    name = _next_name(store, digest)
    store.put_if_absent(name, _canonical({**document, "time": time}))
    return name


def _next_name(store: ObjectStore, digest: str) -> str:
    # Two writers may take one number: their names still differ by what they ask.
    numbers = [int(match[1]) for key, _ in store.list(TOMBSTONES) if (match := _NAME.fullmatch(key))]
    return f"{TOMBSTONES}{max(numbers, default=0) + 1:06d}-{digest}.json"


def _parse(store: ObjectStore, name: str, data: bytes) -> dict[str, Any]:
    match = _NAME.fullmatch(name)
    try:
        document = json.loads(data)
        whole = match is not None and _digest(document) == match[2]
        whole = whole and all(isinstance(i, int) for i in document["ids"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ManifestMismatch(
            f"{store.uri}/{name}: not a tombstone that was written here; restore it, or delete it and repeat "
            "maskclip dataset remove"
        )
    return document


def _digest(document: dict[str, Any]) -> str:
    asked = {key: value for key, value in document.items() if key != "time"}
    return hashlib.sha256(_canonical(asked)).hexdigest()[:32]


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _get_all(store: ObjectStore, names: Sequence[str]) -> list[bytes]:
    return list(in_order(store.get, names, 16))
