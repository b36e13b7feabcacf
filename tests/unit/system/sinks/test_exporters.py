"""What Prometheus scrapes and what an OpenTelemetry collector gets."""

import json
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from system.sinks.otel import OtelConfig, OtelSink
from system.sinks.prometheus import PrometheusConfig, PrometheusSink

HEADER = {"t": 1000.0, "attempt": 3, "rank": 0, "kind": "instant"}
STEP = {**HEADER, "name": "step", "step": 7, "loss": 2.5, "step_seconds": 0.3, "data_seconds": 0.1}
STEP |= {"ids_digest": "0a", "store_errors": 4}
EVENTS = (
    {**HEADER, "name": "attempt_started", "processes": 2, "resumed_step": None},
    STEP,
    STEP | {"step": 8, "loss": 2.0},
    {**HEADER, "name": "step_refused", "step": 8, "reason": "non-finite loss"},
    {**HEADER, "name": "checkpoint_committed", "step": 8, "seconds": 1.5, "bytes": 10, "stall_seconds": 0.2},
)


def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name, class) -> value, of this run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"night"}
    return {(sample.name, sample.labels.get("class", "")): sample.value for sample in samples}


def test_a_scrape_has_the_newest_values():
    sink = PrometheusSink(PrometheusConfig(port=0), "night")
    try:
        for event in EVENTS:
            sink.take(event)
        found = scrape(sink.port)
    finally:
        sink.close()
    assert found["maskclip_loss", ""] == 2.0
    assert found["maskclip_step", ""] == 8
    assert found["maskclip_attempt", ""] == 3
    assert found["maskclip_steps_total", ""] == 2
    assert found["maskclip_steps_refused_total", ""] == 1
    assert found["maskclip_store_errors_total", ""] == 4  # a sum already, not to be added up
    assert found["maskclip_checkpoint_bytes", ""] == 10
    assert found["maskclip_time_seconds_total", "productive"] == pytest.approx(0.6)
    assert found["maskclip_time_seconds_total", "data_wait"] == pytest.approx(0.2)
    assert found["maskclip_step_time_seconds_count", ""] == 2
    assert not any("ids_digest" in name for name, _ in found)


@pytest.mark.parametrize(("code", "stays"), [(0, False), (75, True), (None, True)])
def test_only_a_finished_run_takes_its_target_away(tmp_path: Path, code: int | None, stays: bool):
    sink = PrometheusSink(PrometheusConfig(port=0, targets=str(tmp_path)), "night")
    target = tmp_path / "night.json"
    expected = [{"targets": [f"127.0.0.1:{sink.port}"], "labels": {"run": "night"}}]
    assert json.loads(target.read_text()) == expected
    if code is not None:
        sink.take({**HEADER, "name": "attempt_ended", "exit_code": code, "reason": ""})
    sink.close()
    assert target.exists() == stays


def test_a_taken_port_is_an_error_of_the_sink():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            PrometheusSink(PrometheusConfig(port=taken.getsockname()[1]), "night")


def test_a_collector_gets_the_same_values():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/metrics"
        sink = OtelSink(OtelConfig(endpoint=endpoint), "night")
        for event in EVENTS:
            sink.take(event)
        sink.close()
    finally:
        server.shutdown()
        server.server_close()
    request = vars(metrics_service_pb2)["ExportMetricsServiceRequest"]()
    request.ParseFromString(_plain(bodies[-1]))
    values = {
        metric.name: [
            point.as_double or point.as_int for point in (*metric.gauge.data_points, *metric.sum.data_points)
        ]
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert values["maskclip_loss"] == [2.0]
    assert values["maskclip_steps_total"] == [2.0]
    assert values["maskclip_store_errors_total"] == [4.0]
    assert sorted(values["maskclip_time_seconds_total"]) == pytest.approx([0.2, 0.2, 0.6])


def test_a_collector_that_is_away_is_an_error_of_the_sink():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    config = OtelConfig(endpoint="http://127.0.0.1:9/v1/metrics", timeout_seconds=1.0)
    sink = OtelSink(config, "night")
    sink.take(STEP)
    with pytest.raises(OSError, match="did not take"):
        sink.close()


def _plain(body: bytes) -> bytes:
    import gzip

    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
