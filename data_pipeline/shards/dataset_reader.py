"""Any sample of a committed data set, wherever the set lies: in a folder, or in a store behind a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError, ObjectNotFound, ShardCorrupt, StorageUnavailable
from cluster.manifest import sha256_file
from cluster.store import open_store
from cluster.store_local import LocalStore
from data_pipeline.catalog import DatasetManifest
from data_pipeline.row_checksum import rows_are_whole
from data_pipeline.shards.prefetch import Ahead, Prefetcher, RangedImages
from data_pipeline.shards.shard_cache import CacheCounters, ShardCache
from data_pipeline.shards.shard_reader import ShardReader, StoredSample

OPEN_SHARDS = 256  # two descriptors each; the usual limit of a process is 1024
OPEN_ATTEMPTS = 5


class DatasetReader:
    """Any sample of a data set by (shard, index in shard). Keeps the shards used last open.

    A data set in a local folder is read where it is: the size of a shard and the sha256 of its index (format
    arrow: the checksums of its rows) are checked when it is first opened, the checksum of an image at each
    read. Shards of a remote one are copied into the folder `cache`, which may be shared by the processes of a
    node and holds at most `cache_bytes`.

    Raises ConfigError when the data set is remote and there is no cache folder, or it cannot hold one shard.
    """

    def __init__(self, dataset: DatasetManifest, cache: str | None, cache_bytes: int) -> None:
        self._dataset = dataset
        self._store = open_store(dataset.uri)
        self._cache: ShardCache | None = None
        self._prefetcher: Prefetcher | None = None
        if not isinstance(self._store, LocalStore):
            if cache is None:
                raise ConfigError(
                    f"{dataset.uri}: shards of a remote data set need a local folder: set data.loader.cache"
                )
            self._cache = ShardCache(self._store, dataset, Path(cache), cache_bytes)
            self._images = RangedImages(self._cache)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._by_range: set[int] = set()
        self._checked: set[int] = set()

    @property
    def remote(self) -> bool:
        """Whether shards come through a cache."""
        return self._cache is not None

    @property
    def counters(self) -> CacheCounters:
        """What the cache did for this reader; all zero for a local data set."""
        return self._cache.counters if self._cache is not None else CacheCounters()

    def look_ahead(self, ahead: Ahead) -> Prefetcher | None:
        """Start to copy in advance; tell the prefetcher each step. None where there is nothing to copy."""
        if self._cache is not None:
            self._prefetcher = Prefetcher(self._dataset, self._cache, self._images, ahead)
        return self._prefetcher

    def get(self, shard: int, index: int) -> StoredSample:
        """One sample.

        Raises:
            ShardCorrupt: the shard or the sample is not what was committed.
            ObjectNotFound: a file of the data set is gone.
            StorageUnavailable: the store did not answer.
        """
        return next(self._rows(shard, [index]))

    def samples(self, shards: np.ndarray, indices: np.ndarray) -> Iterator[tuple[int, StoredSample]]:
        """The samples at (shards[k], indices[k]), int64 [n] both, as pairs (k, sample), shard by shard.

        Shards that are here come first, so a slow transfer delays only its own samples. Raises as `get`.
        """
        if not len(shards):
            return
        order = np.argsort(shards, kind="stable")
        found, starts = np.unique(shards[order], return_index=True)
        groups = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))
        absent = [shard for shard in groups if self._absent(shard)]
        if self._prefetcher is not None:
            self._prefetcher.urgent(absent)
        here = [shard for shard in groups if shard not in absent]
        while here or absent:
            if here:
                shard = here.pop()
            else:
                shard = self._prefetcher.next_of(absent) if self._prefetcher is not None else absent[0]
                absent.remove(shard)
            places = groups[shard].tolist()
            rows = indices[groups[shard]].tolist()
            yield from zip(places, self._rows(shard, rows), strict=True)

    def table(self, shard: int) -> pa.Table:
        """The columns of a shard's index (`records.INDEX_SCHEMA` but for the offsets, which format arrow has
        not), one row per sample; raises as `get`."""
        return self._reader(shard).table

    def close(self) -> None:
        """Close every open shard and stop copying ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for shard in list(self._open):
            self._forget(shard)

    def _absent(self, shard: int) -> bool:
        return (
            self._cache is not None
            and shard not in self._open
            and not self._cache.holds(shard)
            and not self._wanted_by_range(shard)
        )

    def _rows(self, shard: int, rows: Sequence[int]) -> Iterator[StoredSample]:
        done = again = 0
        while done < len(rows):
            try:
                for sample in self._reader(shard).samples(rows[done:]):
                    yield sample
                    done += 1
            except ShardCorrupt:
                # A copy that went bad, here or on the way, says nothing about the data set: copy it again.
                if self._cache is None or again:
                    raise
                again = 1
                self._forget(shard)
                self._cache.discard(shard)

    def _wanted_by_range(self, shard: int) -> bool:
        return self._prefetcher is not None and self._prefetcher.by_range(shard)

    def _reader(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is not None and shard in self._by_range and not self._wanted_by_range(shard):
            self._forget(shard)
            reader = None
        if reader is None:
            reader = self._open[shard] = self._opened(shard)
            if len(self._open) > OPEN_SHARDS:
                oldest, closed = self._open.popitem(last=False)
                self._by_range.discard(oldest)
                closed.close()
        self._open.move_to_end(shard)
        return reader

    def _opened(self, shard: int) -> ShardReader:
        info = self._dataset.shards[shard]
        if isinstance(self._store, LocalStore):
            file, index = self._store.root / info.name, self._store.root / info.index_name
            try:
                return self._checked_reader(shard, file, index)
            except FileNotFoundError as error:
                raise ObjectNotFound(
                    f"{error.filename}: no such file, but the manifest lists it; restore it"
                ) from None
        cache = self._cache
        assert cache is not None
        for _ in range(OPEN_ATTEMPTS):
            try:
                if self._wanted_by_range(shard) and not cache.holds(shard):
                    return self._ranged_reader(shard, cache)
                return self._checked_reader(shard, *cache.paths(shard))
            except FileNotFoundError:
                continue  # another process evicted it between the copy and the opening
        raise StorageUnavailable(
            f"{cache.folder}: {info.name} was evicted {OPEN_ATTEMPTS} times before it could be opened; "
            "raise data.loader.cache_bytes"
        )

    def _checked_reader(self, shard: int, file: Path, index: Path) -> ShardReader:
        if shard not in self._checked:
            info = self._dataset.shards[shard]
            if (size := file.stat().st_size) != info.size:
                raise ShardCorrupt(
                    f"{file}: {size} bytes, but the manifest says {info.size}; "
                    "restore the shard or preprocess again"
                )
            self._check_index(shard, index)
            self._checked.add(shard)
        return ShardReader(file, index)

    def _ranged_reader(self, shard: int, cache: ShardCache) -> ShardReader:
        index = cache.index_path(shard)
        self._check_index(shard, index)
        self._by_range.add(shard)
        remote = f"{self._dataset.uri}/{self._dataset.shards[shard].name}"
        return ShardReader(
            remote, index, lambda row, offset, size: self._images.take(shard, row, offset, size)
        )

    def _check_index(self, shard: int, index: Path) -> None:
        # In format arrow the sha256 would take the whole shard. The checksums of its rows prove as much of
        # what is read here; images have their own.
        info = self._dataset.shards[shard]
        if self._dataset.format == "arrow" and rows_are_whole(index, info.num_samples):
            return
        if sha256_file(index) != self._dataset.files[info.index_name].sha256:
            raise ShardCorrupt(
                f"{index}: sha256 is not the manifest's; restore the index or preprocess again"
            )

    def _forget(self, shard: int) -> None:
        self._checked.discard(shard)
        self._by_range.discard(shard)
        if (reader := self._open.pop(shard, None)) is not None:
            reader.close()
