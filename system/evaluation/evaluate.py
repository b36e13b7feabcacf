"""Evaluation of a run's checkpoints: retrieval, zero-shot classification, k-NN, linear probe, patches.

Runs in one process, without DeepSpeed, in fp32. The result of a checkpoint is
RUN/evaluations/step-000000200-<data digest>[-<tasks>][-teacher].json, and an `evaluation` event with its
headline numbers; evaluating the same again replaces it. Shapes: N images, U texts, E shared space.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from cluster.errors import ConfigError
from cluster.events import EventLog
from cluster.store import ObjectStore, open_store
from system.checkpoints.checkpoint import committed_steps, newest_step, step_folder
from system.choices import Task
from system.evaluation.config import FEATURE_TASKS, EvaluateConfig
from system.evaluation.encoder import Encoder, Report, Share
from system.evaluation.examples import retrieval_examples
from system.evaluation.masked import evaluate_masked, load_distillation
from system.evaluation.open import detect_layout, open_set
from system.evaluation.patches import MaskedImages, evaluate_segmentation, open_masks
from system.evaluation.tasks import FeatureEvaluation, address
from system.evaluation.view import headline
from system.evaluation.zero_shot import class_embeddings, read_templates
from system.export.export import load_trained
from system.run_folder import load_run_config

VERSION = 2
# Evaluations belong to no attempt of the trainer: their events go under the number that claim_attempt never
# gives.
NO_ATTEMPT = 0

Progress = Callable[[dict[str, Any]], None]


def evaluate(run_uri: str, config: EvaluateConfig, progress: Progress | None = None) -> dict:
    """Evaluate one checkpoint, store the result in the run folder and return it (without the pictures).

    Args:
        progress: called with {"stage": "images" | "texts" | "classes" | ..., "done", "total"}.

    Raises:
        ObjectNotFound: no run, no checkpoint or no data there.
        DataError: the data or the list of classes are empty, or do not belong together.
        ConfigError: a setting does not fit the data, or a text file cannot be read.
        NonFinite: the model's embeddings are not finite.
    """
    (result,) = evaluations(run_uri, replace(config, every=False, steps=()), progress)
    return result


def evaluations(run_uri: str, config: EvaluateConfig, progress: Progress | None = None) -> Iterator[dict]:
    """As `evaluate`, for each of the checkpoints that `config` asks for, oldest first.

    Each result is stored when it is there, so what was done is kept when a later one fails.
    """
    run = open_store(run_uri)
    steps = _steps(run, config)
    work = _Work(config, progress)
    for step in steps:
        yield _store(run, *work.measure(run, step))


def _steps(run: ObjectStore, config: EvaluateConfig) -> list[int]:
    load_run_config(run)
    # What names a step that is not there is found before the first is evaluated, which can take an hour.
    if config.steps:
        return [newest_step(run, step) for step in sorted(set(config.steps))]
    newest = newest_step(run, config.checkpoint)
    return committed_steps(run) if config.every else [newest]


class _Work:
    """The data of a configuration, opened once, and what is measured with each checkpoint."""

    def __init__(self, config: EvaluateConfig, progress: Progress | None) -> None:
        self._config, self._progress = config, progress
        self._features: FeatureEvaluation | None = None
        self._masks: MaskedImages | None = None
        self.tasks: tuple[Task, ...] = ()
        store = open_store(config.data)
        layout = detect_layout(store) if config.layout == "auto" else config.layout
        if layout == "segmentation":
            wrong = set(config.tasks) - {"segmentation"}
            if wrong:
                raise ConfigError(
                    f"{config.data}: images with masks are for segmentation, not {min(wrong)}; change tasks"
                )
            self._masks = open_masks(config.data)
            self.tasks = ("segmentation",)
            self._origin = (store.uri, self._masks.digest, len(self._masks.pairs))
            return
        if "segmentation" in config.tasks:
            raise ConfigError(
                f"{config.data}: no images/, masks/ and classes.txt for segmentation; change data or tasks"
            )
        asked: tuple[Task, ...] = tuple(task for task in config.tasks if task in FEATURE_TASKS)
        if asked or not config.tasks:
            self._features = FeatureEvaluation(config, asked)
            self.tasks = self._features.tasks
        self._images = self._features.images if self._features is not None else open_set(address(config))
        if "masked" in config.tasks:
            self.tasks = (*self.tasks, "masked")
        self._origin = (self._images.uri, self._images.digest, self._images.num_images)

    def measure(self, run: ObjectStore, step: int) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The result with the checkpoint of `step`, examples to keep with it, and the name of its file."""
        started, config = time.monotonic(), self._config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trained = load_trained(run, step, config.tower)
        model = trained.model.to(device)
        encoder = Encoder(model, model.vision, device, config.batch, Share())
        uri, digest, number = self._origin
        result: dict[str, Any] = {
            "version": VERSION,
            "time": time.time(),
            **trained.provenance,
            "data": {"uri": uri, "digest": digest, "samples": number},
            "tasks": list(self.tasks),
        }
        extra: dict[str, Any] = {"examples": {}, "pictures": {}}
        if self._masks is not None:
            result["segmentation"] = self._segmentation(encoder, self._masks)
        if self._features is not None:
            extra |= self._measure_features(encoder, self._features, result)
        if "masked" in self.tasks:
            parts, report = load_distillation(run, step), self._stage("masked")
            result["masked"] = evaluate_masked(parts, self._images, device, config.batch, config.seed, report)
        result["seconds"] = time.monotonic() - started
        return result, extra, self._file(result)

    def _measure_features(
        self, encoder: Encoder, evaluation: FeatureEvaluation, result: dict[str, Any]
    ) -> dict[str, Any]:
        features = evaluation.encode(encoder, self._stage)
        embed_dim = encoder.model.config.embed_dim
        result |= evaluation.score(features, embed_dim)
        if "retrieval" not in evaluation.tasks:
            return {}
        image_NE, text_UE = features["images"][:, :embed_dim], features["texts"]
        return retrieval_examples(
            self._config.pictures, image_NE, text_UE, evaluation.groups, evaluation.images
        )

    def _segmentation(self, encoder: Encoder, masks: MaskedImages) -> dict[str, Any]:
        templates = read_templates(self._config.templates)
        class_CE = class_embeddings(masks.class_names, templates, encoder.encode, encoder.batch)
        config = self._config
        return evaluate_segmentation(
            encoder, masks, class_CE, config.dense, config.seed, self._stage("segmentation")
        )

    def _stage(self, name: str) -> Report:
        def report(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress({"stage": name, "done": done, "total": total})

        return report

    def _file(self, result: dict[str, Any]) -> str:
        tasks = f"-{'+'.join(self._config.tasks)}" if self._config.tasks else ""
        tower = "-teacher" if result["tower"] == "teacher" else ""
        return f"evaluations/{step_folder(result['step'])}-{result['data']['digest'][:8]}{tasks}{tower}.json"


def _store(run: ObjectStore, result: dict[str, Any], extra: dict[str, Any], file: str) -> dict:
    run.put(file, json.dumps({**result, **extra}).encode())
    # Every evaluation is a writer of its own, so that none writes over the events of another.
    taken = [
        int(match[1])
        for info in run.list(f"events/attempt-{NO_ATTEMPT:04d}/")
        if (match := re.search(r"rank-(\d+)/", info.key))
    ]
    events = EventLog(run, NO_ATTEMPT, max(taken, default=-1) + 1)
    events.instant("evaluation", **headline(result), file=file)
    events.close()
    return {**result, "file": f"{run.uri}/{file}"}
