"""The dashboards are what Grafana's schema says, and ask only for metrics that there are."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from system.monitoring.alerts import ALERTS, RECORDINGS
from system.monitoring.dashboards import dashboards, expressions
from system.telemetry.metrics import METRICS

# What the Prometheus sink adds to the registry.
OWN = {"maskclip_step_time_seconds_bucket", "maskclip_step_timestamp_seconds"}


def queries() -> list[str]:
    shown = [expr for page in dashboards().values() for expr in expressions(page)]
    return shown + [rule.expr for rule in (*RECORDINGS, *ALERTS)]


def test_every_query_names_metrics_that_there_are():
    known = {metric.exported for metric in METRICS} | {rule.record for rule in RECORDINGS} | OWN
    named = {name for expr in queries() for name in re.findall(r"maskclip[_:][\w:]+", expr)}
    assert named - known == set()


def test_every_metric_has_a_panel():
    shown = " ".join(expr for expr in expressions(dashboards()["maskclip-metrics.json"]))
    assert [metric.exported for metric in METRICS if f"{metric.exported}{{" not in shown] == []


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of the Debian package prometheus"
)
def test_every_query_is_promql(tmp_path: Path):
    rules = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    argv = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_grafanas_own_types_keep_everything(name: str):
    """What its types do not know they drop, or refuse."""
    model = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    page = dashboards()[name]
    again = yaml.safe_load(encoder.JSONEncoder(sort_keys=True).encode(model.Dashboard.from_json(page)))
    assert missing(page, again) == []


def missing(given: Any, kept: Any, place: str = "") -> list[str]:
    """Places of `given` that are not in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [line for key in given for line in missing(given[key], kept.get(key), f"{place}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            line
            for n, (a, b) in enumerate(zip(given, kept, strict=True))
            for line in missing(a, b, f"{place}[{n}]")
        ]
    return [] if given == kept else [f"{place}: {given!r} became {kept!r}"]


def test_panels_do_not_overlap():
    for page in dashboards().values():
        taken: set[tuple[int, int]] = set()
        for panel in page["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert taken.isdisjoint(cells)
            assert at["x"] + at["w"] <= 24
            taken |= cells
