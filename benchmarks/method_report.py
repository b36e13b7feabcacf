"""Tables and plot of the study of the method (`benchmarks/method_study.py`), from the ranks its runs left.

A score is the share of the queries whose right answer is among the first k. Its interval is a bootstrap over
both sources of chance: seeds are drawn with replacement, and queries with replacement, 2,000 times. A
difference is drawn with the same seeds and queries on both sides, which share their order of the data.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

NAMES = {
    "clip": "CLIP",
    "mlm": "+ MLM",
    "pixels": "+ pixels",
    "features": "+ features",
    "distill": "+ distillation",
    "maskclip": "+ both (MaskCLIP)",
}
BASE = "clip"
MEASURES = {"image to text R@5": ("image_to_text", 5), "text to image R@5": ("text_to_image", 5)}
MEASURES |= {"k-NN top-1": ("knn", 1)}
BUDGETS = ("equal samples", "equal compute")
_COLOURS = {"equal samples": "#4c72b0", "equal compute": "#dd8452"}
_RESAMPLES = 2000

Hits = np.ndarray
"""bool [S, Q]: which of the queries each seed's model answers right."""


def report(files: Sequence[Path], picture: Path) -> None:
    """Print a table for each set and budget, and draw the scores into `picture`."""
    results = [json.loads(file.read_text()) for file in files]
    cells = by_cell(results)
    for data, budget in dict.fromkeys((data, budget) for data, budget, _ in cells):
        runs = {name: cells[data, budget, name] for name in NAMES if (data, budget, name) in cells}
        _print(f"{data}, {budget}", runs)
    _draw(cells, picture)


def by_cell(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Runs by set, budget and variant, in the order of their seeds. The whole method's run is in both
    budgets; of another variant the shorter run is the one of equal samples."""
    steps: dict[tuple[str, str], set[int]] = defaultdict(set)
    for result in results:
        steps[result["data"], result["variant"]].add(result["steps"])
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda result: (result["data"], result["seed"])):
        data, variant = result["data"], result["variant"]
        shortest = result["steps"] == min(steps[data, variant])
        if shortest:
            cells[data, BUDGETS[0], variant].append(result)
        if variant == "maskclip" or not shortest:
            cells[data, BUDGETS[1], variant].append(result)
    return cells


def hits(runs: Sequence[dict[str, Any]], measure: str) -> Hits:
    task, k = MEASURES[measure]
    return np.array([run["ranks"][task] for run in runs]) < k


def resampled(hits_SQ: Hits, key: int) -> np.ndarray:
    """[R] scores of resampled seeds and queries; equal keys and shapes draw the same."""
    draw, (seeds, queries) = np.random.default_rng(key), hits_SQ.shape
    return np.array(
        [
            hits_SQ[draw.integers(seeds, size=seeds)]
            .mean(axis=0)[draw.integers(queries, size=queries)]
            .mean()
            for _ in range(_RESAMPLES)
        ]
    )


def interval(scores_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(scores_R, (0.025, 0.975))
    return float(low), float(high)


def _print(title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("variant", "seeds", "pairs", "TFLOP", *MEASURES, title=title)
    for name, some in runs.items():
        row = [NAMES[name], str(len(some)), f"{some[0]['pairs']:,}", f"{some[0]['gflop'] / 1e3:.2f}"]
        for measure in MEASURES:
            own = hits(some, measure)
            low, high = interval(resampled(own, 0))
            spread = own.mean(axis=1).std(ddof=1) if len(own) > 1 else float("nan")
            text = f"{100 * own.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}] sd {100 * spread:.1f}"
            base = hits(runs[BASE], measure) if name != BASE and BASE in runs else None
            if base is not None and base.shape == own.shape:
                low, high = interval(resampled(own, 0) - resampled(base, 0))
                change = 100 * (own.mean() - base.mean())
                text += f"\n  {change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            row.append(text)
        table.add_row(*row)
    Console(width=130).print(table)


def _draw(cells: dict[tuple[str, str, str], list[dict[str, Any]]], picture: Path) -> None:
    sets = list(dict.fromkeys(data for data, _, _ in cells))
    figure = Figure(figsize=(8.5, 2.7 * len(sets)), layout="constrained")
    grid = figure.subplots(len(sets), len(MEASURES), squeeze=False, sharey=True)
    for row, data in zip(grid, sets, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            _panel(axes, cells, data, measure)
    grid[0, 0].invert_yaxis()  # of all, which share it
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2, loc="outside lower right"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _panel(
    axes: Axes, cells: dict[tuple[str, str, str], list[dict[str, Any]]], data: str, measure: str
) -> None:
    """Mean and interval of every variant, and a small dot for each seed."""
    for shift, budget in zip((-0.15, 0.15), BUDGETS, strict=True):
        for place, name in enumerate(NAMES):
            runs = cells.get((data, budget, name))
            if not runs:
                continue
            own, y = hits(runs, measure), place + shift
            ends = [100 * end for end in interval(resampled(own, 0))]
            colour, label = _COLOURS[budget], budget if place == 0 else None
            axes.plot(ends, [y, y], color=colour, linewidth=1.4)
            axes.plot(100 * own.mean(), y, "o", color=colour, markersize=5, label=label)
            axes.plot(100 * own.mean(axis=1), [y] * len(own), "|", color=colour, markersize=5)
    queries, k = hits(cells[data, BUDGETS[0], BASE], measure).shape[1], MEASURES[measure][1]
    axes.axvline(100 * k / queries, color="#999999", linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(NAMES)), list(NAMES.values()), fontsize=7)
    axes.set_title(f"{data}: {measure}, %", fontsize=8)
    axes.tick_params(labelsize=7, length=0)
    axes.spines[["top", "right"]].set_visible(False)
