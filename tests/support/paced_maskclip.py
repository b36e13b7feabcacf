"""`maskclip` whose new runs train no further than `PACED_STEPS` steps until they are asked to stop: so that a
signal comes in the middle of a run, however fast the machine is. A run that goes on from a checkpoint is not
held up."""

import os
import sys
import time

from system import cli
from system.trainer import Trainer

_step = Trainer.step
_attempts = {"resumed": False}
_resume = Trainer.resume


def resume(trainer: Trainer, *args: object) -> int | None:
    step = _resume(trainer, *args)  # type: ignore[arg-type]
    _attempts["resumed"] = step is not None
    return step


def step(trainer: Trainer, *args: object) -> object:
    while (
        not _attempts["resumed"]
        and trainer.steps_done == int(os.environ["PACED_STEPS"])
        and trainer.stop.reason is None
    ):
        time.sleep(0.05)
    return _step(trainer, *args)  # type: ignore[arg-type]


if __name__ == "__main__":
    Trainer.resume, Trainer.step = resume, step  # type: ignore[method-assign, assignment]
    sys.exit(cli.main())
