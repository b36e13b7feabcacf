"""Makes the batch of any step, in the process that it lives in.

b slots of the rank in one batch, H, W height and width of a view, L tokens of a caption.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from cluster.errors import DataError, ManifestMismatch
from cluster.store import open_store
from data_pipeline.catalog import DatasetManifest
from data_pipeline.image.augment import AugmentConfig, Box, crop_boxes, view
from data_pipeline.image.decode import PixelMemory, UndecodableImage
from data_pipeline.loading.loader_config import LoaderConfig
from data_pipeline.loading.mixing import MixedOrder, MixPart, keyed_ids
from data_pipeline.loading.order import OrderConfig, window_of
from data_pipeline.loading.tokenizer import Tokenizer
from data_pipeline.shards.dataset_reader import DatasetReader
from data_pipeline.shards.prefetch import Ahead, Prefetcher
from data_pipeline.shards.shard_cache import CacheCounters
from data_pipeline.shards.shard_reader import StoredSample
from data_pipeline.upkeep.takedown import load_tombstones

CHUNK = 64  # samples that are in memory undecoded
KEPT_ARRAYS = 3

Batch = dict[str, torch.Tensor]
"""image uint8 [b,3,H,W] (channels-last in memory), tokens int64 [b,L], id int64 [b], epoch int64 [b], slot
int64 [b], weight float32 [b]: 1, or 0 for a slot that only fills up the rank's part, and for a sample that
was taken out of its data set or cannot be decoded, which is black and has no words."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Everything that decides what a batch holds: addresses and settings, cheap to send to a worker."""

    parts: tuple[MixPart, ...]
    digests: tuple[str, ...]
    order: OrderConfig
    augment: AugmentConfig
    loader: LoaderConfig
    global_batch: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class BadSample:
    """A sample that keeps its slot with weight 0, since its image cannot be decoded."""

    slot: int
    id: int
    key: str
    reason: str


class BatchMaker:
    """The batches of one rank. Raises as `loader.Loader`."""

    def __init__(self, spec: BatchSpec, datasets: Sequence[DatasetManifest]) -> None:
        for dataset, digest in zip(datasets, spec.digests, strict=True):
            if dataset.digest != digest:
                raise ManifestMismatch(
                    f"{dataset.uri}: the data set was replaced while in use; start the run again"
                )
        self._spec = spec
        sizes = [np.array([shard.num_samples for shard in dataset.shards]) for dataset in datasets]
        self._order = MixedOrder(sizes, [part.weight for part in spec.parts], spec.order, spec.global_batch)
        budget = spec.loader.cache_bytes // len(datasets)
        self._readers = [DatasetReader(dataset, spec.loader.cache, budget) for dataset in datasets]
        self._removed = [_Removed(dataset.uri, spec.loader.tombstone_seconds) for dataset in datasets]
        self._tokenizer = Tokenizer()
        self._prefetchers: list[Prefetcher] = []
        self._skipped: tuple[int, ...] = ()
        self._shown = self._undecodable = 0
        self._memory = _Memory()
        self._decoded = PixelMemory()
        part = -(-spec.global_batch // spec.world_size)
        places = spec.rank * part + np.arange(part)
        # Places beyond the batch repeat its last one with weight 0.
        self._places = np.minimum(places, spec.global_batch - 1)
        self._weight = (places < spec.global_batch).astype(np.float32)
        self._distinct = max(1, int(self._weight.sum()))

    @property
    def removed(self) -> int:
        """Samples that were taken down, as far as is known here."""
        return sum(len(removed) for removed in self._removed)

    @property
    def counters(self) -> CacheCounters:
        """What the caches of all data sets have done, as of now."""
        return sum((reader.counters for reader in self._readers), CacheCounters())

    def begin(self, last_step: int, skipped: tuple[int, ...] = (), worker: int = 0, workers: int = 1) -> None:
        """Steps before last_step will be asked for, every `workers`-th of them here: copy ahead for them.
        None of them consumes the slot windows `skipped` (see `order.window_of`)."""
        cfg = self._spec.loader
        self._skipped = skipped
        sections = self._order.sections(self._places[: self._distinct])
        for number, (places, share) in enumerate(sections):
            reader, part = self._readers[number], self._order.parts[number]
            if reader.remote and len(places):

                def needs(step: int, part=part, places=places) -> tuple[np.ndarray, np.ndarray]:
                    located = part.locate_places(window_of(step, skipped), places)
                    return located.shard, located.index

                prefetcher = reader.look_ahead(
                    Ahead(
                        needs=needs,
                        batches=cfg.lookahead,
                        transfers=cfg.transfers,
                        share=share,
                        last_step=last_step,
                        worker=worker,
                        workers=workers,
                    )
                )
                if prefetcher is not None:
                    self._prefetchers.append(prefetcher)

    def end(self) -> None:
        """No more batches for now: stop copying ahead and close the shards."""
        self._prefetchers.clear()
        for reader in self._readers:
            reader.close()

    def make(self, step: int) -> tuple[Batch, list[BadSample]]:
        """The batch of `step`, and what is wrong in it; raises DataError or StorageUnavailable."""
        for prefetcher in self._prefetchers:
            prefetcher.advance(step)
        side, distinct = self._spec.augment.image_size, self._distinct
        fillers = len(self._places) - distinct
        window = window_of(step, self._skipped)
        slots = self._order.slots(window, self._places)
        located = self._order.locate_places(window, self._places[:distinct])
        images = self._memory.array((len(slots), side, side, 3))
        captions, ids, weight = [""] * distinct, np.empty(distinct, np.int64), self._weight.copy()
        bad: list[BadSample] = []
        for number, (reader, removed) in enumerate(zip(self._readers, self._removed, strict=True)):
            here = np.flatnonzero(located.dataset == number)
            removed.refresh()
            samples = reader.samples(located.shard[here], located.index[here])
            while chunk := list(islice(samples, CHUNK)):
                at = here[[k for k, _ in chunk]]
                stored = [sample for _, sample in chunk]
                raw_ids = np.array([sample.id for sample in stored])
                gone = removed.among(raw_ids)
                ids[at] = keyed_ids(raw_ids, np.full(len(at), number))
                weight[at[gone]] = 0.0
                failed = self._show(stored, at, gone, ids[at], located.epoch[at], images, captions)
                for place, (sample, reason) in failed.items():
                    weight[place] = 0.0
                    bad.append(BadSample(int(slots[place]), int(ids[place]), sample.key, reason))
        images[distinct:] = images[distinct - 1]
        batch = collate(
            images,
            captions + captions[-1:] * fillers,
            self._tokenizer,
            np.append(ids, ids[-1:].repeat(fillers)),
            np.append(located.epoch, located.epoch[-1:].repeat(fillers)),
            slots,
            weight,
        )
        return batch, bad

    def _show(
        self,
        samples: list[StoredSample],
        at: np.ndarray,
        gone: np.ndarray,
        ids: np.ndarray,
        epochs: np.ndarray,
        images: np.ndarray,
        captions: list[str],
    ) -> dict[int, tuple[StoredSample, str]]:
        """Put views and captions where they belong; what was taken out of its data set stays black and
        empty, and so does what cannot be decoded: it is returned by place, with the reason."""
        cfg = self._spec.augment
        sizes = np.array([(sample.width, sample.height) for sample in samples])
        boxes = crop_boxes(sizes[:, 0], sizes[:, 1], ids, epochs, self._spec.order.seed, cfg)
        failed: dict[int, tuple[StoredSample, str]] = {}
        self._shown += len(samples)
        for sample, place, absent, box in zip(samples, at.tolist(), gone, boxes.tolist(), strict=True):
            if absent:
                images[place] = 0
                continue
            problem = self._decode(sample, box, images[place])
            if problem is None:
                captions[place] = sample.caption
            else:
                images[place] = 0
                failed[place] = (sample, problem)
        return failed

    def _decode(self, sample: StoredSample, box: Box, out: np.ndarray) -> str | None:
        """One view; why there is none, after a second try. Raises DataError where that happens too often."""
        size = (sample.width, sample.height)
        with suppress(UndecodableImage):
            view(sample.image, size, box, out, self._decoded)
            return None
        try:
            view(sample.image, size, box, out, self._decoded)
        except UndecodableImage as error:
            self._undecodable += 1
            share = self._spec.loader.undecodable_share
            if self._undecodable > (share > 0) + share * self._shown:
                raise undecodable(sample, error) from error
            return str(error)
        return None


class _Memory:
    """uint8 arrays for images. One that no batch uses any more is given out again: fresh pages cost more time
    than the views that are put there."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array with anything in it."""
        for array in self._arrays:
            # The list, the loop and the call itself refer to it: no tensor does.
            if array.shape == shape and sys.getrefcount(array) == 3:
                return array
        self._arrays = [*self._arrays[-KEPT_ARRAYS:], np.empty(shape, np.uint8)]
        return self._arrays[-1]


class _Removed:
    """Ids of the samples that were taken out of one data set, read again every `seconds`."""

    def __init__(self, uri: str, seconds: float) -> None:
        self._store = open_store(uri)
        self._seconds = seconds
        self._read()

    def __len__(self) -> int:
        return len(self._ids)

    def refresh(self) -> None:
        """Read them again when it is time; raises as `load_tombstones`."""
        if time.monotonic() - self._read_at >= self._seconds:
            self._read()

    def among(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids`, int64 [n], are removed: bool [n]."""
        at = np.searchsorted(self._ids, ids)
        return np.append(self._ids, -1)[at] == ids  # ids are never negative

    def _read(self) -> None:
        self._ids = load_tombstones(self._store)
        self._read_at = time.monotonic()


def collate(
    images: np.ndarray,
    captions: Sequence[str],
    tokenizer: Tokenizer,
    ids: np.ndarray,
    epochs: np.ndarray,
    slots: np.ndarray,
    weights: np.ndarray,
) -> Batch:
    """A batch of uint8 images [b, H, W, 3] and what belongs to them, arrays [b]."""
    # Decoded pixels are HWC: the permuted view is what channels-last memory is, and saves transposing every
    # image.
    return {
        "image": torch.from_numpy(images).permute(0, 3, 1, 2),
        "tokens": torch.from_numpy(tokenizer.encode(captions)),
        "id": torch.from_numpy(ids),
        "epoch": torch.from_numpy(epochs),
        "slot": torch.from_numpy(slots),
        "weight": torch.from_numpy(weights),
    }


def undecodable(sample: StoredSample, error: UndecodableImage) -> DataError:
    """The decoder's error as one that names the sample."""
    return DataError(
        f"the stored image of sample {sample.key!r} (id {sample.id}) cannot be decoded ({error}); "
        "preprocess again"
    )
