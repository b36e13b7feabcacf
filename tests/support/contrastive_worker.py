"""One rank that takes the gradients of the contrastive losses of its part of a made-up batch."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model import contrastive, losses
from system.engine.collectives import DistributedCollectives

ROWS, WIDTH, SCALE, BIAS = 12, 20, 9.0, -4.0
TILE = 5


def made_up_features(size: int) -> list[Tensor]:
    """Unit images and texts [size * ROWS, WIDTH], and weights of which some are 0."""
    generator = torch.Generator().manual_seed(7)
    image, text = (F.normalize(torch.randn(size * ROWS, WIDTH, generator=generator), dim=1) for _ in range(2))
    weight = torch.randint(0, 3, (size * ROWS,), generator=generator).float()
    return [image, text, weight]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    comm = DistributedCollectives()
    own = slice(comm.rank * ROWS, (comm.rank + 1) * ROWS)
    results = []
    for loss in ("info_nce", "sigmoid"):
        image, text, weight = (part[own] for part in made_up_features(comm.size))
        leaves = {"image": image, "text": text, "scale": torch.tensor([SCALE]), "bias": torch.tensor([BIAS])}
        for leaf in leaves.values():
            leaf.requires_grad_()
        share = losses.mean_shares(weight, comm)
        if loss == "info_nce":
            leaves.pop("bias")
            terms = contrastive.info_nce(image, text, leaves["scale"], share, comm, TILE)
            total = torch.stack(terms).sum()
        else:
            total = contrastive.sigmoid(image, text, leaves["scale"], leaves["bias"], share, comm, TILE)
        total.backward()
        results.append({"loss": total.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    torch.save(results, folder / f"rank-{comm.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
