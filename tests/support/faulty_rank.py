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
from cluster.store_s3 import S3Store
from cluster.world import World
from system import cli
from system.checkpoints import save as checkpoint_save
from system.checkpoints.checkpoint import step_folder
from system.checkpoints.checkpointer import Checkpointer
from system.checkpoints.job_state import JobState
from system.checkpoints.restore import _Loading
from system.checkpoints.save import SaveJob
from system.checkpoints.snapshot import Snapshot
from system.engine.teacher_state import ShardedTeacher
from system.trainer import Trainer

_with_group = False


def die() -> None:
    if _with_group:
        os.killpg(os.getpgrp(), signal.SIGKILL)
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


def in_teacher(step: int, method: str) -> None:
    """In the update of the teacher that belongs to the step that leads to `step`."""
    coming, votes = [0], Checkpointer.votes

    def noted(checkpointer: Checkpointer, ahead: int) -> Any:
        coming[0] = ahead
        return votes(checkpointer, ahead)

    Checkpointer.votes = noted  # type: ignore[method-assign]
    patch(ShardedTeacher, method, lambda *_: coming[0] == step)


def in_prune(step: int, of_manifest: bool, after: bool) -> None:
    """Around the deletion of a file of the checkpoint of `step`."""
    for store_class in (LocalStore, S3Store):
        patch(
            store_class,
            "delete",
            lambda store, key: (key == MANIFEST) == of_manifest and of(step)(store),
            after=after,
        )


def of(step: int) -> Callable[..., bool]:
    """Whether a function is called on the checkpoint folder of `step`."""
    return lambda store, *_: store.uri.endswith(step_folder(step))


POINTS: dict[str, Callable[[int], None]] = {
    # student and optimizer are of STEP, the teacher is not, or not yet where it is computed with
    "before-teacher": lambda step: in_teacher(step, "update"),
    "in-teacher": lambda step: in_teacher(step, "refresh"),
    # right after STEP was applied
    "step": lambda step: patch(Trainer, "step", lambda t, *_: t.steps_done == step, after=True),
    "before-snapshot": lambda step: patch(Checkpointer, "begin", lambda _, s, *__: s == step),
    "after-snapshot": lambda step: patch(Checkpointer, "begin", lambda _, s, *__: s == step, after=True),
    "upload": in_upload,
    # the rank's file is in the store, its record is not
    "before-part": lambda step: patch(checkpoint_save, "put_part", of(step)),
    "after-part": lambda step: patch(checkpoint_save, "put_part", of(step), after=True),
    # every rank's file is in the store, the manifest is not
    "commit": lambda step: patch(checkpoint_save, "commit", of(step)),
    "after-commit": lambda step: patch(checkpoint_save, "commit", of(step), after=True),
    # the checkpoint of STEP is being deleted: it is whole, its manifest is gone, its first file is gone
    "before-prune": lambda step: in_prune(step, of_manifest=True, after=False),
    "prune": lambda step: in_prune(step, of_manifest=True, after=True),
    "in-prune": lambda step: in_prune(step, of_manifest=False, after=True),
    # the checkpoint of STEP is being read, is read, is in use
    "in-restore": lambda step: patch(_Loading, "_fetch", lambda loading, *_: loading._step == step),
    "restore": lambda step: patch(JobState, "filled", lambda _, s: s == step),
    "after-restore": lambda step: patch(JobState, "filled", lambda _, s: s == step, after=True),
}
FIRST_RANK_ONLY = {"commit", "after-commit", "before-prune", "prune", "in-prune"}
"""Points that no other rank passes."""


def arm(point: str, step: int, with_group: bool = False) -> None:
    """Have this process, or its whole process group, killed when it comes to the point."""
    global _with_group
    _with_group = with_group
    POINTS[point](step)


if __name__ == "__main__":
    point, at_step, at_rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if World.from_env().rank == at_rank:
        arm(point, at_step)
    sys.exit(cli.main(["train", *sys.argv[4:]]))
