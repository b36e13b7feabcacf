"""Which sample stands at slot g of a run: a pure function of (shard sizes, OrderConfig, global batch, g).

Letters: N samples in the data set, B slots in a global batch, S streams, n slots asked for at once.
The law and its limits are written down in docs/resume-and-elasticity.md.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np

from data_pipeline.keyed import mix, permute, shuffled, unpermute

SHARD_KEY = 1
WINDOW_KEY = 2
BATCH_KEY = 3
CACHED_EPOCHS = 2


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """How samples are shuffled; part of the identity of a run, so it cannot change at a resume."""

    seed: int = 0
    """Seed of the shuffle, of the crops and of everything else that is keyed by a sample."""
    streams: int = 64
    """Places of the data set that are read side by side, at most: a data set of fewer than `streams` times
    `window_shards` shards has fewer. A batch takes equally many samples from each."""
    window_shards: int = 4
    """Samples are shuffled within windows of this many shards; more mix better and keep more shards open."""

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams is {self.streams}: set it to 1 or more")
        if self.window_shards < 1:
            raise ValueError(f"window_shards is {self.window_shards}: set it to 1 or more")


def window_of(step: int, skipped: Sequence[int]) -> int:
    """The slot window, slots [w*B, (w+1)*B), that step number `step` (from 0) of a run consumes.

    Args:
        skipped: windows that the run leaves out, rising.
    """
    for window in skipped:
        if window > step:
            break
        step += 1
    return step


class Located(NamedTuple):
    """Where slots point to: int64 arrays of the shape of the slots."""

    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


class _EpochTable(NamedTuple):
    shard_order: np.ndarray  # shard at each place of the epoch's laid-out order
    starts: np.ndarray  # first position of each place, and N at the end


class SampleOrder:
    """slot -> (epoch, shard, index in shard), O(1) in the slot and O(shards) in memory.

    Within an epoch the shards are permuted, laid end to end and cut into S runs whose lengths differ by at
    most one. A run is cut into equal windows of about `window_shards` mean shards, and samples are permuted
    inside them. A global batch takes B/S consecutive positions from every run; its places count run by run,
    and its slots are a keyed permutation of its places. Every epoch holds every sample once; no remainder is
    dropped, whether B divides N or not. May be used from several threads.

    S is the largest divisor of `OrderConfig.streams` at which a run has `window_shards` shards, and 1 where
    there are not so many: windows are never cut short by the ends of runs.

    Raises ValueError: no samples, a negative shard size, B < streams or B not a multiple of streams.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, cfg: OrderConfig, global_batch: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.ndim != 1 or self._sizes.size == 0 or self._sizes.min() < 0 or self._sizes.sum() == 0:
            raise ValueError("the data set has no samples: preprocess some first")
        if global_batch < cfg.streams or global_batch % cfg.streams:
            raise ValueError(
                f"global batch {global_batch} is not a multiple of {cfg.streams} streams: "
                "change data.global_batch or data.streams"
            )
        self.num_samples = int(self._sizes.sum())
        self.global_batch = global_batch
        self._cfg = cfg
        shards = int(np.count_nonzero(self._sizes))
        wanted = max(1, shards // cfg.window_shards)
        self.streams = max(s for s in range(1, min(cfg.streams, wanted) + 1) if cfg.streams % s == 0)
        self._window = max(1, round(cfg.window_shards * self.num_samples / shards))
        self._tables: OrderedDict[int, _EpochTable] = OrderedDict()
        self._lock = Lock()

    def slots(self, step: int, places: np.ndarray) -> np.ndarray:
        """The slots at `places` (int array [n], 0 <= place < B) of the batch of `step`: int64 [n].

        Neighbouring places lie in the same run. A rank that takes neighbouring places reads few shards.
        """
        return step * self.global_batch + permute(places, self.global_batch, self._batch_key(step))

    def locate(self, slots: np.ndarray) -> Located:
        """Locate any slots >= 0: int array [n], any order, any epochs. ValueError for a negative one."""
        g = np.asarray(slots, dtype=np.int64)
        if np.any(g < 0):
            raise ValueError("slots start at 0")
        batch, slot = np.divmod(g, self.global_batch)
        return self.located(batch, unpermute(slot, self.global_batch, self._batch_key(batch)))

    def locate_places(self, step: int, places: np.ndarray) -> Located:
        """As `locate(slots(step, places))`, at half the cost."""
        return self.located(np.int64(step), np.asarray(places, dtype=np.int64))

    def _batch_key(self, batch: np.ndarray | int) -> np.ndarray:
        return mix(self._cfg.seed, BATCH_KEY, batch)

    def located(self, batch: np.ndarray | np.int64, place: np.ndarray) -> Located:
        """Where the places of batches point to: two int64 arrays that broadcast to the shape of `place`."""
        stream, row = np.divmod(place, self.global_batch // self.streams)
        q = batch * self.global_batch + row * self.streams + stream
        epoch, r = np.divmod(q, self.num_samples)
        laid = self._laid_position(epoch, r)
        shard, index = np.empty_like(laid), np.empty_like(laid)
        for e in np.unique(epoch):
            here = epoch == e
            table = self._table(int(e))
            # side="right" steps over shards without samples, which share their start with the next one.
            at = np.searchsorted(table.starts, laid[here], side="right") - 1
            shard[here] = table.shard_order[at]
            index[here] = laid[here] - table.starts[at]
        return Located(epoch, shard, index)

    def _laid_position(self, epoch: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Position in the epoch's laid-out order of the r-th sample that the epoch hands out."""
        length, longer = divmod(self.num_samples, self.streams)
        offset, run = np.divmod(r, self.streams)
        run_start = run * length + np.minimum(run, longer)
        run_length = length + (run < longer)
        # Equal windows, as many as fit best: a short last one would leave its samples unshuffled.
        windows = np.maximum(1, (run_length + self._window // 2) // self._window)
        # The last window that starts at or before offset.
        window = (offset * windows + windows - 1) // run_length
        start = window * run_length // windows
        size = (window + 1) * run_length // windows - start
        key = mix(self._cfg.seed, WINDOW_KEY, epoch, run, window)
        return run_start + start + permute(offset - start, size, key)

    def _table(self, epoch: int) -> _EpochTable:
        with self._lock:
            table = self._tables.get(epoch)
            if table is None:
                shard_order = shuffled(self._sizes.size, mix(self._cfg.seed, SHARD_KEY, epoch))
                starts = np.zeros(self._sizes.size + 1, dtype=np.int64)
                np.take(self._sizes, shard_order, out=starts[1:], mode="clip")  # "raise" would copy
                np.cumsum(starts, out=starts)
                table = self._tables[epoch] = _EpochTable(shard_order, starts)
                if len(self._tables) > CACHED_EPOCHS:
                    self._tables.popitem(last=False)
            return table
