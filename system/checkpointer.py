"""Writing checkpoints of a running job and restoring one into it; every function here is called by all
ranks together.

A save is committed by one conditional put of the manifest after every rank's file is in the store, so a
kill at any moment leaves either the whole checkpoint or none. For now the step loop waits for it.
"""

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from cluster.errors import CheckpointIncompatible, DataError, MaskClipError
from cluster.events import EventLog
from cluster.manifest import MANIFEST, FileEntry, Manifest, commit, file_entry, verify
from cluster.store import ObjectStore
from system.agreement import on_rank_zero, state_digest
from system.checkpoint import (
    KIND,
    VERSION,
    FragmentReader,
    committed_steps,
    open_checkpoint,
    step_folder,
)
from system.engine import Engine
from system.teacher_state import ShardedTeacher

CENTRE = ("state", "teacher.centre", 0)


@dataclass(frozen=True)
class Restored:
    """Where a restored run stands; step 0 for a new run."""

    step: int
    meta: dict[str, Any]


class Checkpointer:
    def __init__(
        self,
        run: ObjectStore,
        engine: Engine,
        teacher: ShardedTeacher,
        events: EventLog,
        description: dict[str, Any],
    ) -> None:
        """
        Args:
            description: goes into every manifest (identity, data set digest, configuration).
        """
        self._run, self._engine, self._teacher, self._events = run, engine, teacher, events
        self._description = description
        self._shapes = engine.shapes

    def _saved_tensors(self) -> dict[str, torch.Tensor]:
        """The runs that this rank writes, as flat fp32 host copies."""
        tensors = {}
        teacher = {
            f.parameter: master for f, master in zip(self._teacher.held, self._teacher.masters, strict=True)
        }
        for fragment in self._engine.fragments:
            kinds = dict(fragment.state)
            if fragment.parameter in teacher:
                kinds["teacher"] = teacher[fragment.parameter]
            first = fragment.saved_start - fragment.start
            for kind, values in kinds.items():
                run = values[first : first + fragment.saved_length]
                if run.numel():
                    tensors[f"{kind}/{fragment.parameter}/{fragment.saved_start}"] = (
                        run.detach().cpu().clone()
                    )
        if self._centre is not None and dist.get_rank() == 0:
            tensors["/".join(map(str, CENTRE))] = self._centre.detach().cpu().clone()
        return tensors

    @property
    def _centre(self) -> torch.Tensor | None:
        """Of the teacher's logits, where there are some."""
        module = self._teacher.module
        return module.centre if module is not None and module.centre.numel() else None

    def _digest(self) -> str:
        masters = [
            (f.parameter, f.saved_start, f.state["master"][f.saved_start - f.start :][: f.saved_length])
            for f in self._engine.fragments
        ]
        teachers = [
            (f"teacher/{f.parameter}", f.saved_start, master[f.saved_start - f.start :][: f.saved_length])
            for f, master in zip(self._teacher.held, self._teacher.masters, strict=True)
        ]
        return state_digest(masters + teachers)

    def save(self, step: int, meta: dict[str, Any]) -> bool:
        """Write and commit the state after `step` applied steps. False, with an event, when the store
        refused it."""
        started = time.monotonic()
        store = self._run.child(f"checkpoints/{step_folder(step)}")
        digest = self._digest()
        mine: FileEntry | str
        try:
            mine = self._write(store)
        except (MaskClipError, OSError) as error:
            mine = f"rank {dist.get_rank()}: {error}"
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        problems = [part for part in parts if isinstance(part, str)]
        if not problems:
            everything = {
                **self._description,
                **meta,
                "step": step,
                "state_digest": digest,
                "parameters": self._shapes,
            }
            manifest = Manifest(KIND, VERSION, tuple(parts), everything)
            try:
                on_rank_zero(lambda: self._commit(store, manifest))
            except MaskClipError as error:
                problems = [str(error)]
        if dist.get_rank() == 0:
            seconds = time.monotonic() - started
            if problems:
                self._events.instant("checkpoint_failed", step=step, seconds=seconds, reason=problems[0])
            else:
                size = sum(part.size for part in parts)
                self._events.instant("checkpoint_committed", step=step, seconds=seconds, bytes=size)
        return not problems

    def _commit(self, store: ObjectStore, manifest: Manifest) -> None:
        """The record of the steps goes first: a resume never repeats a committed step, so its events would
        be lost for good. A store that is too slow for them does not hold the checkpoint up."""
        self._events.flush()
        commit(store, manifest)

    def _write(self, store: ObjectStore) -> FileEntry:
        name = f"rank-{dist.get_rank():05d}.safetensors"
        with tempfile.TemporaryDirectory(prefix="maskclip-") as folder:
            path = Path(folder) / name
            save_file(self._saved_tensors(), path)
            entry = file_entry(path, name)
            store.put_file(name, path)
        return entry

    def restore(self) -> Restored:
        """Fill the job from the newest checkpoint that verifies; damaged ones are set aside. Proves what it
        restored.

        Raises:
            CheckpointIncompatible: the checkpoint does not fit this model, or the filled state is not what
            was saved.
        """
        step = on_rank_zero(self._newest_verified)
        if step is None:
            return Restored(0, {})
        store, manifest = open_checkpoint(self._run, step)
        saved = manifest.meta
        if saved["parameters"] != self._shapes:
            both = saved["parameters"].keys() | self._shapes.keys()
            names = sorted(n for n in both if saved["parameters"].get(n) != self._shapes.get(n))
            raise CheckpointIncompatible(
                f"{store.uri}: its parameters are not those of this model (first difference: {names[0]}); "
                "resume with the model section that wrote it, or start a new run.uri"
            )
        self._fill(FragmentReader(store, manifest))
        self._engine.finish_restore(step)
        self._teacher.refresh()
        digest = self._digest()
        if digest != saved["state_digest"]:
            raise CheckpointIncompatible(
                f"{store.uri}: the restored state has digest {digest}, saved was {saved['state_digest']}; "
                "run `maskclip checkpoint verify` on this run"
            )
        return Restored(step, saved)

    def _fill(self, reader: FragmentReader) -> None:
        runs, targets = [], []
        for fragment in self._engine.fragments:
            for kind, values in fragment.state.items():
                runs.append((kind, fragment.parameter, fragment.start, fragment.length))
                targets.append(values)
        for fragment, master in zip(self._teacher.held, self._teacher.masters, strict=True):
            runs.append(("teacher", fragment.parameter, fragment.start, fragment.length))
            targets.append(master)
        if self._centre is not None:
            runs.append((*CENTRE, self._centre.numel()))
            targets.append(self._centre)
        with torch.no_grad():
            for target, values in zip(targets, reader.read(runs), strict=True):
                target.copy_(values.view(target.shape))

    def _newest_verified(self) -> int | None:
        """On rank 0. A damaged checkpoint keeps its files, but loses its manifest to quarantine/."""
        for step in reversed(committed_steps(self._run)):
            try:
                store, manifest = open_checkpoint(self._run, step)
                problems = verify(store, manifest)
            except DataError as error:  # an unreachable store is no damage: that error ends the attempt
                store = self._run.child(f"checkpoints/{step_folder(step)}")
                problems = [str(error)]
            if not problems:
                return step
            self._quarantine(store, step, problems)
        if self._run.list("quarantine"):
            raise CheckpointIncompatible(
                f"{self._run.uri}: every checkpoint of this run is damaged (see quarantine/), and starting "
                "again from step 0 would hide that; put a copy back or choose a new run.uri"
            )
        return None

    def _quarantine(self, store: ObjectStore, step: int, problems: list[str]) -> None:
        manifest = store.get(MANIFEST)
        name = f"quarantine/{step_folder(step)}-{hashlib.sha256(manifest).hexdigest()[:8]}.json"
        record = {"step": step, "problems": problems, "manifest": manifest.decode(errors="replace")}
        self._run.put(name, json.dumps(record, indent=1).encode())
        store.delete(MANIFEST)
        self._events.instant("checkpoint_quarantined", step=step, problems=problems[:3])
