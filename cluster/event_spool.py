"""A local folder between the event log and its store: nothing is lost while the store is away.

`put` writes a file on a disk of the node and returns; a thread copies the files to the store, oldest first,
and deletes each once it is there. What is left when the process dies, a later one on the same node copies.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path

from cluster.store_base import ObjectStore, checked_key
from cluster.store_local import write_whole

_RETRY_SECONDS = 2.0
_CLOSE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class SpoolFull(OSError):
    """The spool holds as much as it may; the events wait where they are."""


class Spool:
    """The segments of one rank of one run, on their way to `store`."""

    def __init__(self, folder: Path, store: ObjectStore, rank: int, limit_bytes: int) -> None:
        """Starts with what earlier processes of this rank have left in `folder`."""
        name = hashlib.sha256(store.uri.encode()).hexdigest()[:16]
        self._root = folder / f"{name}-{rank:05d}"
        self._store, self._limit = store, limit_bytes
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._failing = False
        self._copier = threading.Thread(target=self._copy, name="event-spool", daemon=True)
        self._copier.start()

    def put(self, key: str, data: bytes) -> None:
        """Keep a segment, durably.

        Raises:
            OSError: the disk, or the spool's share of it, is full.
        """
        if sum(path.stat().st_size for path in self.waiting()) + len(data) > self._limit:
            raise SpoolFull(f"{self._root}: {self._limit} bytes of events wait for {self._store.uri}")
        write_whole(self._root / checked_key(key), lambda out: out.write(data))
        self._wake.set()

    def waiting(self) -> list[Path]:
        """The files that the store does not have yet, oldest first."""
        return sorted(self._root.rglob("*.jsonl"))

    def close(self) -> None:
        """Copy what waits, for a bounded time; the rest stays for the next process."""
        self._closed.set()
        self._wake.set()
        self._copier.join(_CLOSE_SECONDS)
        if left := len(self.waiting()):
            _log.warning("%d segments of events stay in %s until the next start here", left, self._root)

    def _copy(self) -> None:
        give_up = None
        while True:
            self._wake.clear()
            done = self._copy_waiting()
            if self._closed.is_set():
                give_up = give_up or time.monotonic() + _CLOSE_SECONDS
                if (done and not self.waiting()) or time.monotonic() > give_up:
                    return
            self._wake.wait(None if done and not self._closed.is_set() else _RETRY_SECONDS)

    def _copy_waiting(self) -> bool:
        """False when the store did not take one of them."""
        for path in self.waiting():
            try:
                self._store.put(path.relative_to(self._root).as_posix(), path.read_bytes())
            except Exception as error:
                if not self._failing:
                    _log.warning("events wait in %s, the store fails: %s", self._root, error)
                self._failing = True
                return False
            self._failing = False
            path.unlink(missing_ok=True)
        return True
