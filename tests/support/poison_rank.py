"""One rank of `maskclip train` that goes wrong: ``poison_rank.py FAULTS recipe key=value...``.

FAULTS is JSON: [[kind, rank, first window, last window, times], ...]. In these slot windows `kind` happens to
that rank, so many times in all: loss (its share is infinite), gradient (that of a layer is), memory (a bit of
a parameter's copy flips), hang. All else is the real rank.
"""

import json
import sys
import time
from typing import Any

import torch

from cluster.world import World
from system import cli
from system.config import load_train_recipe
from system.engine.accumulate import Accumulator


def infinite_gradient(module: torch.nn.Module) -> Any:
    """From now on, what flows back into `module` is infinite; a handle that ends it."""

    def hook(_: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    return module.register_forward_hook(hook)


def poison(faults: list[list[Any]], rank: int, global_batch: int) -> None:
    original = Accumulator.forward

    def forward(self: Accumulator, batch: Any, *args: Any, **named: Any) -> Any:
        window, objective = int(batch["slot"][0]) // global_batch, self._engine.objective
        found = [f for f in faults if f[1] == rank and f[2] <= window <= f[3] and f[4] > 0]
        kinds = [fault[0] for fault in found]
        for fault in found:
            fault[4] -= 1
        if "hang" in kinds:
            time.sleep(600)
        if "memory" in kinds:
            next(objective.vision.parameters()).data.view(-1).view(torch.int32)[0] ^= 1 << 20
        handle = infinite_gradient(objective.vision.input_norm) if "gradient" in kinds else None
        output = original(self, batch, *args, **named)
        if handle is not None:
            handle.remove()
        return output._replace(loss=output.loss * float("inf")) if "loss" in kinds else output

    Accumulator.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    recipe = load_train_recipe(sys.argv[2], sys.argv[3:])
    poison(json.loads(sys.argv[1]), World.from_env().rank, recipe.data.global_batch)
    sys.exit(cli.main(["train", *sys.argv[2:]]))
