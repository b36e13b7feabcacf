"""Batches of a rank, by step: a map from the step number to the samples of the rank, made by spawned workers.

b slots of the rank in one batch, H, W height and width of a view, L tokens of a caption.

A batch is a pure function of (data sets, order, augmentation, global batch, rank, world size, step) and of
the tombstones of that moment: workers share no state and draw nothing, so their number changes nothing and a
resume at step k starts with step k. `batch_maker.py` makes one.
"""

import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cluster.errors import DataError, MaskClipError
from cluster.stop import SIGNALS
from data_pipeline.catalog import load_dataset
from data_pipeline.image.augment import AugmentConfig
from data_pipeline.loading.batch_maker import BadSample, Batch, BatchMaker, BatchSpec
from data_pipeline.loading.loader_config import LoaderConfig
from data_pipeline.loading.mixing import MixPart, mix_digest
from data_pipeline.loading.order import OrderConfig
from data_pipeline.shards.shard_cache import CacheCounters

__all__ = ["BadSample", "Batch", "Loader", "LoaderConfig"]


@dataclass(frozen=True)
class _Failure:
    """An error of ours on its way out of a worker; raised there, DataLoader would make a traceback of it."""

    error: MaskClipError


@dataclass(frozen=True)
class _Made:
    """A batch on its way out of a worker, with what the worker's cache has done so far."""

    batch: Batch
    bad: list[BadSample]
    worker: int
    counters: CacheCounters


class _StepBatches(Dataset):
    """Item k is the batch of step k. Pickles to its spec; a worker opens its own files at its first item."""

    def __init__(self, spec: BatchSpec, last_step: int, skipped: tuple[int, ...]) -> None:
        self._spec, self._last_step, self._skipped = spec, last_step, skipped
        self._maker: BatchMaker | None = None

    def __getitem__(self, step: int) -> "_Made | _Failure":
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            if self._maker is None:
                self._maker = BatchMaker(self._spec, [load_dataset(part.uri) for part in self._spec.parts])
                self._maker.begin(self._last_step, self._skipped, worker, workers)
            batch, bad = self._maker.make(step)
            return _Made(batch, bad, worker, replace(self._maker.counters))
        except MaskClipError as error:
            return _Failure(error)


class Loader:
    """The training batches of one rank, from one data set or a weighted mix of several.

    Step k covers slots [k*B, (k+1)*B), or those of a later window where the run skips some. The places of a
    batch are its slots in another order, in which those that are read together stand together; rank r of W
    takes the r-th part of ceil(B/W) places. Every rank has every step, so none waits for another at the end
    of an epoch.

    Raises ValueError for a global batch that is no multiple of the streams or of the weights or a rank
    outside the world, ConfigError for a remote data set without a cache, and what `load_dataset` and
    `load_tombstones` raise. DataError: of all samples not one is left.
    """

    def __init__(
        self,
        data: str | Sequence[MixPart],
        order_cfg: OrderConfig,
        augment_cfg: AugmentConfig,
        loader_cfg: LoaderConfig,
        global_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        parts = (MixPart(uri=data, weight=1),) if isinstance(data, str) else tuple(data)
        datasets = [load_dataset(part.uri) for part in parts]
        self.num_samples = sum(dataset.num_samples for dataset in datasets)
        self.num_shards = sum(len(dataset.shards) for dataset in datasets)
        self.num_rejects = sum(dataset.counts.get("dropped", 0) for dataset in datasets)
        """Rows that preprocessing has dropped."""
        self.manifest_digest = mix_digest(
            [dataset.digest for dataset in datasets], [part.weight for part in parts]
        )
        self._spec = BatchSpec(
            parts=parts,
            digests=tuple(dataset.digest for dataset in datasets),
            order=order_cfg,
            augment=augment_cfg,
            loader=loader_cfg,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
        )
        # Also made when workers will do the work: what is wrong with the settings shows here and now.
        self._maker = BatchMaker(self._spec, datasets)
        if self._maker.removed >= self.num_samples:
            raise DataError(
                f"{', '.join(part.uri for part in parts)}: every sample was removed "
                "(maskclip dataset remove), so nothing is left to train on; choose another data set"
            )
        self._counters: dict[int, CacheCounters] = {}

    @property
    def counters(self) -> CacheCounters:
        """What the caches of this rank's processes have done since `batches` was last called."""
        return sum(self._counters.values(), CacheCounters())

    def batches(
        self,
        first_step: int,
        last_step: int,
        skipped: tuple[int, ...] = (),
        report: Callable[[BadSample], None] = lambda _: None,
    ) -> Generator[Batch, None, None]:
        """The batches of steps first_step ... last_step - 1. Closing the iterator stops its workers.

        Args:
            skipped: slot windows that no step consumes, rising (`order.window_of`).
            report: is told of every sample that has weight 0 since it cannot be decoded.

        Raises, at the step concerned: ShardCorrupt and other DataErrors, StorageUnavailable.
        """
        steps = range(first_step, last_step)
        self._counters = {}
        if self._spec.loader.workers == 0:
            self._maker.begin(last_step, skipped)
            try:
                for step in steps:
                    batch, bad = self._maker.make(step)
                    self._counters[0] = replace(self._maker.counters)
                    for sample in bad:
                        report(sample)
                    yield batch
            finally:
                self._maker.end()
            return
        workers = self._start_workers(steps, skipped)
        try:
            for item in workers:
                if isinstance(item, _Failure):
                    raise item.error
                self._counters[item.worker] = item.counters
                for sample in item.bad:
                    report(sample)
                yield item.batch
        finally:
            _stop_workers(workers)

    def _start_workers(self, steps: range, skipped: tuple[int, ...]) -> _MultiProcessingDataLoaderIter:
        loader = DataLoader(
            _StepBatches(self._spec, steps.stop, skipped),
            batch_size=None,
            sampler=steps,
            num_workers=self._spec.loader.workers,
            prefetch_factor=self._spec.loader.prefetch,
            multiprocessing_context="spawn",
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator(),  # else it draws from the global one
        )
        # A worker takes seconds to import; stop signals that reach its process group meanwhile must not kill
        # it, so it is born with them blocked. The tracker must exist before: starting it unblocks them.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return cast(_MultiProcessingDataLoaderIter, iter(loader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_stop_signals(worker: int) -> None:
    """The training process decides when to stop, and needs batches until then: workers outlive the
    signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _stop_workers(workers: _MultiProcessingDataLoaderIter) -> None:
    # DataLoader has no public way: it waits for the garbage collector, and for SIGTERM, which ours ignore.
    workers._shutdown_workers()
    for process in workers._workers:
        if process.is_alive():
            process.kill()
            process.join()
