"""How a rank makes its batches; apart from `loader.py`, because configuration shall not wait for torch."""

import math
from dataclasses import dataclass

MOST_WORKERS = 1024


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a rank makes its batches; nothing here changes what is in them."""

    workers: int = 0
    """Processes per rank that make batches; 0 makes them in the training process itself."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""
    cache: str | None = None
    """Local folder for shards of a remote data set; the processes of a node may share it."""
    cache_bytes: int = 50_000_000_000
    """Size that the cache folder may reach, over all data sets of a mix."""
    lookahead: int = 64
    """Batches for which shards of a remote data set are copied in advance, or read by ranges."""
    transfers: int = 8
    """Shards of a remote data set that a process copies at once."""
    tombstone_seconds: float = 60.0
    """A sample that is taken out of its data set disappears from batches that are made so much later."""
    undecodable_share: float = 1e-4
    """An image that cannot be decoded, twice in a row, keeps its slot with weight 0 and is named in the event
    log; more than one and this share of all that a process shows end the run with exit code 65. 0: the first
    one does."""

    def __post_init__(self) -> None:
        if not 0 <= self.undecodable_share < 1:
            raise ValueError(
                f"{self.undecodable_share} is no share: set data.loader.undecodable_share from 0 to below 1"
            )
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers is {self.workers}: set data.loader.workers to 0 ... {MOST_WORKERS}")
        for name in ("prefetch", "cache_bytes", "lookahead", "transfers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set data.loader.{name} to 1 or more")
        if not 0 <= self.tombstone_seconds < math.inf:
            raise ValueError(
                f"{self.tombstone_seconds} is no time: set data.loader.tombstone_seconds to 0 or more"
            )
