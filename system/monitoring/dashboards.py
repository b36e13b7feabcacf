"""Grafana dashboards, made from the registry of metrics."""

from collections.abc import Sequence
from typing import Any

from system.telemetry.metrics import GROUPS, Metric

Panel = dict[str, Any]

_UNITS = {"s": "s", "bytes": "bytes", "0..1": "percentunit"}
"""Ours to Grafana's; all others are plain numbers."""
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_OVERVIEW = (
    ("Steps left", "max by (run) (maskclip_steps_left)", "none"),
    ("Time left", "max by (run) (maskclip_left_seconds)", "s"),
    ("Goodput, 30 min", "maskclip:goodput:ratio_30m", "percentunit"),
    ("Waiting for data, 10 min", "maskclip:data_wait:ratio_10m", "percentunit"),
    ("Median step", "maskclip:step_time_seconds:p50_5m", "s"),
    ("99th percentile of the step", "maskclip:step_time_seconds:p99_5m", "s"),
    ("Age of the durable state", "max by (run) (maskclip_durable_age_seconds)", "s"),
    ("Attempt", "max by (run) (maskclip_attempt)", "none"),
    ("Alerts", 'count by (run) (ALERTS{alertname=~"Maskclip.*", alertstate="firing"})', "none"),
)


def dashboards() -> dict[str, dict[str, Any]]:
    """File name -> dashboard: one to glance at, one with every metric."""
    overview = [_panel(title, _of_run(expr), unit) for title, expr, unit in _OVERVIEW]
    detail: list[Panel] = []
    for group, metrics in GROUPS.items():
        detail.append({"type": "row", "title": group, "collapsed": False, "panels": []})
        unique = {metric.exported: metric for metric in metrics}
        detail += [_panel(*_curve(metric)) for metric in unique.values()]
    return {
        "maskclip-overview.json": _dashboard("maskclip-overview", "MaskCLIP: overview", overview),
        "maskclip-metrics.json": _dashboard("maskclip-metrics", "MaskCLIP: every metric", detail),
    }


def provisioning() -> dict[str, Any]:
    """Tells Grafana to load them from a folder of its machine."""
    options = {"path": "/var/lib/grafana/dashboards/maskclip"}
    return {"apiVersion": 1, "providers": [{"name": "maskclip", "type": "file", "options": options}]}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Every query of a dashboard, its variable filled in."""
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [target["expr"].replace("$run", ".*") for target in targets]


def _curve(metric: Metric) -> tuple[str, str, str]:
    name = f'{metric.exported}{{run=~"$run"}}'
    unit = _UNITS.get(metric.unit, "none")
    if metric.label is not None:
        return metric.name, f"sum by (run, {metric.label[0]}) (rate({name}[5m]))", "none"
    if metric.kind == "gauge":
        return metric.name, f"max by (run) ({name})", unit
    return f"{metric.name} per second", f"sum by (run) (rate({name}[5m]))", unit


def _of_run(expr: str) -> str:
    """Only the runs that are chosen at the top of the page."""
    return f'{expr} and on (run) maskclip_attempt{{run=~"$run"}}'


def _panel(title: str, expr: str, unit: str) -> Panel:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "targets": [{"refId": "A", "expr": expr, "datasource": _SOURCE}],
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
    }


def _dashboard(uid: str, title: str, panels: Sequence[Panel]) -> dict[str, Any]:
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(maskclip_attempt, run)", "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }
    return {
        "uid": uid,
        "title": title,
        "tags": ["maskclip"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, run]},
        "panels": _placed(panels),
    }


def _placed(panels: Sequence[Panel]) -> list[Panel]:
    """Left to right, row by row."""
    placed, x, y = [], 0, 0
    for number, panel in enumerate(panels, start=1):
        row = panel["type"] == "row"
        if x and (row or x + _WIDTH > _COLUMNS):
            x, y = 0, y + _HEIGHT
        size = {"h": 1, "w": _COLUMNS} if row else {"h": _HEIGHT, "w": _WIDTH}
        placed.append({"id": number, "gridPos": {"x": x, "y": y, **size}, **panel})
        x, y = (0, y + 1) if row else (x + _WIDTH, y)
    return placed
