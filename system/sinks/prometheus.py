"""The newest values of a run for Prometheus, over HTTP."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from system.sinks.feed import Event
from system.telemetry.metrics import METRICS, PREFIX, Metric, by_event

BUCKETS = tuple(0.01 * 2**power for power in range(16))
"""Upper bounds of the step times' histogram: 10 ms to 5 min, seconds."""


@dataclass(frozen=True, kw_only=True)
class PrometheusConfig:
    """Where Prometheus finds the first rank."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Serve /metrics there; 0 takes a free one, null serves nothing."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for a Prometheus on another machine. Whoever reaches it can read the
    numbers of the run, and nothing else."""
    targets: str = ""
    """Folder for Prometheus' file_sd: RUN.json there names this process. A run that finishes takes its file
    away; one that fails or is killed leaves it, so that alerts can tell the two apart. Empty: none."""
    address: str = ""
    """Host name that `targets` names; empty: `host`."""


class PrometheusSink:
    """Serves the registry's metrics; each has the label `run`.

    Raises OSError when the port is taken.
    """

    def __init__(self, config: PrometheusConfig, run: str) -> None:
        import prometheus_client as client

        # Counters are there from the start: Prometheus sees no increase in what begins at 1.
        self._values = {_key(metric): 0.0 for metric in METRICS if metric.kind == "counter"}
        self._lock = threading.Lock()
        self._run = run
        registry = client.CollectorRegistry()
        self._step_times = client.Histogram(
            f"{PREFIX}step_time_seconds",
            "Forward to teacher update",
            ["run"],
            registry=registry,
            buckets=BUCKETS,
        ).labels(run)
        registry.register(self)  # type: ignore[arg-type]  # `collect` is all that it asks for
        self._server, _ = client.start_http_server(config.port or 0, config.host, registry)
        self.port = self._server.server_port
        self._target = _announce(config, run, self.port) if config.targets else None
        self._metrics = by_event()
        self._finished = False

    def take(self, event: Event) -> None:
        with self._lock:
            self._set("attempt", event["attempt"])
            for metric in self._metrics.get(event["name"], ()):
                value = metric.value(event)
                if value is not None:
                    key = _key(metric)
                    before = self._values[key] if metric.kind == "counter" else 0.0
                    self._values[key] = before + value
            if event["name"] == "step":
                self._set("step_timestamp_seconds", event["t"])
                self._step_times.observe(event["step_seconds"])
        self._finished |= event["name"] == "attempt_ended" and event["exit_code"] == 0

    def _set(self, name: str, value: float) -> None:
        self._values[f"{PREFIX}{name}", ""] = float(value)

    def collect(self) -> Iterator:
        """What prometheus_client asks of a collector."""
        with self._lock:
            values = dict(self._values)
        families = {}
        for metric in METRICS:
            value = values.get(_key(metric))
            if value is not None:
                family = families.setdefault(metric.exported, self._family(metric))
                labels = [self._run, metric.label[1]] if metric.label else [self._run]
                family.add_metric(labels, value)
        yield from families.values()

    def _family(self, metric: Metric):
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
        labels = ["run", metric.label[0]] if metric.label else ["run"]
        meaning = "seconds of rank 0 by class" if metric.label else metric.meaning
        return kind(metric.exported, meaning, labels=labels)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._target is not None and self._finished:
            self._target.unlink(missing_ok=True)


def _key(metric: Metric) -> tuple[str, str]:
    """Name, and value of the label if it has one."""
    return metric.exported, metric.label[1] if metric.label else ""


def _announce(config: PrometheusConfig, run: str, port: int) -> Path:
    target = Path(config.targets, f"{run}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".json.tmp")
    place = f"{config.address or config.host}:{port}"
    temporary.write_text(json.dumps([{"targets": [place], "labels": {"run": run}}]))
    temporary.replace(target)
    return target
