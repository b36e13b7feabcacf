"""The results of evaluations for people and for the event log: headline numbers, tables, pictures.

Knows the shape of a result (docs/evaluation.md) and nothing of how it was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table

DIRECTIONS = ("image_to_text", "text_to_image")
CUTOFFS = ("r1", "r5", "r10")
TOPS = ("top1", "top5", "mean_per_class")
CLASSIFIERS = {"zero_shot": "zero-shot", "knn": "k-NN", "linear_probe": "linear probe"}


@dataclass(frozen=True)
class Score:
    """One measured number, all shares from 0 to 1 but for cosines."""

    task: str
    measure: str
    value: float
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval."""
    chance: float | None = None

    @property
    def label(self) -> str:
        """The measure as papers write it: R@5 for r5."""
        return f"R@{self.measure[1:]}" if self.measure in CUTOFFS else self.measure

    @property
    def kind(self) -> str:
        """The task without the number of its classes."""
        return self.task.partition(",")[0]

    @property
    def shown(self) -> str:
        return self._text(self.value)

    @property
    def shown_interval(self) -> str:
        if self.interval is None:
            return ""
        return f"{self._text(self.interval[0]).removesuffix(' %')} - {self._text(self.interval[1])}"

    @property
    def shown_chance(self) -> str:
        return "" if self.chance is None else self._text(self.chance)

    @property
    def shown_ratio(self) -> str:
        """How many times chance; of a cosine it would say nothing."""
        if self.chance is None or self.chance <= 0 or self.measure == "cosine":
            return ""
        return f"{self.value / self.chance:.1f}x"

    def _text(self, value: float) -> str:
        return f"{value:.3f}" if self.measure == "cosine" else f"{100 * value:.2f} %"


def scores(result: dict[str, Any]) -> list[Score]:
    """Every number of a result that has its place in a table."""
    found: list[Score] = []
    retrieval = result.get("retrieval")
    if retrieval:
        for name in DIRECTIONS:
            part = {**retrieval[name], "interval": retrieval.get("interval", {}).get(name, {})}
            part["chance"] = retrieval["chance"][name]
            found += _scores(name.replace("_", " "), part, CUTOFFS)
    for task, name in CLASSIFIERS.items():
        if task in result:
            found += _scores(f"{name}, {result[task]['classes']:,} classes", result[task], TOPS)
    if "masked" in result:
        found += _scores(f"masked {result['masked']['target']}", result["masked"], ("cosine", "agreement"))
    if "segmentation" in result:
        part = result["segmentation"]
        name = f"segmentation, {part['classes']:,} classes"
        found += _scores(name, part, ("miou", "pixel_accuracy", "mean_image_accuracy"))
    return found


def _scores(task: str, part: dict[str, Any], measures: Sequence[str]) -> list[Score]:
    intervals, chance = part.get("interval", {}), part.get("chance", {})
    return [
        Score(
            task,
            measure.removeprefix("mean_").replace("_", " "),
            part[measure],
            tuple(intervals[measure]) if measure in intervals else None,
            chance.get(measure),
        )
        for measure in measures
        if measure in part
    ]


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """What the `evaluation` event says: step, tower, data and the main number of each task."""
    facts: dict[str, Any] = {
        "step": result["step"],
        "tower": result["tower"],
        "data": result["data"]["uri"],
        "seconds": result["seconds"],
    }
    retrieval = result.get("retrieval")
    if retrieval:
        facts["chance"] = retrieval["chance"]["image_to_text"]
        facts |= {
            f"{name}_{cutoff}": retrieval[name][cutoff] for name in DIRECTIONS for cutoff in ("r1", "r5")
        }
    for task, prefix in (("zero_shot", ""), ("knn", "knn_"), ("linear_probe", "linear_probe_")):
        if task in result:
            facts[f"{prefix}top1"] = result[task]["top1"]
    for measure in ("cosine", "agreement"):
        if measure in result.get("masked", {}):
            facts[f"masked_{measure}"] = result["masked"][measure]
    if "segmentation" in result:
        facts["miou"] = result["segmentation"]["miou"]
    return facts


def render(result: dict[str, Any]) -> RenderableType:
    """One result as a table for the terminal."""
    data = result["data"]
    title = f"step {result['step']}, {result['tower']} tower, {data['samples']} images of {data['uri']}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("task", "measure", "result", "95 % interval", "chance", "x chance"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for score in scores(result):
        shown = (score.shown, score.shown_interval, score.shown_chance, score.shown_ratio)
        table.add_row(score.task, score.label, *shown)
    return table


def render_several(results: Sequence[dict[str, Any]]) -> RenderableType:
    """Results of several checkpoints: a row for each, a column for each number."""
    first = results[0]
    title = f"{first['tower']} tower, {first['data']['samples']} images of {first['data']['uri']}, in %"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("step", justify="right")
    for score in scores(first):
        table.add_column(f"{score.kind.replace('-', ' ')}\n{score.label}", justify="right", overflow="fold")
    for result in results:
        table.add_row(f"{result['step']:,}", *(score.shown.removesuffix(" %") for score in scores(result)))
    return table
