"""DeepSpeed at arm's length: the only module that knows its engine.

Its surprises become plain facts here: whether a step was applied, what the global gradient norm was, which
fragments of the state this rank holds.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from model.objective import Objective
from system.config import TrainConfig
from system.ds_config import deepspeed_config
from system.fragments import partitioned_fragments, replicated_fragments, replicated_masters, set_adam_step
from system.optim import build_optimizer, set_learning_rate


@dataclass(frozen=True)
class StepOutcome:
    applied: bool
    grad_norm: float
    """Global L2 norm before clipping; not finite when the step was refused for it."""


class Engine:
    """Student and optimizer under ZeRO 0, 1 or 2. torch.distributed must be initialised."""

    def __init__(self, objective: Objective, config: TrainConfig, local_batch: int) -> None:
        import deepspeed  # only the processes that train pay for this import

        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._stage = config.engine.zero_stage
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, config.optimizer),
            config=deepspeed_config(config, local_batch, world_size),
            dist_init_required=False,
        )
        self.objective: Objective = self._engine.module
        # DeepSpeed's wrappers hold the torch optimizer; in fp32 at stage 0 there is no wrapper.
        self._adam = getattr(self._optimizer, "optimizer", self._optimizer)
        if self._stage == 0:
            masters = replicated_masters(self.objective, self._optimizer)
            self.fragments = list(replicated_fragments(masters, self._adam, rank, world_size))
        else:
            self.fragments = list(partitioned_fragments(self.objective, self._optimizer))

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def forward(self, batch: dict[str, torch.Tensor], **how):
        """All passes of the objective; see `model.objective.Objective.forward`."""
        return self._engine(batch, **how)

    def step(self, loss: torch.Tensor, lr: float) -> StepOutcome:
        """Backward, reduce over ranks, and apply unless the global gradient is not finite (the same on
        every rank)."""
        set_learning_rate(self._optimizer, lr)
        self._engine.backward(loss)
        norm = self._plain_grad_norm() if self._optimizer is self._adam else None
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            return StepOutcome(False, norm)
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return StepOutcome(self._engine.was_step_applied(), norm)

    def _plain_grad_norm(self) -> float:
        """The gradients are averaged already; for the plain torch optimizer DeepSpeed reports no norm."""
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def finish_restore(self, step: int) -> None:
        """After the fragments were filled: set Adam's counter, and refresh what computes from the fp32
        masters."""
        set_adam_step(self._adam, step)
        if self._stage > 0:
            self._optimizer.update_lp_params()
        elif self._optimizer is not self._adam:
            masters = {fragment.parameter: fragment.state["master"] for fragment in self.fragments}
            with torch.no_grad():
                for name, parameter in self.objective.named_parameters():
                    parameter.copy_(masters[name].view(parameter.shape))
