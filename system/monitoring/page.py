"""The tables of docs/metrics.md, made from the registry and the alerts: ``python -m system.monitoring.page
docs/metrics.md`` writes them anew between their marks."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from system.monitoring.alerts import ALERTS
from system.telemetry.metrics import GROUPS, Metric


def filled(page: str) -> str:
    """The text of the page with every table as it should be.

    Raises:
        KeyError: it has a mark for a table that there is not.
    """
    tables = {"metrics": _metrics(), "alerts": _alerts()}

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n{match[4]}"

    return re.sub(r"(<!-- table (\w+) -->)\n(.*?)\n?(<!-- end -->)", fill, page, flags=re.DOTALL)


def _metrics() -> str:
    parts, head = [], ("name", "event", "unit", "meaning", "look twice when")
    for group, metrics in GROUPS.items():
        rows = [(f"`{_name(metric)}`", _source(metric), metric.unit, *_text(metric)) for metric in metrics]
        parts.append(f"### {group}\n\n{_table(head, rows)}")
    return "\n\n".join(parts)


def _name(metric: Metric) -> str:
    label = f'{{{metric.label[0]}="{metric.label[1]}"}}' if metric.label else ""
    return f"{metric.exported.removeprefix('maskclip_')}{label}"


def _source(metric: Metric) -> str:
    if metric.kind == "counter" and metric.field is None:
        return f"number of `{metric.event}`"
    return f"`{metric.event}`" + (f", `{metric.field}`" if metric.field else "")


def _text(metric: Metric) -> tuple[str, str]:
    return metric.meaning, metric.look


def _alerts() -> str:
    rows = [(f"`{a.name}`", a.severity, a.wait, a.summary, a.look) for a in ALERTS]
    return _table(("alert", "severity", "after", "means", "look at"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text("utf-8")), "utf-8")
