"""All that watches over the health of a run, as the training loop sees it. Every method is called by all
ranks together."""

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import LossSpike, NonFinite
from cluster.events import EventLog
from cluster.store import ObjectStore
from cluster.watchdog import Watchdog
from data_pipeline.loading.order import window_of
from system.agreement import Verdict
from system.config import TrainConfig
from system.console import Console
from system.engine.engine import Engine, StepOutcome
from system.engine.teacher_state import ShardedTeacher
from system.health import skips
from system.health.culprits import LocalGradients, describe, find
from system.health.equal_copies import compare, equal_tensors
from system.health.memory import MemoryWatch
from system.health.spikes import LossHistory, MomentRatio, ratios
from system.schedules import Scheduled


class Health:
    def __init__(
        self,
        config: TrainConfig,
        run: ObjectStore,
        engine: Engine,
        teacher: ShardedTeacher,
        events: EventLog,
        console: Console,
        watchdog: Watchdog,
    ) -> None:
        self.watchdog = watchdog
        self._config, self._settings = config, config.health
        self._run, self._events, self._console = run, events, console
        self._engine, self._teacher = engine, teacher
        self._gradients = LocalGradients(engine.objective)
        self._losses = LossHistory(config.health.spike_window)
        self._moments = MomentRatio(engine.fragments, config.optimizer.betas[1], config.optimizer.eps)
        self._memory = MemoryWatch(events, config.health.memory_seconds, config.health.memory_growth)
        self._copies = equal_tensors(engine, teacher)
        self._spike = self._ahead = False
        self._loss = 0.0
        self._refusal = ""

    def resume(self, meta: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says."""
        for loss in meta.get("recent_losses", ()):
            self._losses.add(loss)

    def counters(self) -> dict[str, Any]:
        """For the meta of a checkpoint: with `on_spike: rollback` the losses before a step decide whether it
        is applied, so a resumed run must know them, too."""
        return {"recent_losses": self._losses.known}

    def measured(self) -> Tensor:
        """int64, this rank's part of what `judge` gets: goes with the votes of a step."""
        return self._moments.share(self._engine.device)

    def judge(self, step: int, skipped: tuple[int, ...], verdict: Verdict) -> None:
        """Look at a step before it is applied.

        Raises:
            LossSpike: the loss has jumped and `on_spike` is rollback.
        """
        self._loss = verdict.loss
        self._warn_ahead(step, ratios(verdict.measured))
        if verdict.non_finite_ranks:
            return
        deviations = self._losses.deviations(verdict.loss)
        found = deviations > self._settings.spike_deviations
        if found and not self._spike:
            reason = f"loss {verdict.loss:.4f} lies {deviations:.0f} deviations above the steps before"
            self._tell("loss_spike", step, reason, loss=verdict.loss, deviations=deviations)
            if self._settings.on_spike == "rollback":
                raise self.without_window(LossSpike, step, skipped, reason)
        self._spike = found

    def _warn_ahead(self, step: int, found: dict[str, float]) -> None:
        over = {tower: value for tower, value in found.items() if value > self._settings.moment_ratio}
        if over and not self._ahead:
            words = ", ".join(f"{tower} {value:.1f}" for tower, value in over.items())
            self._tell("spike_ahead", step, f"gradients outrun Adam's second moment ({words})", **over)
        self._ahead = bool(over)

    def refused(
        self,
        step: int,
        batch: Mapping[str, Tensor],
        loss: Tensor,
        scheduled: Scheduled,
        verdict: Verdict,
        outcome: StepOutcome,
        times: Mapping[str, float],
    ) -> None:
        """Tell of a step that was not applied, with the ranks and samples that are the cause."""
        reason = f"non-finite loss on {verdict.non_finite_ranks} ranks"
        if not verdict.non_finite_ranks:
            reason = "non-finite gradient"
        scale = "" if outcome.loss_scale is None else f" at loss scale {outcome.loss_scale:g}"
        found, started = [], time.perf_counter()
        if not outcome.scale_lowered:  # fp16 looks for its scale: nobody's fault
            finite = bool(torch.isfinite(loss.detach()).all())
            # Of a loss that is not finite there is no gradient to look at.
            sound = verdict.non_finite_ranks > 0 or self._gradients.finite()
            temperature = scheduled.teacher_temperature
            with self.watchdog.between("looking for what is not finite"):
                found = find(self._engine, self._teacher.module, temperature, batch, finite, sound)
        self._gradients.forget()
        self._refusal = reason + scale + (f" ({describe(found)})" if found else "")
        if dist.get_rank() == 0:
            self._events.instant(
                "step_refused",
                step=step,
                reason=self._refusal,
                ranks=[culprit.rank for culprit in found],
                slots=[slot for culprit in found for slot in culprit.slots],
                ids=[identity for culprit in found for identity in culprit.ids],
                data_seconds=times["data_seconds"],
                step_seconds=times["step_seconds"] + time.perf_counter() - started,
            )
            self._console.warn(f"step {step} refused: {self._refusal}, norm {outcome.grad_norm}")

    def too_often_refused(self, step: int, skipped: tuple[int, ...]) -> NonFinite | LossSpike:
        """The error that ends an attempt which cannot apply a step."""
        times = self._config.engine.max_refused_steps
        return self.without_window(NonFinite, step, skipped, f"{self._refusal}, {times} times in a row")

    def without_window(
        self, error: type[NonFinite | LossSpike], step: int, skipped: tuple[int, ...], reason: str
    ) -> NonFinite | LossSpike:
        """Have the window of `step` left out from now on, or give up; the error that says so."""
        window, batch = window_of(step, skipped), self._config.data.global_batch
        record = {
            "window": window,
            "slots": [window * batch, (window + 1) * batch - 1],
            "step": step,
            "attempt": self._events.attempt,
            "reason": reason,
        }
        if dist.get_rank() == 0:
            self._events.instant("window_given_up", **{k: v for k, v in record.items() if k != "attempt"})
        return skips.give_up_window(self._run, error, record)

    def after_step(self, step: int) -> None:
        """After the `step`-th step was applied, and before its state may be saved.

        Raises:
            DeviceFault: ranks differ in what must be equal.
        """
        self._gradients.forget()
        self._losses.add(self._loss)
        self._moments.measure(step)
        self._memory.after_step(step)
        every = self._settings.compare_every
        if every and step % every == 0 and dist.get_world_size() > 1 and self._copies:
            self.watchdog.at("comparing the ranks' copies")
            compare(self._copies, step)

    def _tell(self, name: str, step: int, words: str, **facts: float) -> None:
        if dist.get_rank() == 0:
            self._events.instant(name, step=step, **facts)
            self._console.warn(f"step {step}: {words}")
