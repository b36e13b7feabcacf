"""Open a set of images to evaluate on, whatever its layout; see `data.py` for the layouts.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.errors import ConfigError, DataError
from cluster.manifest import MANIFEST
from cluster.store import ObjectStore, open_store
from system.choices import Layout
from system.evaluation.data import CLASS_NAMES, SEGMENTATION_CLASSES, EvalSet, SetAddress, is_image
from system.evaluation.dataset import open_dataset
from system.evaluation.files import open_folder, open_webdataset


def detect_layout(store: ObjectStore) -> Layout:
    """The layout that the files of `store` have; ConfigError when they have none of them."""
    if store.exists(MANIFEST):
        return "dataset"
    if store.exists(SEGMENTATION_CLASSES):
        return "segmentation"
    names = [info.key for info in store.list("")]
    if CLASS_NAMES in names or any(name.endswith(".tar") for name in names):
        return "webdataset"
    if any(is_image(name) and "/" in name for name in names):
        return "folder"
    # Most often a mistyped address of a data set, so the error is the one of a data set that is not there.
    return "dataset"


def open_set(
    address: SetAddress, class_names: Sequence[str] | None = None, class_source: str = ""
) -> EvalSet:
    """Open the set at `address`; images are read later.

    Args:
        class_names: names to use instead of the set's own: for a data set the classes themselves; for the
            other layouts the names of the classes in their order, as many as there are.
        class_source: where these names come from.

    Raises:
        ObjectNotFound: there is nothing at the address.
        ConfigError: the layout and the settings do not fit each other.
        DataError: no images, no classes, or files that are not what the layout says.
    """
    store = open_store(address.uri)
    layout = detect_layout(store) if address.layout == "auto" else address.layout
    if layout == "segmentation":
        raise ConfigError(
            f"{address.uri}: a folder of images and masks has no captions and no classes per image; "
            "leave this address to data=... with tasks=[segmentation]"
        )
    if layout == "dataset":
        return open_dataset(address, class_names, class_source)
    found = open_folder(store) if layout == "folder" else open_webdataset(store, address.split)
    if class_names is None:
        return found
    if found.class_names and len(class_names) != len(found.class_names):
        raise ConfigError(
            f"{address.uri}: has {len(found.class_names)} classes, but {class_source} names "
            f"{len(class_names)}; correct class_names"
        )
    return replace(found, class_names=tuple(class_names), class_source=class_source)


def require_images_of_classes(images: EvalSet) -> None:
    """Raise DataError where a class has no image: the mean over classes would not be that of the list."""
    counts_C = np.bincount(images.label_N[images.label_N >= 0], minlength=len(images.class_names))
    empty = [name for name, count in zip(images.class_names, counts_C, strict=True) if count == 0]
    if empty and len(empty) < len(images.class_names):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise DataError(
            f"{images.uri}: no image of the class {', '.join(map(repr, empty[:3]))}{more} "
            f"({images.class_source}); remove such classes or give empty_classes=allow"
        )
