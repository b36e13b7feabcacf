"""Goodput of a run at sizes that nobody here has, simulated: over checkpoint interval and number of GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field
from rich.table import Table

from cluster.errors import ConfigError, ObjectNotFound
from cluster.events import read_events
from cluster.goodput import build_ledger
from cluster.simulate import Costs, poisson, simulate
from cluster.store import open_store
from system.report.costs import measured_costs

_Seconds = Annotated[float, Field(ge=0, lt=1e9)]


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Costs that are not given are those of the run; without a run all of them are given."""

    step_seconds: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    """A step, forward to teacher update."""
    waiting_seconds: _Seconds | None = None
    """Beside each step: data wait and the loop's own time."""
    stall_seconds: _Seconds | None = None
    """A save holds training up."""
    save_seconds: _Seconds | None = None
    """From its snapshot to its commit."""
    restart_seconds: _Seconds | None = None
    """From a failure to the begin of the restore."""
    restore_seconds: _Seconds | None = None
    """Reading the checkpoint."""
    mean_failure_hours: Annotated[float, Field(gt=0, lt=1e9)] = 7.9
    """Between two failures of a job of `failure_gpus`; it falls with the number of GPUs."""
    failure_gpus: Annotated[int, Field(ge=1)] = 1024
    """See there."""
    gpus: tuple[Annotated[int, Field(ge=1)], ...] = (1024, 2048, 4096, 8192, 16384)
    """Sizes to look at."""
    intervals: tuple[Annotated[float, Field(gt=0)], ...] = (15, 30, 60, 120, 240, 480, 960, 1920, 3840)
    """Seconds between two saves to look at."""
    days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    """Productive time of the run."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5
    """Runs with other failures, of which the mean is shown."""
    output: str = ""
    """PNG of the curves; empty: none."""


def run_simulation(run: str | None, config: SimulateConfig) -> dict[str, Any]:
    """
    Raises:
        ConfigError: a cost is neither given nor measured, failures come faster than restarts, or `output`
            cannot be written.
        ObjectNotFound: there is no such run.
    """
    costs = _costs(run, config)
    steps = math.ceil(config.days * 86_400 / costs.step_seconds)
    rows = []
    for gpus in config.gpus:
        between = 3600 * config.mean_failure_hours * config.failure_gpus / gpus
        curve = {seconds: _goodput(costs, seconds, steps, between, config) for seconds in config.intervals}
        # Young's interval, and not shorter than a save.
        best = max(math.sqrt(2 * max(costs.stall_seconds, 1e-3) * between), costs.save_seconds)
        rows.append(
            {
                "gpus": gpus,
                "mean_failure_hours": between / 3600,
                "interval_seconds": best,
                "goodput": _goodput(costs, best, steps, between, config),
                "by_interval": curve,
            }
        )
    found = {"simulated": True, "run": run, "costs": costs.__dict__, "days": config.days, "sizes": rows}
    if config.output:
        _draw(found, Path(config.output))
        found["written"] = config.output
    return found


def _costs(run: str | None, config: SimulateConfig) -> Costs:
    given = {
        name: value for name in Costs.__dataclass_fields__ if (value := getattr(config, name)) is not None
    }
    if run is not None:
        events = read_events(open_store(run))
        if not events:
            raise ObjectNotFound(f"{run}: there is no run here (no events); check the path of the run")
        return replace(measured_costs(events, build_ledger(events)), **given)
    missing = [name for name in Costs.__dataclass_fields__ if name not in given and name != "waiting_seconds"]
    if missing:
        raise ConfigError(
            f"not known without a run: {', '.join(missing)}; give a run that measured them, or them"
        )
    return Costs(**given)


def _goodput(costs: Costs, interval: float, steps: int, between: float, config: SimulateConfig) -> float:
    try:
        return mean(
            simulate(costs, interval, steps, poisson(between, seed)).goodput for seed in range(config.repeats)
        )
    except ValueError as error:
        raise ConfigError(
            f"a failure every {between:.0f} s: {error}; raise mean_failure_hours or lower restart_seconds"
        ) from None


def table(found: dict[str, Any]) -> Table:
    """For a terminal."""
    rows = Table(
        "GPUs",
        "a failure every",
        "saves every",
        "goodput",
        title="simulated, not measured",
        title_justify="left",
    )
    for row in found["sizes"]:
        rows.add_row(
            f"{row['gpus']:,}",
            f"{row['mean_failure_hours']:.2f} h",
            f"{row['interval_seconds']:.0f} s",
            f"{row['goodput']:.2%}",
        )
    return rows


def _draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row in found["sizes"]:
        label = f"{row['gpus']:,} GPUs, a failure every {row['mean_failure_hours']:.1f} h"
        (line,) = axes.plot(list(row["by_interval"]), list(row["by_interval"].values()), label=label)
        axes.plot([row["interval_seconds"]], [row["goodput"]], "o", color=line.get_color())
    costs = found["costs"]
    axes.set_xscale("log")
    axes.set_xlabel("seconds between saves (dots: Young's interval)")
    axes.set_ylabel("goodput")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(
        f"Simulated: step {costs['step_seconds']:.2g} s, stall {costs['stall_seconds']:.2g} s, save "
        f"{costs['save_seconds']:.2g} s, restart {costs['restart_seconds']:.2g} s, restore "
        f"{costs['restore_seconds']:.2g} s",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written ({error}); change output") from None
