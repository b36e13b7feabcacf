"""The preprocess job: raw input becomes a committed data set, one Ray task per chunk, one shard per chunk.

What is written depends on the input and the recipe alone, whatever the number of workers, their order or
their deaths. The driver moves no image: a task reads its chunk, writes its shard to a local file, puts it
into the store and answers with a record of the ledger. A rerun does only what the ledger lacks. The manifest
comes last.
"""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster import manifest as manifests
from cluster.errors import ConfigError, DataError, ManifestMismatch
from cluster.manifest import MANIFEST, Manifest, file_entry
from cluster.ray_tasks import ray_session, run_bounded
from cluster.store import ObjectStore, open_store
from data_pipeline import ledger
from data_pipeline.catalog import describe
from data_pipeline.ledger import ChunkRecord
from data_pipeline.records import (
    DATASET_KIND,
    DATASET_VERSION,
    REJECTS_NAME,
    Reject,
    Sample,
    ShardInfo,
    shard_names,
)
from data_pipeline.shard_writer import write_shard
from data_pipeline.sources import Chunk, SourceConfig, plan_chunks, plan_digest, read_chunk
from data_pipeline.transforms import TransformConfig, prepare


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One preprocess job."""

    command: Literal["preprocess"] = "preprocess"
    """The command that runs this recipe."""
    source: SourceConfig
    """The raw input."""
    output: str
    """Folder of the data set: a local one, or s3://bucket/prefix."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How images are stored."""
    samples_per_shard: int = 4096
    """Input rows per shard where the source is a folder; a tar becomes one shard, whatever it holds."""
    window: int = 4
    """Tasks in flight. Each needs a core, and local space for a raw tar and a shard."""
    retries: int = 2
    """Times that a task is run again when it fails or its worker dies; broken input is not tried again."""
    workers: int | None = None
    """Cores of the local Ray that is started where no cluster is given; null: all of them."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty: set output to the folder of the data set")
        for name, least in (("samples_per_shard", 1), ("window", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: set {name} to {least} or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}: set workers to 1 or more, or to null")


@dataclass(frozen=True)
class PreprocessSummary:
    """What a preprocess job did. `rejects` counts by reason; the other counts are of the whole data set."""

    samples: int
    shards: int
    rejects: dict[str, int]
    skipped_shards: int
    """Shards that an earlier run had finished."""
    seconds: float
    manifest_digest: str
    already_committed: bool
    """The data set was there, made from this input by this recipe, and nothing was done."""


@dataclass(frozen=True)
class ChunkTask:
    """What a worker needs to make one shard. `digest` is the recipe's."""

    chunk: Chunk
    transform: TransformConfig
    output: str
    digest: str


def run_preprocess(
    config: PreprocessConfig, progress: Callable[[dict[str, Any]], None] | None = None
) -> PreprocessSummary:
    """Make and commit the data set of `config`; a job that was killed is continued.

    `progress` is called at the start and after every chunk with the counts so far: chunks, chunks_done,
    samples, rejected, skipped.

    Raises:
        ConfigError: the output lies inside the source.
        DataError: there is no input, every row was rejected, or two rows have one id. Nothing is committed.
        ShardCorrupt: a tar of the input is broken. Nothing is committed; the shards that are done stay done.
        ManifestMismatch: the output holds, or was begun as, another data set.
    """
    start = time.monotonic()
    store = open_store(config.output)
    _refuse_overlap(store, open_store(config.source.uri))
    chunks = plan_chunks(config.source, config.samples_per_shard)
    # The addresses are no part of it: the same data elsewhere give the same bytes, the manifest's included.
    recipe = {"source": {"kind": config.source.kind}, "transform": asdict(config.transform)}
    inputs = {"chunks": len(chunks), "bytes": sum(c.size for c in chunks), "digest": plan_digest(chunks)}
    digest = hashlib.sha256(ledger.canonical(recipe)).hexdigest()
    if store.exists(MANIFEST):
        return _already_committed(store, {"recipe": recipe, "inputs": inputs}, start)

    ledger.claim(store, recipe)
    records = ledger.finished(store, digest, chunks)
    skipped = len(records)

    def report() -> None:
        if progress is not None:
            progress(
                {
                    "chunks": len(chunks),
                    "chunks_done": len(records),
                    "samples": sum(r.kept for r in records.values()),
                    "rejected": sum(r.rows_in - r.kept for r in records.values()),
                    "skipped": skipped,
                }
            )

    report()
    todo = [ChunkTask(c, config.transform, store.uri, digest) for c in chunks if c.index not in records]
    if todo:
        with ray_session(config.workers):
            for i, record in run_bounded(process_chunk, todo, window=config.window, retries=config.retries):
                records[todo[i].chunk.index] = record
                report()
    ordered = [records[c.index] for c in chunks]
    manifest = _commit(store, digest, ordered, {"recipe": recipe, "recipe_digest": digest, "inputs": inputs})
    return _summary(store, manifest, start, skipped, already_committed=False)


def process_chunk(task: ChunkTask) -> ChunkRecord:
    """Make the shard of one chunk and enter it into the ledger; runs in a worker. Raises as `read_chunk`."""
    store = open_store(task.output)
    tar_name, index_name = shard_names(task.chunk.index)
    rows_in = 0
    ids: list[int] = []
    rejects: list[Reject] = []

    def kept() -> Iterator[Sample]:
        nonlocal rows_in
        for row in read_chunk(task.chunk):
            rows_in += 1
            result = row if isinstance(row, Reject) else prepare(row, task.transform)
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                ids.append(result.id)
                yield result

    with tempfile.TemporaryDirectory(prefix="maskclip-") as name:
        folder = Path(name)
        shard = write_shard(kept(), folder / tar_name, folder / index_name)
        ledger.write_rows(folder / "rows", ids, rejects)
        files = tuple(file_entry(folder / n, n) for n in (tar_name, index_name)) if shard.num_samples else ()
        for entry in files:
            store.put_file(entry.name, folder / entry.name)
        rows = file_entry(folder / "rows", ledger.rows_name(task.digest, task.chunk.index))
        store.put_file(rows.name, folder / "rows")
    rejected = dict(sorted(Counter(reject.reason for reject in rejects).items()))
    record = ChunkRecord(
        task.chunk.names, task.chunk.size, rows_in, shard.num_samples, rejected, files=files, rows=rows
    )
    # False: a twin of this task, of a driver that was killed, was faster; its bytes are the same.
    store.put_if_absent(ledger.record_name(task.digest, task.chunk.index), record.to_bytes())
    return record


def _refuse_overlap(output: ObjectStore, source: ObjectStore) -> None:
    if f"{output.uri}/".startswith(f"{source.uri}/"):
        raise ConfigError(f"{output.uri}: lies inside the source {source.uri}; choose another output")


def _already_committed(store: ObjectStore, wanted: dict[str, Any], start: float) -> PreprocessSummary:
    manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
    for part, value in wanted.items():
        if manifest.meta.get(part) != value:
            how = "by another recipe" if part == "recipe" else "from other input, or cut otherwise"
            raise ManifestMismatch(
                f"{store.uri}: has a data set made {how}, which is never overwritten; choose another output"
            )
    return _summary(store, manifest, start, skipped=len(manifest.meta["shards"]), already_committed=True)


def _commit(
    store: ObjectStore, digest: str, records: Sequence[ChunkRecord], meta: dict[str, Any]
) -> Manifest:
    """Check the books, write the rejects and then the manifest."""
    rejected: Counter[str] = Counter()
    for record in records:
        rejected.update(record.rejected)
    rows_in, kept = sum(r.rows_in for r in records), sum(r.kept for r in records)
    if kept == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(rejected.items())) or "it has no rows"
        raise DataError(f"{store.uri}: the data set would be empty, no row is usable ({reasons})")
    with tempfile.TemporaryDirectory(prefix="maskclip-") as folder:
        path = Path(folder) / REJECTS_NAME
        names = [ledger.rows_name(digest, i) for i in range(len(records))]
        ids, num_rejects = ledger.gather_rows(store, names, path)
        store.put_file(REJECTS_NAME, path)
        rejects = file_entry(path, REJECTS_NAME)
    if not (rows_in == kept + rejected.total() and kept == len(ids) and rejected.total() == num_rejects):
        raise DataError(
            f"{store.uri}: {rows_in} rows in, {kept} kept, {rejected.total()} rejected, but the ledger has "
            f"{len(ids)} and {num_rejects}; delete the folder and run again"
        )
    _require_unique(store, ids)
    shards = [
        ShardInfo(r.files[0].name, r.files[1].name, r.kept, r.files[0].size) for r in records if r.files
    ]
    counts = {"rows_in": rows_in, "kept": kept, "rejected": rejected.total()}
    counts.update({f"rejected/{reason}": n for reason, n in rejected.items()})
    files = (*(entry for r in records for entry in r.files), rejects)
    meta = {**meta, "counts": counts, "shards": [asdict(shard) for shard in shards]}
    manifest = Manifest(DATASET_KIND, DATASET_VERSION, files, meta)
    manifests.commit(store, manifest)
    return manifest


def _require_unique(store: ObjectStore, ids: np.ndarray) -> None:
    values, times = np.unique(ids, return_counts=True)
    if times.max() > 1:
        raise DataError(
            f"{store.uri}: {int((times > 1).sum())} ids belong to several samples, such as "
            f"{values[times.argmax()]}; rename the tars or keys of the input"
        )


def _summary(
    store: ObjectStore, manifest: Manifest, start: float, skipped: int, already_committed: bool
) -> PreprocessSummary:
    dataset = describe(store, manifest)
    return PreprocessSummary(
        samples=dataset.num_samples,
        shards=len(dataset.shards),
        rejects=dataset.rejects,
        skipped_shards=skipped,
        seconds=time.monotonic() - start,
        manifest_digest=dataset.digest,
        already_committed=already_committed,
    )
