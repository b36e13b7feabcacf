"""Makes one committed data set of several, without touching an image: shards are copied under new numbers,
files of rows are written again with new numbers, counts are added.

What comes out depends on the sets and their order alone. A merge that was killed is finished by the same
command: what it wrote is there whole or not at all, and `ledger/merge.json` says to which merge it belongs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster import manifest as manifests
from cluster.errors import ConfigError, DataError, ManifestMismatch
from cluster.manifest import MANIFEST, Manifest
from cluster.store import ObjectStore, open_store, overlap
from data_pipeline.catalog import describe
from data_pipeline.job.ledger import LEDGER, canonical, digest
from data_pipeline.records import DATASET_KIND, DATASET_VERSION
from data_pipeline.upkeep.audit_files import joined_inputs, number_of
from data_pipeline.upkeep.merge_copy import (
    Origin,
    Progress,
    copy_shards,
    renamed,
    require_disjoint,
    write_rows,
)
from data_pipeline.upkeep.takedown import carry_tombstones

CLAIM = f"{LEDGER}merge.json"


@dataclass(frozen=True)
class MergeSummary:
    """What a merge made."""

    uri: str
    manifest_digest: str
    merged: int
    """Data sets that went in."""
    shards: int
    samples: int
    rows_in: int
    dropped: int
    copied: int
    """Shard files that this call copied; the others were there."""
    tombstones: int
    """Tombstones that this call carried over."""
    already_committed: bool


def merge_datasets(
    uris: Sequence[str], output: str, workers: int = 4, progress: Progress | None = None
) -> MergeSummary:
    """Commit the data set of all samples of `uris`, in this order, at `output`.

    `workers` files are copied at a time. Tombstones go with their samples, also when the same merge is asked
    for again later. The id of a sample stays, and so does its source; a dropped row whose source another set
    has too gets the digest of its own set before its source, so that every source row still stands once.

    Raises:
        ConfigError: there are not two sets, or the output is one of them, lies in one or around one.
        DataError: two sets have a sample with the same id, or are of different formats.
        ShardCorrupt: a file is not what its manifest says. Nothing is committed.
        ManifestMismatch: the output holds something else.
        As `load_dataset` for each of the sets.
    """
    stores = [open_store(uri) for uri in uris]
    target = open_store(output)
    _require_apart(stores, target)
    origins = _plan(stores)
    claim = {"merge": [origin.dataset.digest for origin in origins]}
    recipe = {**claim, "format": origins[0].dataset.format}
    if target.exists(MANIFEST):
        return _already_committed(target, origins, recipe)
    _require_free(target)
    prefixes = require_disjoint(origins)
    _claim(target, claim)  # after all checks: a merge that is refused leaves nothing
    if target.exists(MANIFEST):  # a twin has committed meanwhile; its files must not be touched
        target.delete(CLAIM)
        return _already_committed(target, origins, recipe)
    entries, copied = copy_shards(target, origins, workers, progress)
    entries += write_rows(target, origins, prefixes, workers)
    tombstones = sum(carry_tombstones(origin.store, target) for origin in origins)
    manifest = Manifest(DATASET_KIND, DATASET_VERSION, tuple(entries), _meta(origins, recipe))
    manifests.commit(target, manifest)
    target.delete(CLAIM)
    return _summary(target, manifest, len(origins), copied, tombstones, already=False)


def _require_apart(stores: Sequence[ObjectStore], target: ObjectStore) -> None:
    if len(stores) < 2:
        raise ConfigError("a merge needs two data sets or more; name them before output=...")
    places = [store.uri for store in stores]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{place}: is named twice; name each data set once")
        if overlap(place, target.uri):
            raise ConfigError(f"{target.uri}: is not apart from {place}; choose another output")


def _plan(stores: Sequence[ObjectStore]) -> list[Origin]:
    origins: list[Origin] = []
    shards = chunks = 0
    for store in stores:
        manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
        dataset = describe(store, manifest)
        if origins and dataset.format != (first := origins[0].dataset).format:
            raise DataError(
                f"{dataset.uri}: has shards of format {dataset.format}, but {first.uri} of {first.format}; "
                "preprocess one of them again with the other's shards.format"
            )
        numbers = {number_of(info.name): shards + n for n, info in enumerate(dataset.shards)}
        names = {name: chunks + n for n, name in enumerate(dataset.rows_files)}
        origins.append(Origin(store, dataset, dict(manifest.meta), numbers, names))
        shards, chunks = shards + len(numbers), chunks + len(names)
    return origins


def _require_free(target: ObjectStore) -> None:
    others = [name for name, _ in target.list() if name != CLAIM]
    if others and not target.exists(CLAIM):
        raise ManifestMismatch(
            f"{target.uri}: holds files of something else, such as {others[0]}; choose another output"
        )


def _claim(target: ObjectStore, claim: dict[str, Any]) -> None:
    data = canonical(claim)
    if not target.put_if_absent(CLAIM, data) and target.get(CLAIM) != data:
        raise ManifestMismatch(
            f"{target.uri}: holds an unfinished merge of other sets; choose another output"
        )


def _meta(origins: Sequence[Origin], recipe: dict[str, Any]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for origin in origins:
        counts.update(origin.dataset.counts)
    inputs = [dict(origin.meta.get("inputs", {})) for origin in origins]
    infos = [
        replace(info, name=new[0], index_name=new[1])
        for origin in origins
        for info in origin.dataset.shards
        for new in ([name for _, name in renamed(origin, info)],)
    ]
    kept = ("recipe", "recipe_digest", "inputs", "counts", "merged_from")
    return {
        "recipe": recipe,
        "recipe_digest": digest(recipe),
        "inputs": {
            "chunks": sum(len(origin.chunks) for origin in origins),
            "bytes": sum(int(part.get("bytes", 0)) for part in inputs),
            "digest": joined_inputs([origin.meta for origin in origins]),
        },
        "counts": dict(sorted(counts.items())),
        "shards": [asdict(info) for info in infos],
        "format": origins[0].dataset.format,
        "merged_from": [
            {"digest": origin.dataset.digest, "shards": len(origin.shards)}
            | {name: origin.meta[name] for name in kept if name in origin.meta}
            for origin in origins
        ],
    }


def _already_committed(
    target: ObjectStore, origins: Sequence[Origin], recipe: dict[str, Any]
) -> MergeSummary:
    manifest = manifests.load(target, DATASET_KIND, DATASET_VERSION)
    if manifest.meta.get("recipe") != recipe:
        raise ManifestMismatch(
            f"{target.uri}: has another data set, which is never overwritten; choose another output"
        )
    target.delete(CLAIM)
    tombstones = sum(carry_tombstones(origin.store, target) for origin in origins)
    return _summary(target, manifest, len(origins), 0, tombstones, already=True)


def _summary(
    target: ObjectStore, manifest: Manifest, merged: int, copied: int, tombstones: int, already: bool
) -> MergeSummary:
    dataset = describe(target, manifest)
    return MergeSummary(
        uri=target.uri,
        manifest_digest=dataset.digest,
        merged=merged,
        shards=len(dataset.shards),
        samples=dataset.num_samples,
        rows_in=dataset.counts["rows_in"],
        dropped=dataset.counts["dropped"],
        copied=copied,
        tombstones=tombstones,
        already_committed=already,
    )
