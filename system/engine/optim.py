"""AdamW with the parameter groups of the CLIP recipes."""

import re
from collections import defaultdict

import torch
from torch import nn

from system.config import OptimizerConfig

_TOWER = re.compile(r"(vision|text)\.(?:transformer\.blocks\.(\d+)\.|(?!transformer))")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """No weight decay on 1-d parameters: biases, norms and the logit scale (SLIP's rule; not stated in the
    paper). With `layer_decay` below 1 the learning rate falls from the top of each tower to its
    embeddings."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    depths = _tower_depths(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = config.layer_decay ** _layers_below_top(name, depths)
            groups[parameter.ndim > 1, scale].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": scale,
            }
            for (decays, scale), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _tower_depths(module: nn.Module) -> dict[str, int]:
    """Number of blocks of each tower."""
    depths: dict[str, int] = {}
    for name, _ in module.named_parameters():
        if (found := _TOWER.match(name)) and found[2]:
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def _layers_below_top(name: str, depths: dict[str, int]) -> int:
    """0 for what follows the blocks of a tower, 1 for its last block, ... and one more for its embeddings."""
    found = _TOWER.match(name)
    if found is None:
        return 0
    return depths[found[1]] - (int(found[2]) if found[2] else -1)
