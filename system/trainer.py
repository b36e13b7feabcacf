"""The training loop and the step.

A step commits as a whole: student, optimizer, teacher and the step counter (which is the data position and
drives every schedule) advance together or not at all. A refused step is counted, logged and tried again
with the same samples, which have the same masks; after `engine.max_refused_steps` refusals in a row the
attempt ends, and the next one goes on from the newest checkpoint without these samples.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch.distributed as dist

from cluster.errors import CheckpointIncompatible, Interrupted, Preempted, StorageUnavailable
from cluster.events import EventLog
from cluster.stop import StopRequest
from data_pipeline.loading.loader import Batch
from data_pipeline.loading.order import window_of
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
from system.health import skips
from system.health.monitor import Health
from system.health.spikes import ratios
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
        health: Health,
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
        self.health = health
        self.recorder = StepRecorder(events, config, comm.size, sources)
        self.norms = TowerNorms(engine, teacher, config.telemetry.norms_every)
        self.steps_done = 0
        self.refused_steps = 0
        self.skipped: tuple[int, ...] = ()
        """Slot windows that no step consumes; see `health.skips`."""

    def resume(self, records: Sequence[dict[str, Any]] = ()) -> int | None:
        """Restore the newest checkpoint. Returns the step resumed from, None for a new run.

        Args:
            records: of slot windows that the run leaves out.
        """
        self.health.watchdog.begin("restore")
        restored = self.checkpointer.restore()
        behind = tuple(restored.meta.get("skipped_windows", ()))
        slot = (restored.step + len(behind)) * self.config.data.global_batch
        if restored.meta.get("slot", slot) != slot:
            raise CheckpointIncompatible(
                f"{self.config.run.uri}: the checkpoint of step {restored.step} stands at slot "
                f"{restored.meta['slot']}, this configuration at {slot}; keep data.global_batch"
            )
        self.steps_done = restored.step
        self.skipped = skips.skipped_windows(restored.meta, restored.step, records)
        self.refused_steps = restored.meta.get("refused_steps", 0)
        self.health.resume(restored.meta)
        self.engine.set_loss_scaling(restored.meta.get("loss_scaling"))
        return restored.step or None

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train to `run.steps`; `batches` are those of the steps from steps_done on.

        Raises:
            Interrupted, Preempted: asked to stop; the state is committed.
            NonFinite, LossSpike, DeviceFault: see `health.monitor`.
            StorageUnavailable: the last checkpoint could not be committed.
        """
        watchdog = self.health.watchdog
        watchdog.begin("first batch")
        self.checkpointer.prepare()
        waiting = time.perf_counter()
        for batch in batches:
            data_seconds = time.perf_counter() - waiting
            verdict = self.step_until_applied(batch, data_seconds)
            self.health.after_step(self.steps_done)
            if verdict.interrupted or verdict.preempted:
                kind = Interrupted if verdict.interrupted else Preempted
                raise kind(
                    f"stopped at step {self.steps_done}, checkpoint at step {self.last_save()}; "
                    "run the same command to go on"
                )
            with watchdog.between("after a step"):
                self.checkpointer.after_step(self.steps_done, SaveVotes(*verdict.others), self.counters())
                self.after_step(self.steps_done)
            watchdog.step(self.steps_done)
            waiting = time.perf_counter()
        if self.last_save() != self.steps_done:
            raise StorageUnavailable(
                f"{self.config.run.uri}: the checkpoint of step {self.steps_done} could not be committed; "
                "run the same command again when the store is back"
            )

    def last_save(self) -> int:
        """Have the state as it is saved; returns the newest saved step, which is an older one on failure."""
        with self.health.watchdog.between("last save"):
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
        raise self.health.too_often_refused(self.steps_done, self.skipped)

    def step(self, batch: Batch, data_seconds: float) -> tuple[Verdict, StepOutcome]:
        """Forward, agree, backward, apply, teacher: one step of the run, or one counted refusal."""
        started = time.perf_counter()
        self.comm.clock.start(data_seconds)
        placed = {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()}
        scheduled, phase = at(self.steps_done, self.config), self.health.watchdog.at
        phase("forward")
        output = self.accumulator.forward(
            placed,
            teacher=self.teacher.module,
            teacher_temperature=scheduled.teacher_temperature,
            comm=self.comm,
        )
        votes = self.checkpointer.votes(self.steps_done + 1)
        phase("agreement")
        verdict = agree(
            output.loss,
            output.total,
            placed,
            self.stop.reason,
            self.comm.clock.seconds,
            astuple(votes),
            self.health.measured(),
        )
        self.health.judge(self.steps_done, self.skipped, verdict)
        phase("backward and update")
        outcome = StepOutcome(False, float("nan"))
        if verdict.non_finite_ranks:
            self.engine.discard(output.loss)
        else:
            outcome = self.engine.step(output.loss, scheduled.lr, self.norms.measurement(self.steps_done))
        if outcome.applied:
            phase("teacher")
            self.teacher.update(
                scheduled.momentum, output.centre_K, self.config.model.distill.centre_momentum
            )
            self.steps_done += 1
            times = {"data_seconds": data_seconds, "step_seconds": time.perf_counter() - started}
            self.record(output, verdict, outcome, scheduled, batch, times)
        else:
            self.refused_steps += 1
            times = {"data_seconds": data_seconds, "step_seconds": time.perf_counter() - started}
            self.health.refused(self.steps_done, placed, output.loss, scheduled, verdict, outcome, times)
        return verdict, outcome

    def counters(self) -> dict[str, Any]:
        """What a checkpoint says besides the tensors."""
        batch = self.config.data.global_batch
        return {
            "slot": window_of(self.steps_done, self.skipped) * batch,
            "samples_seen": self.steps_done * batch,
            **skips.counted(self.steps_done, self.skipped),
            **self.health.counters(),
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
            "slot": window_of(self.steps_done - 1, self.skipped) * self.config.data.global_batch,
            "ids_digest": verdict.ids_digest,
            **{f"moment_ratio_{tower}": ratio for tower, ratio in ratios(verdict.measured).items()},
            **self.checkpointer.gauges(),
        }
        recorded = self.recorder.record(
            self.steps_done, tensors, values, verdict.work_seconds, batch["tokens"], **times
        )
        problem = self.checkpointer.check_first_loss(self.steps_done, recorded["loss"])
        if problem:
            self.console.warn(problem)
