"""What is done of a preprocess job: one small JSON record per finished task, written once.

    ledger/recipe.json                       the recipe that this folder belongs to, claimed before any work
    ledger/driver-000001.json                a driver took the output over, see drivers.py
    ledger/<recipe>/stage-000000-r0.json     round 0 of a chunk is staged; r1, r2 ... tried its retriable rows
    ledger/<recipe>/select.json              the fate of every row is decided; no more rounds
    ledger/<recipe>/shard-000000.json        an output shard is written: its files and their checksums

A record is put after the files that it names and only where there is none, so of tasks that race one wins and
its files count. Readers of the data set never see the ledger; the commit deletes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ManifestMismatch, StorageUnavailable
from cluster.manifest import FileEntry
from cluster.store import ObjectStore
from cluster.store_base import TEMPORARY
from cluster.store_local import LocalStore
from data_pipeline.ingest.sources import Chunk, plan_digest

CLAIM = "ledger/recipe.json"
STAGING = "staging/"
LEDGER = "ledger/"
OUTPUTS = ("shard-", "rows/")
"""Where the files of the data set lie."""
_THREADS = 32


@dataclass(frozen=True)
class StageRecord:
    """One round of a chunk. Counts are of the rows that this round did."""

    chunk: int
    round: int
    inputs: str
    """`plan_digest` of the chunk."""
    rows_in: int
    kept: int
    dropped: dict[str, int]
    """Dropped rows by reason."""
    retriable: dict[str, int]
    """Those among them that may pass in another round, by reason."""
    rows: str
    """Object with the staged rows."""
    rows_size: int
    images: str | None
    """Object with the staged images; None where there are none."""
    images_size: int


@dataclass(frozen=True)
class ShardRecord:
    """A written output shard."""

    index: int
    plan: str
    """Digest of the decision that it belongs to."""
    num_samples: int
    files: tuple[FileEntry, ...]
    """The shard, then its index if that is a file of its own."""


def canonical(document: Any) -> bytes:
    """JSON of which equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(document: Any) -> str:
    """sha256 of the canonical bytes, in hexadecimal."""
    return hashlib.sha256(canonical(document)).hexdigest()


def claim(store: ObjectStore, recipe: dict[str, Any]) -> None:
    """Make the folder belong to `recipe`, if it belongs to none.

    Raises:
        ManifestMismatch: it holds files that no recipe claims, or the unfinished work of another recipe.
    """
    data = canonical(recipe)
    found = any(store.list(prefix) for prefix in (*OUTPUTS, STAGING, LEDGER))
    # In this order: where another driver has just claimed the folder, the claims are compared.
    if found and not store.exists(CLAIM):
        raise ManifestMismatch(
            f"{store.uri}: holds shards or rows that were not made here; choose another output or move them "
            "away"
        )
    if not store.put_if_absent(CLAIM, data) and store.get(CLAIM) != data:
        raise ManifestMismatch(
            f"{store.uri}: holds unfinished work of another recipe; delete it or choose another output"
        )


def folder(recipe: str) -> str:
    """Where the records under the recipe's digest lie."""
    return f"{LEDGER}{recipe[:12]}/"


def stage_key(recipe: str, chunk: int, round: int) -> str:
    """Key of the record of a round of a chunk, under the recipe's digest."""
    return f"{folder(recipe)}stage-{chunk:06d}-r{round}.json"


def select_key(recipe: str) -> str:
    """Key of the record of the decision over all rows."""
    return f"{folder(recipe)}select.json"


def shard_key(recipe: str, index: int) -> str:
    """Key of the record of an output shard."""
    return f"{folder(recipe)}shard-{index:06d}.json"


def enter(store: ObjectStore, key: str, record: StageRecord) -> StageRecord:
    """Put the record of a finished round, and return the one that counts: a faster twin's, if there was one.

    Both are right; but where rows were downloaded they need not be equal. One of other input is of a driver
    that was replaced, and gives way.
    """
    data = canonical(asdict(record))
    if store.put_if_absent(key, data):
        return record
    found = StageRecord(**json.loads(store.get(key)))
    if found.inputs == record.inputs:
        return found
    store.put(key, data)
    return record


def enter_shard(store: ObjectStore, key: str, record: ShardRecord) -> None:
    """Put the record of a written shard; a twin's says the same."""
    store.put_if_absent(key, canonical(asdict(record)))


def staged_rounds(store: ObjectStore, recipe: str, chunks: Sequence[Chunk]) -> list[list[StageRecord]]:
    """For each chunk the rounds that need no work, from 0 on without a gap.

    A record counts if its input still has its names and sizes and its files are there in their sizes. Records
    that do not are deleted.
    """
    prefix = folder(recipe)
    sizes = dict(store.list(STAGING))
    names = [key for key, _ in store.list(f"{prefix}stage-")]
    by_chunk: dict[int, dict[int, StageRecord]] = {}
    for data in _get_all(store, names):
        record = StageRecord(**json.loads(data))
        by_chunk.setdefault(record.chunk, {})[record.round] = record
    rounds: list[list[StageRecord]] = []
    valid: set[str] = set()
    for chunk in chunks:
        found = by_chunk.get(chunk.index, {})
        done: list[StageRecord] = []
        inputs = plan_digest([chunk])
        while (record := found.get(len(done))) is not None:
            whole = sizes.get(record.rows) == record.rows_size and (
                record.images is None or sizes.get(record.images) == record.images_size
            )
            if record.inputs != inputs or not whole:
                break
            valid.add(stage_key(recipe, chunk.index, record.round))
            done.append(record)
        rounds.append(done)
    _delete_all(store, (name for name in names if name not in valid))
    return rounds


def written_shards(store: ObjectStore, recipe: str, plan: str) -> dict[int, ShardRecord]:
    """The output shards that need no work, by index: of this decision, with files of the right size.

    Other records are deleted.
    """
    prefix = f"{folder(recipe)}shard-"
    sizes = dict(store.list("shard-"))
    names = [key for key, _ in store.list(prefix)]
    done: dict[int, ShardRecord] = {}
    stale: list[str] = []
    for name, data in zip(names, _get_all(store, names), strict=True):
        document = json.loads(data)
        files = tuple(FileEntry(**entry) for entry in document.pop("files"))
        record = ShardRecord(**document, files=files)
        if record.plan == plan and all(sizes.get(file.name) == file.size for file in record.files):
            done[record.index] = record
        else:
            stale.append(name)
    _delete_all(store, stale)
    return done


def decided(store: ObjectStore, recipe: str, rounds: Sequence[Sequence[StageRecord]]) -> bool:
    """Whether the fates of exactly these staged rows were decided: then no round may add to them."""
    key = select_key(recipe)
    return store.exists(key) and json.loads(store.get(key)) == _decision(rounds)


def decide(store: ObjectStore, recipe: str, rounds: Sequence[Sequence[StageRecord]]) -> None:
    """Enter that the fates of these staged rows are decided."""
    store.put(select_key(recipe), canonical(_decision(rounds)))


def _decision(rounds: Sequence[Sequence[StageRecord]]) -> dict[str, Any]:
    return {"staged": digest([[asdict(record) for record in done] for done in rounds])}


def clean_up(store: ObjectStore, files: Iterable[str]) -> None:
    """Delete what only the job needed, and outputs that are not of `files`, which the manifest names.

    Of a committed data set nobody misses these, so it may fail.
    """
    kept = frozenset(files)
    with suppress(StorageUnavailable):
        for prefix in OUTPUTS:  # of an attempt before the input changed
            delete_under(store, prefix, keep=kept)
        for prefix in (STAGING, LEDGER):
            delete_under(store, prefix)
        if isinstance(store, LocalStore):
            _sweep(store.root)


def _sweep(root: Path) -> None:
    """Remove files that were being written when their process was killed, and folders that are empty."""
    for prefix in (STAGING, LEDGER):
        shutil.rmtree(root / prefix, ignore_errors=True)
    for folder in (root, root / "rows"):
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


def delete_under(store: ObjectStore, prefix: str, keep: Iterable[str] = ()) -> None:
    """Delete all objects whose key starts with `prefix`, but not those of `keep`."""
    kept = frozenset(keep)
    _delete_all(store, [key for key, _ in store.list(prefix) if key not in kept])


def _get_all(store: ObjectStore, keys: Sequence[str]) -> list[bytes]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(store.get, keys))


def _delete_all(store: ObjectStore, keys: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(store.delete, keys))
