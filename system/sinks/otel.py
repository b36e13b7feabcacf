"""The newest values of a run for an OpenTelemetry collector, over OTLP and HTTP."""

import logging
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from system.sinks.feed import Event
from system.telemetry.metrics import Metric, by_event


@dataclass(frozen=True, kw_only=True)
class OtelConfig:
    """OpenTelemetry metrics; needs the extra `otel`."""

    endpoint: str = ""
    """Such as http://collector:4318/v1/metrics; empty: none are sent."""
    every_seconds: Annotated[float, Field(gt=0)] = 15.0
    """Values are sent this often."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Longest time of one attempt to send."""


class OtelSink:
    """Gauges and counters with the names of the Prometheus exporter; the resource names the run."""

    def __init__(self, config: OtelConfig, run: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.resources import Resource

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # our feed says it, once
        self._every, self._timeout = config.every_seconds, config.timeout_seconds
        self._exporter = OTLPMetricExporter(config.endpoint, timeout=config.timeout_seconds)
        # A reader that sends nothing by itself: whether a send has failed is for the feed to know.
        self._reader = InMemoryMetricReader()
        resource = Resource.create({"service.name": "maskclip", "maskclip.run": run})
        self._meter = MeterProvider([self._reader], resource).get_meter("maskclip")
        self._instruments: dict[str, Any] = {}
        self._totals: dict[str, float] = {}
        self._metrics = by_event()
        self._sent = time.monotonic()

    def take(self, event: Event) -> None:
        for metric in self._metrics.get(event["name"], ()):
            value = metric.value(event)
            if value is not None:
                self._record(metric, value)
        if time.monotonic() - self._sent > self._every:
            self._send()

    def _record(self, metric: Metric, value: float) -> None:
        name = metric.exported
        if name not in self._instruments:
            create = self._meter.create_gauge if metric.kind == "gauge" else self._meter.create_counter
            self._instruments[name] = create(name, unit=metric.unit or "1", description=metric.meaning)
        labels = dict([metric.label]) if metric.label else {}
        if metric.kind == "gauge":
            self._instruments[name].set(value, labels)
            return
        before = self._totals.get(name, 0.0) if metric.kind == "total" else 0.0
        self._totals[name] = value
        self._instruments[name].add(max(0.0, value - before), labels)

    def _send(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        self._sent = time.monotonic()
        data = self._reader.get_metrics_data()
        if data is None:
            return
        if self._exporter.export(data, 1000 * self._timeout) is not MetricExportResult.SUCCESS:
            raise OSError("the collector did not take the metrics")

    def close(self) -> None:
        self._send()
        self._exporter.shutdown()
