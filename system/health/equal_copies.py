"""Whether what must be equal on all ranks is equal, to the bit.

Ranks compute with copies of the same parameters. A memory or arithmetic fault of one device makes its copy
another one; nothing else tells, since its gradients are averaged into everybody's.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import DeviceFault
from system.engine.engine import Engine
from system.engine.teacher_state import ShardedTeacher

_BITS = {2: torch.int16, 4: torch.int32}


def equal_tensors(engine: Engine, teacher: ShardedTeacher) -> dict[str, Tensor]:
    """What every rank holds whole: the parameters below stage 3, all of the optimizer at stage 0, and the
    teacher's compute copy with its centre."""
    found: dict[str, Tensor] = {}
    if engine.stage < 3:
        found |= {name: parameter.detach() for name, parameter in engine.objective.named_parameters()}
    if engine.stage == 0:
        for fragment in engine.fragments:
            found |= {f"{kind} of {fragment.parameter}": values for kind, values in fragment.state.items()}
    if teacher.module is not None:
        copies = {**dict(teacher.module.named_parameters()), "centre": teacher.module.centre}
        found |= {f"the teacher's {name}": tensor.detach() for name, tensor in copies.items()}
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def compare(tensors: dict[str, Tensor], step: int) -> None:
    """All ranks call it.

    Raises:
        DeviceFault: on all ranks, with the ranks that differ from most others; with two ranks that is both.
    """
    sums = [t.reshape(-1).view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()]
    mine = torch.stack([total.to(sums[0].device) for total in sums])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    sums_RT = torch.stack(everyone).cpu()
    if bool((sums_RT == sums_RT[0]).all()):
        return
    # A rank that half of all or more disagree with; of two ranks, both.
    agreeing_RT = (sums_RT[:, None] == sums_RT[None]).sum(dim=1)
    different_RT = 2 * agreeing_RT <= len(sums_RT)
    ranks = different_RT.any(dim=1).nonzero().flatten().tolist()
    places = different_RT.any(dim=0).nonzero().flatten().tolist()
    names = list(tensors)
    error = DeviceFault(
        f"step {step}: {len(places)} tensors that must be equal on all ranks differ on rank "
        f"{', '.join(map(str, ranks))}, first {names[places[0]]}; check the memory of that machine and "
        "run the same command to go on from the newest checkpoint"
    )
    error.agreed = True
    raise error
