"""Takes samples out of a committed data set: a tombstone for each, beside the set and never in it.

    tombstones/000001-<sha256>.json     what was asked, why, when, and the ids of the samples that it took out

The files of the set do not change and neither does its digest, so the order of all other samples stays; a
loader skips the ids that it finds here. Tombstones are only ever added. The name holds the first half of the
SHA-256 of what was asked and found, so the same request, made twice or at once by two, is one file.

A row that was dropped as the duplicate of another has its picture in the set all the same, in the sample that
stayed for it: that twin goes too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError, ManifestMismatch
from cluster.manifest import sha256_file
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, load_dataset
from data_pipeline.records import sample_id
from data_pipeline.upkeep.scan import Progress, in_order, local_file, pc, read_rows

TOMBSTONES = "tombstones/"
By = Literal["url", "sha256", "id", "source"]

_NAME = re.compile(rf"{TOMBSTONES}(\d{{6,}})-([0-9a-f]{{32}})\.json")
_MERGED = re.compile(r"(?:[0-9a-f]{16}/)+")  # what a merge may put before the source of a dropped row
_COLUMNS = ("fate", "id", "source", "reason", "detail")
_NEAR = "near_duplicate"
TWIN_REASONS = ("duplicate_bytes", "duplicate_pixels", "duplicate_pair", _NEAR)
"""Those of `dedup`, which loads what a loader does not need; a test compares."""
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
    """Rows that were asked for, but that never became a sample."""
    twins: int
    """Of `removed`: samples that nobody named, but that stayed in place of a duplicate that was asked for."""
    near_twins: tuple[str, ...]
    """Sources of those among them whose picture only looks like that of a row that was asked for."""
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
    names. All that is found is removed, whatever is not; to ask again changes nothing. Where a row was
    dropped as a duplicate, the sample that stayed for it goes as well. The fate of every row is read, once
    more for every step from a duplicate to its twin, and no shard.

    Raises:
        ConfigError: there are no values, or one is no id or no sha256.
        As `load_dataset`, and ManifestMismatch for a damaged file of rows.
    """
    wanted = sorted({value.strip() for value in values} - {""})
    if not wanted:
        raise ConfigError(f"{uri}: nothing to remove; give values=a,b or list=FILE with one value per line")
    parsed = pa.array([_parse_value(by, value) for value in wanted], _TYPES[by])
    dataset, store = load_dataset(uri), open_store(uri)
    asked = _find(store, dataset, by, parsed, progress)
    not_found = tuple(value for value, found in zip(wanted, asked.seen, strict=True) if not found)
    twins, near = _follow(store, dataset, asked, progress)
    ids, gone = np.union1d(asked.ids, twins), load_tombstones(store)
    new = np.setdiff1d(ids, gone)
    new_twins = np.setdiff1d(new, asked.ids)
    name = None
    if len(new):
        document = {
            "by": by,
            "values": wanted,
            "reason": reason,
            "ids": new.tolist(),
            "twins": new_twins.tolist(),
            "dataset": dataset.digest,
        }
        name = _write(store, document, now())
    return Removal(
        uri=store.uri,
        by=by,
        asked=len(wanted),
        removed=len(new),
        already_removed=len(ids) - len(new),
        dropped=asked.dropped,
        twins=len(new_twins),
        near_twins=tuple(sorted(source for source in near if sample_id(source) in new_twins)),
        not_found=not_found,
        tombstone=name,
        removed_in_all=len(np.union1d(gone, new)),
    )


def tombstone_problems(store: ObjectStore) -> list[str]:
    """One line for every tombstone that is damaged."""
    names = [key for key, _ in store.list(TOMBSTONES)]
    problems = []
    for name, data in zip(names, _get_all(store, names), strict=True):
        try:
            _parse(store, name, data)
        except ManifestMismatch as error:
            problems.append(str(error))
    return problems


def carry_tombstones(source: ObjectStore, target: ObjectStore) -> int:
    """Copy the tombstones that `target` lacks, under new numbers; how many."""
    there = _by_digest(target)
    before = len(there)
    for _, document in read_tombstones(source):
        digest = _digest(document)
        if digest not in there:
            there[digest] = _next_name(there, digest)
            target.put_if_absent(there[digest], _canonical(document))
    return len(there) - before


@dataclass
class _Found:
    """The rows that match some values."""

    ids: np.ndarray
    """Of the kept ones, int64, sorted."""
    dropped: int
    seen: np.ndarray
    """Which of the values some row has, bool."""
    twins: dict[str, bool] = field(default_factory=dict)
    """Sources of the rows for which duplicates among the dropped ones went; True: as near ones alone."""

    def add(self, other: _Found) -> None:
        self.ids = np.union1d(self.ids, other.ids)
        self.dropped += other.dropped
        self.seen |= other.seen
        for source, near in other.twins.items():
            self.twins[source] = near and self.twins.get(source, True)


def _follow(
    store: ObjectStore, dataset: DatasetManifest, asked: _Found, progress: Progress | None
) -> tuple[np.ndarray, set[str]]:
    """Ids of the samples that stayed for the duplicates in `asked`, and the sources of near ones.

    What stayed in one comparison may have gone in the next one, hence the loop; every step is to a row that
    was not looked at.
    """
    ids, near = np.empty(0, np.int64), set[str]()
    todo, known = asked.twins, set[str]()
    while todo:
        known |= todo.keys()
        near |= {source for source, is_near in todo.items() if is_near}
        found = _find(store, dataset, "source", pa.array(sorted(todo), pa.string()), progress)
        ids = np.union1d(ids, found.ids)
        todo = {source: is_near for source, is_near in found.twins.items() if source not in known}
    return ids, near


def _find(
    store: ObjectStore, dataset: DatasetManifest, by: By, wanted: pa.Array, progress: Progress | None
) -> _Found:
    """The rows whose `by` is one of `wanted`."""
    names = dataset.rows_files
    columns = tuple(dict.fromkeys((*_COLUMNS, by)))

    def nothing() -> _Found:
        return _Found(np.empty(0, np.int64), 0, np.zeros(len(wanted), bool))

    def matches(name: str) -> _Found:
        found = nothing()
        with local_file(store, name) as path:
            if sha256_file(path) != dataset.files[name].sha256:  # a changed value would be a missed sample
                raise ManifestMismatch(
                    f"{store.uri}/{name}: not what the manifest says; restore it and ask again"
                )
            for batch in read_rows(path, columns, name):
                at = pc.index_in(batch[by], wanted)
                hits = batch.filter(pc.is_valid(at))
                if hits.num_rows:
                    seen = np.zeros(len(wanted), bool)
                    seen[at.drop_null().to_numpy(zero_copy_only=False)] = True
                    kept = hits.filter(pc.equal(hits["fate"], "kept"))
                    ids = np.unique(np.array(kept["id"].to_pylist(), np.int64))
                    found.add(_Found(ids, hits.num_rows - kept.num_rows, seen, _twins_of(hits)))
        return found

    total = nothing()
    for done, found in enumerate(in_order(matches, names, _WORKERS), start=1):
        total.add(found)
        if progress is not None:
            progress(done, len(names), f"{len(total.ids)} found")
    return total


def _twins_of(rows: pa.RecordBatch) -> dict[str, bool]:
    """Sources of the rows for which the duplicates in `rows` went, and whether as near ones alone."""
    twins: dict[str, bool] = {}
    lost = rows.filter(pc.is_in(rows["reason"], pa.array(TWIN_REASONS)))
    columns = (lost[name].to_pylist() for name in ("source", "reason", "detail"))
    for source, reason, detail in zip(*columns, strict=True):
        # A merge may have renamed the dropped rows of a set, but not the names in `detail`.
        prefix = _MERGED.match(source)
        for twin in {detail, f"{prefix[0]}{detail}" if prefix else detail} - {None}:
            twins[twin] = reason == _NEAR and twins.get(twin, True)
    return twins


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
    there = _by_digest(store)
    if digest in there:
        return there[digest]  # another one made the same request meanwhile
    name = _next_name(there, digest)
    store.put_if_absent(name, _canonical({**document, "time": time}))
    return name


def _by_digest(store: ObjectStore) -> dict[str, str]:
    """Names of the tombstones in `store`, by the digest of what they ask."""
    return {match[2]: key for key, _ in store.list(TOMBSTONES) if (match := _NAME.fullmatch(key))}


def _next_name(there: dict[str, str], digest: str) -> str:
    # Two writers may take one number: their names still differ by what they ask.
    numbers = [int(match[1]) for name in there.values() if (match := _NAME.fullmatch(name))]
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
