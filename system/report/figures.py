"""The curves of a report as inline SVG that follows the colours of the page, light or dark.

matplotlib draws with placeholder colours; afterwards each one becomes a CSS variable, which the template
defines for both colour schemes. Ids are made unique per figure, since all figures stand in one document.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from cluster.goodput import CLASSES
from system.report.history import History

# Attempts beyond the last colour start again with the first.
NUM_ATTEMPT_COLOURS = 6
MAX_POINTS = 600

_INK, _LINE, _KILL, _RESUME, _COMMIT = "#010101", "#020202", "#030303", "#040404", "#050505"
ATTEMPTS = tuple(f"#0a0a{index:02x}" for index in range(NUM_ATTEMPT_COLOURS))
CLASS_COLOURS = tuple(f"#0b0b{index:02x}" for index in range(len(CLASSES)))
"""Of the classes of the goodput ledger, in their order."""
_VARIABLES = {
    _INK: "var(--muted)",
    _LINE: "var(--line)",
    _KILL: "var(--kill)",
    _RESUME: "var(--resume)",
    _COMMIT: "var(--commit)",
    **{colour: f"var(--attempt-{index})" for index, colour in enumerate(ATTEMPTS)},
    **{colour: f"var(--class-{name})" for colour, name in zip(CLASS_COLOURS, CLASSES, strict=True)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Panel:
    scalar: str
    title: str
    note: str
    """What a reader should know to judge the curve."""
    wide: bool = False


PANELS = (
    Panel("loss", "Loss", "weighted sum of the four terms", wide=True),
    Panel("image_text", "Contrast, image to text", "ln(batch) is chance"),
    Panel("text_image", "Contrast, text to image", "ln(batch) is chance"),
    Panel("distill", "Self-distillation", "cross-entropy, unweighted"),
    Panel("mlm", "Masked words", "cross-entropy, unweighted"),
    Panel("lr", "Learning rate", "as scheduled"),
    Panel("pairs_per_second", "Throughput", "pairs per second, all processes"),
    Panel("grad_norm", "Gradient norm", "before clipping"),
    Panel("logit_scale", "Logit scale", "held at 100 or below"),
    Panel("teacher_entropy", "Teacher entropy", "in nats; 0 is a collapse"),
    Panel("codeword_use", "Codeword use", "effective share of all codewords"),
)


EVALUATION_PANELS = (
    Panel("image_to_text_r5", "Image to text R@5", "chance dotted"),
    Panel("text_to_image_r5", "Text to image R@5", "share of the captions"),
    Panel("top1", "Zero-shot top-1", "share of the images"),
    Panel("knn_top1", "k-NN top-1", "share of the images"),
    Panel("linear_probe_top1", "Linear probe top-1", "share of the images"),
    Panel("masked_cosine", "Masked patches", "cosine of guess and target"),
    Panel("masked_agreement", "Masked codewords", "share of patches"),
    Panel("miou", "Segmentation", "mean IoU"),
)


@dataclass(frozen=True)
class Curve:
    panel: Panel
    svg: str
    last: str
    """The newest value, written out."""
    label: str
    """What the picture shows, in words, for who does not see it."""


def attempt_colour(number: int) -> int:
    """Index of the colour of an attempt (numbers start at 1)."""
    return (number - 1) % NUM_ATTEMPT_COLOURS


def curves(history: History) -> list[Curve]:
    """One curve per panel that the run has values for."""
    found = []
    for panel in PANELS:
        points = [(step, value) for step, value in history.series(panel.scalar) if math.isfinite(value)]
        if not points:
            continue
        (first_step, first), (last_step, last) = points[0], points[-1]
        label = f"{panel.title} by step: {first:.4g} at step {first_step}, {last:.4g} at step {last_step}"
        found.append(Curve(panel, svg(_draw(history, panel), panel.scalar), f"{last:.4g}", label))
    return found


def evaluation_curves(history: History) -> list[Curve]:
    """One curve per measure that was evaluated at two steps or more; a line for each tower and data set.

    Of several evaluations of one step the last counts.
    """
    found = []
    for panel in EVALUATION_PANELS:
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for mark in history.evaluations:  # oldest first
            if panel.scalar in mark.facts and math.isfinite(float(mark.facts[panel.scalar])):
                line = lines.setdefault((mark.facts["tower"], mark.facts["data"]), {})
                line[mark.step] = float(mark.facts[panel.scalar])
        lines = {key: dict(sorted(line.items())) for key, line in lines.items() if len(line) > 1}
        if not lines:
            continue
        chance = [m.facts["chance"]["r5"] for m in history.evaluations if "chance" in m.facts]
        dotted = chance[-1] if chance and panel.scalar == "image_to_text_r5" else None
        picture = svg(_draw_evaluations(lines, dotted), f"evaluation-{panel.scalar}")
        texts = [
            f"{tower} tower on {data}: {list(line.values())[-1]:.4g} at step {list(line)[-1]}"
            for (tower, data), line in lines.items()
        ]
        last = list(list(lines.values())[-1].values())[-1]
        found.append(Curve(panel, picture, f"{last:.4g}", f"{panel.title} by step, {'; '.join(texts)}"))
    return found


def _draw_evaluations(lines: dict[tuple[str, str], dict[int, float]], dotted: float | None) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines.values()):
            colour = ATTEMPTS[number % NUM_ATTEMPT_COLOURS]
            axes.plot(list(line), list(line.values()), color=colour, marker="o", markersize=3)
        if dotted is not None:
            axes.axhline(dotted, color=_INK, linestyle=":", linewidth=1)
        axes_of(axes, wide=False)
        return figure


def thin(points: Sequence[tuple[int, float]], limit: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most about `limit` points that keep the lowest and highest of every stretch, so no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _draw(history: History, panel: Panel) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6 if panel.wide else 3.7, 2.3), layout="constrained")
        axes = figure.add_subplot()
        _marks(axes, history)
        own = defaultdict(list)
        for record in history.steps:
            if math.isfinite(float(record.values.get(panel.scalar, math.nan))):
                own[record.attempt].append(record)
        for attempt in history.attempts:
            records = own[attempt.number]
            live = [(r.step, float(r.values[panel.scalar])) for r in records if r.live]
            lost = [(r.step, float(r.values[panel.scalar])) for r in records if not r.live]
            colour = ATTEMPTS[attempt_colour(attempt.number)]
            # The dashed line starts at the last live point, so that the two parts touch.
            _line(axes, live[-1:] + lost if lost else [], colour, linestyle=(0, (2, 1.6)), alpha=0.7)
            _line(axes, live, colour)
        axes_of(axes, panel.wide)
        return figure


def axes_of(axes: Axes, wide: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(length=0)
    axes.margins(x=0.02, y=0.12)


def _line(axes: Axes, points: list[tuple[int, float]], colour: str, **style: Any) -> None:
    if points:
        steps, values = zip(*thin(points), strict=True)
        axes.plot(steps, values, color=colour, marker="o" if len(points) == 1 else "", markersize=3, **style)


def _marks(axes: Axes, history: History) -> None:
    bottom = axes.get_xaxis_transform()
    commits = sorted({mark.step for mark in history.checkpoints})
    axes.plot(
        commits,
        [0.0] * len(commits),
        "^",
        color=_COMMIT,
        markersize=5,
        transform=bottom,
        clip_on=False,
        zorder=3,
    )
    for attempt, after in zip(history.attempts, history.attempts[1:], strict=False):
        if attempt.last_step is None:
            continue
        if attempt.killed:
            axes.axvline(attempt.last_step, color=_KILL, linewidth=1.1, linestyle=(0, (4, 2)))
        if after.first_step is not None:
            axes.axvline(after.first_step, color=_RESUME, linewidth=1.1)
            if after.first_step < attempt.last_step:
                axes.axvspan(after.first_step, attempt.last_step, color=_KILL, alpha=0.12, linewidth=0)


def svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG; `name` makes its ids unique in the document."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    # The page sets the size and the font; the viewBox keeps the proportions.
    text = re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
