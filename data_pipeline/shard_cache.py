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
from pathlib import Path

from cluster.errors import ConfigError, ShardCorrupt
from cluster.manifest import FileEntry, sha256_file
from cluster.store import ObjectStore
from data_pipeline.catalog import DatasetManifest

LOCKS = 64  # a fixed number of lock files, whatever the number of shards
EVICTION = "eviction"


class ShardCache:
    """Copies of the shards of one data set under `folder`/<digest>, at most `budget_bytes` of them.

    The budget is for one data set; copies that several processes have under way at once may exceed it until
    they are done. Raises ConfigError when the budget is smaller than the largest shard with its index.
    """

    def __init__(self, store: ObjectStore, dataset: DatasetManifest, folder: Path, budget_bytes: int) -> None:
        self.folder = folder / dataset.digest[:16]
        self._store = store
        self._dataset = dataset
        self._budget = budget_bytes
        largest = max(sum(e.size for e in self._entries(shard)) for shard in range(len(dataset.shards)))
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
        """Local tar and index of a shard, copied first if they are not there, and marked as just used.

        Another process may evict them at once: open them, and ask again on FileNotFoundError.

        Raises:
            ShardCorrupt: what the store holds is not what the manifest says.
            ObjectNotFound, StorageUnavailable: from the store.
        """
        entries = self._entries(shard)
        tar, index = (self.folder / entry.name for entry in entries)
        if not _touch(tar, index):
            lock = f"{zlib.crc32(tar.name.encode()) % LOCKS:02d}"
            with self._locked(lock):
                if not _touch(tar, index):  # it may have come while we waited
                    self._make_room(sum(entry.size for entry in entries))
                    for entry in entries:
                        self._copy(entry, self._incoming / lock)
                    _touch(tar, index)
        return tar, index

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
                if used + needed <= self._budget:
                    return
                path.unlink(missing_ok=True)
                used -= stat.st_size

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
