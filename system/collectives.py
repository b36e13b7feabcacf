"""The collectives that the model asks for, over torch.distributed."""

import torch
import torch.distributed as dist


class _GatherWithGrad(torch.autograd.Function):
    """All-gather along dimension 0 whose backward hands each rank the summed gradient of its own part."""

    @staticmethod
    def forward(ctx, x_BD: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gathered = x_BD.new_empty(dist.get_world_size() * x_BD.shape[0], *x_BD.shape[1:])
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), x_BD.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        # Not reduce_scatter: gloo has none for every build, and the features are small beside the gradients.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class DistributedCollectives:
    """`model.losses.Collectives` over the default process group; every rank holds equally many rows."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather_with_grad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ...] on each rank -> [size * B, ...] in rank order; gradients flow back to their rank."""
        return _GatherWithGrad.apply(x)  # type: ignore[no-any-return]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, without gradient; the argument is left alone."""
        total = x.detach().clone()
        dist.all_reduce(total)
        return total
