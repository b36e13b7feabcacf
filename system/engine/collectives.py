"""The collectives that the model asks for, over torch.distributed."""

import torch
import torch.distributed as dist

from system.telemetry.work_clock import WorkClock


class DistributedCollectives:
    """`model.losses.Collectives` over the default process group; every rank holds equally many rows."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.clock = WorkClock()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Send x to the next rank, receive the previous one's; all ranks hold the same shape."""
        if self.size == 1:
            return x
        received = torch.empty_like(x)
        turns = [
            dist.P2POp(dist.isend, x.contiguous(), (self.rank + 1) % self.size),
            dist.P2POp(dist.irecv, received, (self.rank - 1) % self.size),
        ]
        with self.clock.meeting():
            for work in dist.batch_isend_irecv(turns):
                work.wait()
        return received

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, without gradient; the argument is left alone."""
        total = x.detach().clone()
        with self.clock.meeting():
            dist.all_reduce(total)
        return total
