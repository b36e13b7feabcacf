"""One process of a training job, from its configuration to its end."""

from contextlib import closing

from cluster.errors import exit_code_of
from cluster.store import open_store
from cluster.world import World
from system.agreement import peer_lost
from system.build import build_trainer, open_event_log, process_group
from system.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Train to the end, from the newest checkpoint if there is one. Every rank calls this; rank comes from
    the environment.

    Raises:
        MaskClipError: see `Trainer.fit`; also wrong configuration, data set or checkpoint.
    """
    world = World.from_env()
    with process_group(world):
        run = open_store(config.run.uri, config.store)
        with open_event_log(run, world, config.run.event_seconds) as events:
            reason, code = "finished", 0
            try:
                with build_trainer(config, world, run, events) as (trainer, loader):
                    resumed = trainer.resume()
                    events.instant(
                        "attempt_started",
                        processes=world.size,
                        zero_stage=config.engine.zero_stage,
                        precision=config.engine.precision,
                        resumed_step=resumed,
                    )
                    with closing(loader.batches(trainer.steps_done, config.run.steps)) as batches:
                        trainer.fit(batches)
            except BaseException as error:
                known = peer_lost(error) or error
                reason, code = f"{type(known).__name__}: {known}", exit_code_of(known)
                if known is not error:
                    raise known from error
                raise
            finally:
                events.instant("attempt_ended", reason=reason, exit_code=code)
