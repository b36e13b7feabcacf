"""What watches a training run from inside: its sinks, and the values that a step does not give itself."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from cluster.events import EventLog
from cluster.store_base import TOTALS
from cluster.world import World
from data_pipeline.loading.loader import Loader
from system.config import TrainConfig
from system.sinks.feed import Feed
from system.sinks.open import open_sinks, wanted_sinks
from system.telemetry.machine import MachineSampler
from system.telemetry.recorder import Source


@contextmanager
def open_telemetry(config: TrainConfig, world: World, events: EventLog) -> Iterator[Sequence[Feed]]:
    """The sinks of the first rank; none on the others.

    Raises:
        ConfigError: on every rank, when one is asked for whose package is not installed.
    """
    wanted = wanted_sinks(config.telemetry, config.run.uri)
    if world.rank != 0:
        yield ()
        return
    with open_sinks(wanted, config.telemetry.queue, events) as feeds:
        yield feeds


@contextmanager
def step_sources(
    config: TrainConfig, loader: Loader, events: EventLog, feeds: Sequence[Feed]
) -> Iterator[tuple[Source, ...]]:
    """What the registry knows of data, store, machine and telemetry itself."""
    batch, samples = config.data.global_batch, loader.num_samples
    with closing(MachineSampler(_local_folders(config))) as machine:
        yield (
            lambda step: {"epoch": step * batch / samples},
            lambda step: _cache_totals(loader),
            lambda step: _store_totals(),
            lambda step: {"telemetry_dropped": events.dropped + sum(feed.dropped for feed in feeds)},
            lambda step: machine.values,
        )


def _cache_totals(loader: Loader) -> dict[str, float]:
    counters = loader.counters
    return {
        "cache_hits": counters.hits,
        "cache_misses": counters.misses,
        "cache_copied_bytes": counters.bytes_copied,
        "cache_evictions": counters.evictions,
    }


def _store_totals() -> dict[str, float]:
    return {
        "store_requests": TOTALS.requests,
        "store_retries": TOTALS.retries,
        "store_errors": TOTALS.errors,
        "store_request_seconds": TOTALS.seconds,
    }


def _local_folders(config: TrainConfig) -> list[str]:
    """Where this run writes on disks of its own machine."""
    own = (config.run.uri, config.data.loader.cache, config.checkpoint.local, config.telemetry.spool)
    local = [uri.removeprefix("file://") for uri in own if uri and not uri.startswith("s3://")]
    return [tempfile.gettempdir(), *local]
