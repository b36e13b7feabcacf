"""One rank that evaluates a fresh model as the trainer would: ``RUN DATA TRAIN [BROKEN_RANK]``.

At BROKEN_RANK reading an image fails. The events of the run say what came out.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.errors import DataError
from cluster.store import open_store
from cluster.world import World
from system.build import build_engine, open_event_log, process_group
from system.console import Console
from system.evaluation.config import EvaluationConfig
from system.evaluation.tasks import FeatureEvaluation
from system.evaluation.training import TrainingEvaluation
from tests.support.engine_worker import worker_config


def broken(positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    raise DataError(f"image {positions[0]} is broken for the test")
    yield


def main(run_uri: str, data: str, train: str, broken_rank: str = "") -> None:
    world, run = World.from_env(), open_store(run_uri)
    settings = EvaluationConfig(data=data, train=train, every_steps=5, batch=8)
    config = replace(worker_config(run_uri, 7, {"zero_stage": 3}), evaluation=settings)
    with process_group(world), open_event_log(run, world, 1.0) as events:
        engine, teacher = build_engine(config, world)
        with Console(7, active=False) as console:
            evaluate = TrainingEvaluation(config, engine, teacher, events, console)
            if broken_rank and world.rank == int(broken_rank):
                found = evaluate._evaluation
                assert isinstance(found, FeatureEvaluation)
                found.images = replace(found.images, files=broken)
            for step in range(1, config.run.steps + 1):
                evaluate(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
