"""The training loop and the step.

A step commits as a whole: student, optimizer, teacher and the step counter (which is the data position and
drives every schedule) advance together or not at all. A refused step is counted, logged and tried again
with the same samples, which have the same masks; after `engine.max_refused_steps` refusals in a row the
attempt ends.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch.distributed as dist

from cluster.errors import CheckpointIncompatible, Interrupted, NonFinite, Preempted, StorageUnavailable
from cluster.events import EventLog
from cluster.stop import StopRequest
from data_pipeline.loading.loader import Batch
from model.objective import Output
from system.agreement import Verdict, agree
from system.checkpoints.checkpointer import Checkpointer, SaveVotes
from system.config import TrainConfig
from system.console import Console
from system.engine.accumulate import Accumulator
from system.engine.collectives import DistributedCollectives
from system.engine.engine import Engine, StepOutcome
from system.engine.norms import TowerNorms
from system.engine.teacher_state import ShardedTeacher
from system.schedules import Scheduled, at
from system.telemetry.recorder import Source, StepRecorder


class Trainer:
    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        teacher: ShardedTeacher,
        comm: DistributedCollectives,
        checkpointer: Checkpointer,
        events: EventLog,
        console: Console,
        stop: StopRequest,
        after_step: Callable[[int], None],
        sources: Sequence[Source] = (),
    ) -> None:
        """`after_step` is called with the number of applied steps once the step is done, by all ranks;
        `sources` add to what the first rank records of a step."""
        self.config, self.after_step = config, after_step
        self.engine, self.teacher, self.comm = engine, teacher, comm
        self.accumulator = Accumulator(engine, config.engine.accumulation)
        self.checkpointer, self.events, self.console, self.stop = checkpointer, events, console, stop
        self.recorder = StepRecorder(events, config, comm.size, sources)
        self.norms = TowerNorms(engine, teacher, config.telemetry.norms_every)
        self.steps_done = 0
        self.refused_steps = 0

    def resume(self) -> int | None:
        """Restore the newest checkpoint. Returns the step resumed from, None for a new run."""
        restored = self.checkpointer.restore()
        slot = restored.step * self.config.data.global_batch
        if restored.meta.get("slot", slot) != slot:
            raise CheckpointIncompatible(
                f"{self.config.run.uri}: the checkpoint of step {restored.step} stands at slot "
                f"{restored.meta['slot']}, this configuration at {slot}; keep data.global_batch"
            )
        self.steps_done = restored.step
        self.refused_steps = restored.meta.get("refused_steps", 0)
        self.engine.set_loss_scaling(restored.meta.get("loss_scaling"))
        return restored.step or None

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train to `run.steps`; `batches` begins at slot steps_done * global_batch.

        Raises:
            Interrupted, Preempted: asked to stop; the state is committed.
            NonFinite: too many refused steps in a row.
            StorageUnavailable: the last checkpoint could not be committed.
        """
        self.checkpointer.prepare()
        waiting = time.perf_counter()
        for batch in batches:
            data_seconds = time.perf_counter() - waiting
            verdict = self.step_until_applied(batch, data_seconds)
            if verdict.interrupted or verdict.preempted:
                kind = Interrupted if verdict.interrupted else Preempted
                raise kind(
                    f"stopped at step {self.steps_done}, checkpoint at step {self.last_save()}; "
                    "run the same command to go on"
                )
            self.checkpointer.after_step(self.steps_done, SaveVotes(*verdict.others), self.counters())
            self.after_step(self.steps_done)
            waiting = time.perf_counter()
        if self.last_save() != self.steps_done:
            raise StorageUnavailable(
                f"{self.config.run.uri}: the checkpoint of step {self.steps_done} could not be committed; "
                "run the same command again when the store is back"
            )

    def last_save(self) -> int:
        """Have the state as it is saved; returns the newest saved step, which is an older one on failure."""
        saved = self.checkpointer.finish(self.steps_done, self.counters())
        if saved != self.steps_done and dist.get_rank() == 0:
            self.console.warn(f"checkpoint at step {self.steps_done} failed; see the event log")
        return saved

    def step_until_applied(self, batch: Batch, data_seconds: float) -> Verdict:
        refused = 0
        while refused < self.config.engine.max_refused_steps:
            verdict, outcome = self.step(batch, data_seconds)
            if outcome.applied:
                return verdict
            # A loss scale that falls is found in a few tries; it has a lower end.
            refused += not outcome.scale_lowered
            data_seconds = 0.0
        first = self.steps_done * self.config.data.global_batch
        last = first + self.config.data.global_batch - 1
        raise NonFinite(
            f"step {self.steps_done} was refused {self.config.engine.max_refused_steps} times in a row: "
            f"loss or gradient not finite on slots {first} to {last}; "
            "lower optimizer.lr or look at these samples"
        )

    def step(self, batch: Batch, data_seconds: float) -> tuple[Verdict, StepOutcome]:
        """Forward, agree, backward, apply, teacher: one step of the run, or one counted refusal."""
        started = time.perf_counter()
        self.comm.clock.start(data_seconds)
        placed = {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()}
        scheduled = at(self.steps_done, self.config)
        output = self.accumulator.forward(
            placed,
            teacher=self.teacher.module,
            teacher_temperature=scheduled.teacher_temperature,
            comm=self.comm,
        )
        votes = self.checkpointer.votes(self.steps_done + 1)
        verdict = agree(output.loss, placed, self.stop.reason, self.comm.clock.seconds, astuple(votes))
        outcome = StepOutcome(False, float("nan"))
        if verdict.non_finite_ranks:
            self.engine.discard(output.loss)
        else:
            outcome = self.engine.step(output.loss, scheduled.lr, self.norms.measurement(self.steps_done))
        if outcome.applied:
            self.teacher.update(
                scheduled.momentum, output.centre_K, self.config.model.distill.centre_momentum
            )
            self.steps_done += 1
            times = {"data_seconds": data_seconds, "step_seconds": time.perf_counter() - started}
            self.record(output, verdict, outcome, scheduled, batch, times)
        else:
            self.refuse(verdict, outcome, data_seconds, time.perf_counter() - started)
        return verdict, outcome

    def refuse(self, verdict: Verdict, outcome: StepOutcome, data_seconds: float, seconds: float) -> None:
        self.refused_steps += 1
        where = f"loss on {verdict.non_finite_ranks} ranks" if verdict.non_finite_ranks else "gradient"
        if outcome.loss_scale is not None:
            where += f" at loss scale {outcome.loss_scale:g}"
        if dist.get_rank() == 0:
            times = {"data_seconds": data_seconds, "step_seconds": seconds}
            self.events.instant("step_refused", step=self.steps_done, reason=f"non-finite {where}", **times)
            self.console.warn(
                f"step {self.steps_done} refused: non-finite {where} (norm {outcome.grad_norm})"
            )

    def counters(self) -> dict[str, Any]:
        """What a checkpoint says besides the tensors."""
        seen = self.steps_done * self.config.data.global_batch
        return {
            "slot": seen,
            "samples_seen": seen,
            "refused_steps": self.refused_steps,
            "loss_scaling": self.engine.loss_scaling(),
        }

    def record(
        self,
        output: Output,
        verdict: Verdict,
        outcome: StepOutcome,
        scheduled: Scheduled,
        batch: Batch,
        times: dict[str, float],
    ) -> None:
        """One scalar event per applied step; `step` counts applied steps, so the first is 1."""
        tensors = {"loss": output.total, **output.terms, **output.metrics, **self.norms.collect()}
        if dist.get_rank() != 0:
            return
        values = {
            "lr": scheduled.lr,
            "teacher_momentum": scheduled.momentum,
            "teacher_temperature": scheduled.teacher_temperature,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            "ids_digest": verdict.ids_digest,
            **self.checkpointer.gauges(),
        }
        recorded = self.recorder.record(
            self.steps_done, tensors, values, verdict.work_seconds, batch["tokens"], **times
        )
        problem = self.checkpointer.check_first_loss(self.steps_done, recorded["loss"])
        if problem:
            self.console.warn(problem)
