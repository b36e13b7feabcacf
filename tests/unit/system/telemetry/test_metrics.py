"""The registry is what the page says, and its names are ones that Prometheus takes."""

import re

from system.monitoring.page import filled
from system.telemetry.metrics import METRICS
from tests.support.paths import ROOT


def test_the_page_has_the_registrys_tables():
    page = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert page.count("<!-- table") == 2
    assert filled(page) == page, "run python -m system.monitoring.page docs/metrics.md"


def test_names_are_unique_and_valid():
    keys = [(metric.exported, metric.label) for metric in METRICS]
    assert len(set(keys)) == len(keys)
    assert [name for name, _ in keys if not re.fullmatch(r"maskclip_[a-z][a-z0-9_]*", name)] == []


def test_names_end_with_their_unit():
    units = {"s": "seconds", "bytes": "bytes"}
    wrong = [m.name for m in METRICS if m.unit in units and not m.name.endswith(units[m.unit])]
    assert wrong == []


def test_one_name_is_one_kind_of_metric():
    kinds = {metric.exported: metric.kind for metric in METRICS}
    assert [metric.name for metric in METRICS if kinds[metric.exported] != metric.kind] == []
