"""One save, from the snapshot to the manifest, in a background thread of every rank.

No collective is called here: a rank that fails leaves nobody stranded. Ranks speak through part records in
the store; the first one commits. A job never raises: `error` says why it failed.
"""

import hashlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import MaskClipError, StorageUnavailable, Superseded
from cluster.events import EventLog, newest_attempt
from cluster.manifest import MANIFEST, Manifest, commit, verify
from cluster.store import ObjectStore
from system.checkpoints.checkpoint import KIND, VERSION, sealed, step_folder
from system.checkpoints.checksum import CRC32, Crc32
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.local_tier import LocalTier
from system.checkpoints.parts import Part, collect_parts, file_name, put_part
from system.checkpoints.retention import Retention
from system.checkpoints.snapshot import Snapshot
from system.checkpoints.state_digest import add

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Place:
    """Where a job works, and for whom."""

    run: ObjectStore
    rank: int
    ranks: int
    events: EventLog
    config: CheckpointConfig
    local: LocalTier | None
    retention: Retention


@dataclass
class SaveJob:
    """The save of one step. `snapshot` belongs to the job until `done`."""

    place: Place
    step: int
    meta: dict[str, Any]
    """Goes into the manifest."""
    snapshot: Snapshot
    taken: float
    """time.monotonic() when the snapshot was begun."""
    stall_seconds: float
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    committed: bool = False
    bytes: int = 0
    """Of all ranks, on the first one."""
    seconds: float = 0.0
    """From the snapshot to the end."""
    _cancelled: str | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    def cancel(self, reason: str) -> None:
        """The job fails at its next look; it never commits after that."""
        self._cancelled = reason

    def run(self) -> None:
        try:
            part = self._write()
            put_part(self._store, part)
            self.place.events.instant(
                "checkpoint_part",
                step=self.step,
                bytes=part.size,
                stall_seconds=self.stall_seconds,
                write_seconds=part.write_seconds,
                upload_seconds=part.upload_seconds,
            )
            if self.place.rank == 0:
                parts = collect_parts(
                    self._store, self._attempt, self.place.ranks, self._check, _POLL_SECONDS
                )
                self._commit(parts)
        except Exception as error:  # whatever it is, it must not stop training
            self.error = error
        self.seconds = time.monotonic() - self.taken
        self._report()
        if self.committed:
            self.place.retention.after_commit(self.step)
        self.done.set()

    @property
    def _store(self) -> ObjectStore:
        return self.place.run.child(f"checkpoints/{step_folder(self.step)}")

    @property
    def _attempt(self) -> int:
        return self.place.events.attempt

    def _check(self) -> None:
        late = time.monotonic() - self.taken > self.place.config.deadline_seconds
        if self._cancelled or late:
            reason = self._cancelled or "not all ranks had written their part by checkpoint.deadline_seconds"
            raise StorageUnavailable(f"{self._store.uri}: {reason}")

    def _write(self) -> Part:
        """The file goes to the local tier, if there is one, and to the store."""
        name, local = file_name(self._attempt, self.place.rank), self.place.local
        checksums = []

        def pieces():
            digest, crc = hashlib.sha256(), Crc32()
            checksums.append((digest, crc))  # the last ones are of the attempt that succeeded
            for piece in self.snapshot.pieces():
                digest.update(piece)
                crc.update(piece)
                self._check()
                yield piece

        started = time.monotonic()
        if local is None:
            self._store.put_pieces(name, pieces)
            written, uploaded = 0.0, time.monotonic() - started
        else:
            path: Path = local.write(self.step, name, pieces)
            written = time.monotonic() - started
            self._store.put_file(name, path)
            uploaded = time.monotonic() - started - written
        digest, crc = checksums[-1]
        return Part(
            attempt=self._attempt,
            rank=self.place.rank,
            ranks=self.place.ranks,
            name=name,
            size=self.snapshot.size,
            sha256=digest.hexdigest(),
            crc32=crc.hexdigest(),
            digest_sum=add([self.snapshot.digest_sum()]),
            write_seconds=written,
            upload_seconds=uploaded,
        )

    def _commit(self, parts: list[Part]) -> None:
        """The record of the steps goes first: a resume never repeats a committed step, so its events would
        be lost for good. A store that is too slow for them does not hold the checkpoint up."""
        digest = add(int(part.digest_sum, 16) for part in parts)
        meta = {**self.meta, "step": self.step, "state_digest": digest, "attempt": self._attempt}
        meta[CRC32] = {part.name: part.crc32 for part in parts}
        manifest = sealed(Manifest(KIND, VERSION, tuple(part.entry for part in parts), meta))
        self.bytes = sum(part.size for part in parts)
        check_not_superseded(self.place.run, self._attempt)
        self.place.events.flush()
        self._check()
        commit(self._store, manifest)
        problems = verify(self._store, manifest, deep=self.place.config.verify == "full")
        if problems:  # what the store gives back is not what was saved
            take_back(self._store, manifest)
            raise StorageUnavailable(f"{problems[0]}; the checkpoint was taken back")
        self.committed = True

    def _report(self) -> None:
        if self.place.rank != 0 and self.error is None:
            return
        facts = {"step": self.step, "seconds": self.seconds, "stall_seconds": self.stall_seconds}
        if self.error is not None:
            reason = f"rank {self.place.rank}: {_one_line(self.error)}"
            self.place.events.instant("checkpoint_failed", reason=reason, **facts)
        else:
            self.place.events.instant("checkpoint_committed", bytes=self.bytes, **facts)


def check_not_superseded(run: ObjectStore, own: int) -> None:
    """Raises Superseded when a newer attempt was claimed. Two that go on from one checkpoint would mix their
    steps."""
    newest = newest_attempt(run)
    if newest > own:
        raise Superseded(
            f"{run.uri}: attempt {newest} of this run has begun meanwhile, so attempt {own} ends "
            "without this checkpoint; stop one of the two or give it another run.uri"
        )


def take_back(store: ObjectStore, manifest: Manifest) -> None:
    """Uncommit what we have committed, and nothing else."""
    if store.get(MANIFEST) == manifest.to_bytes():
        store.delete(MANIFEST)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, MaskClipError) else f"{type(error).__name__}: {text}"
