"""Copies what the coming batches of a rank need, before they need it.

One thread asks the order which samples the next batches hold; others bring them, several shards at a time, so
that a slow one holds up nobody else. A shard of which few samples are needed is not copied: the bytes of its
samples are read by ranges and kept in memory until they are used.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cluster.errors import MaskClipError
from data_pipeline.catalog import DatasetManifest
from data_pipeline.records import ShardInfo
from data_pipeline.shards.shard_cache import ShardCache
from data_pipeline.shards.shard_reader import ShardReader

REQUEST_BYTES = 1 << 20  # what a store could have sent in the time that one more request takes
RANGED_BYTES = 256 << 20  # images that wait in memory

Needs = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Step -> shard and row of each sample of this rank's part of the batch: int64 [n], int64 [n]."""


class Range(NamedTuple):
    """Bytes [start, stop) of a shard's file, which hold the images `rows`."""

    start: int
    stop: int
    rows: list[int]


def coalesced(reader: ShardReader, rows: Iterable[int]) -> list[Range]:
    """The fewest reads that cost least: images whose gap costs less than one more request go together."""
    ranges: list[Range] = []
    for (offset, size), row in sorted((reader.place(row), row) for row in set(rows)):
        if ranges and offset - ranges[-1].stop <= REQUEST_BYTES:
            last = ranges.pop()
            ranges.append(Range(last.start, max(last.stop, offset + size), [*last.rows, row]))
        else:
            ranges.append(Range(offset, offset + size, [row]))
    return ranges


def worth_copying(uses: float, shard: ShardInfo) -> bool:
    """Whether `uses` samples of a shard cost at least as much by themselves as the whole shard."""
    return uses * (REQUEST_BYTES + shard.size / max(1, shard.num_samples)) >= shard.size


class RangedImages:
    """Images that were read by ranges and wait for their batch. May be used from several threads."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._held: dict[tuple[int, int], bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def bring(self, shard: int, rows: Iterable[int]) -> None:
        """Read these images; stops early when memory for them is full. Raises what the store raises."""
        path = self._cache.index_path(shard)
        reader = ShardReader(path.with_suffix(".tar"), path, lambda *_: b"")
        for part in coalesced(reader, rows):
            if self._bytes > RANGED_BYTES:
                return
            data = self._cache.read_range(shard, part.start, part.stop - part.start)
            for row in part.rows:
                offset, size = reader.place(row)
                image = data[offset - part.start : offset - part.start + size]
                with self._lock:
                    self._bytes += len(image)
                    self._held[shard, row] = image

    def take(self, shard: int, row: int, offset: int, size: int) -> bytes:
        """One image: what waits for it, or a read of its own. Not verified."""
        with self._lock:
            image = self._held.pop((shard, row), None)
            if image is not None:
                self._bytes -= len(image)
                return image
        return self._cache.read_range(shard, offset, size)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a prefetcher may know of the loader."""

    needs: Needs
    batches: int
    """How far to look ahead."""
    transfers: int
    """Shards on their way at once."""
    share: float
    """Part of a shard's samples that this rank uses when the run does not end before."""
    last_step: int
    worker: int = 0
    """Worker k of n copies the shards k, k + n, ... and makes the steps first_step + k, + k + n, ..."""
    workers: int = 1


@dataclass
class _Plan:
    copy: list[int] = field(default_factory=list)
    ranges: deque[tuple[int, list[int]]] = field(default_factory=deque)


class Prefetcher:
    """Background threads of one process over its cache. `close` ends them; they die with the process too.

    An error of the store in the background is nobody's error yet: the batch that needs the shard tries again
    and raises it.
    """

    def __init__(
        self, dataset: DatasetManifest, cache: ShardCache, images: RangedImages, ahead: Ahead
    ) -> None:
        self._dataset, self._cache, self._images, self._ahead = dataset, cache, images, ahead
        self._whole = dataset.format == "arrow"  # its index is in the shard
        self._changed = threading.Condition()
        self._step: int | None = None
        self._closed = False
        self._by_range: frozenset[int] = frozenset()
        self._plan, self._busy = _Plan(), set[int]()
        self._threads = [threading.Thread(target=self._planning, daemon=True, name="plan-shards")]
        for number in range(ahead.transfers):
            self._threads.append(
                threading.Thread(target=self._copying, daemon=True, name=f"copy-shards-{number}")
            )
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """The batch of `step` is made next."""
        with self._changed:
            self._step = step
            self._changed.notify_all()

    def urgent(self, shards: list[int]) -> None:
        """Somebody waits for these."""
        with self._changed:
            self._plan.copy[:0] = [shard for shard in shards if shard not in self._busy]
            self._changed.notify_all()

    def next_of(self, shards: list[int]) -> int:
        """The first of these whose transfer is over, well or not; waits where all are queued or on their
        way."""

        def ended() -> int | None:
            waiting = self._busy.union(self._plan.copy)
            return next((shard for shard in shards if shard not in waiting), None)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or ended() is not None)
            return found if (found := ended()) is not None else shards[0]

    def by_range(self, shard: int) -> bool:
        """Whether the shard is read by ranges now."""
        return shard in self._by_range

    def close(self) -> None:
        """End the threads; a transfer that is under way ends first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _planning(self) -> None:
        window: deque[tuple[int, np.ndarray, np.ndarray]] = deque()
        next_step = ranged_until = at = -1
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._step not in (None, at))  # noqa: B023
                if self._closed:
                    return
                assert self._step is not None
                if self._step < at or at < 0:  # begun anew
                    window.clear()
                    next_step = ranged_until = self._step
                at = self._step
            while window and window[0][0] < at:
                window.popleft()
            end = min(at + self._ahead.batches, self._ahead.last_step)
            next_step, ranged_until = max(next_step, at), max(ranged_until, at)
            for step in range(next_step, end):
                window.append((step, *self._ahead.needs(step)))
            next_step = max(next_step, end)
            near = min(at + -(-self._ahead.batches // 2), end)
            self._replan(window, near, ranged_until, ends=end == self._ahead.last_step)
            ranged_until = near

    def _replan(
        self,
        window: deque[tuple[int, np.ndarray, np.ndarray]],
        near: int,
        ranged_until: int,
        ends: bool,
    ) -> None:
        due = dict.fromkeys(int(s) for step, shards, _ in window if step < near for s in shards)
        uses = np.bincount(
            np.concatenate([shards for _, shards, _ in window] or [np.zeros(0, np.int64)]),
            minlength=len(self._dataset.shards),
        )
        copy, ranged, room = [], set[int](), self._cache.budget_bytes // 2
        for shard in due:
            info = self._dataset.shards[shard]
            expected = float(uses[shard])
            if not ends:  # the window of the shuffle goes on behind what was looked at
                expected = max(expected, self._ahead.share * info.num_samples)
            if self._cache.holds(shard):
                continue
            if not self._whole and not worth_copying(expected, info):
                ranged.add(shard)
            elif shard % self._ahead.workers == self._ahead.worker and (room := room - info.size) >= 0:
                copy.append(shard)
        rows: dict[int, list[int]] = {}
        for step, shards, indices in window:
            own = (step - window[0][0]) % self._ahead.workers == 0
            if own and ranged_until <= step < near:
                for shard, row in zip(shards.tolist(), indices.tolist(), strict=True):
                    if shard in ranged:
                        rows.setdefault(shard, []).append(row)
        with self._changed:
            self._by_range = frozenset(ranged)
            self._plan.copy = [shard for shard in copy if shard not in self._busy]
            self._plan.ranges.extend(rows.items())
            self._changed.notify_all()

    def _copying(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._plan.copy or self._plan.ranges)
                if self._closed:
                    return
                rows: list[int] | None = None
                if self._plan.ranges:
                    shard, rows = self._plan.ranges.popleft()
                else:
                    shard = self._plan.copy.pop(0)
                    if shard in self._busy:
                        continue
                    self._busy.add(shard)
            try:
                if rows is None:
                    self._cache.paths(shard)
                else:
                    self._images.bring(shard, rows)
            except (MaskClipError, OSError):
                pass  # the batch that needs it will meet the same, and say it
            finally:
                if rows is None:
                    with self._changed:
                        self._busy.discard(shard)
                        self._changed.notify_all()
