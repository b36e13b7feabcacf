"""Local copies of the shards of a remote data set: verified on arrival, the least recently used evicted
first.

Any number of processes of a node may share the folder. One of them copies a shard while the others wait for
it (an advisory lock, which the kernel drops with its holder). A copy takes its name when it is whole and
verified. Eviction unlinks files, so a reader that has one open is not disturbed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cluster.errors import ConfigError, ShardCorrupt
from cluster.manifest import FileEntry, sha256_file
from cluster.store import ObjectStore
from data_pipeline.catalog import DatasetManifest

LOCKS = 1024  # a fixed number of lock files, whatever the number of shards; two shards seldom share one
EVICTION = "eviction"


@dataclass
class CacheCounters:
    """What one process did; sums over its threads."""

    hits: int = 0
    """Files that were asked for and were there."""
    misses: int = 0
    """Files that had to be copied."""
    bytes_copied: int = 0
    evictions: int = 0
    """Files deleted to make room."""
    bytes_evicted: int = 0
    range_reads: int = 0
    """Reads of a part of a shard that was not worth a copy."""
    bytes_ranged: int = 0

    def __add__(self, other: CacheCounters) -> CacheCounters:
        return CacheCounters(**{name: value + vars(other)[name] for name, value in vars(self).items()})


class ShardCache:
    """Copies of the shards of one data set under `folder`/<digest>, at most `budget_bytes` of them.

    The budget is for one data set; copies that several processes have under way at once may exceed it until
    they are done. Raises ConfigError when the budget is smaller than the largest shard with its index.
    """

    def __init__(self, store: ObjectStore, dataset: DatasetManifest, folder: Path, budget_bytes: int) -> None:
        self.folder = folder / dataset.digest[:16]
        self.counters = CacheCounters()
        self._counting = Lock()
        self._store = store
        self._dataset = dataset
        self.budget_bytes = budget_bytes
        largest = max(sum(e.size for e in set(self._entries(shard))) for shard in range(len(dataset.shards)))
        if largest > budget_bytes:
            raise ConfigError(
                f"{folder}: a cache of {budget_bytes} bytes cannot hold the largest shard of {dataset.uri}, "
                f"which has {largest}: raise data.loader.cache_bytes"
            )
        self._locks = self.folder / "locks"
        self._incoming = self.folder / "incoming"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._incoming.mkdir(exist_ok=True)

    def paths(self, shard: int) -> tuple[Path, Path]:
        """Local file and index of a shard, copied first if they are not there, and marked as just used.

        Another process may evict them at once: open them, and ask again on FileNotFoundError.

        Raises:
            ShardCorrupt: what the store holds is not what the manifest says.
            ObjectNotFound, StorageUnavailable: from the store.
        """
        file, index = self._entries(shard)
        self._hold(file, index)
        return self.folder / file.name, self.folder / index.name

    def index_path(self, shard: int) -> Path:
        """As `paths`, for the index alone; in format arrow that is the shard itself."""
        index = self._entries(shard)[1]
        self._hold(index)
        return self.folder / index.name

    def holds(self, shard: int) -> bool:
        """Whether the whole shard is here now; marks nothing as used."""
        return all((self.folder / entry.name).exists() for entry in self._entries(shard))

    def read_range(self, shard: int, start: int, length: int) -> bytes:
        """Bytes of a shard's file straight from the store, not verified; raises what the store raises."""
        data = self._store.get_range(self._entries(shard)[0].name, start, length)
        self._count(range_reads=1, bytes_ranged=len(data))
        return data

    def _hold(self, *entries: FileEntry) -> None:
        """Copy what is not there of a shard's files, and mark all as just used."""
        entries = tuple(dict.fromkeys(entries))
        paths = [self.folder / entry.name for entry in entries]
        if _touch(*paths):
            self._count(hits=len(entries))
            return
        # The lock is the shard's: named after the file that it always has.
        lock = f"{zlib.crc32(entries[-1].name.encode()) % LOCKS:04d}"
        with self._locked(lock):
            missing = [entry for entry, path in zip(entries, paths, strict=True) if not path.exists()]
            if missing:  # they may have come while we waited
                self._make_room(sum(entry.size for entry in missing))
                for entry in missing:
                    self._copy(entry, self._incoming / lock)
            _touch(*paths)
        self._count(hits=len(entries) - len(missing), misses=len(missing))

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, number in more.items():
                setattr(self.counters, name, getattr(self.counters, name) + number)

    def discard(self, shard: int) -> None:
        """Delete the copy of a shard, for one that turned out to be damaged."""
        with self._locked(EVICTION):
            for entry in self._entries(shard):
                (self.folder / entry.name).unlink(missing_ok=True)

    def _entries(self, shard: int) -> tuple[FileEntry, FileEntry]:
        info = self._dataset.shards[shard]
        return self._dataset.files[info.name], self._dataset.files[info.index_name]

    def _copy(self, entry: FileEntry, incoming: Path) -> None:
        # The folder belongs to the holder of the lock; what is in it was left by one that died.
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        arrived = incoming / entry.name
        self._store.get_file(entry.name, arrived)
        if arrived.stat().st_size != entry.size or sha256_file(arrived) != entry.sha256:
            raise ShardCorrupt(
                f"{self._store.uri}/{entry.name}: size or sha256 is not the manifest's; "
                "restore the file or preprocess again"
            )
        arrived.replace(self.folder / entry.name)
        self._count(bytes_copied=entry.size)

    def _make_room(self, needed: int) -> None:
        with self._locked(EVICTION):
            for abandoned in self._incoming.iterdir():
                with self._locked(abandoned.name, wait=False) as held:
                    if held:
                        shutil.rmtree(abandoned, ignore_errors=True)
            # Nobody else deletes under this lock, so what is listed can be asked for its size.
            found = [(path, path.stat()) for path in self.folder.iterdir() if path.is_file()]
            used = sum(stat.st_size for _, stat in found)
            for path, stat in sorted(found, key=lambda item: item[1].st_mtime_ns):
                if used + needed <= self.budget_bytes:
                    return
                path.unlink(missing_ok=True)
                used -= stat.st_size
                self._count(evictions=1, bytes_evicted=stat.st_size)

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock of the folder; without `wait`, yields False when another holds it."""
        with open(self._locks / name, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _touch(*paths: Path) -> bool:
    """Whether all files are there; their modification time becomes the time of their last use."""
    now = time.time_ns()  # finer than the clock that the kernel stamps files with
    try:
        for path in paths:
            os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True
