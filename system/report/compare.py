"""Two runs side by side: their numbers, and their curves in one picture each."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from system.report.figures import ATTEMPTS, PANELS, STYLE, Curve, axes_of, svg, thin
from system.report.history import History
from system.report.story import key_numbers

NAMES = ("this run", "the other")


def rows(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name and both values of what either summary has: key numbers, then the scalars of the last steps."""
    numbers = [{n["name"]: n["value"] for n in key_numbers(facts)} for facts in (ours, theirs)]
    found = [
        (name, *(one.get(name, "–") for one in numbers)) for name in dict.fromkeys([*numbers[0], *numbers[1]])
    ]
    wanted = [panel.scalar for panel in PANELS if panel.scalar not in ("loss", "pairs_per_second")]
    for scalar in wanted:
        values = [facts["last"].get(scalar) for facts in (ours, theirs)]
        if any(value is not None for value in values):
            found.append((scalar, *("–" if value is None else f"{value:.4g}" for value in values)))
    return [(name, a, b) for name, a, b in found]


def table(ours: dict[str, Any], theirs: dict[str, Any]) -> Table:
    """The same for a terminal."""
    shown = Table("side by side", ours["name"], theirs["name"], box=None)
    for row in rows(ours, theirs):
        shown.add_row(*row)
    return shown


def curves(histories: Sequence[History]) -> list[Curve]:
    """One picture per panel that both runs have values for; the steps that count of each."""
    found = []
    for panel in PANELS:
        lines = [
            [(step, value) for step, value in history.series(panel.scalar) if isfinite(value)]
            for history in histories
        ]
        if not all(lines):
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(7.6 if panel.wide else 3.7, 2.3), layout="constrained")
            axes = figure.add_subplot()
            for points, colour in zip(lines, ATTEMPTS, strict=False):
                steps, values = zip(*thin(points), strict=True)
                axes.plot(steps, values, color=colour, marker="o" if len(points) == 1 else "")
            axes_of(axes, panel.wide)
        ends = [points[-1] for points in lines]
        texts = [
            f"{name} {value:.4g} at step {step}" for name, (step, value) in zip(NAMES, ends, strict=True)
        ]
        last = " / ".join(f"{value:.4g}" for _, value in ends)
        found.append(Curve(panel, svg(figure, f"compare-{panel.scalar}"), last, ", ".join(texts)))
    return found
