"""Proves from the folder alone that a data set is whole: every source row has exactly one fate.

    rows in = kept + dropped + pending
    no source row stands twice, no id stands twice
    every kept row stands where its row says, and nothing else stands in the shards
    every file has its size and its SHA-256, every image its checksum
    the manifest does not contradict itself

Every byte is read once. Memory is bounded by a few files of rows or indexes and one bucket of `Buckets`,
whatever the size of the set. `audit_job` does the same for a job that has not committed yet.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import manifest as manifests
from cluster.errors import ManifestMismatch
from cluster.manifest import MANIFEST, Manifest
from cluster.scratch import scratch_folder
from cluster.store import ObjectStore, open_store
from data_pipeline.catalog import DatasetManifest, describe
from data_pipeline.job.ledger import digest
from data_pipeline.records import DATASET_KIND, DATASET_VERSION
from data_pipeline.upkeep.audit_files import check_file, check_rows, check_shard, joined_inputs
from data_pipeline.upkeep.scan import Buckets, Problems, Progress, in_order
from data_pipeline.upkeep.takedown import TOMBSTONES, load_tombstones

SOURCE = [("high", "<u8"), ("low", "<u8"), ("row", "<i8"), ("chunk", "<i4")]
_PLACE = [("id", "<i8"), ("shard", "<i4"), ("index", "<i4"), ("side", "u1")]
_ROW, _SAMPLE = 0, 1  # sides: what the rows say, what stands in the shards
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found."""

    uri: str
    committed: bool
    digest: str | None = None
    """Of the manifest."""
    format: str | None = None
    rows_in: int
    kept: int
    dropped: int
    pending: int
    """Rows that have no fate yet: of a job that is not finished, those that another round will try."""
    reasons: dict[str, int]
    """Dropped rows by reason."""
    retriable: int
    """Dropped rows that might pass another day."""
    removed: int = 0
    """Samples that tombstones take out; they count as kept."""
    chunks: int
    pending_chunks: int | None = 0
    """Chunks that no round of the job has done; None where the folder does not say how many there are."""
    shards: int
    files: int
    bytes: int
    orphans: tuple[str, ...] = ()
    """Files that the manifest does not name; they belong to nothing and are no problem."""
    problems: tuple[str, ...] = ()
    """One line for each thing that is wrong."""

    @property
    def whole(self) -> bool:
        """Committed, and nothing is wrong."""
        return self.committed and not self.problems


def audit_dataset(uri: str, workers: int = 4, progress: Progress | None = None) -> Audit:
    """Audit the committed data set at `uri`, reading `workers` files at a time.

    Raises:
        ObjectNotFound: there is no manifest.
        ManifestMismatch, DataError: the manifest is not one of a data set; see `load_dataset`.
    """
    store = open_store(uri)
    manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
    dataset = describe(store, manifest)
    names = [name for name, _ in store.list()]
    problems = Problems()
    _check_manifest(store, manifest, dataset, problems)
    steps = len(dataset.rows_files) + len(dataset.shards)
    rows_in = kept = retriable = done = 0
    reasons: Counter[str] = Counter()
    unread_rows, unread_shards = False, set()

    def step(note: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps, note)

    with scratch_folder() as folder:
        places = Buckets(folder / "places", _PLACE, 2 * dataset.num_samples)
        sources = Buckets(folder / "sources", SOURCE, dataset.counts.get("rows_in", 0))
        entries = [dataset.files[name] for name in dataset.rows_files]
        for rows in in_order(lambda entry: check_rows(store, entry), entries, workers):
            rows_in, kept, retriable = rows_in + rows.rows_in, kept + rows.kept, retriable + rows.retriable
            reasons += rows.reasons
            unread_rows |= rows.broken
            problems.extend(rows.problems)
            for columns in rows.places:
                places.add(**columns, side=_ROW)
            for columns in rows.sources:
                sources.add(**columns)
            step(f"{rows_in} rows")
        for shard in in_order(lambda info: check_shard(store, dataset, info), dataset.shards, workers):
            problems.extend(shard.problems)
            if shard.ids is None:
                unread_shards.add(shard.number)
            else:
                index = np.arange(len(shard.ids))
                places.add(id=shard.ids, shard=shard.number, index=index, side=_SAMPLE)
            step(shard.name)
        report_twice(sources, problems)
        removed = stray = _tombstones(store, problems)
        for bucket in places:
            _compare(bucket, unread_shards, unread_rows, problems)
            stray = np.setdiff1d(stray, bucket["id"], assume_unique=False)
    if len(stray) and not unread_shards:
        line = f"{store.uri}/{TOMBSTONES}: id {stray[0]} is not in the data set"
        problems.add_some("tombstones", [line], len(stray))
    if not unread_rows:
        found = {"rows_in": rows_in, "kept": kept, "dropped": reasons.total()}
        _compare_counts(found | {f"dropped/{reason}": n for reason, n in reasons.items()}, dataset, problems)
    checked = {name for info in dataset.shards for name in (info.name, info.index_name)}
    for name in sorted(dataset.files.keys() - checked - set(dataset.rows_files)):
        problems.extend(check_file(store, dataset.files[name]))
    known = (*dataset.files, MANIFEST)
    return Audit(
        uri=store.uri,
        committed=True,
        digest=dataset.digest,
        format=dataset.format,
        rows_in=rows_in,
        kept=kept,
        dropped=reasons.total(),
        pending=0,
        reasons=dict(sorted(reasons.items())),
        retriable=retriable,
        removed=len(removed),
        chunks=len(dataset.rows_files),
        shards=len(dataset.shards),
        files=len(dataset.files),
        bytes=sum(entry.size for entry in dataset.files.values()),
        orphans=tuple(sorted(n for n in set(names).difference(known) if not n.startswith(TOMBSTONES))),
        problems=tuple(problems.lines()),
    )


def _check_manifest(
    store: ObjectStore, manifest: Manifest, dataset: DatasetManifest, problems: Problems
) -> None:
    """What can be known of the manifest from itself: it has no checksum, being what identifies the set."""
    if store.get(MANIFEST) != manifest.to_bytes():
        problems.add("manifest", f"{MANIFEST}: not in the form in which it was written, so it was edited")
    _check_meta(manifest.meta, MANIFEST, problems)
    inputs = manifest.meta.get("inputs")
    chunks = inputs.get("chunks") if isinstance(inputs, dict) else None
    if chunks != (found := len(dataset.rows_files)):
        line = f"{MANIFEST}: inputs says {chunks} chunks, but there are files of rows of {found}"
        problems.add("manifest", line)


def _check_meta(meta: dict[str, Any], where: str, problems: Problems) -> None:
    """The digests of the recipe and, of a merge, of the inputs; likewise of each set that was merged."""
    if meta.get("recipe_digest") != digest(meta.get("recipe")):
        line = f"{where}: the recipe is not the one of recipe_digest, so one of them was changed"
        problems.add("manifest", line)
    parts = meta.get("merged_from", [])
    if parts and joined_inputs(parts) != meta.get("inputs", {}).get("digest"):
        problems.add("manifest", f"{where}: the digest of inputs is not that of the inputs of merged_from")
    for number, part in enumerate(parts):
        _check_meta(part, f"{where}: merged_from, entry {number + 1}", problems)


def report_twice(sources: Buckets, problems: Problems) -> None:
    """Enter source rows that stand twice; `sources` holds records of the dtype SOURCE."""
    for bucket in sources:
        bucket = bucket[np.lexsort((bucket["low"], bucket["high"]))]
        same = (bucket["high"][1:] == bucket["high"][:-1]) & (bucket["low"][1:] == bucket["low"][:-1])
        again = np.flatnonzero(same)
        lines = [
            f"row {a['row']} of chunk {a['chunk']} and row {b['row']} of chunk {b['chunk']} have one source"
            for a, b in ((bucket[at], bucket[at + 1]) for at in again[:_SHOWN])
        ]
        problems.add_some("source row twice", lines, len(again))


def _compare(bucket: np.ndarray, unread_shards: set[int], unread_rows: bool, problems: Problems) -> None:
    """What the rows say and what stands in the shards must be one set, in which every id stands once."""
    sides = []
    for side, who in ((_ROW, "say the rows"), (_SAMPLE, "stands in the shards")):
        part = bucket[bucket["side"] == side]
        again = np.flatnonzero(part["id"][1:] == part["id"][:-1])
        lines = [
            f"id {a['id']} twice, {who}: {_place(a)} and {_place(b)}"
            for a, b in ((part[at], part[at + 1]) for at in again[:_SHOWN])
        ]
        problems.add_some("id twice", lines, len(again))
        sides.append(np.unique(part[["id", "shard", "index"]]))
    rows, samples = sides
    if np.array_equal(rows, samples):
        return
    lost = np.setdiff1d(rows, samples)
    lost = lost[~np.isin(lost["shard"], list(unread_shards))]
    lines = [
        f"id {place['id']} does not stand at {_place(place)}, as its row says" for place in lost[:_SHOWN]
    ]
    problems.add_some("sample not in its place", lines, len(lost))
    if not unread_rows:
        stray = np.setdiff1d(samples, rows)
        lines = [f"id {place['id']} at {_place(place)} has no row that says so" for place in stray[:_SHOWN]]
        problems.add_some("sample without a row", lines, len(stray))


def _place(record: Any) -> str:
    return f"shard {record['shard']} index {record['index']}"


def _compare_counts(found: dict[str, int], dataset: DatasetManifest, problems: Problems) -> None:
    for name in sorted({*found, *dataset.counts}):
        here, said = found.get(name, 0), dataset.counts.get(name, 0)
        if here != said:
            problems.add("books", f"{name}: {here} in the rows, but the manifest says {said}")
    if found["rows_in"] != found["kept"] + found["dropped"]:
        line = f"{found['rows_in']} rows in, but {found['kept']} kept and {found['dropped']} dropped"
        problems.add("books", line)


def _tombstones(store: ObjectStore, problems: Problems) -> np.ndarray:
    try:
        return load_tombstones(store)
    except ManifestMismatch as error:
        problems.add("tombstones", str(error))
        return np.empty(0, np.int64)
