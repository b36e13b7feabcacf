"""Evaluation in training: every rank encodes a share, the first one scores, the others train on.

Shapes: n rows of this rank, N of all, F values of one.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import ConfigError, MaskClipError
from cluster.events import EventLog
from system.config import TrainConfig
from system.console import Console
from system.engine.engine import Engine
from system.engine.teacher_state import ShardedTeacher
from system.evaluation.config import TRAINING_TASKS
from system.evaluation.encoder import Encoder, Report, Share, no_report
from system.evaluation.tasks import FeatureEvaluation, Features
from system.evaluation.view import headline


class TrainingEvaluation:
    """Call it after every applied step; it does something when `evaluation.every_steps` says so.

    An evaluation that fails (an image that cannot be read, features that are not finite) is an
    `evaluation_failed` event and a warning: it never stops the training. What is wrong with the settings or
    the data as a whole is raised here, before the first step.

    Raises:
        ConfigError: the settings do not fit the data or the model.
        DataError: as `FeatureEvaluation`.
    """

    def __init__(
        self, config: TrainConfig, engine: Engine, teacher: ShardedTeacher, events: EventLog, console: Console
    ) -> None:
        self._settings, self._last_step = config.evaluation, config.run.steps
        self._engine, self._events, self._console = engine, events, console
        self._evaluation: FeatureEvaluation | None = None
        if not self._settings.data:
            return
        self._evaluation = FeatureEvaluation(self._settings, self._settings.tasks, TRAINING_TASKS)
        vision = engine.objective.vision
        if self._settings.tower == "teacher":
            if teacher.module is None:
                raise ConfigError("this model has no teacher; change evaluation.tower")
            vision = teacher.module.vision
        share = Share(dist.get_rank(), dist.get_world_size())
        self._encoder = Encoder(engine.objective, vision, engine.device, self._settings.batch, share)

    def __call__(self, step: int) -> None:
        """Evaluate the weights after `step`, if it is time. All ranks call it."""
        due = step % self._settings.every_steps == 0 or step == self._last_step
        if self._evaluation is None or not due:
            return
        started = time.monotonic()
        features, failure = self._features(self._evaluation)
        if dist.get_rank() != 0:
            return
        try:
            if failure is not None:
                raise failure
            result = self._evaluation.score(features, self._encoder.model.config.embed_dim)
        except MaskClipError as error:
            lost = time.monotonic() - started
            self._events.instant("evaluation_failed", step=step, seconds=lost, reason=str(error))
            self._console.warn(f"evaluation at step {step} failed, training goes on: {error}")
            return
        self._report(step, result, time.monotonic() - started)

    def _features(self, evaluation: FeatureEvaluation) -> tuple[Features, MaskClipError | None]:
        """On rank 0 the features of the whole sets; or why a rank could not make its share."""
        part: Features = {}
        failure: MaskClipError | None = None
        try:
            with self._engine.whole_parameters():  # the ranks' shares may differ by a batch
                part = evaluation.encode(self._encoder, _silent)
        except MaskClipError as error:
            failure = error
        failures: list[MaskClipError | None] = [None] * self._encoder.share.size
        dist.all_gather_object(failures, failure)
        first = next((found for found in failures if found is not None), None)
        if first is not None:
            return {}, first
        counts = evaluation.counts()
        return {name: self._gather(rows, *counts[name]) for name, rows in part.items()}, None

    def _gather(self, rows_nF: torch.Tensor, total: int, batch: int) -> torch.Tensor:
        """[N, F] on rank 0, nothing elsewhere. Who has how many rows follows from `Share`."""
        ranks = self._encoder.share.size
        if ranks == 1:
            return rows_nF
        lengths = [len(Share(rank, ranks).part(total, batch)) for rank in range(ranks)]
        padded = rows_nF.new_zeros(max(lengths), rows_nF.shape[1])
        padded[: len(rows_nF)] = rows_nF
        received = [torch.empty_like(padded) for _ in lengths] if dist.get_rank() == 0 else None
        dist.gather(padded, received, dst=0)
        if received is None:
            return rows_nF[:0]
        return torch.cat([rows[:length] for rows, length in zip(received, lengths, strict=True)])

    def _report(self, step: int, scores: dict[str, Any], seconds: float) -> None:
        evaluation, settings = self._evaluation, self._settings
        assert evaluation is not None
        images = evaluation.images
        result = {
            "step": step,
            "tower": settings.tower,
            "data": {"uri": images.uri, "digest": images.digest, "samples": images.num_images},
            "seconds": seconds,
            **scores,
        }
        facts = headline(result)
        self._events.instant("evaluation", **facts)
        numbers = [
            f"{name} {facts[name]:.2%}" for name in ("image_to_text_r5", "top1", "knn_top1") if name in facts
        ]
        self._console.say(f"evaluated step {step} in {seconds:.1f} s: {', '.join(numbers)}")


def _silent(stage: str) -> Report:
    return no_report
