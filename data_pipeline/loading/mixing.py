"""Several data sets in one run, in exact proportions: slot -> (data set, epoch, shard, index), pure and O(1).

Letters: B slots in a global batch, B_i of them from data set i, n slots asked for at once. One data set is
the mix of one part, and its order is that of `SampleOrder` itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.keyed import mix, permute, unpermute
from data_pipeline.loading.order import BATCH_KEY, OrderConfig, SampleOrder

MIX_KEY = 4
ID_KEY = 5


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """One data set of a mix; its place in the list is part of the run's identity."""

    uri: str
    """Committed data set, as written by `maskclip preprocess`."""
    weight: int
    """Its share of every batch is weight / sum of the weights, exactly."""

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise ValueError(f"weight is {self.weight}: set it to 1 or more")


class MixLocated(NamedTuple):
    """Where slots point to: int64 arrays of the shape of the slots. `epoch` is the data set's own."""

    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


class MixedOrder:
    """The order of a weighted mix. Every batch holds B * weight / sum(weights) samples of each data set.

    The places of a batch are the places of its parts, one data set behind the other; its slots are a keyed
    permutation of them. Each data set is gone through in its own `SampleOrder`, by batches of B_i, over and
    over; a small one has more epochs than a large one. May be used from several threads.

    Raises ValueError: no data sets, B no multiple of the sum of the weights (in lowest terms) or of the
    streams, and what `SampleOrder` raises.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        weights: Sequence[int],
        cfg: OrderConfig,
        global_batch: int,
    ) -> None:
        if not shard_sizes or len(shard_sizes) != len(weights) or min(weights) < 1:
            raise ValueError("a mix needs data sets with a weight of 1 or more each: change data.mix")
        if global_batch % cfg.streams:
            raise ValueError(
                f"global batch {global_batch} is not a multiple of {cfg.streams} streams: "
                "change data.global_batch or data.streams"
            )
        shares = [weight // math.gcd(*weights) for weight in weights]
        if global_batch % sum(shares):
            raise ValueError(
                f"global batch {global_batch} cannot be shared as {':'.join(map(str, shares))}: make "
                f"data.global_batch a multiple of {sum(shares)}, or change the weights of data.mix"
            )
        self.global_batch = global_batch
        self.counts = [global_batch // sum(shares) * share for share in shares]
        """B_i: samples of each data set in a batch."""
        self.parts = [
            SampleOrder(
                sizes,
                replace(
                    cfg,
                    seed=cfg.seed if number == 0 else int(mix(cfg.seed, MIX_KEY, number)),
                    streams=math.gcd(cfg.streams, count),
                ),
                count,
            )
            for number, (sizes, count) in enumerate(zip(shard_sizes, self.counts, strict=True))
        ]
        self._starts = np.cumsum([0, *self.counts])
        self._seed = cfg.seed

    def slots(self, step: int, places: np.ndarray) -> np.ndarray:
        """The slots at `places` (int array [n], 0 <= place < B) of the batch of `step`: int64 [n]."""
        return step * self.global_batch + permute(places, self.global_batch, self._batch_key(step))

    def locate(self, slots: np.ndarray) -> MixLocated:
        """Locate any slots >= 0: int array [n], any order. ValueError for a negative one."""
        g = np.asarray(slots, dtype=np.int64)
        if np.any(g < 0):
            raise ValueError("slots start at 0")
        batch, slot = np.divmod(g, self.global_batch)
        return self._at(batch, unpermute(slot, self.global_batch, self._batch_key(batch)))

    def locate_places(self, step: int, places: np.ndarray) -> MixLocated:
        """As `locate(slots(step, places))`, at half the cost."""
        return self._at(np.int64(step), np.asarray(places, dtype=np.int64))

    def sections(self, places: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """For each data set: which of the sorted `places` are its, as places of its own batch, and the part
        of the samples of a shard that they take when the same places are taken in every batch."""
        found = []
        for number, part in enumerate(self.parts):
            own = places[(places >= self._starts[number]) & (places < self._starts[number + 1])]
            own = own - self._starts[number]
            rows = part.global_batch // part.streams
            streams = len(np.unique(own // rows))
            found.append((own, len(own) / (streams * rows) if streams else 0.0))
        return found

    def _batch_key(self, batch: np.ndarray | int) -> np.ndarray:
        return mix(self._seed, BATCH_KEY, batch)

    def _at(self, batch: np.ndarray | np.int64, place: np.ndarray) -> MixLocated:
        dataset = np.searchsorted(self._starts, place, side="right") - 1
        batch = np.broadcast_to(batch, place.shape)
        epoch, shard, index = (np.empty(place.shape, dtype=np.int64) for _ in range(3))
        for number, part in enumerate(self.parts):
            here = dataset == number
            if here.any():
                local = part.located(batch[here], place[here] - self._starts[number])
                epoch[here], shard[here], index[here] = local
        return MixLocated(dataset, epoch, shard, index)


def mix_digest(digests: Sequence[str], weights: Sequence[int]) -> str:
    """What identifies the samples and proportions of a mix: a SHA-256 in hexadecimal. That of one data set is
    its own."""
    if len(digests) == 1:
        return digests[0]
    shares = [weight // math.gcd(*weights) for weight in weights]
    return hashlib.sha256(json.dumps([list(digests), shares]).encode()).hexdigest()


def keyed_ids(ids: np.ndarray, dataset: np.ndarray) -> np.ndarray:
    """Sample ids (int64 [n]) as they go into batches and keys of random draws: int64 [n], never negative.

    Two data sets may hold rows of one source, and so equal ids. Those of the first keep their id, the others'
    is hashed with the number of their data set.
    """
    hashed = (mix(ID_KEY, ids, dataset) >> np.uint64(1)).astype(np.int64)
    return np.where(dataset == 0, ids, hashed)
