"""The sinks that a configuration asks for, fed from the event log of the first rank."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from cluster.errors import ConfigError
from cluster.events import EventLog
from system.sinks.config import TelemetryConfig
from system.sinks.feed import Feed, Sink
from system.sinks.otel import OtelSink
from system.sinks.prometheus import PrometheusSink
from system.sinks.tensorboard import TensorBoardSink
from system.sinks.wandb import WandbSink

_log = logging.getLogger(__name__)
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "otel": "opentelemetry.exporter.otlp.proto.http"}


def run_name(uri: str) -> str:
    """What a run is called where its address would be too long: its last part."""
    return uri.rstrip("/").rpartition("/")[2]


def wanted_sinks(config: TelemetryConfig, run_uri: str) -> dict[str, Callable[[], Sink]]:
    """Name -> what makes it.

    Raises:
        ConfigError: the package of one of them is not installed.
    """
    run = run_name(run_uri)
    wanted: dict[str, Callable[[], Sink]] = {}
    if config.prometheus.port is not None:
        wanted["prometheus"] = lambda: PrometheusSink(config.prometheus, run)
    if config.tensorboard.folder:
        wanted["tensorboard"] = lambda: TensorBoardSink(config.tensorboard)
    if config.wandb.mode != "off":
        wanted["wandb"] = lambda: WandbSink(config.wandb, run)
    if config.otel.endpoint:
        wanted["otel"] = lambda: OtelSink(config.otel, run)
    for name in wanted:
        if name in _PACKAGES and not _installed(_PACKAGES[name]):
            raise ConfigError(
                f"telemetry.{name} is set, its package is not installed; run pip install 'maskclip[{name}]'"
            )
    return wanted


@contextmanager
def open_sinks(
    wanted: dict[str, Callable[[], Sink]], queue: int, events: EventLog
) -> Iterator[Sequence[Feed]]:
    """Feed them from `events` until the block ends. What goes wrong in one of them is an event
    `sink_failed`; what it has lost in the end, `sink_dropped`."""

    def trouble(name: str, reason: str) -> None:
        # Not by way of the console, which opens after the sinks and may miss it.
        _log.warning("%s fails, training goes on without it: %s", name, reason)
        events.instant("sink_failed", sink=name, reason=reason)

    feeds = [Feed(name, make, queue, trouble) for name, make in wanted.items()]
    for feed in feeds:
        events.subscribe(feed.offer)
    try:
        yield feeds
    finally:
        for feed in feeds:
            feed.close()
        for feed in feeds:
            if feed.dropped:
                events.instant("sink_dropped", sink=feed.name, count=feed.dropped)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of it
        return False
