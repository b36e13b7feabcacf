"""One rank of `maskclip train` that kills itself: ``faulty_rank.py POINT STEP RANK recipe key=value...``.

POINT is where the SIGKILL comes, see `POINTS`. Without a fault the rank is the real one, nothing is replaced.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cluster.manifest import MANIFEST
from cluster.store_local import LocalStore
from cluster.world import World
from system import cli
from system.checkpoints import save as checkpoint_save
from system.checkpoints.checkpoint import step_folder
from system.checkpoints.checkpointer import Checkpointer
from system.checkpoints.job_state import JobState
from system.checkpoints.save import SaveJob
from system.checkpoints.snapshot import Snapshot
from system.trainer import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, here: Callable[..., bool], after: bool = False) -> None:
    """`owner.name` kills the process where `here`, which gets its arguments, says so."""
    original = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        if not after and here(*args):
            die()
        result = original(*args, **named)
        if after and here(*args):
            die()
        return result

    setattr(owner, name, patched)


def in_upload(step: int) -> None:
    """When the first piece of the file is written."""
    steps: dict[int, int] = {}
    write, pieces = SaveJob._write, Snapshot.pieces

    def noted(job: SaveJob) -> Any:
        steps[id(job.snapshot)] = job.step
        return write(job)

    def torn(snapshot: Snapshot, *args: Any) -> Any:
        for piece in pieces(snapshot, *args):
            yield piece
            if steps.get(id(snapshot)) == step:
                die()

    SaveJob._write, Snapshot.pieces = noted, torn  # type: ignore[method-assign]


def of(step: int) -> Callable[..., bool]:
    """Whether a function is called on the checkpoint folder of `step`."""
    return lambda store, *_: store.uri.endswith(step_folder(step))


POINTS: dict[str, Callable[[int], None]] = {
    # right after STEP was applied
    "step": lambda step: patch(Trainer, "step", lambda t, *_: t.steps_done == step, after=True),
    "before-snapshot": lambda step: patch(Checkpointer, "begin", lambda _, s, *__: s == step),
    "after-snapshot": lambda step: patch(Checkpointer, "begin", lambda _, s, *__: s == step, after=True),
    "upload": in_upload,
    "after-part": lambda step: patch(checkpoint_save, "put_part", of(step), after=True),
    # every rank's file is in the store, the manifest is not
    "commit": lambda step: patch(checkpoint_save, "commit", of(step)),
    "after-commit": lambda step: patch(checkpoint_save, "commit", of(step), after=True),
    # the checkpoint of STEP is being deleted: its manifest is gone, its files are there
    "prune": lambda step: patch(
        LocalStore, "delete", lambda store, key: key == MANIFEST and of(step)(store), after=True
    ),
    "restore": lambda step: patch(JobState, "filled", lambda _, s: s == step),
}


if __name__ == "__main__":
    point, at_step, at_rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if World.from_env().rank == at_rank:
        POINTS[point](at_step)
    sys.exit(cli.main(["train", *sys.argv[4:]]))
