"""DeepSpeed at arm's length: the only module that knows its engine.

Its surprises become plain facts here: whether a step was applied, what the global gradient norm was, which
fragments of the state this rank holds.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from cluster.errors import ConfigError
from model.global_batch import Features, GlobalBatch
from model.losses import Collectives
from model.objective import Objective, Output, Shares
from model.teacher import Teacher
from system.config import TrainConfig
from system.engine.ds_config import deepspeed_config
from system.engine.fragments import (
    Fragment,
    fragment_gradient,
    partitioned_fragments,
    refresh_parameters,
    replicated_fragments,
    replicated_masters,
    set_adam_step,
    sharded_fragments,
)
from system.engine.optim import build_optimizer, set_learning_rate

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepOutcome:
    applied: bool
    grad_norm: float
    """Global L2 norm before clipping; not finite when the step was refused for it."""
    loss_scale: float | None = None
    """That the step was computed with; None where there is none (fp16 has one)."""
    scale_lowered: bool = False
    """The step was refused, and will be computed with a lower loss scale when it is tried again."""


class Engine:
    """Student and optimizer under ZeRO 0 to 3. torch.distributed must be initialised."""

    def __init__(self, objective: Objective, config: TrainConfig, local_batch: int) -> None:
        """
        Args:
            local_batch: samples that this rank computes per step, padding included.
        Raises:
            ConfigError: more micro-batches than samples, or a precision that this machine does not have.
        """
        import deepspeed  # only the processes that train pay for this import

        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        _check(config, local_batch)
        self.stage = config.engine.zero_stage
        """ZeRO stage, 0 to 3."""
        self.shapes = {name: list(parameter.shape) for name, parameter in objective.named_parameters()}
        """Of the whole parameters, by name."""
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, config.optimizer),
            config=deepspeed_config(config, local_batch, world_size),
            dist_init_required=False,
        )
        self.objective: Objective = self._engine.module
        self._parameters = dict(self.objective.named_parameters())
        # DeepSpeed's wrappers hold the torch optimizer; in fp32 at stage 0 there is no wrapper.
        self._adam = getattr(self._optimizer, "optimizer", self._optimizer)
        self._scaler = self._optimizer.loss_scaler if config.engine.precision == "fp16" else None
        if self._scaler is not None:
            # At the lowest scale it is the gradient that is not finite: refused and counted as such.
            self._scaler.raise_error_at_min_scale = False
        self._unfinished = False
        if self.stage == 0:
            masters = replicated_masters(self.objective, self._optimizer)
            self.fragments = list(replicated_fragments(masters, self._adam, rank, world_size))
        elif self.stage == 3:
            self.fragments = list(sharded_fragments(self.objective, self._optimizer, rank))
        else:
            self.fragments = list(partitioned_fragments(self.objective, self._optimizer))

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        teacher: Teacher | None,
        teacher_temperature: float,
        comm: Collectives,
    ) -> Output:
        """All passes of the objective; see `model.objective.Objective.loss`."""
        return self._engine(batch, teacher, teacher_temperature, comm)

    @torch.no_grad()
    def features(self, batch: Mapping[str, torch.Tensor]) -> tuple[Features, torch.Tensor]:
        """See `model.objective.Objective.features`."""
        return self._engine(batch, method="features")

    def shares(
        self,
        batch: Mapping[str, torch.Tensor],
        teacher: Teacher | None,
        teacher_temperature: float,
        everyone: GlobalBatch,
    ) -> Shares:
        """See `model.objective.Objective.shares`."""
        return self._engine(batch, teacher, teacher_temperature, everyone, method="shares")

    def add_gradient(self, loss: torch.Tensor) -> None:
        """Backward of a micro-batch that is not the last of its step."""
        self._backward(loss, last=False)
        self._unfinished = True

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the number of micro-batches what arrives at a tensor that its forward returned,
        # in spite of the argument; a copy is not such a tensor.
        self._engine.backward(loss.clone(), scale_wrt_gas=False)

    def step(self, loss: torch.Tensor, lr: float, measure: Callable[[], None] | None = None) -> StepOutcome:
        """Backward, reduce over ranks, and apply unless the global gradient is not finite (the same on
        every rank). `measure` is called in between, where `gradient` has something to say."""
        set_learning_rate(self._optimizer, lr)
        scale = None if self._scaler is None else self._scaler.cur_scale
        self._backward(loss, last=True)
        self._unfinished = False
        if measure is not None:
            measure()
        norm = self._plain_grad_norm() if self._optimizer is self._adam else None
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            return StepOutcome(False, norm)
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        lowered = self._scaler is not None and self._scaler.cur_scale < scale
        return StepOutcome(self._engine.was_step_applied(), norm, scale, lowered)

    def gradient(self, fragment: Fragment) -> torch.Tensor | None:
        """Between backward and update: the averaged gradient of the part of `fragment` that no other rank
        saves, flat; None where a parameter had none."""
        flat = fragment_gradient(self.stage, self._optimizer, self._parameters[fragment.parameter], fragment)
        if flat is None or self._scaler is None:
            return flat
        return flat.float() / self._scaler.cur_scale

    def discard(self, loss: torch.Tensor) -> None:
        """Instead of `step`: forget the gradients of the micro-batches before.

        DeepSpeed keeps them in other places at every stage, and empties all of them when it refuses a
        gradient that is not finite. So it gets one.
        """
        if self._unfinished:
            before = self.loss_scaling()
            self.step(loss * float("nan"), 0.0)
            self.set_loss_scaling(before)

    def loss_scaling(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None where there is none."""
        return None if self._scaler is None else {name: getattr(self._scaler, name) for name in _LOSS_SCALER}

    def set_loss_scaling(self, state: dict[str, float] | None) -> None:
        """Go on from what `loss_scaling` said; None, or no scale here: nothing."""
        if self._scaler is not None and state is not None:
            for name in _LOSS_SCALER:
                setattr(self._scaler, name, state[name])

    def whole_parameters(self) -> AbstractContextManager:
        """Inside, any rank may run parts of the model on its own: at stage 3 all ranks gather the parameters
        first, and nothing is gathered inside."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        return unwrap_model_for_generation(self._engine)

    def _plain_grad_norm(self) -> float:
        """The gradients are averaged already; for the plain torch optimizer DeepSpeed reports no norm."""
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def finish_restore(self, step: int) -> None:
        """After the fragments were filled: set Adam's counter, and refresh what computes from the fp32
        masters."""
        set_adam_step(self._adam, step)
        if self.stage == 3:
            refresh_parameters(self._optimizer)
        elif self.stage > 0:
            self._optimizer.update_lp_params()
        elif self._optimizer is not self._adam:
            masters = {fragment.parameter: fragment.state["master"] for fragment in self.fragments}
            with torch.no_grad():
                for name, parameter in self.objective.named_parameters():
                    parameter.copy_(masters[name].view(parameter.shape))


def _check(config: TrainConfig, local_batch: int) -> None:
    from deepspeed.accelerator import get_accelerator

    engine = config.engine
    if engine.accumulation > local_batch:
        raise ConfigError(
            f"{engine.accumulation} micro-batches of the {local_batch} samples of a rank; lower "
            "engine.accumulation or raise data.global_batch"
        )
    device: Any = get_accelerator()
    if engine.precision == "fp16" and not device.is_fp16_supported():
        raise ConfigError("this machine does not train in fp16; set engine.precision to bf16 or fp32")
