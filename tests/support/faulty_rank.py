"""One rank of `maskclip train` that kills itself: ``faulty_rank.py POINT STEP RANK recipe key=value...``.

POINT is `step` (SIGKILL right after STEP was applied) or `commit` (SIGKILL when the checkpoint of STEP is
about to be committed, with every rank's file already in the store). Without a fault the rank is the real
one, nothing is replaced.
"""

import os
import signal
import sys
from typing import Any

from cluster.world import World
from system import checkpointer, cli
from system.trainer import Trainer


def kill_after_step(step: int, rank: int) -> None:
    original = Trainer.step

    def stepped(self: Trainer, *args: Any) -> Any:
        result = original(self, *args)
        if self.steps_done == step and World.from_env().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer.step = stepped  # type: ignore[method-assign]


def kill_at_commit(step: int) -> None:
    original = checkpointer.commit

    def committed(store: Any, manifest: Any) -> bool:
        if manifest.meta["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(store, manifest)

    checkpointer.commit = committed  # type: ignore[attr-defined]


if __name__ == "__main__":
    point, at_step, at_rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if point == "commit":
        kill_at_commit(at_step)
    else:
        kill_after_step(at_step, at_rank)
    sys.exit(cli.main(["train", *sys.argv[4:]]))
