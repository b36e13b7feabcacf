"""What a run has measured of itself, as the costs that the simulator asks for."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

from cluster.errors import ConfigError
from cluster.goodput import Ledger
from cluster.simulate import Costs


def measured_costs(events: Iterable[dict[str, Any]], ledger: Ledger) -> Costs:
    """Means over the whole run.

    Raises:
        ConfigError: it has no step, no committed checkpoint or no restart yet.
    """
    first = [event for event in events if event.get("rank") == 0]
    steps = [event["step_seconds"] for event in first if event["name"] == "step"]
    saves = [event["seconds"] for event in first if event["name"] == "checkpoint_committed"]
    # The stall of a save in training; that of the last one waits for the commit.
    stalls = [event["stall_seconds"] for event in first if event["name"] == "checkpoint_committed"]
    restores = [event["seconds"] for event in first if event["name"] == "checkpoint_restored"]
    again = [found for found in ledger.recoveries if found.attempt > 1]
    for what, found in (("step", steps), ("committed checkpoint", saves), ("restart", restores and again)):
        if not found:
            raise ConfigError(f"the run has no {what} to measure; take another run, or give all costs")
    seconds = ledger.seconds
    waited = seconds["data_wait"] + seconds["idle"]
    return Costs(
        step_seconds=mean(steps),
        waiting_seconds=waited / len(steps),
        stall_seconds=mean(stalls),
        save_seconds=mean(saves),
        restart_seconds=mean(found.down + found.launch + found.build for found in again),
        restore_seconds=mean(restores),
    )
