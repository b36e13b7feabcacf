"""Named parameter fragments: the topology-free view of what DeepSpeed partitions (design laws 4 and
"Checkpoint").

A fragment is a run of consecutive elements of one parameter, flattened, with the fp32 master values and
both Adam moments that this rank holds for it. Stages 1 to 3 give each rank its share; stage 0 keeps
everything on every rank, and there each rank writes an equal share of every parameter, so that a checkpoint
never holds an element twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Views, never copies: writing into a tensor here writes DeepSpeed's own state."""

    parameter: str
    start: int
    """First element of the flattened parameter that `state` covers."""
    state: dict[str, torch.Tensor]
    """kind -> flat fp32 view [length], in host memory where the optimizer is offloaded."""
    saved_start: int
    saved_length: int
    """The run within the parameter that this rank writes to a checkpoint; inside the run that it holds."""

    @property
    def length(self) -> int:
        return self.state["master"].numel()

    def saved(self, flat: torch.Tensor) -> torch.Tensor:
        """Of values [length] of this fragment the part that no other rank counts, as a view."""
        first = self.saved_start - self.start
        return flat[first : first + self.saved_length]


def replicated_masters(module: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """ZeRO stage 0: parameter name -> its fp32 master, whole on every rank.

    In fp32 `optimizer` is the plain torch one and the parameters are their own masters. In bf16 it is
    DeepSpeed's FP16_UnfusedOptimizer, which allocates Adam's state by a step on zero gradients: that decays
    every weight once and makes Adam count one step too many. Both are undone here, before the first real
    step.
    """
    parameters = dict(module.named_parameters())
    if isinstance(optimizer, torch.optim.Optimizer):
        return {name: parameter.detach() for name, parameter in parameters.items()}
    masters = {}
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    for trained, fp32 in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(trained, fp32, strict=True):
            master.data.copy_(parameter.data)
            optimizer.optimizer.state[master]["step"].zero_()
            masters[by_identity[id(parameter)]] = master
    return masters


def replicated_fragments(
    masters: dict[str, torch.Tensor], adam: torch.optim.Optimizer, rank: int, world_size: int
) -> Iterator[Fragment]:
    """ZeRO stage 0: every rank holds everything and writes its share of each parameter."""
    # The optimizer's state is keyed by the tensor object; a detached view of it shares only the storage.
    keys = {p.data_ptr(): p for group in adam.param_groups for p in group["params"]}
    for name, master in masters.items():
        moments = adam.state[keys[master.data_ptr()]]
        moments.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.device))
        state = {"master": master.detach().view(-1)}
        for kind in MOMENTS:
            state[kind] = moments.setdefault(kind, torch.zeros_like(master.detach())).view(-1)
        first, last = (master.numel() * r // world_size for r in (rank, rank + 1))
        yield Fragment(name, 0, state, first, last - first)


def partitioned_fragments(module: nn.Module, zero_optimizer) -> Iterator[Fragment]:
    """ZeRO stages 1 and 2: the part of each parameter that lies in this rank's flat fp32 partition."""
    for flat in zero_optimizer.single_partition_of_fp32_groups:
        _create_moments(zero_optimizer.optimizer, flat)
    zero_optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in module.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed
        if mapping is None:
            continue
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        state = {"master": mapping.get_hp_fragment().detach()}
        state |= {kind: mapping.get_hp_fragment(optim_state_key=kind) for kind in MOMENTS}
        yield Fragment(name, start, state, start, length)


def sharded_fragments(module: nn.Module, zero_optimizer, rank: int) -> Iterator[Fragment]:
    """ZeRO stage 3: this rank's of the equal shares of each parameter, the last of them padded.

    DeepSpeed's public getters copy to the device where the optimizer is offloaded; the views behind them do
    not.
    """
    for flat in zero_optimizer.fp32_partitioned_groups_flat:
        _create_moments(zero_optimizer.optimizer, flat)
    for name, parameter in module.named_parameters():
        share = parameter.partition_numel()  # type: ignore[attr-defined]  # set by DeepSpeed
        start = rank * share
        length = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length <= 0:
            continue
        state = {}
        for kind in ("master", *MOMENTS):
            key = None if kind == "master" else kind
            view, _ = zero_optimizer._get_fp32_opt_state_partition(parameter, False, key)
            state[kind] = view.detach()[:length]
        yield Fragment(name, start, state, start, length)


def fragment_gradient(
    stage: int, zero_optimizer, parameter: torch.Tensor, fragment: Fragment
) -> torch.Tensor | None:
    """Between backward and update: the gradient of the run that this rank saves, flat; None if it had
    none."""
    if stage == 0:
        if parameter.grad is None:
            return None
        flat, offset = parameter.grad.view(-1), fragment.saved_start
    elif stage == 3:
        flat, _ = zero_optimizer._get_fp32_grad_state_partition(parameter, False)
        flat, offset = flat.view(-1), 0
    else:
        index = parameter._index_in_param_group  # type: ignore[attr-defined]  # set by DeepSpeed
        flat = parameter._hp_mapping.get_lp_grad_fragment(index).view(-1)  # type: ignore[attr-defined]
        offset = fragment.start if flat.numel() == parameter.numel() else 0
    return flat[offset : offset + fragment.saved_length]


def _create_moments(adam: torch.optim.Optimizer, flat: torch.Tensor) -> None:
    """A fresh engine has no Adam state yet: one flat tensor per group, as AdamW itself would create it."""
    moments = adam.state[flat]
    moments.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
    for kind in MOMENTS:
        moments.setdefault(kind, torch.zeros_like(flat))


def refresh_parameters(zero_optimizer) -> None:
    """ZeRO stage 3: the parameters that the passes compute with, from the masters, as after a step."""
    zero_optimizer._partition_all_parameters()
    for group in range(len(zero_optimizer.fp16_groups)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if whole := zero_optimizer.persistent_parameters:
        whole[0].all_gather(whole)


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adam's bias correction counts applied steps; the count is one for all parameters."""
    for moments in optimizer.state.values():
        moments["step"].fill_(float(step))
