"""Results of evaluations as a picture: bars for one checkpoint, curves for several."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.errors import ConfigError
from system.evaluation.view import scores

PICTURE, NUMBERS = "scores.png", "scores.json"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}
_CHANCE = "#c44e52"


def write_scores(results: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Write scores.png and scores.json (the results) into `folder`; their paths.

    Raises ConfigError when the folder cannot be written.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _bars(results[0]) if len(results) == 1 else _curves(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name in (PICTURE, NUMBERS):
            temporary = folder / f".{os.getpid()}.{name}"
            if name == PICTURE:
                figure.savefig(temporary, dpi=150)
            else:
                temporary.write_text(json.dumps(list(results), indent=1) + "\n", encoding="utf-8")
            temporary.replace(folder / name)
            written.append(str(folder / name))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); give another output") from None
    return written


def _bars(result: dict[str, Any]) -> Figure:
    found = scores(result)
    figure = Figure(figsize=(7.5, 1.0 + 0.32 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(found))
    axes.barh(places, [_percent(s.value) for s in found], color="#4c72b0", height=0.62)
    for place, score in zip(places, found, strict=True):
        if score.interval is not None:
            ends = [_percent(end) for end in score.interval]
            axes.plot(ends, [place, place], color="black", linewidth=1.2)
        if score.chance is not None:
            axes.plot([_percent(score.chance)] * 2, [place - 0.36, place + 0.36], color=_CHANCE)
    axes.set_yticks(places, [f"{s.task}: {s.label}" for s in found])
    axes.invert_yaxis()
    axes.set_xlabel("% (cosines times 100); black: 95 % interval, red: chance")
    axes.set_title(f"step {result['step']}, {result['tower']} tower", loc="left")
    return figure


def _curves(results: Sequence[dict[str, Any]]) -> Figure:
    """One panel per task, one line per measure, chance dashed."""
    tasks: dict[str, list[str]] = {}
    for score in scores(results[0]):
        tasks.setdefault(score.task, []).append(score.measure)
    figure = Figure(figsize=(4.2 * min(3, len(tasks)), 3.0 * -(-len(tasks) // 3)), layout="constrained")
    for number, (task, measures) in enumerate(tasks.items(), start=1):
        axes = figure.add_subplot(-(-len(tasks) // 3), min(3, len(tasks)), number)
        for measure in measures:
            _line(axes, results, task, measure)
        axes.set_title(task, loc="left")
        axes.set_xlabel("step (band: 95 % interval, dotted: chance)")
        axes.set_ylabel("%")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(frameon=False)
    return figure


def _line(axes: Axes, results: Sequence[dict[str, Any]], task: str, measure: str) -> None:
    points = [
        (result["step"], score)
        for result in results
        for score in scores(result)
        if (score.task, score.measure) == (task, measure)
    ]
    steps = [step for step, _ in points]
    values = [_percent(score.value) for _, score in points]
    (line,) = axes.plot(steps, values, marker="o", markersize=3, label=points[0][1].label)
    colour = line.get_color()
    if all(score.interval is not None for _, score in points):
        low, high = zip(*((s.interval[0], s.interval[1]) for _, s in points if s.interval), strict=True)
        axes.fill_between(steps, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15)
    if all(score.chance is not None for _, score in points):
        axes.plot(
            steps, [100 * (s.chance or 0.0) for _, s in points], color=colour, linestyle=":", linewidth=1
        )


def _percent(value: float) -> float:
    return 100 * value
