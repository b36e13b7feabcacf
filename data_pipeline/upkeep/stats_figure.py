"""The histograms of a data set as one picture, on a light ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from data_pipeline.upkeep.histogram import Histogram

_BAR, _DROPPED, _MEDIAN, _INK, _LINE = "#3b6fb6", "#b5573c", "#1d1d1f", "#3a3a3c", "#d9d9de"
_BEYOND = "#a9c1e2"
_BINS = 48
_SHARE_SHOWN = 0.995
_MOST_REASONS = 12
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}
# name of the histogram, title, unit of the axis, what one unit of the axis is in values
_PANELS = (
    ("width", "Width", "pixels", 1),
    ("height", "Height", "pixels", 1),
    ("short_side", "Short side", "pixels", 1),
    ("aspect", "Aspect", "width / height", 1000),
    ("image_bytes", "Size of an image", "kB", 1000),
    ("caption_length", "Caption length", "characters", 1),
    ("caption_words", "Caption length", "words", 1),
    ("samples_per_shard", "Samples in a shard", "samples", 1),
)


def draw(stats: dict[str, Any], histograms: dict[str, Histogram], path: Path) -> None:
    """Write the picture of what `dataset_stats` found as a PNG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 9.2), layout="constrained")
        axes = figure.subplots(3, 3).ravel()
        for (name, title, unit, scale), panel in zip(_PANELS, axes, strict=False):
            _histogram(panel, histograms[name], title, unit, scale)
            panel.set_ylabel("shards" if name == "samples_per_shard" else "samples")
        _reasons(axes[-1], stats["dropped"], stats["rows_in"])
        removed = f", {stats['removed']:,} removed" if stats["removed"] else ""
        figure.suptitle(
            f"{stats['samples']:,} samples of {stats['rows_in']:,} rows in {stats['shards']:,} shards"
            f" ({stats['bytes'] / 1e9:,.3g} GB){removed}   manifest {stats['digest'][:12]}",
            x=0.01,
            ha="left",
            fontsize=11,
        )
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _histogram(axes: Axes, histogram: Histogram, title: str, unit: str, scale: int) -> None:
    """Bars up to where 99.5 % of the values are; the last bar holds all beyond."""
    low, high = histogram.quantile(0.0), histogram.quantile(_SHARE_SHOWN)
    # Whole numbers in bars of equal whole width, so that no bar is higher for holding one value more.
    step = max(1, -(-(high - low + 1) // _BINS))
    edges = np.arange(low, high + step + 1, step)
    starts, counts = np.array(histogram.bins()).T
    heights, _ = np.histogram(np.minimum(starts, edges[-1] - 1), edges, weights=counts)
    bars = axes.bar(edges[:-1] / scale, heights, step / scale * 0.92, align="edge", color=_BAR)
    median, most = histogram.quantile(0.5), histogram.quantile(1.0)
    axes.axvline(median / scale, color=_MEDIAN, linewidth=1, linestyle=(0, (4, 2)))
    beyond = ""
    if most >= edges[-1]:
        bars.patches[-1].set_facecolor(_BEYOND)
        beyond = f"; last bar: all up to {most / scale:,.5g}"
    axes.set_title(f"{title}\n", pad=2)
    axes.text(0, 1.02, f"median {median / scale:,.4g}{beyond}", transform=axes.transAxes, fontsize=8.5)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=scale == 1, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(length=0)


def _reasons(axes: Axes, dropped: dict[str, int], rows_in: int) -> None:
    """One bar per reason, the most frequent on top."""
    total = sum(dropped.values())
    axes.set_title("Dropped rows\n", pad=2)
    share = total / rows_in if rows_in else 0.0
    axes.text(0, 1.02, f"{total:,} of {rows_in:,} ({share:.1%})", transform=axes.transAxes, fontsize=8.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    if not dropped:
        axes.set_yticks([])
        return
    ranked = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    shown = ranked[:_MOST_REASONS]
    if rest := sum(n for _, n in ranked[_MOST_REASONS:]):
        shown.append((f"{len(ranked) - _MOST_REASONS} others", rest))
    names, counts = zip(*reversed(shown), strict=True)
    bars = axes.barh(names, counts, 0.7, color=_DROPPED)
    axes.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=8.5)
    axes.margins(x=0.2)
