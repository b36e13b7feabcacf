"""A real Prometheus sees a real run, and its end; sinks that fail leave a run alone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.events import read_events
from cluster.local_launch import free_port
from cluster.store import open_store
from system.monitoring.render import render
from system.telemetry.metrics import METRICS
from tests.support.runs import maskclip, write_recipe

PATIENCE_SECONDS = 120.0
# Only in other configurations, on other devices, or after what did not happen.
NOT_HERE = {"pairs", "loss_scale", "device_bytes"}


class Prometheus:
    """The real one, with our rules, at the pace of a test: only times are changed."""

    def __init__(self, folder: Path) -> None:
        render("prometheus", folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        del config["alerting"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = folder / "maskclip.rules.yml"
        rules.write_text(rules.read_text().replace("for: 2m", "for: 2s"))
        self._port = free_port()
        listen = f"--web.listen-address=127.0.0.1:{self._port}"
        argv = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/db",
            listen,
        ]
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)

    def ask(self, path: str, **query: str) -> Any:
        address = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:  # it is starting
            return {}

    def value(self, query: str) -> float:
        found = self.ask("query", query=query).get("result", [])
        return float(found[0]["value"][1]) if found else float("nan")

    def firing(self) -> set[str]:
        alerts = self.ask("alerts").get("alerts", [])
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def wait_until(what: Any, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.2)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_prometheus_sees_a_run_and_its_death(tmp_path: Path, train_data: str):
    prometheus = Prometheus(tmp_path)
    knobs = [f"run.uri={tmp_path}/night", f"data.uri={train_data}", "run.processes=2", "run.steps=100000"]
    knobs += ["telemetry.prometheus.port=0", f"telemetry.prometheus.targets={tmp_path}/targets"]
    knobs += ["telemetry.peak_tflops=0.01", "telemetry.norms_every=2"]
    argv = [sys.executable, "-m", "system.cli", "train", str(write_recipe(tmp_path)), *knobs]
    with (tmp_path / "log").open("wb") as log:
        trainer = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: prometheus.value('maskclip_checkpoints_total{run="night"}') >= 1, trainer)
        names = set(prometheus.ask("label/__name__/values"))
        assert {m.exported for m in METRICS if m.name not in NOT_HERE} - names == set()
        assert prometheus.value("maskclip_processes") == 2
        assert prometheus.value("maskclip_step") >= 4
        assert prometheus.firing() == set()
        os.killpg(trainer.pid, signal.SIGKILL)
        wait_until(lambda: prometheus.firing() == {"MaskclipTrainerDown"}, prometheus.process)
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait()
        prometheus.process.terminate()
        prometheus.process.wait()


def test_sinks_that_fail_leave_the_run_alone(
    tmp_path: Path, train_data: str, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "")
    (tmp_path / "file").write_text("no folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        knobs = [f"telemetry.prometheus.port={taken.getsockname()[1]}", "telemetry.wandb.mode=online"]
        knobs += [f"telemetry.wandb.folder={tmp_path}", f"telemetry.tensorboard.folder={tmp_path}/file"]
        knobs += ["telemetry.otel.endpoint=http://127.0.0.1:9", "telemetry.otel.every_seconds=0.01"]
        knobs += ["telemetry.otel.timeout_seconds=0.1"]
        run = f"{tmp_path}/run"
        words = ("train", write_recipe(tmp_path), f"run.uri={run}", f"data.uri={train_data}", *knobs)
        done = maskclip(*words, "run.steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    events = read_events(open_store(run))
    failed = [event["sink"] for event in events if event["name"] == "sink_failed"]
    assert sorted(failed) == ["otel", "prometheus", "tensorboard", "wandb"]
    for sink in failed:
        assert done.stderr.count(f"{sink} fails, training goes on") == 1
    lost = {event["sink"]: event["count"] for event in events if event["name"] == "sink_dropped"}
    assert lost.keys() == set(failed)
    assert lost["prometheus"] >= 8
    steps = [event for event in events if event["name"] == "step"]
    assert len(steps) == 8
    assert steps[-1]["telemetry_dropped"] > 0
