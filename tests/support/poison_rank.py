"""One rank of `maskclip train` that goes wrong: ``poison_rank.py FAULTS recipe key=value...``.

FAULTS is JSON: [[kind, rank, first window, last window, times], ...]. In these slot windows `kind` happens to
that rank, so many times in all: loss (its share is infinite), gradient (that of its loss is), memory (one bit
of a parameter's copy flips), hang. All else is the real rank.
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


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


def poison(faults: list[list[Any]], rank: int, global_batch: int) -> None:
    original = Accumulator.forward

    def forward(self: Accumulator, batch: Any, *args: Any, **named: Any) -> Any:
        output = original(self, batch, *args, **named)
        window = int(batch["slot"][0]) // global_batch
        for fault in faults:
            kind, where, first, last, times = fault
            if where == rank and first <= window <= last and times > 0:
                fault[-1] -= 1
                if kind == "loss":
                    output = output._replace(loss=output.loss * float("inf"))
                elif kind == "gradient":
                    output = output._replace(loss=_InfiniteGradient.apply(output.loss))
                elif kind == "memory":
                    copy = next(self._engine.objective.vision.parameters()).data.view(-1)
                    copy.view(torch.int32)[0] ^= 1
                else:
                    time.sleep(600)
        return output

    Accumulator.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    recipe = load_train_recipe(sys.argv[2], sys.argv[3:])
    poison(json.loads(sys.argv[1]), World.from_env().rank, recipe.data.global_batch)
    sys.exit(cli.main(["train", *sys.argv[2:]]))
