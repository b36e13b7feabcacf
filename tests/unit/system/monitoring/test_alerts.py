"""Every alert fires when it should and is silent again afterwards, as Prometheus' own rule tests see it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from system.monitoring.alerts import ALERTS
from system.monitoring.render import render

PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of the Debian package prometheus"
)

RUN = '{run="night"}'
OTHER = '{run="day"}'

# Alert -> series, one value a minute; a minute at which it fires; one at which it is over.
CASES: dict[str, tuple[dict[str, str], int, int]] = {
    "MaskclipTrainerDown": ({'up{job="maskclip",run="night"}': "1x9 0x19 1x60"}, 20, 40),
    "MaskclipNoProgress": (
        {
            f"maskclip_step_timestamp_seconds{RUN}": "0+60x10 600x30 2460+60x60",
            f"maskclip_steps_left{RUN}": "9x200",
        },
        30,
        50,
    ),
    "MaskclipGoodputLow": (
        {f'maskclip_time_seconds_total{{class="productive",{RUN[1:]}': "0+57x30 1710+20x90 3510+57x120"},
        110,
        200,
    ),
    "MaskclipCheckpointTooOld": ({f"maskclip_durable_age_seconds{RUN}": "60x9 7300x20 60x60"}, 25, 40),
    "MaskclipCheckpointFailed": ({f"maskclip_checkpoint_failures_total{RUN}": "0x9 1x90"}, 15, 60),
    "MaskclipStepsRefused": ({f"maskclip_steps_refused_total{RUN}": "0x9 10x60"}, 12, 40),
    "MaskclipCodewordCollapse": (
        {f"maskclip_codeword_use{RUN}": "0.5x9 0.001x30 0.5x60", f"maskclip_step{RUN}": "2000+100x100"},
        30,
        60,
    ),
    "MaskclipLoaderBound": (
        {
            f'maskclip_time_seconds_total{{class="productive",{RUN[1:]}': "0+40x200",
            f'maskclip_time_seconds_total{{class="data_wait",{RUN[1:]}': "0+20x60 1200x140",
        },
        50,
        100,
    ),
    "MaskclipStoreErrors": ({f"maskclip_store_errors_total{RUN}": "0x9 8x60"}, 12, 40),
    "MaskclipSlowRank": ({f"maskclip_rank_skew{RUN}": "1.1x9 1.6x30 1.1x60"}, 35, 60),
    "MaskclipRestartStorm": ({f"maskclip_attempt{RUN}": "1x9 2 3 4 5 6x150"}, 20, 100),
    "MaskclipDiskFull": ({f"maskclip_disk_free_ratio{RUN}": "0.5x9 0.05x30 0.5x60"}, 30, 60),
    "MaskclipTelemetryDropped": ({f"maskclip_telemetry_dropped_total{RUN}": "0x9 5x60"}, 12, 40),
}


def test_there_is_a_case_for_every_alert():
    assert set(CASES) == {alert.name for alert in ALERTS}


@PROMTOOL
def test_every_alert_fires_and_clears(tmp_path: Path):
    rules = tmp_path / "maskclip.rules.yml"
    render("prometheus", tmp_path)
    cases = {"rule_files": [str(rules)], "evaluation_interval": "1m"}
    tests = [case(name, *CASES[name]) for name in CASES]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({**cases, "tests": tests}))
    done = promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@PROMTOOL
def test_healthy_runs_are_left_alone(tmp_path: Path):
    """A run that ended well, one that is warming up, and refusals of fp16's first steps."""
    render("prometheus", tmp_path)
    series = {
        f"maskclip_step_timestamp_seconds{RUN}": "600x120",
        f"maskclip_steps_left{RUN}": "0x120",  # it is done
        f"maskclip_codeword_use{OTHER}": "0.001x120",
        f"maskclip_step{OTHER}": "0+5x120",
        f"maskclip_steps_refused_total{OTHER}": "0 2 4x120",
        f"maskclip_attempt{OTHER}": "1x50 2x70",
    }
    quiet = {"input_series": series_of(series), "interval": "1m", "alert_rule_test": []}
    quiet["alert_rule_test"] = [expected(alert.name, at, []) for alert in ALERTS for at in (20, 60, 100)]
    whole = {
        "rule_files": [str(tmp_path / "maskclip.rules.yml")],
        "evaluation_interval": "1m",
        "tests": [quiet],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(whole))
    done = promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@PROMTOOL
def test_the_files_are_what_prometheus_and_alertmanager_read(tmp_path: Path):
    render("prometheus", tmp_path)
    assert promtool("check", "config", tmp_path / "prometheus.yml").returncode == 0
    if shutil.which("amtool"):
        argv = ["amtool", "check-config", str(tmp_path / "alertmanager.yml")]
        assert subprocess.run(argv, capture_output=True).returncode == 0


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60)


def case(name: str, series: dict[str, str], fires: int, clears: int) -> dict[str, Any]:
    alert = next(alert for alert in ALERTS if alert.name == name)
    labels = {"severity": alert.severity, "run": "night"} | (
        {"job": "maskclip"} if "TrainerDown" in name else {}
    )
    firing = [
        {
            "exp_labels": labels,
            "exp_annotations": {"summary": f"night: {alert.summary}", "look": alert.look},
        }
    ]
    wanted = [expected(name, 5, []), expected(name, fires, firing), expected(name, clears, [])]
    return {"input_series": series_of(series), "interval": "1m", "alert_rule_test": wanted}


def series_of(series: dict[str, str]) -> list[dict[str, str]]:
    """Values one a minute: ``1x3`` stands for four of them, as promtool has it."""
    return [{"series": name, "values": values} for name, values in series.items()]


def expected(name: str, minute: int, alerts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": alerts}
