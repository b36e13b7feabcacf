"""When checkpoints are saved, how, and which of them are kept."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[float, Field(gt=0, lt=1e9)]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: Literal["steps", "seconds", "auto"] = "steps"
    """What decides when a save is due: `every_steps`, `every_seconds`, or the time at which the expected loss
    is least (Young and Daly), from the run's own stalls and failures. One is also due at the end of the run
    and when it is asked to stop."""
    every_steps: Annotated[int, Field(ge=1)] = 1000
    """Interval in applied steps (`interval: steps`)."""
    every_seconds: Positive = 1800.0
    """Interval in seconds (`interval: seconds`)."""
    mean_failure_hours: Positive = 24.0
    """What `interval: auto` expects between two failures before the run had any; counts as one failure."""
    background: bool = True
    """Write and upload while training goes on. False: every save is waited for, as in a test that counts
    them."""
    deadline_seconds: Positive = 1800.0
    """A save that is not committed so long after its snapshot has failed; training goes on."""
    verify: Literal["full", "size"] = "full"
    """How a new checkpoint is read back before older ones may go: every byte, or the sizes only."""
    keep_last: Annotated[int, Field(ge=0)] = 0
    """Keep this many newest checkpoints; 0 keeps all. The settings below keep further ones."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Also keep those whose step is a multiple of this; 0: none."""
    keep_best: str = ""
    """Also keep the one with the highest value of this number of the run's evaluations, for example
    image_to_text_r5 (the names of the `evaluation` event); empty: none."""
    local: str = ""
    """Folder on a disk of the node: each rank's file goes there first, and a restart on the same node reads
    it instead of the store; empty: none."""
    local_keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints whose files stay in `local`."""

    def __post_init__(self) -> None:
        if not self.keep_last and (self.keep_every_steps or self.keep_best):
            raise ValueError(
                "keep_every_steps and keep_best say nothing while all are kept; set checkpoint.keep_last"
            )
