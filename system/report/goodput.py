"""The goodput ledger as numbers for programs, as a table for the terminal and as a stacked time line."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table
from rich.text import Text

from cluster.goodput import CLASSES, MEANING, Class, Ledger
from system.report.figures import CLASS_COLOURS, STYLE, svg

_BINS = 240
_BAR = 30
_UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def facts(ledger: Ledger) -> dict[str, Any]:
    """What `--json` prints: seconds by class, which sum to `wall_seconds`, and how each attempt came to its
    first step."""
    return {
        "wall_seconds": ledger.wall_seconds,
        "share": ledger.goodput,
        "seconds": ledger.seconds,
        "recoveries": [{**asdict(found), "seconds": found.seconds} for found in ledger.recoveries],
    }


def table(ledger: Ledger) -> Table:
    """Seconds and share of every class that has any."""
    rows = Table("where the time went", "time", "share", "", box=None)
    for name, seconds, share in shares(ledger):
        bar = "█" * round(_BAR * share)
        rows.add_row(
            name.replace("_", " "), f"{seconds:,.1f} s", f"{100 * share:.1f} %", Text(bar, style="dim")
        )
    return rows


def shares(ledger: Ledger) -> list[tuple[Class, float, float]]:
    """Class, seconds, share of the wall time; classes without a second are left out."""
    wall = ledger.wall_seconds
    return [(name, seconds, seconds / wall) for name, seconds in ledger.seconds.items() if seconds > 0]


def rows(ledger: Ledger) -> list[dict[str, Any]]:
    """For the page: the table with the meaning and the colour of each class."""
    return [
        {"name": n.replace("_", " "), "key": n, "seconds": s, "share": share, "meaning": MEANING[n]}
        for n, s, share in shares(ledger)
    ]


def recovery_table(ledger: Ledger) -> Table:
    """From the last sign of one attempt to the first step of the next, in seconds."""
    columns = ("down", "launch", "build", "restore", "first_batch", "first_step")
    rows = Table("attempt", *(name.replace("_", " ") for name in columns), "to its first step", box=None)
    for found in ledger.recoveries:
        values = (getattr(found, name) for name in columns)
        rows.add_row(str(found.attempt), *(f"{value:.1f} s" for value in values), f"{found.seconds:.1f} s")
    return rows


def binned(ledger: Ledger, bins: int) -> tuple[float, dict[Class, list[float]]]:
    """Width of a bin in seconds, and by class its share of each bin; the shares of a bin sum to 1."""
    width = ledger.wall_seconds / bins
    found: dict[Class, list[float]] = {name: [0.0] * bins for name in CLASSES}
    for stretch in ledger.stretches:
        first = min(bins - 1, int(stretch.start / width))
        last = min(bins - 1, int(stretch.end / width))
        for index in range(first, last + 1):
            inside = min(stretch.end, (index + 1) * width) - max(stretch.start, index * width)
            found[stretch.kind][index] += max(0.0, inside) / width
    return width, found


def time_line(ledger: Ledger) -> str:
    """Inline SVG: the share of every class over the time of the run. Empty while no time has passed."""
    if not ledger.wall_seconds:
        return ""
    width, found = binned(ledger, min(_BINS, max(1, len(ledger.stretches) * 4)))
    return svg(_draw(ledger.wall_seconds, width, {n: s for n, s in found.items() if any(s)}), "goodput")


def _draw(wall: float, width: float, found: Mapping[Class, list[float]]) -> Figure:
    unit, name = next((u, n) for u, n in _UNITS if wall >= 2 * u or u == 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 1.9), layout="constrained")
        axes = figure.add_subplot()
        edges = [index * width / unit for index in range(len(next(iter(found.values()))) + 1)]
        bottom = [0.0] * (len(edges) - 1)
        for kind, values in found.items():
            top = [low + value for low, value in zip(bottom, values, strict=True)]
            colour = CLASS_COLOURS[CLASSES.index(kind)]
            axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, linewidth=0)
            bottom = top
        axes.set_xlabel(name)
        axes.set_xlim(0, wall / unit)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{math.floor(100 * value + 0.5)} %"))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        return figure
