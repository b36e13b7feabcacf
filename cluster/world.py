"""Which process am I: rank and world size, as the launcher wrote them into the environment."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """One process: `rank` in [0, size) over all nodes, `local_rank` in [0, local_size) on its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_env(cls) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. None of them set means a single process.

        Raises ConfigError when only some are set, one is not a whole number, or they contradict each other.
        """
        given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not given:
            return cls(rank=0, size=1, local_rank=0, local_size=1)
        missing = [name for name in _VARIABLES if name not in given]
        if missing:
            raise ConfigError(
                f"environment: {', '.join(given)} set without {', '.join(missing)}; "
                "set all four as torchrun does, or unset them"
            )
        try:
            rank, size, local_rank, local_size = (int(given[name]) for name in _VARIABLES)
        except ValueError:
            raise ConfigError(f"environment: {_shown(given)}: not whole numbers; set or unset them") from None
        if not (0 <= local_rank < local_size <= size and local_rank <= rank < size):
            raise ConfigError(
                f"environment: {_shown(given)}: a rank must be below its world size and a local value within "
                "the global one; set or unset them"
            )
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def process_clocks() -> dict[str, str | float | None]:
    """How a process tells when it began: `process_seconds` since its start, its `monotonic` clock now, and
    `boot`, the boot of the host in which that clock runs (None where the system does not name it)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "process_seconds": max(0.0, time.time() - psutil.Process().create_time()),
        "monotonic": time.monotonic(),
        "boot": boot.read_text().strip() if boot.exists() else None,
    }


def _shown(given: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())
