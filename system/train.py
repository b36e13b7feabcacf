"""One process of a training job, from its configuration to its end."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial

from cluster.errors import exit_code_of
from cluster.events import EventLog
from cluster.stop import StopRequest
from cluster.store import open_store
from cluster.watchdog import Watchdog
from cluster.world import World
from data_pipeline.loading.loader import BadSample
from system.agreement import lost_peers_named, on_rank_zero, same_on_all_ranks, stop_if_asked
from system.build import build_trainer, open_event_log, process_group
from system.config import TrainConfig, digest, to_dict
from system.health.skips import recorded
from system.observe import open_telemetry


def train(config: TrainConfig) -> None:
    """Train to the end, from the newest checkpoint if there is one. Every rank calls this; rank comes from
    the environment.

    Raises:
        MaskClipError: see `Trainer.fit`; also wrong configuration, data set or checkpoint.
    """
    world = World.from_env()
    with process_group(world), StopRequest() as stop, lost_peers_named(stop):
        same_on_all_ranks("configuration", digest(to_dict(config)))
        stop_if_asked(stop)
        run = open_store(config.run.uri, config.store)
        with (
            open_event_log(run, world, config.run.event_seconds, config.telemetry) as events,
            open_telemetry(config, world, events) as feeds,
            end_logged(events),
            lost_peers_named(stop),
            Watchdog(config.watchdog, run, world, events) as watchdog,
            build_trainer(config, world, run, events, watchdog, stop, feeds) as (trainer, loader),
        ):
            resumed = trainer.resume(on_rank_zero(lambda: recorded(run)))
            stop_if_asked(stop)
            events.instant(
                "attempt_started",
                processes=world.size,
                zero_stage=config.engine.zero_stage,
                precision=config.engine.precision,
                resumed_step=resumed,
                skipped_windows=trainer.skipped,
                dataset_samples=loader.num_samples,
                dataset_shards=loader.num_shards,
                dataset_rejects=loader.num_rejects,
            )
            if world.rank == 0:
                events.instant("attempt_config", config=to_dict(config))
            steps, quarantined = (trainer.steps_done, config.run.steps), partial(_tell_bad_sample, events)
            with closing(loader.batches(*steps, trainer.skipped, quarantined)) as batches:
                trainer.fit(batches)


def _tell_bad_sample(events: EventLog, bad: BadSample) -> None:
    events.instant("sample_quarantined", **asdict(bad))


@contextmanager
def end_logged(events: EventLog) -> Iterator[None]:
    """Whatever ends the attempt stands in the log."""
    reason, code = "finished", 0
    try:
        yield
    except BaseException as error:
        reason, code = f"{type(error).__name__}: {error}", exit_code_of(error)
        raise
    finally:
        events.instant("attempt_ended", reason=reason, exit_code=code)
