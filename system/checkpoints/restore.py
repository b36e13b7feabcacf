"""From a checkpoint into a running job; all ranks together.

Every file is verified, by one rank. Where that rank needs the file's values as well it takes them on the way,
so at the topology that wrote the checkpoint nothing is read twice. No rank's state counts before all have
agreed that all files are whole; a checkpoint that is damaged is set aside and the one before is taken.
"""

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import CheckpointIncompatible, DataError, ObjectNotFound
from cluster.events import EventLog
from cluster.manifest import MANIFEST, FileEntry, Manifest, verify
from cluster.store import ObjectStore
from system.agreement import on_every_rank, on_rank_zero
from system.checkpoints.checkpoint import (
    FragmentReader,
    Index,
    Range,
    committed_steps,
    copy_values,
    open_checkpoint,
    read_index,
    step_folder,
)
from system.checkpoints.checksum import Running, expected
from system.checkpoints.job_state import JobState
from system.checkpoints.local_tier import LocalTier

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Restored:
    """Where a restored run stands; step 0 for a new run."""

    step: int
    meta: dict[str, Any]
    seconds: float = 0.0


def restore(run: ObjectStore, state: JobState, events: EventLog, local: LocalTier | None) -> Restored:
    """Fill the job from the newest checkpoint that verifies, and prove what was filled.

    Raises:
        CheckpointIncompatible: the checkpoint does not fit this model, the filled state is not what was
            saved, or every checkpoint of the run is damaged.
    """
    started = time.monotonic()
    for step in reversed(on_rank_zero(lambda: committed_steps(run))):
        manifest, problems = on_rank_zero(lambda step=step: _open(run, step))
        store = run.child(f"checkpoints/{step_folder(step)}")
        if manifest is not None:
            loading = _Loading(store, manifest, step, state, local)
            problems = problems or loading.load()
        if problems:
            on_rank_zero(lambda step=step, found=problems: quarantine(run, step, found, events))
            continue
        assert manifest is not None
        state.filled(step)
        digest, saved = state.digest(), manifest.meta["state_digest"]
        if digest != saved:
            raise CheckpointIncompatible(
                f"{store.uri}: the restored state has digest {digest}, saved was {saved}; "
                "run `maskclip checkpoint verify` on this run"
            )
        seconds = time.monotonic() - started
        events.instant("checkpoint_restored", step=step, seconds=seconds, **loading.read)
        return Restored(step, manifest.meta, seconds)
    if on_rank_zero(lambda: bool(run.list("quarantine"))):
        raise CheckpointIncompatible(
            f"{run.uri}: every checkpoint of this run is damaged (see quarantine/), and starting "
            "again from step 0 would hide that; put a copy back or choose a new run.uri"
        )
    return Restored(0, {})


def _open(run: ObjectStore, step: int) -> tuple[Manifest | None, list[str]]:
    """On rank 0: the manifest, and what is wrong with the checkpoint that one can tell without reading it. An
    unreachable store is no damage: that error ends the attempt."""
    try:
        store, manifest = open_checkpoint(run, step)
        if manifest.meta.get("step") != step or "parameters" not in manifest.meta:
            return None, [f"{store.uri}/{MANIFEST}: is not of step {step}"]
        return manifest, verify(store, manifest, deep=False)
    except DataError as error:
        return None, [str(error)]


def quarantine(run: ObjectStore, step: int, problems: list[str], events: EventLog | None) -> None:
    """A damaged checkpoint keeps its files, but loses its manifest to quarantine/."""
    store = run.child(f"checkpoints/{step_folder(step)}")
    manifest = store.get(MANIFEST)
    name = f"quarantine/{step_folder(step)}-{hashlib.sha256(manifest).hexdigest()[:8]}.json"
    record = {"step": step, "problems": problems, "manifest": manifest.decode(errors="replace")}
    run.put(name, json.dumps(record, indent=1).encode())
    store.delete(MANIFEST)
    if events is not None:
        events.instant("checkpoint_quarantined", step=step, problems=problems[:3])


class _NodeFirst:
    """The files of a checkpoint, out of the node's local tier where there is a verified copy."""

    def __init__(self, store: ObjectStore, copies: dict[str, Path], read: dict[str, int]) -> None:
        self.uri, self._store, self._copies, self._read = store.uri, store, copies, read

    def get_range(self, key: str, start: int, length: int, /) -> bytes:
        path = self._copies.get(key)
        if path is None:
            data = self._store.get_range(key, start, length)
            self._read["store_bytes"] += len(data)
            return data
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        self._read["local_bytes"] += len(data)
        return data


class _Loading:
    """One checkpoint on its way into the job."""

    def __init__(
        self, store: ObjectStore, manifest: Manifest, step: int, state: JobState, local: LocalTier | None
    ) -> None:
        self._store, self._manifest, self._step = store, manifest, step
        self._state, self._local = state, local
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self.read = {"store_bytes": 0, "local_bytes": 0}
        """Bytes that this rank has read, and from where."""

    def load(self) -> list[str]:
        """Verify all files and fill the job. Returns what is damaged; then the job's values mean nothing.

        Raises:
            CheckpointIncompatible: it is whole, but not of this model.
        """
        if self._manifest.meta["parameters"] != self._state.shapes:
            raise self._other_model()
        copies = self._local_copies()
        source = _NodeFirst(self._store, copies, self.read)
        files = sorted(self._manifest.files, key=lambda entry: entry.name)
        found = on_every_rank(lambda: self._index(source, files[self._rank :: self._ranks]))
        problems = [line for _, lines in found for line in lines]
        if problems:
            return problems
        reader = FragmentReader(source, self._manifest, [index for part, _ in found for index in part])
        held = self._state.targets()
        misfit: CheckpointIncompatible | None = None
        wanted: dict[str, list[Range]] = {}
        try:
            wanted = reader.ranges([run for run, _ in held], [target for _, target in held])
        except CheckpointIncompatible as error:  # unless a damaged header says so
            misfit = error
        from_store = {
            name: sum(size for _, size, _ in ranges) for name, ranges in wanted.items() if name not in copies
        }
        everyone = on_every_rank(lambda: (from_store, sorted(copies), misfit is not None))
        mine = self._share(files, [(needs, set(held)) for needs, held, _ in everyone])
        results = on_every_rank(lambda: self._check(source, mine, wanted))
        problems = [line for lines in results for line in lines]
        if problems:
            return problems
        if any(misfits for *_, misfits in everyone):
            on_every_rank(lambda: _raise(misfit))
        rest = {name: ranges for name, ranges in wanted.items() if name not in {e.name for e in mine}}
        on_every_rank(lambda: self._fetch(reader, rest))
        return []

    def _fetch(self, reader: FragmentReader, wanted: dict[str, list[Range]]) -> None:
        with torch.no_grad():
            for name, ranges in sorted(wanted.items()):
                reader.fetch(name, ranges)

    def _other_model(self) -> CheckpointIncompatible:
        saved, ours = self._manifest.meta["parameters"], self._state.shapes
        names = sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name))
        return CheckpointIncompatible(
            f"{self._store.uri}: its parameters are not those of this model (first difference: {names[0]}); "
            "resume with the model section that wrote it, or start a new run.uri"
        )

    def _local_copies(self) -> dict[str, Path]:
        """Whole copies on this node; its ranks share the work of comparing them."""
        if self._local is None:
            return {}
        hosts = on_every_rank(socket.gethostname)
        mates = [rank for rank, host in enumerate(hosts) if host == hosts[self._rank]]
        share = sorted(self._manifest.files, key=lambda e: e.name)[mates.index(self._rank) :: len(mates)]
        local = self._local
        found = on_every_rank(
            lambda: {
                e.name: path
                for e in share
                if (path := local.find(self._step, e, *expected(self._manifest, e)))
            }
        )
        return {name: path for mate in mates for name, path in found[mate].items()}

    def _index(self, source: _NodeFirst, share: list[FileEntry]) -> tuple[list[Index], list[str]]:
        indices, problems = [], []
        for entry in share:
            try:
                indices.append(read_index(source, entry.name))
            except DataError as error:
                problems.append(str(error))
        return indices, problems

    def _share(
        self, files: list[FileEntry], everyone: list[tuple[dict[str, int], set[str]]]
    ) -> list[FileEntry]:
        """The files that this rank verifies: each goes to the rank that needs most of it from the store. One
        that nobody reads from there, as all who need it have a copy, is not read at all; but the first rank
        verifies what nobody needs and nobody has."""
        mine = []
        for entry in files:
            needs = [needs.get(entry.name, 0) for needs, _ in everyone]
            if max(needs) == 0 and any(entry.name in held for _, held in everyone):
                continue
            if needs.index(max(needs)) == self._rank:
                mine.append(entry)
        return mine

    def _check(self, source: _NodeFirst, mine: list[FileEntry], wanted: dict[str, list[Range]]) -> list[str]:
        problems = []
        for entry in mine:
            running, wanted_sum = expected(self._manifest, entry)
            try:
                _take(source, entry, wanted.get(entry.name, []), running)
            except ObjectNotFound as error:
                problems.append(str(error))
                continue
            if (found := running.hexdigest()) != wanted_sum:
                where = f"{self._store.uri}/{entry.name}"
                problems.append(f"{where}: {running.name} {found}, manifest says {wanted_sum}")
        return problems


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _take(source: _NodeFirst, entry: FileEntry, ranges: list[Range], running: Running) -> None:
    """Read a file once: `running` has all of it, and the targets of `ranges` (in the order of the file) are
    full."""
    waiting = list(reversed(ranges))
    with torch.no_grad():
        for at, data in _pieces(source, entry):
            running.update(data)
            end = at + len(data)
            while waiting and waiting[-1][0] < end:
                offset, size, target = waiting.pop()
                here = min(end, offset + size) - offset
                if offset < at or (here < size and here % 4):  # a damaged header
                    break
                copy_values(data, offset - at, here, target[: here // 4])
                if here < size:
                    waiting.append((end, size - here, target[here // 4 :]))
                    break


def _pieces(source: _NodeFirst, entry: FileEntry) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) one after the other; the next is being read while one is used."""

    def read(at: int) -> bytes:
        return source.get_range(entry.name, at, min(_PIECE_BYTES, entry.size - at))

    starts = range(0, entry.size, _PIECE_BYTES)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, 0)
        for at in starts:
            data = ahead.result()
            if at != starts[-1]:
                ahead = pool.submit(read, at + _PIECE_BYTES)
            yield at, data
