"""The preprocess job: raw input becomes a committed data set in five stages.

    plan     list the input and cut it into chunks
    stage    one Ray task per chunk: filter, download, check, decode, encode; what may pass is tried again
    select   over the rows of all chunks: duplicates, and each kept row's place (metadata only, Ray Data)
    write    one Ray task per output shard, from staged images
    commit   check the books, put the manifest, delete what was staged

What is committed depends on the input and the recipe alone, whatever the number of workers, their order or
their deaths. The driver moves no image. Every finished task leaves a record in the ledger, and a rerun does
only what the ledger lacks. Of several drivers of one output the newest works and the others end; what is
committed never changes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from cluster import manifest as manifests
from cluster.errors import (
    ConfigError,
    DataError,
    ManifestMismatch,
    ObjectNotFound,
    StorageUnavailable,
    Superseded,
)
from cluster.manifest import MANIFEST, Manifest
from cluster.ray_tasks import ray_session, run_bounded
from cluster.store import ObjectStore, open_store, overlap
from data_pipeline.catalog import describe
from data_pipeline.fetch.download import DownloadConfig
from data_pipeline.image.transforms import TransformConfig
from data_pipeline.ingest.sources import Chunk, SourceConfig, plan_chunks, plan_digest
from data_pipeline.job import ledger
from data_pipeline.job.dedup import DuplicateConfig
from data_pipeline.job.drivers import Driver, commit_manifest, require_newest, take_over
from data_pipeline.job.filters import FilterConfig, RowFilter, check_columns
from data_pipeline.job.ledger import ShardRecord, StageRecord
from data_pipeline.job.lists import lists_digest
from data_pipeline.job.progress import Progress, Report
from data_pipeline.job.selection import Selection, ShardConfig, select_rows
from data_pipeline.job.staging import StageSettings, StageTask, stage_chunk
from data_pipeline.job.write_stage import WriteTask, write_output_shard
from data_pipeline.records import DATASET_KIND, DATASET_VERSION, ShardInfo

# Settings of the download that say how fast and how patiently, but not what: they may change between runs.
_PACE = ("concurrency", "per_host", "per_host_rate", "look_ahead", "buffer_bytes", "retries", "backoff_base")
_PACE += ("backoff_cap", "retry_after_cap", "connect_timeout", "read_timeout", "total_timeout", "contact")
_PACE += ("robots_cache_size", "crawl_delay_cap")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One preprocess job."""

    command: Literal["preprocess"] = "preprocess"
    """The command that runs this recipe."""
    source: SourceConfig
    """The raw input."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Rows that are not wanted."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """How images of rows that have only an address are fetched."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """How images are stored."""
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    """Which rows count as the same."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    """How samples are spread over output shards."""
    output: str
    """Folder of the data set: a local one, or s3://bucket/prefix."""
    window: int | None = None
    """Tasks in flight, each with a core and local space for a raw tar or a shard; null: twice the cores."""
    retries: int = 2
    """Times that a task is run again when it fails or its worker dies; broken input is not tried again."""
    retry_rounds: int = 1
    """Times that rows whose download failed for what may pass are tried again in one run."""
    accept_retriable: float = 0.05
    """Share of rows that may be missing for what may pass; with more the job ends, and can be repeated."""
    workers: int | None = None
    """Cores of the local Ray that is started where no cluster is given; null: all of them."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty: set output to the folder of the data set")
        for name in ("retries", "retry_rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: set {name} to 0 or more")
        for name in ("window", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: set {name} to 1 or more, or to null")
        if not 0 <= self.accept_retriable <= 1:
            raise ValueError(f"accept_retriable is {self.accept_retriable}: set accept_retriable to 0 ... 1")
        if self.duplicates.needs_fingerprints and not self.transform.fingerprints:
            raise ValueError("duplicates needs the hashes of images: set transform.fingerprints to true")


@dataclass(frozen=True)
class PreprocessSummary:
    """What a preprocess job did. Counts are of the whole data set, `rejects` are dropped rows by reason."""

    samples: int
    shards: int
    rejects: dict[str, int]
    skipped: int
    """Chunks and shards that an earlier run had finished."""
    seconds: float
    manifest_digest: str
    already_committed: bool
    """The data set was there, made from this input by this recipe, and nothing was done."""
    retriable: int = 0
    """Rows among `rejects` that were lost for what may pass; not known of a set that was there."""


def run_preprocess(config: PreprocessConfig, progress: Report | None = None) -> PreprocessSummary:
    """Make and commit the data set of `config`; a job that was killed is continued.

    `progress` is called at the start of each stage and after every task; `Progress.state` says with what.

    Raises:
        ConfigError: the output and the source overlap, or a list of the filters is not there.
        DataError: there is no input, or no row is kept. Nothing is committed.
        ShardCorrupt: a tar of the input is broken. Nothing is committed; what is done stays done.
        StorageUnavailable: too many rows are missing for what may pass; the same call tries only these again.
            Or a disk for temporary files is full.
        ManifestMismatch: the output holds, or was begun as, another data set.
        Superseded: another driver took the output over.
        Hang: Ray itself failed; the same call continues.
    """
    start = time.monotonic()
    store = open_store(config.output)
    if overlap(store.uri, config.source.uri):
        raise ConfigError(
            f"{store.uri}: lies inside the source {config.source.uri}, or around it; choose another output"
        )
    check_columns(config.source, config.filters)
    RowFilter(config.filters)  # a list that is not there is found now, and not by every task
    chunks = plan_chunks(config.source)
    recipe = recipe_of(config)
    inputs = {"chunks": len(chunks), "bytes": sum(c.size for c in chunks), "digest": plan_digest(chunks)}
    wanted = {"recipe": recipe, "inputs": inputs}
    if store.exists(MANIFEST):
        return _already_committed(store, wanted, start)
    try:
        with ray_session(config.workers):  # before the claim: without a cluster nothing is touched
            ledger.claim(store, recipe)
            driver = take_over(store, inputs["digest"])
            job = _Job(config, store, ledger.digest(recipe), driver, Progress(progress))
            rounds = job.stage(chunks)
            selection = job.select(rounds)
            shards = job.write(selection)
        meta = {**wanted, "recipe_digest": job.recipe, "format": config.shards.format}
        manifest = job.commit(selection, shards, meta)
    except (ManifestMismatch, ObjectNotFound, Superseded):
        # Another driver has put the manifest since we looked, and deleted what we were to read.
        if store.exists(MANIFEST):
            return _already_committed(store, wanted, start)
        raise
    lost = _missing(rounds).total()
    return _summary(store, manifest, start, job.skipped, already_committed=False, retriable=lost)


def recipe_of(config: PreprocessConfig) -> dict[str, Any]:
    """What the data set depends on besides its input, as plain JSON: no addresses and no matter of speed."""
    parts = ("source", "filters", "download", "transform", "duplicates", "shards")
    recipe = {name: asdict(getattr(config, name)) for name in parts}
    del recipe["source"]["uri"]
    for name in _PACE:
        del recipe["download"][name]
    if config.source.kind != "table":
        del recipe["download"]  # nothing is fetched
    for name in ("allow", "deny"):
        recipe["filters"][name] = lists_digest(getattr(config.filters, name))
    return json.loads(ledger.canonical(recipe))


class _Job:
    """The stages of one run."""

    def __init__(
        self, config: PreprocessConfig, store: ObjectStore, recipe: str, driver: Driver, progress: Progress
    ) -> None:
        self.config, self.store, self.recipe, self.driver = config, store, recipe, driver
        self.progress = progress
        self.skipped = 0
        self._plan = f"{ledger.STAGING}plan"

    def stage(self, chunks: Sequence[Chunk]) -> list[list[StageRecord]]:
        """The rounds of every chunk. Raises as `stage_chunk`, and StorageUnavailable as `run_preprocess`."""
        config = self.config
        settings = StageSettings(
            output=self.store.uri,
            recipe=self.recipe,
            source=config.source,
            filters=config.filters,
            download=config.download,
            transform=config.transform,
            driver=self.driver,
        )
        rounds = ledger.staged_rounds(self.store, self.recipe, chunks)
        self.skipped += sum(bool(done) for done in rounds)
        decided = ledger.decided(self.store, self.recipe, rounds)
        earlier = any(done and done[-1].retriable for done in rounds)
        todo = [StageTask(c, settings) for c, done in zip(chunks, rounds, strict=True) if not done]
        self._stage("stage", rounds, todo, len(chunks))
        # A run that was repeated for the sake of these rows tries them, whatever the recipe says.
        for _ in range(0 if decided else max(config.retry_rounds, int(earlier))):
            pairs = zip(chunks, rounds, strict=True)
            todo = [StageTask(c, settings, done[-1]) for c, done in pairs if done[-1].retriable]
            if not todo:
                break
            self._stage("retry", rounds, todo, len(todo))
        if not decided:
            _refuse_many_retriable(self.store, rounds, config.accept_retriable)
        return rounds

    def select(self, rounds: list[list[StageRecord]]) -> Selection:
        """The fate of every row. Raises as `select_rows`, and DataError when the books do not balance."""
        self.progress.begin("select", 1)
        self._require_newest()
        staged = [[record.rows for record in done] for done in rounds]
        # A plan belongs to these staged rows: a driver that was replaced cannot write into that of another.
        self._plan = f"{ledger.STAGING}plan-{ledger.digest(staged)[:16]}"
        chosen = select_rows(
            self.store.uri,
            staged,
            self.config.duplicates,
            self.config.shards,
            self._plan,
            guard=partial(require_newest, self.store, self.driver),
        )
        rows_in, dropped = sum(done[0].rows_in for done in rounds), sum(chosen.dropped.values())
        if not rows_in == chosen.rows_in == chosen.samples + dropped:
            raise DataError(
                f"{self.store.uri}: {rows_in} rows in, but {chosen.rows_in} were decided on, "
                f"{chosen.samples} kept and {dropped} dropped; delete the folder and run again"
            )
        if chosen.samples == 0:
            reasons = ", ".join(f"{reason} {n}" for reason, n in chosen.dropped.items()) or "it has no rows"
            raise DataError(f"{self.store.uri}: the data set would be empty, no row is usable ({reasons})")
        self._require_newest()
        ledger.decide(self.store, self.recipe, rounds)
        self.progress.selected(chosen.rows_in, chosen.samples)
        return chosen

    def write(self, chosen: Selection) -> list[ShardRecord]:
        """The written shards, in order. Raises as `write_output_shard`."""
        self._require_newest()
        plan = ledger.digest(asdict(chosen))
        done = ledger.written_shards(self.store, self.recipe, plan)
        wanted = [index for index, size in enumerate(chosen.shard_sizes) if size]
        todo = [
            WriteTask(
                index,
                self.store.uri,
                self.recipe,
                plan,
                chosen.shards_per_part,
                self.config.shards.format,
                self._plan,
                self.driver,
            )
            for index in wanted
            if index not in done
        ]
        self.skipped += len(done)
        self.progress.begin("write", len(wanted), len(done))
        for record in self._run(write_output_shard, todo):
            done[record.index] = record
            self.progress.written(record.num_samples)
        for index in wanted:
            if done[index].num_samples != chosen.shard_sizes[index]:
                raise DataError(
                    f"{self.store.uri}/{done[index].files[0].name}: {done[index].num_samples} samples, but "
                    f"{chosen.shard_sizes[index]} were planned; delete the folder and run again"
                )
        return [done[index] for index in wanted]

    def commit(self, chosen: Selection, shards: Sequence[ShardRecord], meta: dict[str, Any]) -> Manifest:
        """Put the manifest, then delete what was only needed to get there. Raises as `commit_manifest`."""
        self.progress.begin("commit", 1)
        infos = [ShardInfo(r.files[0].name, r.files[-1].name, r.num_samples, r.files[0].size) for r in shards]
        counts = {"rows_in": chosen.rows_in, "kept": chosen.samples, "dropped": sum(chosen.dropped.values())}
        counts |= {f"dropped/{reason}": n for reason, n in chosen.dropped.items()}
        files = (*(entry for record in shards for entry in record.files), *chosen.rows)
        meta = {**meta, "counts": counts, "shards": [asdict(info) for info in infos]}
        sizes = {key: size for prefix in ledger.OUTPUTS for key, size in self.store.list(prefix)}
        for entry in files:
            if sizes.get(entry.name) != entry.size:
                raise StorageUnavailable(
                    f"{self.store.uri}/{entry.name}: {sizes.get(entry.name)} bytes, but {entry.size} were "
                    "written: it was changed while the job ran; run the same command again"
                )
        manifest = Manifest(DATASET_KIND, DATASET_VERSION, files, meta)
        commit_manifest(self.store, self.driver, manifest)
        ledger.clean_up(self.store, (entry.name for entry in files))
        self.progress.committed()
        return manifest

    def _require_newest(self) -> None:
        require_newest(self.store, self.driver)

    def _stage(
        self, name: str, rounds: list[list[StageRecord]], todo: Sequence[StageTask], total: int
    ) -> None:
        skipped = total - len(todo)
        self.progress.begin(name, total, skipped, (record for done in rounds for record in done))
        for record in self._run(stage_chunk, todo):
            rounds[record.chunk].append(record)
            self.progress.staged(record)

    def _run(self, fn: Callable[[Any], Any], todo: Sequence[Any]) -> Iterator[Any]:
        config = self.config
        results = run_bounded(fn, todo, window=config.window, retries=config.retries, label=str)
        return (record for _, record in results)


def _missing(rounds: Sequence[Sequence[StageRecord]]) -> Counter[str]:
    """Rows that are missing for what may pass, by reason."""
    return sum((Counter(done[-1].retriable) for done in rounds), Counter[str]())


def _refuse_many_retriable(
    store: ObjectStore, rounds: Sequence[Sequence[StageRecord]], accepted: float
) -> None:
    rows = sum(done[0].rows_in for done in rounds)
    missing = _missing(rounds)
    if missing.total() > accepted * rows:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(missing.items()))
        raise StorageUnavailable(
            f"{store.uri}: {missing.total()} of {rows} rows are missing for what may pass ({reasons}), more "
            f"than {accepted:.0%}; run the same command again, it tries only these, or raise accept_retriable"
        )


def _already_committed(store: ObjectStore, wanted: dict[str, Any], start: float) -> PreprocessSummary:
    manifest = manifests.load(store, DATASET_KIND, DATASET_VERSION)
    for part, value in wanted.items():
        if manifest.meta.get(part) != value:
            how = "by another recipe" if part == "recipe" else "from other input, or cut otherwise"
            raise ManifestMismatch(
                f"{store.uri}: has a data set made {how}, which is never overwritten; choose another output"
            )
    ledger.clean_up(store, (entry.name for entry in manifest.files))
    skipped = wanted["inputs"]["chunks"] + len(manifest.meta["shards"])
    return _summary(store, manifest, start, skipped, already_committed=True)


def _summary(
    store: ObjectStore,
    manifest: Manifest,
    start: float,
    skipped: int,
    *,
    already_committed: bool,
    retriable: int = 0,
) -> PreprocessSummary:
    dataset = describe(store, manifest)
    return PreprocessSummary(
        samples=dataset.num_samples,
        shards=len(dataset.shards),
        rejects=dataset.dropped,
        skipped=skipped,
        seconds=time.monotonic() - start,
        manifest_digest=dataset.digest,
        already_committed=already_committed,
        retriable=retriable,
    )
