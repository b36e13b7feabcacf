"""Where the numbers of a run go besides its event log."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from system.sinks.otel import OtelConfig
from system.sinks.prometheus import PrometheusConfig
from system.sinks.tensorboard import TensorBoardConfig
from system.sinks.wandb import WandbConfig


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """All of it optional, and nothing of it changes what is trained."""

    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of one device in the training precision, TFLOP/s, as its maker states it without sparsity (H100
    SXM in bf16: 989, A100: 312). Null: no `mfu`, since none is guessed."""
    norms_every: Annotated[int, Field(ge=0)] = 50
    """Norms by tower are measured in every so-manieth step; 0: never."""
    queue: Annotated[int, Field(ge=1)] = 10_000
    """Events that may wait for a slow sink; later ones are lost to it, and counted."""
    spool: str = ""
    """Folder on a disk of the node: events lie there until the store has them, over restarts too. Empty: they
    wait in memory, and a process that dies while the store is away takes them along."""
    spool_bytes: Annotated[int, Field(ge=1_000_000)] = 1_000_000_000
    """Size of the spool of one rank, at most; beyond it events wait in memory."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    otel: OtelConfig = field(default_factory=OtelConfig)
