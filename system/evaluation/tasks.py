"""The tasks that need one feature per image or text: what to encode, and the scores of what was encoded.

The same for an evaluation of a checkpoint and for one in training, where every rank encodes a share and the
first one scores.

Shapes: N images, M training images, U distinct texts, C classes, E shared space, D width of the image tower.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cluster.errors import ConfigError, DataError
from cluster.store import open_store
from system.choices import Task
from system.evaluation.config import FEATURE_TASKS, MeasureConfig
from system.evaluation.data import EvalSet, SetAddress
from system.evaluation.encoder import Encoder, Report
from system.evaluation.knn import evaluate_knn
from system.evaluation.linear_probe import evaluate_linear_probe, require_two_images
from system.evaluation.open import detect_layout, open_set, require_images_of_classes
from system.evaluation.retrieval import CaptionGroups, evaluate_retrieval
from system.evaluation.zero_shot import class_embeddings, evaluate_zero_shot, read_lines, read_templates

Features = dict[str, torch.Tensor]
"""images [N, E + D] (embedding and class token), texts [U, E], classes [C, E], train [M, E + D]: those that
the tasks need."""
Stages = Callable[[str], Report]
"""From the name of a stage to who hears of its progress."""


def address(config: MeasureConfig) -> SetAddress:
    """The set that `config` is about."""
    return SetAddress(
        uri=config.data,
        layout=config.layout,
        split=config.split,
        label=config.label,
        same_image=config.same_image,
    )


class FeatureEvaluation:
    """Sets, texts and classes of one configuration, ready for any number of models.

    Raises:
        ConfigError: the tasks and the data do not fit each other, or a text file is wrong.
        DataError: an empty set, an empty list of classes, or a class without images.
    """

    def __init__(
        self,
        config: MeasureConfig,
        tasks: Sequence[Task] = (),
        allowed: Sequence[Task] = FEATURE_TASKS,
    ) -> None:
        """
        Args:
            tasks: those of `config` that are asked for here; empty: those of `allowed` that the data allow.
        """
        self.config = config
        names = read_lines(config.class_names, "class_names") if config.class_names else None
        self.images = open_set(address(config), names, config.class_names or "")
        self.tasks = self._chosen(tasks, allowed)
        self.groups = CaptionGroups.of(self.images.captions if "retrieval" in self.tasks else ())
        self.templates: tuple[str, ...] = ()
        if "zero_shot" in self.tasks:
            given = self.images.templates if config.templates is None else None
            self.templates = given or read_templates(config.templates)
        if set(self.tasks) - {"retrieval"} and config.empty_classes == "error":
            require_images_of_classes(self.images)
        self.train: EvalSet | None = None
        if {"knn", "linear_probe"} & set(self.tasks):
            self._open_train()

    def _chosen(self, asked: Sequence[Task], allowed: Sequence[Task]) -> tuple[Task, ...]:
        config, images = self.config, self.images
        possible: dict[Task, bool] = {
            "retrieval": bool(images.captions),
            "zero_shot": bool(images.class_names),
            "knn": config.train is not None and bool(images.class_names),
            "linear_probe": config.train is not None and bool(images.class_names),
        }
        for task in asked:
            if not possible.get(task, False):
                lacking = "captions" if task == "retrieval" else "classes"
                raise ConfigError(f"{config.data}: has no {lacking} for {task}; change data or tasks")
        wanted = asked or [task for task in allowed if possible[task]]
        chosen: tuple[Task, ...] = tuple(task for task in FEATURE_TASKS if task in wanted)
        if not chosen:
            raise DataError(f"{config.data}: neither captions nor classes in it; correct data or split")
        return chosen

    def _open_train(self) -> None:
        """The training split with the numbers of the classes of the test split."""
        config = self.config
        assert config.train is not None  # the tasks say so
        layout = config.layout if config.layout != "auto" else detect_layout(open_store(config.train))
        place = SetAddress(uri=config.train, layout=layout, split=config.train_split, label=config.label)
        of_test = (self.images.class_names, self.images.class_source)
        train = open_set(place, *of_test) if layout == "dataset" else open_set(place)
        if layout == "dataset":
            self.train_label_M = train.label_N
        elif config.class_names and len(train.class_names) == len(self.images.class_names):
            self.train_label_M = train.label_N  # the names are new ones for the same order
        else:
            number = {name: k for k, name in enumerate(self.images.class_names)}
            lookup = np.array([*(number.get(name, -1) for name in train.class_names), -1])
            self.train_label_M = lookup[train.label_N]
        absent = np.setdiff1d(np.unique(self.images.label_N), [*self.train_label_M, -1])
        if len(absent):
            raise DataError(
                f"{config.train}: no training image of the class "
                f"{self.images.class_names[int(absent[0])]!r}; correct train, train_split or label"
            )
        if "linear_probe" in self.tasks:
            require_two_images(torch.from_numpy(self.train_label_M))
        self.train = train

    def counts(self) -> dict[str, tuple[int, int]]:
        """What there is to encode: rows of each feature in all, and how many make one batch of a rank."""
        batch, config = self.config.batch, self.config
        found = {"images": (self.images.num_images, batch)}
        if "retrieval" in self.tasks:
            found["texts"] = (len(self.groups.texts), batch)
        if "zero_shot" in self.tasks:
            at_once = max(1, config.batch // len(self.templates))
            found["classes"] = (len(self.images.class_names), at_once)
        if self.train is not None:
            found["train"] = (self.train.num_images, batch)
        return found

    def encode(self, encoder: Encoder, stages: Stages) -> Features:
        """This rank's share of every feature; raises DataError for an image that cannot be read."""
        counts = self.counts()
        found = {"images": encoder.images(self.images, stages("images"))}
        if "texts" in counts:
            found["texts"] = encoder.texts(self.groups.texts, stages("texts"))
        if "classes" in counts:
            found["classes"] = self._classes(encoder, counts["classes"], stages("classes"))
        if self.train is not None:
            found["train"] = encoder.images(self.train, stages("train"))
        return found

    def _classes(self, encoder: Encoder, count: tuple[int, int], report: Report) -> torch.Tensor:
        part = encoder.share.part(*count)
        names, parts = self.images.class_names, []
        for start in range(part.start, part.stop, count[1]):
            some = names[start : min(start + count[1], part.stop)]
            parts.append(class_embeddings(some, self.templates, encoder.encode, encoder.batch))
            report(start + len(some) - part.start, len(part))
        empty = torch.zeros(0, encoder.model.config.embed_dim, device=encoder.device)
        return torch.cat(parts) if parts else empty

    @torch.no_grad()
    def score(self, features: Features, embed_dim: int) -> dict[str, Any]:
        """The result of every task, from the features of the whole sets; `embed_dim` is E.

        Raises NonFinite when a feature is nan or infinite.
        """
        return {task: self._score(task, features, embed_dim) for task in self.tasks}

    def _score(self, task: Task, features: Features, embed_dim: int) -> dict[str, Any]:
        images, config = self.images, self.config
        image_NE = features["images"][:, :embed_dim]
        if task == "retrieval":
            image_P = torch.from_numpy(images.image_P)
            return evaluate_retrieval(image_NE, features["texts"], self.groups, image_P, config.seed)
        label_N = torch.from_numpy(images.label_N)
        if task == "zero_shot":
            source, class_CE = images.class_source, features["classes"]
            scores = evaluate_zero_shot(image_NE, class_CE, label_N, source, config.seed)
            return scores | {"templates": len(self.templates)}
        columns = slice(embed_dim, None) if config.features == "tower" else slice(embed_dim)
        train_label_M, classes = torch.from_numpy(self.train_label_M), len(images.class_names)
        test_n, train_m = label_N >= 0, train_label_M >= 0
        test_ND = features["images"][test_n.to(image_NE.device), columns]
        train_MD = features["train"][train_m.to(image_NE.device), columns]
        data = (test_ND, label_N[test_n], train_MD, train_label_M[train_m], classes)
        if task == "knn":
            scores = evaluate_knn(*data, k=config.k, temperature=config.temperature, seed=config.seed)
        else:
            scores = evaluate_linear_probe(*data, seed=config.seed)
        return scores | {"features": config.features}
