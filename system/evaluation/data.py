"""Images to evaluate on, with their captions and classes, whatever layout they come in.

`open.py` opens them. Layouts: `dataset` is a committed data set of ours; `folder` has one folder of
images per class (torchvision's ImageFolder); `webdataset` is CLIP_benchmark's: tars of
`.jpg|.jpeg|.png|.webp` with `.cls` (class number) or `.txt` (a caption per line) in ROOT/<split>/,
ROOT/classnames.txt and, optionally, ROOT/zeroshot_classification_templates.txt.

Shapes: N images, P captions, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import torch

from cluster.errors import DataError
from cluster.store import ObjectStore
from data_pipeline.image.augment import eval_view
from data_pipeline.image.decode import UndecodableImage
from system.choices import Layout
from system.evaluation.zero_shot import parse_templates, read_lines

ReadFiles = Callable[[Sequence[int]], Iterator[tuple[str, bytes]]]

SEGMENTATION_CLASSES = "classes.txt"
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


@dataclass(frozen=True, kw_only=True)
class SetAddress:
    """Where a set lies and how its classes are read from it."""

    uri: str
    layout: Layout = "auto"
    split: str = "test"
    label: str = "caption"
    same_image: Literal["sha256", "key", "id"] = "sha256"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """N images in a fixed order, each with any number of captions and at most one class."""

    uri: str
    layout: Layout
    digest: str
    """Of the data set's manifest; of the other layouts, of the list of their files and sizes."""
    num_images: int
    files: ReadFiles
    """Positions of images -> their names and encoded files, in that order."""
    captions: tuple[str, ...] = ()
    image_P: np.ndarray
    """int64 [P]: the image of each caption."""
    class_names: tuple[str, ...] = ()
    class_source: str = ""
    """What the classes come from, for people."""
    label_N: np.ndarray
    """int64 [N]: class of each image, -1 where it has none."""
    templates: tuple[str, ...] | None = None
    """Prompts that come with the set."""

    def views(self, first: int, last: int, side: int, batch: int) -> Iterator[torch.Tensor]:
        """The centre squares of images first ... last - 1 in batches: uint8 [b, 3, side, side].

        Raises DataError for an image that cannot be decoded, and what reading raises.
        """
        images: list[np.ndarray] = []
        for name, data in self.files(range(first, last)):
            try:
                images.append(eval_view(data, side))
            except UndecodableImage as error:
                raise DataError(
                    f"{self.uri}: the image {name} cannot be decoded ({error}); remove or replace it"
                ) from error
            if len(images) == batch:
                yield _stack(images)
                images = []
        if images:
            yield _stack(images)


def _stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def listing_digest(files: Sequence[tuple[str, int]], *more: Any) -> str:
    """sha256 over names, sizes and whatever else decides what a set means."""
    return hashlib.sha256(json.dumps([sorted(files), *more]).encode()).hexdigest()


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def stored_lines(store: ObjectStore, name: str) -> list[str]:
    """Non-blank lines of a text file of a set; DataError when there are none."""
    return read_lines(f"{store.uri}/{name}", name, store.get(name))


def stored_templates(store: ObjectStore) -> tuple[str, ...] | None:
    if not store.exists(TEMPLATES):
        return None
    return parse_templates(stored_lines(store, TEMPLATES), f"{store.uri}/{TEMPLATES}")
