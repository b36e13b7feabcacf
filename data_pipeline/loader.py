"""Batches of a rank, by step: a map from the step number to the samples of the rank, made by spawned workers.

b slots of the rank in one batch, H, W height and width of a view, L tokens of a caption.

A batch is a pure function of (data set, order, augmentation, global batch, rank, world size, step): workers
share no state and draw nothing, so their number changes nothing and a resume at step k starts with step k.
"""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cluster.errors import DataError, ManifestMismatch, MaskClipError
from data_pipeline.augment import AugmentConfig, eval_view, train_view
from data_pipeline.catalog import DatasetManifest, load_dataset
from data_pipeline.order import OrderConfig, SampleOrder
from data_pipeline.shard_reader import DatasetReader, StoredSample
from data_pipeline.tokenizer import Tokenizer

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

Batch = dict[str, torch.Tensor]
"""image uint8 [b,3,H,W] (channels-last in memory), tokens int64 [b,L], id int64 [b], epoch int64 [b], slot
int64 [b], weight float32 [b]: 1, or 0 for a slot that only fills up the rank's part."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a rank makes its batches; nothing here changes what is in them."""

    workers: int = 0
    """Processes per rank that make batches; 0 makes them in the training process itself."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""
    cache: str | None = None
    """Local folder for shards of a remote data set; the processes of a node may share it."""
    cache_bytes: int = 50_000_000_000
    """Size that the cache folder may reach."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: set it to 0 or more")
        if self.prefetch < 1:
            raise ValueError(f"prefetch is {self.prefetch}: set it to 1 or more")


@dataclass(frozen=True)
class _Failure:
    """An error of ours on its way out of a worker; raised there, DataLoader would make a traceback of it."""

    error: MaskClipError


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """Everything that decides what a batch holds: addresses and settings, cheap to send to a worker."""

    dataset_uri: str
    digest: str
    order: OrderConfig
    augment: AugmentConfig
    loader: LoaderConfig
    global_batch: int
    rank: int
    world_size: int


class _BatchMaker:
    """Makes the batch of any step in the process that it lives in. Raises as `Loader`."""

    def __init__(self, spec: _Spec, dataset: DatasetManifest) -> None:
        if dataset.digest != spec.digest:
            raise ManifestMismatch(
                f"{dataset.uri}: the data set was replaced while in use; start the run again"
            )
        self._seed = spec.order.seed
        self._augment = spec.augment
        sizes = [shard.num_samples for shard in dataset.shards]
        self._order = SampleOrder(sizes, spec.order, spec.global_batch)
        self._reader = DatasetReader(dataset, spec.loader.cache, spec.loader.cache_bytes)
        self._tokenizer = Tokenizer()
        part = -(-spec.global_batch // spec.world_size)
        inside = spec.rank * part + np.arange(part)
        # Slots beyond the batch repeat its last one with weight 0.
        self._inside = np.minimum(inside, spec.global_batch - 1)
        self._weight = (inside < spec.global_batch).astype(np.float32)

    def make(self, step: int) -> Batch:
        """The batch of `step`; raises DataError or StorageUnavailable."""
        slots = step * self._order.global_batch + self._inside
        epochs, shards, indices = self._order.locate(slots)
        distinct = max(1, int(self._weight.sum()))
        samples, views = [], []
        for epoch, shard, index in zip(
            epochs[:distinct].tolist(), shards[:distinct].tolist(), indices[:distinct].tolist(), strict=True
        ):
            sample = self._reader.get(shard, index)
            samples.append(sample)
            with _decoding(sample):
                views.append(train_view(sample.image, sample.id, epoch, self._seed, self._augment))
        filler = len(slots) - distinct
        return _collate(
            samples + samples[-1:] * filler,
            views + views[-1:] * filler,
            self._tokenizer,
            epochs,
            slots,
            self._weight,
        )


class _StepBatches(Dataset):
    """Item k is the batch of step k. Pickles to its spec; a worker opens its own files at its first item."""

    def __init__(self, spec: _Spec) -> None:
        self._spec = spec
        self._maker: _BatchMaker | None = None

    def __getitem__(self, step: int) -> "Batch | _Failure":
        try:
            if self._maker is None:
                self._maker = _BatchMaker(self._spec, load_dataset(self._spec.dataset_uri))
            return self._maker.make(step)
        except MaskClipError as error:
            return _Failure(error)


class Loader:
    """The training batches of one rank.

    Step k covers slots [k*B, (k+1)*B); rank r of W takes the r-th part of ceil(B/W) of them.

    Raises ValueError for a global batch that is no multiple of the streams or a rank outside the world,
    ConfigError for a remote data set without a cache, and what `load_dataset` raises.
    """

    def __init__(
        self,
        dataset_uri: str,
        order_cfg: OrderConfig,
        augment_cfg: AugmentConfig,
        loader_cfg: LoaderConfig,
        global_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        dataset = load_dataset(dataset_uri)
        self.num_samples = dataset.num_samples
        self.manifest_digest = dataset.digest
        self._spec = _Spec(
            dataset_uri=dataset_uri,
            digest=dataset.digest,
            order=order_cfg,
            augment=augment_cfg,
            loader=loader_cfg,
            global_batch=global_batch,
            rank=rank,
            world_size=world_size,
        )
        # Also made when workers will do the work: what is wrong with the settings shows here and now.
        self._maker = _BatchMaker(self._spec, dataset)

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """The batches of steps first_step ... last_step - 1. Closing the iterator stops its workers.

        Raises, at the step concerned: ShardCorrupt and other DataErrors, StorageUnavailable.
        """
        steps = range(first_step, last_step)
        if self._spec.loader.workers == 0:
            yield from map(self._maker.make, steps)
            return
        workers = self._start_workers(steps)
        try:
            for item in workers:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            _stop_workers(workers)

    def _start_workers(self, steps: range) -> _MultiProcessingDataLoaderIter:
        loader = DataLoader(
            _StepBatches(self._spec),
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
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return cast(_MultiProcessingDataLoaderIter, iter(loader))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def eval_batches(dataset_uri: str, image_size: int, batch: int) -> Generator[Batch, None, None]:
    """Every sample once, in stored order: the centre of each image, weight 1, epoch 0.

    The last batch may be smaller. Runs in this process. Shards of a remote data set are held in a temporary
    folder, two at a time. Raises as `Loader`.
    """
    dataset = load_dataset(dataset_uri)
    tokenizer = Tokenizer()
    starts = np.cumsum([0] + [shard.num_samples for shard in dataset.shards])
    largest = max(dataset.files[s.name].size + dataset.files[s.index_name].size for s in dataset.shards)
    with TemporaryDirectory(prefix="maskclip-eval-") as folder:
        reader = DatasetReader(dataset, folder, 2 * largest)
        try:
            for first in range(0, dataset.num_samples, batch):
                slots = np.arange(first, min(first + batch, dataset.num_samples))
                shards = np.searchsorted(starts, slots, side="right") - 1
                samples, views = [], []
                for shard, index in zip(shards.tolist(), (slots - starts[shards]).tolist(), strict=True):
                    sample = reader.get(shard, index)
                    samples.append(sample)
                    with _decoding(sample):
                        views.append(eval_view(sample.image, image_size))
                yield _collate(
                    samples, views, tokenizer, np.zeros_like(slots), slots, np.ones(len(slots), np.float32)
                )
        finally:
            reader.close()


def _collate(
    samples: list[StoredSample],
    views: list[np.ndarray],
    tokenizer: Tokenizer,
    epochs: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
) -> Batch:
    # Pillow's pixels are HWC: the permuted view is what channels-last memory is, and saves transposing every
    # image.
    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    return {
        "image": images,
        "tokens": torch.from_numpy(tokenizer.encode([sample.caption for sample in samples])),
        "id": torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        "epoch": torch.from_numpy(epochs.copy()),
        "slot": torch.from_numpy(slots.copy()),
        "weight": torch.from_numpy(weights.copy()),
    }


@contextmanager
def _decoding(sample: StoredSample) -> Iterator[None]:
    try:
        yield
    except UNDECODABLE as error:
        raise DataError(
            f"{sample.source}: the stored image of sample {sample.key!r} cannot be decoded ({error}); "
            "preprocess again"
        ) from error


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_stop_signals(worker: int) -> None:
    """The training process decides when to stop, and needs batches until then: workers outlive the
    signals."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _stop_workers(workers: _MultiProcessingDataLoaderIter) -> None:
    # DataLoader has no public way: it waits for the garbage collector, and for SIGTERM, which ours ignore.
    workers._shutdown_workers()
    for process in workers._workers:
        if process.is_alive():
            process.kill()
            process.join()
