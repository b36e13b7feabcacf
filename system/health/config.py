"""What the health of a run is measured against."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """None of it is from the paper."""

    spike_window: Annotated[int, Field(ge=20, le=100_000)] = 200
    """Losses that a new one is compared with: their median and their median absolute deviation. Fewer than 20
    say nothing yet."""
    spike_deviations: Annotated[float, Field(gt=0)] = 10.0
    """A loss that lies so many deviations above the median is a spike (`loss_spike` event)."""
    on_spike: Literal["warn", "rollback"] = "warn"
    """rollback: the step is not applied; the attempt ends with exit code 76, and the next one goes on from
    the newest checkpoint without the slots of that step."""
    moment_ratio: Annotated[float, Field(gt=1)] = 2.3
    """Root mean square of gradient over Adam's second moment, from which on a spike is near (Wortsman et al.,
    2023: 1 to 8 steps ahead); `spike_ahead` event."""
    compare_every: Annotated[int, Field(ge=0)] = 1000
    """Every so many steps all ranks compare what must be equal on them; 0: never. A difference ends the
    attempt with exit code 77."""
    memory_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Every rank notes its memory this often."""
    memory_growth: Annotated[float, Field(gt=0)] = 0.25
    """Growth by this share is a `memory_growth` event."""
