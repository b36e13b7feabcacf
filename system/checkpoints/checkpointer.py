"""The checkpoints of a running job, as its training loop sees them. Every method that is not marked
otherwise is called by all ranks together, in the main thread.

A save is a copy into host memory between two steps; what is written, and how it is committed, is in
`checkpoint_save`. Ranks tell each other about their saves with the votes of the step's one all-reduce.
"""

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import Superseded
from cluster.events import EventLog
from cluster.store import ObjectStore
from system.checkpoints.config import CheckpointConfig
from system.checkpoints.first_loss import TOPOLOGY, KnownLoss, compare, known_loss
from system.checkpoints.interval import Interval, observed_failures
from system.checkpoints.job_state import JobState
from system.checkpoints.local_tier import LocalTier
from system.checkpoints.restore import Restored, restore
from system.checkpoints.retention import Retention
from system.checkpoints.save import Place, SaveJob
from system.checkpoints.snapshot import Snapshot
from system.engine.engine import Engine
from system.engine.teacher_state import ShardedTeacher

_DEFAULTS = CheckpointConfig()
_LOOK_SECONDS = 0.05
_GRACE_SECONDS = 15.0
"""After its deadline, for a job to notice it."""


@dataclass(frozen=True)
class SaveVotes:
    """What a rank says of its saves before a step; or the sums over all ranks."""

    due: int = 0
    """The first rank wants one after this step."""
    busy: int = 0
    """One is in flight."""
    failed: int = 0
    """The last one has failed."""
    superseded: int = 0
    """It has failed because a newer attempt of the run has begun."""


class Checkpointer:
    def __init__(
        self,
        run: ObjectStore,
        engine: Engine,
        teacher: ShardedTeacher,
        events: EventLog,
        description: dict[str, Any],
        config: CheckpointConfig = _DEFAULTS,
    ) -> None:
        """
        Args:
            description: goes into every manifest (identity, data set digest, configuration).
        """
        self._run, self._events, self._config = run, events, config
        self._description = description
        self._state = JobState(engine, teacher)
        self._local = LocalTier(config.local, run.uri, config.local_keep) if config.local else None
        retention = Retention(run, config, events)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self._place = Place(run, rank, ranks, events, config, self._local, retention)
        self._interval = Interval(config, events, lambda: observed_failures(run, events.attempt))
        self._snapshot: Snapshot | None = None
        self._job: SaveJob | None = None
        self._counted: SaveJob | None = None
        self._durable_at = time.monotonic()
        self._known: KnownLoss | None = None
        engine_config = description.get("config", {}).get("engine", {})
        self._topology = {name: engine_config.get(name) for name in TOPOLOGY} | {"processes": ranks}
        self.last_saved = 0
        """Step of the newest state that is known to be durable; on rank 0."""
        self.skipped = self.failed = 0
        """Saves of this attempt that were left out since one was in flight, and that failed; on rank 0."""

    def prepare(self) -> None:
        """Make the host buffer in the background, so that the first save need not."""
        self._snapshot = Snapshot(self._state.saved_tensors())
        threading.Thread(target=self._snapshot.touch, name="checkpoint-buffer", daemon=True).start()

    def votes(self, step: int) -> SaveVotes:
        """What this rank says before the step that leads to `step` applied ones."""
        job = self._job
        return SaveVotes(
            due=int(self._place.rank == 0 and self._interval.due(step)),
            busy=int(job is not None and not job.done.is_set()),
            failed=int(job is not None and job.failed),
            superseded=int(job is not None and isinstance(job.error, Superseded)),
        )

    def after_step(self, step: int, votes: SaveVotes, meta: dict[str, Any]) -> None:
        """Begin a save if one is due; `votes` are the sums that all ranks have.

        Raises:
            Superseded: a newer attempt has begun.
        """
        self._settle(votes)
        if not votes.due:
            return
        if votes.busy:
            self.skipped += 1
            if self._place.rank == 0:
                self._events.instant("checkpoint_skipped", step=step, skipped=self.skipped)
                self._interval.began()
        else:
            with self._events.span("checkpoint_stall", step=step):
                (self.begin if self._config.background else self.save)(step, meta)

    def save(self, step: int, meta: dict[str, Any]) -> bool:
        """Save the state after `step` applied steps and wait until it is committed. False, with an event,
        when the store refused it.

        Raises:
            Superseded: a newer attempt has begun. Two that go on from one checkpoint would mix their steps.
        """
        self.wait()
        self.begin(step, meta)
        self.wait()
        return self.saved_on_all(step)

    def begin(self, step: int, meta: dict[str, Any]) -> None:
        """Take the snapshot, and start what writes it. No save may be in flight on any rank."""
        started = time.monotonic()
        if self._job is not None and not self._job.done.is_set():
            self._snapshot = None  # a job that was given up may still read it
        tensors = self._state.saved_tensors()
        if self._snapshot is None:
            self._snapshot = Snapshot(tensors)
        self._snapshot.take(tensors)
        everything = {**self._description, **meta, "parameters": self._state.shapes}
        stall = time.monotonic() - started
        self._job = SaveJob(self._place, step, everything, self._snapshot, started, stall)
        self._interval.began()
        threading.Thread(target=self._work, args=(self._job,), name="checkpoint", daemon=True).start()

    def _work(self, job: SaveJob) -> None:
        """In the background thread."""
        job.run()
        if job.committed:
            self._interval.saved(job.stall_seconds, job.seconds)

    def wait(self) -> None:
        """Wait for the save in flight, until it ends on all ranks or its deadline has passed.

        Raises:
            Superseded: a newer attempt has begun.
        """
        while True:
            votes = self.votes(-1)
            job = self._job
            if job is not None and self._late(job):
                votes = replace(votes, busy=0, failed=1)
            votes = self._sum(votes)
            self._settle(votes)
            if not votes.busy:
                return
            if job is not None:
                job.done.wait(_LOOK_SECONDS)

    def _late(self, job: SaveJob) -> bool:
        """It ended neither by its deadline nor soon after."""
        return time.monotonic() - job.taken > self._config.deadline_seconds + _GRACE_SECONDS

    def finish(self, step: int, meta: dict[str, Any]) -> int:
        """Wait for the save in flight and have the state after `step` saved. Returns the newest step that is,
        the same on all ranks."""
        with self._events.span("checkpoint_stall", step=step):
            self.wait()
            if not self.saved_on_all(step):
                self.save(step, meta)
        box = [self.last_saved]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def saved_on_all(self, step: int) -> bool:
        """Whether the state of `step` was committed, as rank 0 knows it."""
        box = [self._place.rank == 0 and self.last_saved == step]
        dist.broadcast_object_list(box, src=0)
        return bool(box[0])

    def restore(self) -> Restored:
        """Fill the job from the newest checkpoint that verifies; see `checkpoint_restore.restore`."""
        restored = restore(self._run, self._state, self._events, self._local)
        self.last_saved = restored.step
        self._interval.restore_seconds = restored.seconds
        self._durable_at = time.monotonic()
        if restored.step and self._place.rank == 0:
            self._known = known_loss(self._run, self._events.attempt, restored.step + 1)
        return restored

    def gauges(self) -> dict[str, float]:
        """What the step's event says of the checkpoints; on rank 0."""
        return {"durable_age_seconds": time.monotonic() - self._durable_at}

    def check_first_loss(self, step: int, loss: float) -> str | None:
        """Compare the first loss after a restore with what an older attempt had there. What to warn of, if
        they differ; on rank 0."""
        known, self._known = self._known, None
        if known is None:
            return None
        facts = compare(known, loss, self._topology)
        off = facts.pop("off")
        self._events.instant("first_loss_off" if off else "first_loss", step=step, **facts)
        if not off:
            return None
        return f"loss {loss} of step {step} is not the {known.loss} that attempt {known.attempt} had there"

    def _settle(self, votes: SaveVotes) -> None:
        """Take note of what has ended since."""
        job = self._job
        if votes.superseded:
            error = job.error if job is not None and isinstance(job.error, Superseded) else None
            error = error or Superseded(f"{self._run.uri}: a newer attempt of this run has begun")
            error.agreed = True
            raise error
        if job is None:
            return
        if votes.failed and not job.failed and not job.done.is_set():
            job.cancel("another rank could not write its part")
        elif self._late(job) and not job.done.is_set():
            job.cancel("it has not ended by checkpoint.deadline_seconds")
        if job is not self._counted and (job.committed or job.failed):
            self._counted = job
            self.failed += job.failed
            if job.committed:
                self.last_saved, self._durable_at = job.step, job.taken

    def _sum(self, votes: SaveVotes) -> SaveVotes:
        counts = torch.tensor([votes.due, votes.busy, votes.failed, votes.superseded])
        if dist.get_backend() == "nccl":
            counts = counts.cuda()
        dist.all_reduce(counts)
        return SaveVotes(*counts.tolist())
