"""When checkpoints are saved, how, and which of them are kept."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: Literal["steps", "seconds", "auto"] = "steps"
    """What decides when a save is due: `every_steps`, `every_seconds`, or the time at which the expected loss
    is least (Young and Daly), from the run's own stalls and failures. One is also due at the end of the run
    and when it is asked to stop."""
    every_steps: int = 1000
    """Interval in applied steps (`interval: steps`)."""
    every_seconds: float = 1800.0
    """Interval in seconds (`interval: seconds`)."""
    mean_failure_hours: float = 24.0
    """What `interval: auto` expects between two failures before the run had any; counts as one failure."""
    background: bool = True
    """Write and upload while training goes on. False: every save is waited for, as in a test that counts
    them."""
    deadline_seconds: float = 1800.0
    """A save that is not committed so long after its snapshot has failed; training goes on."""
    verify: Literal["full", "size"] = "full"
    """How a new checkpoint is read back before older ones may go: every byte, or the sizes only."""
    keep_last: int = 0
    """Keep this many newest checkpoints; 0 keeps all. The settings below keep further ones."""
    keep_every_steps: int = 0
    """Also keep those whose step is a multiple of this; 0: none."""
    keep_best: str = ""
    """Also keep the one with the highest value of this number of the run's evaluations, for example
    image_to_text_r5 (the names of the `evaluation` event); empty: none."""
    local: str = ""
    """Folder on a disk of the node: each rank's file goes there first, and a restart on the same node reads
    it instead of the store; empty: none."""
    local_keep: int = 2
    """Newest checkpoints whose files stay in `local`."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError("every_steps is at least 1; raise checkpoint.every_steps")
        for name in ("every_seconds", "mean_failure_hours", "deadline_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is above 0; raise checkpoint.{name}")
        for name, least in (("keep_last", 0), ("keep_every_steps", 0), ("local_keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}; raise checkpoint.{name}")
        if not self.keep_last and (self.keep_every_steps or self.keep_best):
            raise ValueError(
                "keep_every_steps and keep_best say nothing while all are kept; set checkpoint.keep_last"
            )
